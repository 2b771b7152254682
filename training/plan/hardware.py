"""GPUs by name: memory, and operations a second by precision, dense, as their data sheets say."""

from __future__ import annotations

import re
from dataclasses import dataclass

from ...models.errors import UserError, nearest


@dataclass(frozen=True)
class GPU:
    """One kind of GPU.

    Attributes:
        name: as it is asked for.
        memory: bytes.
        bf16, fp32: floating-point operations a second, without sparsity; fp32 is what matrix products get without TF32.
    """

    name: str
    memory: float
    bf16: float
    fp32: float

    def peak(self, precision: str) -> float:
        """Operations a second at a precision of Composer's."""
        return self.fp32 if precision == "fp32" else self.bf16


GIB = 2.0**30

GPUS = {
    gpu.name: gpu
    for gpu in (
        GPU("a10", 24 * GIB, 125e12, 31.2e12),
        GPU("a100-40gb", 40 * GIB, 312e12, 19.5e12),
        GPU("a100-80gb", 80 * GIB, 312e12, 19.5e12),
        GPU("b200", 180 * GIB, 2250e12, 75e12),
        GPU("gh200", 96 * GIB, 989.5e12, 67e12),
        GPU("h100", 80 * GIB, 989.5e12, 67e12),
        GPU("h100-pcie", 80 * GIB, 756.5e12, 51e12),
        GPU("h200", 141e9, 989.5e12, 67e12),
        GPU("l4", 24 * GIB, 121e12, 30.3e12),
        GPU("l40s", 48 * GIB, 362e12, 91.6e12),
        GPU("rtx-4090", 24 * GIB, 165.2e12, 82.6e12),
        GPU("rtx-6000-ada", 48 * GIB, 364e12, 91.1e12),
    )
}
"""By name."""

_ALSO = {"a100": "a100-80gb", "h100-sxm": "h100", "h200-sxm": "h200", "4090": "rtx-4090"}


def gpu_named(name: str) -> GPU:
    """A GPU by name.

    Raises:
        UserError: it is not in the table; the line names the nearest one.
    """
    key = name.strip().lower().replace("_", "-").replace(" ", "-")
    key = _ALSO.get(key, key)
    if key not in GPUS:
        known = ", ".join(GPUS)
        raise UserError(f"--gpu {name}: not in the table{nearest(key, [*GPUS, *_ALSO])}; known are {known}")
    return GPUS[key]


def gpu_of_device(device_name: str) -> GPU | None:
    """The GPU that a driver's name means (``NVIDIA H100 80GB HBM3``); None: not in the table (an L40, an H100 NVL)."""
    said = device_name.lower()
    for mark, name in (
        ("h200 nvl", None), ("h200", "h200"), ("gh200", "gh200"), ("h100 pcie", "h100-pcie"), ("h100 nvl", None),
        ("h100", "h100"), ("b200", "b200"),
        ("a100-sxm4-40gb", "a100-40gb"), ("a100-pcie-40gb", "a100-40gb"), ("a100", "a100-80gb"), ("l40s", "l40s"),
        ("a10", "a10"), ("rtx 4090", "rtx-4090"), ("6000 ada", "rtx-6000-ada"), ("l4", "l4"),
    ):  # fmt: skip
        if re.search(rf"\b{mark}\b", said):  # whole words: L40 is no L4, A1000 no A100
            return None if name is None else GPUS[name]
    return None
