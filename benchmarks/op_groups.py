"""Processor time of a training step by group of operators: where a difference between two steps comes from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.profiler import ProfilerActivity
from torch.profiler import profile as torch_profile

HEAD, LOSS, CAST = "LM head matmul", "cross-entropy", "copies and upcasts"
GROUPS = (
    HEAD,
    LOSS,
    CAST,
    "other matmuls",
    "attention",
    "embedding",
    "optimizer",
    "norms, activations, the rest",
)
_MATMUL = ("aten::mm", "aten::addmm", "aten::bmm", "aten::matmul", "aten::linear")
_LOSS = ("log_softmax", "nll_loss", "cross_entropy")
_CAST = ("aten::copy_", "aten::_to_copy", "aten::constant_pad_nd", "aten::fill_", "aten::zero_")


def group_of(name: str, shapes: list, vocabulary: int) -> str:
    """Group of one operator, by its name and whether the vocabulary is one of its dimensions."""
    if any(part in name for part in _LOSS):
        return LOSS
    if name in _MATMUL:
        wide = any(vocabulary in shape for shape in shapes if isinstance(shape, list | tuple))
        return HEAD if wide else "other matmuls"
    if name in _CAST:
        return CAST
    if "scaled_dot_product" in name or "flash_attention" in name:
        return "attention"
    if "embedding" in name:
        return "embedding"
    if "adam" in name.lower() or "Optimizer" in name:
        return "optimizer"
    return GROUPS[-1]


def measured(step: Callable[[], Any], vocabulary: int, device: str) -> dict[str, float]:
    """Milliseconds of each group in one step, after one that does not count."""
    step()
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device == "cuda" else [])
    with torch_profile(activities=activities, record_shapes=True) as record:
        step()
    found = dict.fromkeys(GROUPS, 0.0)
    for event in record.key_averages(group_by_input_shape=True):
        own = event.self_device_time_total if device == "cuda" else event.self_cpu_time_total
        found[group_of(event.key, event.input_shapes, vocabulary)] += own / 1e3
    return found


def profile(
    steps: dict[str, Callable[[], Any]], vocabulary: int, device: str
) -> tuple[str, dict[str, dict[str, float]]]:
    """A text table of the groups of several steps, and the numbers in it (milliseconds)."""
    found = {name: measured(step, vocabulary, device) for name, step in steps.items()}
    first, second = found
    lines = [f"{'self time of one step, ms':32}{first:>12}{second:>12}{'difference':>12}"]
    for group in (*GROUPS, "all"):
        a, b = (sum(found[n].values()) if group == "all" else found[n][group] for n in (first, second))
        lines.append(f"{group:32}{a:12.1f}{b:12.1f}{a - b:12.1f}")
    return "\n".join(lines) + "\n", found
