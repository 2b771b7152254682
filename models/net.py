"""The one module that is wrapped, sharded and trained: a Hugging Face VLM plus the methods' heads.

Everything that touches a parameter happens inside a ``forward`` of this module or of a head, because FSDP2
gathers parameters only there; every other layout that was tried broke or let ranks drift apart.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from .anatomy import Anatomy, anatomy_of
from .attention import Visibility, masks_for
from .errors import UserError
from .geometry import PER_IMAGE_KEYS, PIXEL_KEY
from .step import FINAL, Branch, Step

MASKS_FOR = "packing, independent turns, bidirectional images and masked prediction"
"""What wants attention masks of its own."""


def silenced(value: torch.Tensor) -> torch.Tensor:
    """Zeros that depend on ``value`` in the graph: gradients are zeros, even where ``value`` is NaN.

    ``0 * value`` would carry NaN. What a module is fed where it has nothing to do but must run all the same: fed
    NaN, its weights' gradient would be 0 times that.
    """
    never = torch.zeros((), dtype=torch.bool, device=value.device)
    return torch.where(never, value, torch.zeros((), dtype=value.dtype, device=value.device))


def nan_safe_zero(value: torch.Tensor) -> torch.Tensor:
    """A scalar 0 that depends on ``value`` in the graph (:func:`silenced`), for a loss."""
    return silenced(value).sum()


def _same_heads(net: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Refuse a checkpoint of other methods: Composer would drop their heads, or leave ours as they are, without a word."""
    names = [key.removeprefix(prefix) for key in state if key.startswith(prefix)]
    stored = {name.split(".")[1] for name in names if name.startswith("auxiliary.")}
    here = set(net.auxiliary)  # type: ignore[arg-type]
    if not any(name.startswith("hf.") for name in names) or stored == here:
        return
    more, less = ", ".join(sorted(stored - here)), ", ".join(sorted(here - stored))
    said = [f"has heads of {more}, which are not switched on here"] * bool(more) + [
        f"has none of {less}"
    ] * bool(less)
    raise UserError(
        f"the checkpoint {' and '.join(said)}: resume with its methods, or start a new run from its weights (init_from)"
    )


class VisionLanguageNet(nn.Module):
    """A Hugging Face VLM (``hf``) and heads of methods (``auxiliary``), run for training.

    ``forward`` runs the language-model head only at labelled positions.

    Attributes:
        anatomy: where this family keeps its parts.
        bidirectional_images: whether visual tokens see all tokens of their own image (a property of the
            model: export keeps it), by the family's own rule or because they were told to.
        foreign_attention: they were told to, which plain transformers does not know.
        autocast_dtype: dtype for autocast inside ``forward``, for devices on which Composer has none.
    """

    def __init__(self, hf: nn.Module, *, bidirectional_images: bool = False):
        super().__init__()
        self.hf = hf
        self.auxiliary = nn.ModuleDict()
        self.anatomy: Anatomy = anatomy_of(hf)
        self.bidirectional_images = bidirectional_images or self.anatomy.bidirectional_images
        self.foreign_attention = bidirectional_images and not self.anatomy.bidirectional_images
        self.autocast_dtype: torch.dtype | None = None
        self._step: Step | None = None
        self._prefill: Visibility | None = None
        # Decoder layers are sharded one by one; everything else belongs to this module's own group.
        for layer in self.anatomy.decoder_layers(hf):
            layer._fsdp_wrap = True  # type: ignore[assignment]
        self.anatomy.decoder(hf).register_forward_pre_hook(self._seam, with_kwargs=True)
        self.register_load_state_dict_pre_hook(_same_heads)

    def train(self, mode: bool = True) -> VisionLanguageNet:
        """Training mode for what is trained; a frozen vision tower stays in evaluation mode (dropout, statistics)."""
        super().train(mode)
        if mode:
            for path in self.anatomy.vision_tower:
                tower = self.hf.get_submodule(path)
                inside = [p for p in self.anatomy.projector if p.startswith(path + ".")]
                learnt = {id(q) for p in inside for q in self.hf.get_submodule(p).parameters()}
                if not any(p.requires_grad and id(p) not in learnt for p in tower.parameters()):
                    tower.eval()
                    for projector in inside:  # Qwen2-VL keeps its projector in the tower
                        self.hf.get_submodule(projector).train()
        return self

    def forward(self, batch: dict[str, Any], step: Step) -> dict[str, torch.Tensor]:
        """Run one micro-batch.

        Args:
            batch: a micro-batch as ``data.batch.split_batch`` makes it, on this module's device.
            step: what methods want of this pass; its ``tapped`` is filled.

        Returns:
            ``nll`` (n,) float32 negative log-likelihood in nats of each labelled token, in the order of
            ``label_rows``; only in evaluation mode ``likeliest`` (n,) int64, the likeliest token there, and
            ``correct`` (n,) bool, whether it is that one; ``zero``: scalar 0 that keeps tower and projector in the graph when no row has a picture.
        """
        with self.autocast():
            zero = self._idle_vision() if PIXEL_KEY not in batch else None
            step.zero = zero
            hidden = self.hidden(batch, step)
            if FINAL in step.taps:
                step.tapped[FINAL] = hidden
            for name in sorted(step.branches):
                step.branched[name] = self._branch(batch, step, step.branches[name])
            read = hidden.flatten(0, 1)[batch["label_rows"]]
            if step.apart is not None:
                apart = self._apart(batch, step).flatten(0, 1)[batch["label_rows"]]
                read = torch.where(step.apart.labels[:, None], apart, read)
            step.embeddings = step.zero = None
            logits = self.anatomy.head(self.hf, read)
        logits = logits.float()
        targets = batch["label_targets"]
        outputs = {"nll": F.cross_entropy(logits, targets, reduction="none")}
        if not self.training:
            outputs["likeliest"] = logits.argmax(-1)
            outputs["correct"] = outputs["likeliest"] == targets
        if zero is not None:
            outputs["zero"] = zero
        outputs.update({f"tap{layer}": value for layer, value in step.tapped.items()})
        outputs.update({f"branch/{name}": value for name, value in step.branched.items()})
        return outputs

    def hidden(self, batch: dict[str, Any], step: Step) -> torch.Tensor:
        """Hidden states after the final norm, (B, L, width): the family's own body, with our seam in it."""
        pixels = {k: batch[k] for k in (PIXEL_KEY, *PER_IMAGE_KEYS) if k in batch}
        with self._active(step):
            out = self.hf.get_submodule(self.anatomy.body)(
                input_ids=batch["input_ids"],
                attention_mask=batch["attention_mask"],
                position_ids=batch["position_ids"],
                use_cache=False,
                return_dict=True,
                **pixels,
            )
        return out.last_hidden_state

    def _branch(self, batch: dict[str, Any], step: Step, branch: Branch) -> torch.Tensor:
        """A second pass of some tokens through the first layers: (W, M, D), before any final norm."""
        assert step.embeddings is not None
        at = branch.positions.clamp(min=0)
        # Padding is zeros, not somebody's token: a softmax weight of 0 still carries NaN.
        real = (branch.positions >= 0)[..., None]
        embeddings = branch.edit(torch.where(real, step.embeddings.flatten(0, 1)[at], 0))
        self.anatomy.require("masks", MASKS_FOR)
        decoder = self.anatomy.decoder(self.hf)
        wanted = Step(batch, taps={branch.layers})
        positions = batch["position_ids"].flatten(-2)[..., at]
        see = branch.visibility.with_terms(position=positions if positions.ndim == 2 else None)
        with self._first_layers(branch.layers), self._tapping(wanted):
            decoder(
                inputs_embeds=embeddings,
                attention_mask=masks_for(see, decoder.config, embeddings.dtype),
                position_ids=positions,
                use_cache=False,
                return_dict=True,
            )
        return wanted.tapped[branch.layers]

    def _apart(self, batch: dict[str, Any], step: Step) -> torch.Tensor:
        """The pass of ``step.apart``: hidden states after the final norm, (B, L, width)."""
        assert step.apart is not None and step.embeddings is not None
        decoder = self.anatomy.decoder(self.hf)
        see = Step(batch, visibility=step.apart.visibility).sees(self.bidirectional_images)
        mask: Any = batch["attention_mask"]
        if see is not None:
            self.anatomy.require("masks", MASKS_FOR)
            mask = masks_for(see, decoder.config, step.embeddings.dtype)
        out = decoder(
            inputs_embeds=step.embeddings,
            attention_mask=mask,
            position_ids=batch["position_ids"],
            use_cache=False,
            return_dict=True,
        )
        return out.last_hidden_state

    @contextlib.contextmanager
    def _first_layers(self, count: int) -> Iterator[None]:
        """Run the decoder with its first layers only."""
        parent, _, name = self.anatomy.layers.rpartition(".")
        owner = self.anatomy.decoder(self.hf).get_submodule(parent)
        layers = self.anatomy.decoder_layers(self.hf)
        setattr(owner, name, nn.ModuleList(layers[:count]))
        try:
            yield
        finally:
            setattr(owner, name, layers)

    def _idle_vision(self) -> torch.Tensor:
        """Tower and projector on a dummy picture, as a zero: all ranks run and differentiate the same modules."""
        reference = next(self.hf.get_submodule(self.anatomy.vision_tower[0]).parameters())
        dtype = self.autocast_dtype or reference.dtype
        pixels = self.anatomy.dummy(self.hf, reference.device, dtype)
        return nan_safe_zero(self.anatomy.image_features(self.hf, pixels).float())

    def _seam(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        """Pre-hook of the decoder: the one place where embeddings and masks are changed, in all families."""
        step = self._step
        if step is None:
            return self._seam_of_prefill(module, args, kwargs)
        if "inputs_embeds" not in kwargs or kwargs["inputs_embeds"] is None:
            raise UserError(
                f"{type(module).__name__} was not called with inputs_embeds=; this family needs its own seam"
            )
        kwargs = dict(kwargs)
        if step.zero is not None:
            # Else, with a frozen language model, the ranks with pictures alone would differentiate its layers, and
            # FSDP2 gathers a layer's parameters again when it is.
            kwargs["inputs_embeds"] = kwargs["inputs_embeds"] + step.zero.to(kwargs["inputs_embeds"].dtype)
        if step.branches or step.apart is not None:
            step.embeddings = kwargs["inputs_embeds"]
        kwargs["inputs_embeds"] = step.edited(kwargs["inputs_embeds"])
        see = step.sees(self.bidirectional_images)
        if see is not None:
            self.anatomy.require("masks", MASKS_FOR)
            kwargs["attention_mask"] = masks_for(see, module.config, kwargs["inputs_embeds"].dtype)
        return args, kwargs

    def _seam_of_prefill(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        """While generating: restore the mask of bidirectional images for the prompt; later tokens are causal."""
        cache = kwargs.get("past_key_values")
        if self._prefill is None or (cache is not None and cache.get_seq_length() > 0):
            return None
        kwargs = dict(kwargs)
        kwargs["attention_mask"] = masks_for(self._prefill, module.config, kwargs["inputs_embeds"].dtype)
        return args, kwargs

    @contextlib.contextmanager
    def prompt(self, see: Visibility | None) -> Iterator[None]:
        """While generating from a prompt whose visibility is ``see`` (None: the family's own causal mask)."""
        self._prefill = see
        try:
            yield
        finally:
            self._prefill = None

    @contextlib.contextmanager
    def _active(self, step: Step) -> Iterator[None]:
        """Make ``step`` the one that hooks serve, and tap the layers it asks for."""
        self._step = step
        try:
            with self._tapping(step):
                yield
        finally:
            self._step = None

    @contextlib.contextmanager
    def _tapping(self, step: Step) -> Iterator[None]:
        """Keep the output of the layers that ``step`` asks for."""
        layers = self.anatomy.decoder_layers(self.hf)
        handles = []
        for layer in sorted(step.taps - {FINAL}):
            if not 1 <= layer <= len(layers):
                raise UserError(f"tap at layer {layer}: the language model has layers 1 to {len(layers)}")

            def keep(module: nn.Module, args: tuple, output: Any, layer: int = layer) -> None:
                # Checkpointing runs a layer again during backward; the first output is the one with the graph.
                step.tapped.setdefault(layer, output[0] if isinstance(output, tuple) else output)

            handles.append(layers[layer - 1].register_forward_hook(keep))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def autocast(self) -> contextlib.AbstractContextManager:
        """Autocast of our own, for devices on which Composer offers none (``amp_bf16`` on a CPU)."""
        if self.autocast_dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(next(self.parameters()).device.type, self.autocast_dtype)
