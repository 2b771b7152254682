"""What the GPU tests share: small trainings on a device, and callbacks that look at it."""

from __future__ import annotations

import traceback
import warnings
from functools import cache
from pathlib import Path
from typing import Any

import torch
from composer import Callback

import opsin

import jobs
import settings

OURS = str(Path(opsin.__file__).parent)
THEIRS = ("composer", "transformers", "diffusers", "timm", "peft", "streaming", "torchmetrics")


def trainer_device(device: str) -> Any:
    """For ``composer.Trainer``: exact fp32, where Composer's own default is TF32."""
    if device == "cpu":
        return "cpu"
    from composer.devices import DeviceGPU

    return DeviceGPU(allow_tf32=False)


@cache
def trained(
    subset: tuple[str, ...], device: str, precision: str = "fp32", steps: int = 3, **more: Any
) -> dict[str, Any]:
    """Three steps of two micro-batches with some of the methods; losses, gradients, weights."""
    samples = [s for first in (1, 11, 21) for s in settings.mixed(first)][: 4 * steps]
    on_cpu = device == "cpu" and precision == "amp_bf16"  # Composer refuses it there
    options = {"autocast": True, "precision": "fp32"} if on_cpu else {"precision": precision}
    quiet = {"jarvis": {"log_interval": 100}, "vift": {"log_interval": 100}}
    return jobs.train(
        samples=samples, global_batch=4, microbatch=2, steps=steps, lr=1e-3, device=trainer_device(device),
        algorithms=settings.algorithms(subset, **quiet), **settings.MODEL, **options, **more,
    )  # fmt: skip


class Look(Callback):
    """Where parameters and the optimizer's state are when training ends, and how often the optimizer has each."""

    seen: dict[str, Any] = {}  # noqa: RUF012
    loaded: dict[str, torch.Tensor] = {}  # noqa: RUF012

    def after_load(self, state: Any, logger: Any) -> None:
        Look.loaded = {n: v.detach().cpu().clone() for n, v in state.model.state_dict().items()}

    def fit_end(self, state: Any, logger: Any) -> None:
        optimizer = state.optimizers[0]
        held = [id(p) for group in optimizer.param_groups for p in group["params"]]
        named = {n.removeprefix("module."): p for n, p in state.model.named_parameters()}
        Look.seen = {
            "parameters": {n: p.device.type for n, p in named.items()},
            "times": {n: held.count(id(p)) for n, p in named.items() if p.requires_grad},
            "state": {
                n: {v.device.type for k, v in optimizer.state[p].items() if k != "step"}
                for n, p in named.items()
                if p in optimizer.state
            },
            "sharded": {n for n, p in named.items() if hasattr(p, "full_tensor")},
        }


class Syncs(Callback):
    """From the second step's batch to its end: every wait for the device, with the frame that is to blame.

    The innermost frame of a library or of ours; what ``torch`` does in between is blamed on who called it.
    """

    found: list[tuple[str, str]] = []  # noqa: RUF012
    watched = 0

    def __init__(self) -> None:
        self._before: Any = None

    def after_dataloader(self, state: Any, logger: Any) -> None:
        if int(state.timestamp.batch) == 1:
            Syncs.found, Syncs.watched = [], 0
            self._before = (warnings.showwarning, warnings.filters[:])
            warnings.simplefilter("always")
            warnings.showwarning = self._see  # type: ignore[assignment]
            torch.cuda.set_sync_debug_mode("warn")

    def batch_end(self, state: Any, logger: Any) -> None:
        if self._before is None:
            return
        torch.cuda.set_sync_debug_mode("default")
        warnings.showwarning, warnings.filters[:] = self._before
        self._before = None

    @staticmethod
    def _see(message: Any, *args: Any, **kwargs: Any) -> None:
        if "synchronizing CUDA operation" in str(message):
            Syncs.watched += 1
            Syncs.found.append(blamed(traceback.extract_stack()))


def blamed(stack: traceback.StackSummary) -> tuple[str, str]:
    """(``ours``, ``theirs`` or ``tests``; file:line and code) of the frame that waited."""
    for frame in reversed(stack):
        path = Path(frame.filename)
        line = f"{frame.filename}:{frame.lineno} {frame.line}"
        if "site-packages" in path.parts:
            package = path.parts[path.parts.index("site-packages") + 1]
            if package in THEIRS:
                return "theirs", line
            continue
        if frame.filename.startswith(OURS):
            relative = path.relative_to(OURS)
            if relative.parts[0] == "tests":
                if "_see" not in (frame.name or ""):
                    return "tests", line
                continue
            return "ours", line
    return "theirs", "?"


def worst(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """Largest difference of two sets of tensors, as a share of the largest number of the second."""
    assert set(a) == set(b)
    scale = max(float(v.abs().max()) for v in b.values())
    return max(float((a[n].float() - b[n].float()).abs().max()) for n in b) / scale
