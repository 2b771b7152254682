"""What Composer's own algorithms do not go with: part of the table of :mod:`.compatibility`; they declare nothing themselves."""

from __future__ import annotations

_PAIRS = (
    "it changes batches of an input and a target, and ours are dictionaries of tokens, pictures and views"
)
_LOW = {
    "precision=fp32": ("warning", "it acts under amp_bf16 and amp_fp16 alone"),
    "device=cpu": ("warning", "it has no effect on a CPU"),
}

RULES: dict[str, dict[str, tuple[str, str]]] = {
    **{
        name: {"": ("refused", _PAIRS)}
        for name in ("col_out", "cut_mix", "cut_out", "mix_up", "progressive_resizing", "selective_backprop")
    },
    "label_smoothing": {"": ("refused", "the loss takes tokens, no smoothed targets")},
    "seq_length_warmup": {"": ("refused", "it cuts every tensor of a batch at one length, those of pictures too")},
    "no_op_model": {"": ("refused", "it puts another model in the place of the one that is trained")},
    "low_precision_layer_norm": _LOW,
    "low_precision_group_norm": _LOW,
}  # fmt: skip
"""Registered name -> conditions (empty: always) -> (status, why)."""
