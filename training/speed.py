"""Composer's SpeedMonitor with the operations of our steps, so that a run logs its MFU.

``throughput/device/flops_per_sec`` and ``throughput/device/mfu`` count real tokens (no padding), the vision tower, the
projector and what the run's methods add (:mod:`.plan.flops`).
"""

from __future__ import annotations

from typing import Any

import torch
from composer.callbacks import SpeedMonitor as ComposerSpeedMonitor
from composer.core import State
from composer.loggers import Logger

from ..algorithms.base import unwrap
from .plan.flops import StepOperations
from .plan.hardware import gpu_of_device


class SpeedMonitor(ComposerSpeedMonitor):
    """Logs throughput, operations a second and MFU.

    Args:
        window_size: batches of the rolling mean; nothing is logged before there are so many.
        gpu_flops_available: the device's peak, operations a second; default: ``opsin plan``'s table by device and precision, then
            Composer's. Without one (on a CPU) there is no MFU.
        time_unit: of ``time/...``: seconds, minutes, hours or days.
    """

    def __init__(
        self,
        window_size: int = 100,
        gpu_flops_available: float | int | None = None,
        time_unit: str = "hours",
    ):
        super().__init__(window_size, gpu_flops_available, time_unit)

    def init(self, state: State, logger: Logger) -> None:
        """Give the model its counter, while parameters are whole."""
        named = {getattr(a, "name", type(a).__name__): a for a in state.algorithms}
        model: Any = unwrap(state.model)
        model.flops_per_batch = StepOperations(model, named)
        if self.gpu_flops_available is None and torch.cuda.is_available():
            known = gpu_of_device(torch.cuda.get_device_name())
            precision = state.precision.value
            if known is not None and precision in ("fp32", "bf16", "amp_bf16", "amp_fp16"):
                self.gpu_flops_available = known.peak(precision)
        super().init(state, logger)
