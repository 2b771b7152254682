"""Random numbers that are a pure function of a key: counter-based, vectorised, the same on every device.

A method's randomness must depend on (seed, method, visit, sample uid, image, draw) and on nothing else: not on the
batch's size, on ranks, workers or restarts. A generator that is seeded a sample would need a loop over samples;
here every element is mixed from its own key and counter (SplitMix64: Steele, Lea & Flood, OOPSLA 2014).
"""

from __future__ import annotations

import math
from typing import Any

import torch

_GAMMA = 0x9E3779B97F4A7C15
_WHOLE = (1 << 64) - 1
_MIX = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)


def _signed(value: int) -> int:
    """A 64-bit constant as torch's int64 holds it."""
    return value - (1 << 64) if value >= 1 << 63 else value


def _shifted(x: torch.Tensor, by: int) -> torch.Tensor:
    """Logical right shift (torch's is arithmetic)."""
    return (x >> by) & ((1 << (64 - by)) - 1)


def mix(x: torch.Tensor) -> torch.Tensor:
    """SplitMix64's finaliser: int64 -> int64 of which every bit depends on every bit."""
    x = (x ^ _shifted(x, 30)) * _signed(_MIX[0])
    x = (x ^ _shifted(x, 27)) * _signed(_MIX[1])
    return x ^ _shifted(x, 31)


def _mix_int(x: int) -> int:
    """:func:`mix` of a Python number."""
    x &= _WHOLE
    x = ((x ^ (x >> 30)) * _MIX[0]) & _WHOLE
    x = ((x ^ (x >> 27)) * _MIX[1]) & _WHOLE
    return x ^ (x >> 31)


def keys(*parts: torch.Tensor | int) -> torch.Tensor:
    """One int64 key for each combination of the parts, which broadcast (int64 tensors or integers).

    The key lies where its tensors lie: numbers are mixed on the host and never travel.

    Example:
        >>> keys(stable_hash("ross", seed), document_uid, document_visit, image)
    """
    key: torch.Tensor | int = 0
    for part in parts:
        mixed = _mix_int(part + _GAMMA) if isinstance(part, int) else mix(part.long() + _signed(_GAMMA))
        if isinstance(key, int) and isinstance(mixed, int):
            key = _mix_int((key + _GAMMA) & _WHOLE ^ mixed)
        else:
            left = _signed((key + _GAMMA) & _WHOLE) if isinstance(key, int) else key + _signed(_GAMMA)
            right = _signed(mixed) if isinstance(mixed, int) else mixed
            key = mix(left ^ right)  # type: ignore[operator]
    return torch.tensor(_signed(key)) if isinstance(key, int) else key


def view_keys(
    seed: int, uid: torch.Tensor, visit: torch.Tensor, image: torch.Tensor, row: torch.Tensor
) -> torch.Tensor:
    """One key a view, a function of (seed, sample, visit, image, which view of the image): (V,) int64.

    Args:
        seed: of the run and the method.
        uid, visit, image: (V,) int64, of the view's document.
        row: (V,) int64, anything that tells documents apart that share a uid in one batch (its batch row).
    """
    place = torch.arange(len(uid), device=uid.device)
    new = torch.ones_like(place, dtype=torch.bool)
    if len(uid) > 1:
        same = (uid[1:] == uid[:-1]) & (image[1:] == image[:-1]) & (row[1:] == row[:-1])
        new[1:] = ~same
    first = torch.where(new, place, 0).cummax(0).values if len(uid) else place
    return keys(seed, uid, visit, image, place - first)


def keys_of_views(seed: int, batch: dict[str, Any]) -> torch.Tensor:
    """:func:`view_keys` of the views of a batch or micro-batch (``data.batch``): (V,) int64, where the batch lies.

    ``seed``: of the run and the method, as ``data.schema.stable_hash(method, seed of the run)``.
    """
    row, document = batch["view_row"], batch["view_document"]
    uid, visit = batch["document_uid"][row, document], batch["document_visit"][row, document]
    return view_keys(seed, uid, visit, batch["view_image"], row * batch["document_uid"].shape[1] + document)


def _bits(key: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
    return mix(key + (count + 1) * _signed(_GAMMA))


def uniform(key: torch.Tensor, count: int | torch.Tensor = 1) -> torch.Tensor:
    """Uniform numbers in [0, 1), float64: (*key.shape, count), or of the broadcast shape if ``count`` is a tensor
    of counters."""
    if isinstance(count, int):
        key, count = key[..., None], torch.arange(count, device=key.device)
    return _shifted(_bits(key, count), 11).double() * 2.0**-53


def normal(key: torch.Tensor, count: int | torch.Tensor) -> torch.Tensor:
    """Standard normal numbers, float32: (*key.shape, count), or of the broadcast shape if ``count`` is a tensor of
    counters. Box and Muller (1958), both halves of the bits used.
    """
    if isinstance(count, int):
        key, count = key[..., None], torch.arange(count, device=key.device)
    bits = _bits(key, count)
    radius = ((_shifted(bits, 40).float() + 0.5) * 2.0**-24).log().mul_(-2).sqrt_()
    angle = (bits & 0xFFFFFFFF).float().mul_(2 * math.pi * 2.0**-32)
    return radius * angle.cos()
