"""What JARVIS learns beside the model: the latent token and the head that reads predictions off an early layer."""

from __future__ import annotations

import torch
from torch import nn

HEADS = ("mlp", "linear")


class LatentToken(nn.Module):
    """One vector z that stands in for every hidden patch; where it stands is told by position ids alone.

    Args:
        width: D of the language model.
        deviation: of its normal initial values (the language model's ``initializer_range``).
    """

    def __init__(self, width: int, deviation: float):
        super().__init__()
        self.z = nn.Parameter(torch.randn(width) * deviation)

    def forward(self, embeddings: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """Embeddings (B, L, D) with z where ``hidden`` (B, L) bool is True, out of place.

        What stood there gets no gradient; z gets the sum over hidden positions, zero where there are none.
        """
        return torch.where(hidden[..., None], self.z.to(embeddings.dtype), embeddings)


class TargetHead(nn.Module):
    """Hidden states of the tapped layer (n, D) -> predicted features (n, C); no biases, no norm (sheet, 1.1).

    Args:
        kind: ``linear``; ``mlp``: two layers of width C with GELU between them.
        width: D.
        dim: C.
    """

    def __init__(self, kind: str, width: int, dim: int):
        super().__init__()
        layers = [nn.Linear(width, dim, bias=False)]
        if kind == "mlp":
            layers += [nn.GELU(), nn.Linear(dim, dim, bias=False)]  # type: ignore[list-item]
        self.layers = nn.Sequential(*layers)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """(n, D) -> (n, C)."""
        return self.layers(hidden)


class JarvisHead(nn.Module):
    """Both, each called through its own ``forward`` and sharded on its own: one acts before the language model, one after.

    Args:
        kind: see :class:`TargetHead`.
        width: D.
        dim: C.
        deviation: see :class:`LatentToken`.
        latent: False where nothing is hidden.
    """

    def __init__(self, kind: str, width: int, dim: int, deviation: float, latent: bool = True):
        super().__init__()
        self.latent = LatentToken(width, deviation) if latent else None
        self.predict = TargetHead(kind, width, dim)
        for part in (self.latent, self.predict):
            if part is not None:
                part._fsdp_wrap = True  # type: ignore[assignment]
