"""Networks that turn visual outputs into targets: two denoisers, and regression heads for ROSS-R.

All are called alike: ``head(condition, views, noisy, time)`` with ``condition`` (P, D) the hidden states of P patches,
``noisy`` (K, P, C) and ``time`` (K, V) for K draws, and give (K, P, C); regression heads ignore noise and time and
give K = 1. The condition is normed and projected once, then shared by the K draws.

Kept in float32 whatever autocast does: norms, modulation, the time's sinusoid and the residual stream.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from ...models.errors import UserError, nearest
from .views import Views

TIME_WIDTH = 256
WIDTH_OF_DEPTH = {3: 1024, 8: 1280, 12: 1536}
"""Widths of the paper's code by depth; 1024 for any other."""
HEAD_WIDTH = 64


def sinusoid(position: torch.Tensor, width: int) -> torch.Tensor:
    """cos then sin of position / 10000^(2 i / width): (..., width) float32."""
    half = width // 2
    rates = torch.exp(torch.arange(half, device=position.device) * (-math.log(10000.0) / half))
    angle = position.float()[..., None] * rates
    return torch.cat([angle.cos(), angle.sin()], -1)


def positions_2d(row: torch.Tensor, column: torch.Tensor, width: int) -> torch.Tensor:
    """Fixed 2-D positions of patches, half of the channels an axis (as MAE): (P,), (P,) -> (P, width) float32."""
    return torch.cat([sinusoid(column, width // 2), sinusoid(row, width // 2)], -1)


def plain_norm(x: torch.Tensor, eps: float) -> torch.Tensor:
    """LayerNorm without parameters, in float32."""
    return F.layer_norm(x.float(), x.shape[-1:], eps=eps)


def modulate(x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """x (1 + scale) + shift in float32."""
    return x * (1 + scale.float()) + shift.float()


class TimeEmbedding(nn.Module):
    """Integer times (K, V) -> (K, V, width)."""

    def __init__(self, width: int):
        super().__init__()
        self.up = nn.Linear(TIME_WIDTH, width)
        self.out = nn.Linear(width, width)
        for layer in (self.up, self.out):
            nn.init.normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)

    def forward(self, time: torch.Tensor) -> torch.Tensor:
        """See the class."""
        return self.out(F.silu(self.up(sinusoid(time, TIME_WIDTH))))


class Attention(nn.Module):
    """Multi-head self-attention within each view, with biases."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = _xavier(nn.Linear(width, 3 * width))
        self.out = _xavier(nn.Linear(width, width))

    def forward(self, x: torch.Tensor, views: Views) -> torch.Tensor:
        """(K, P, width) -> the same."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(2)
        return self.out(views.attend(q, k, v).flatten(2))


class FeedForward(nn.Sequential):
    """Two linear layers with tanh-approximated GELU."""

    def __init__(self, width: int, ratio: float):
        inner = int(width * ratio)
        super().__init__(
            _xavier(nn.Linear(width, inner)), nn.GELU(approximate="tanh"), _xavier(nn.Linear(inner, width))
        )


class DiTBlock(nn.Module):
    """Attention and MLP, each shifted, scaled and gated by the condition of its own token (AdaLN-Zero)."""

    def __init__(self, width: int, heads: int, ratio: float):
        super().__init__()
        self.attention = Attention(width, heads)
        self.mlp = FeedForward(width, ratio)
        self.modulation = _zero(nn.Linear(width, 6 * width))

    def forward(self, x: torch.Tensor, c: torch.Tensor, views: Views) -> torch.Tensor:
        """x, c: (K, P, width)."""
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.modulation(F.silu(c)).chunk(6, -1)
        x = x + gate_a.float() * self.attention(modulate(plain_norm(x, 1e-6), shift_a, scale_a), views)
        return x + gate_m.float() * self.mlp(modulate(plain_norm(x, 1e-6), shift_m, scale_m))


class ViTBlock(nn.Module):
    """A pre-norm transformer block to whose input the condition is added."""

    def __init__(self, width: int, heads: int, ratio: float):
        super().__init__()
        self.norm_a, self.norm_m = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.attention = Attention(width, heads)
        self.mlp = FeedForward(width, ratio)

    def forward(self, x: torch.Tensor, c: torch.Tensor, views: Views) -> torch.Tensor:
        """x, c: (K, P, width)."""
        x = x + c.float()
        x = x + self.attention(self.norm_a(x), views)
        return x + self.mlp(self.norm_m(x))


class Denoiser(nn.Module):
    """What both denoisers share: maps of target, time and condition; the last modulation and projection.

    Args:
        condition: D, width of the hidden states.
        dim: C, channels of a target token.
        width, depth, heads, mlp_ratio: of the blocks.
    """

    block: type[DiTBlock] | type[ViTBlock]

    def __init__(self, condition: int, dim: int, width: int, depth: int, heads: int, mlp_ratio: float):
        super().__init__()
        if width % heads or width % 4:
            raise UserError(
                f"algorithms.ross.width: {width} must be a multiple of 4 and of the {heads} attention heads"
            )
        if int(width * mlp_ratio) < 1:
            raise UserError(f"algorithms.ross.mlp_ratio: {mlp_ratio} leaves no channel at width {width}")
        self.width = width
        self.input = _xavier(nn.Linear(dim, width))
        self.time = TimeEmbedding(width)
        self.condition = nn.Linear(condition, width)
        nn.init.normal_(self.condition.weight, std=0.02)
        nn.init.zeros_(self.condition.bias)
        self.blocks = nn.ModuleList(self.block(width, heads, mlp_ratio) for _ in range(depth))
        self.last_modulation = _zero(nn.Linear(width, 2 * width))
        self.output = _zero(nn.Linear(width, dim))

    def front(self, condition: torch.Tensor, views: Views) -> torch.Tensor:
        """The condition before its projection: (P, D) float32."""
        raise NotImplementedError

    def enter(self, x: torch.Tensor, views: Views) -> torch.Tensor:
        """The projected noisy tokens as the first block gets them."""
        return x

    def forward(
        self, condition: torch.Tensor, views: Views, noisy: torch.Tensor, time: torch.Tensor
    ) -> torch.Tensor:
        """See the module."""
        projected = self.condition(F.silu(self.front(condition, views)))
        c = self.time(time)[:, views.view] + projected
        x = self.enter(self.input(noisy).float(), views)
        for block in self.blocks:
            x = block(x, c, views)
        shift, scale = self.last_modulation(F.silu(c)).chunk(2, -1)
        return self.output(modulate(plain_norm(x, 1e-6), shift, scale)).float()


class DiTDenoiser(Denoiser):
    """DiT with AdaLN-Zero and one condition a token: what the paper's code runs (the default).

    Predicts exactly 0 at first, and its gradient reaches the condition after some three steps.
    """

    block = DiTBlock

    def front(self, condition: torch.Tensor, views: Views) -> torch.Tensor:
        """LayerNorm without parameters."""
        return plain_norm(condition, 1e-6)

    def enter(self, x: torch.Tensor, views: Views) -> torch.Tensor:
        """Add each patch's place in its own grid."""
        return x + positions_2d(views.row, views.column, self.width)


class ViTDenoiser(Denoiser):
    """Plain ViT blocks with additive conditioning: what the paper's figure draws.

    Args:
        position_grid: rows and columns of the learnt table of positions, in the width of the hidden states; it is
            read bilinearly at each patch's place in its own grid.
        others: as :class:`Denoiser`.
    """

    block = ViTBlock

    def __init__(self, condition: int, dim: int, position_grid: tuple[int, int] = (27, 27), **sizes: Any):
        super().__init__(condition, dim, **sizes)
        self.norm = nn.LayerNorm(condition, eps=1e-6)
        self.position_grid = position_grid
        self.positions = nn.Parameter(torch.randn(position_grid[0] * position_grid[1], condition) * 0.02)

    def front(self, condition: torch.Tensor, views: Views) -> torch.Tensor:
        """LayerNorm with parameters, then the learnt position."""
        return self.norm(condition.float()) + self._positions(views)

    def _positions(self, views: Views) -> torch.Tensor:
        table = self.positions.float().T.unflatten(1, self.position_grid)[None]
        place = torch.stack([views.column, views.row], -1).float()
        at = (place + 0.5) / views.extent.flip(-1) * 2 - 1
        found = F.grid_sample(table, at[None, :, None], padding_mode="border", align_corners=False)
        return found[0, :, :, 0].T


class LinearHead(nn.Module):
    """Norm without parameters, then one linear map D -> C."""

    def __init__(self, condition: int, dim: int):
        super().__init__()
        self.output = _xavier(nn.Linear(condition, dim))

    def forward(self, condition: torch.Tensor, views: Views, *unused: Any) -> torch.Tensor:
        """(1, P, C)."""
        return self.output(plain_norm(condition, 1e-6))[None].float()


class MLPHead(nn.Module):
    """Norm without parameters, then linear maps with GELU between them (LLaVA's ``mlpNx_gelu``)."""

    def __init__(self, condition: int, dim: int, depth: int = 2):
        super().__init__()
        layers: list[nn.Module] = []
        for _ in range(depth - 1):
            layers += [_xavier(nn.Linear(condition, condition)), nn.GELU()]
        self.layers = nn.Sequential(*layers, _xavier(nn.Linear(condition, dim)))

    def forward(self, condition: torch.Tensor, views: Views, *unused: Any) -> torch.Tensor:
        """(1, P, C)."""
        return self.layers(plain_norm(condition, 1e-6))[None].float()


DENOISERS = ("dit", "vit")
HEADS = (*DENOISERS, "linear", "mlp")


def scaled_width(condition: int) -> int:
    """Width in the proportion of the paper's 1024 to Qwen2-7B's 3584, a multiple of the head width, at least one head."""
    return max(HEAD_WIDTH, round(condition * 1024 / 3584 / HEAD_WIDTH) * HEAD_WIDTH)


def make_head(
    name: str,
    condition: int,
    dim: int,
    *,
    depth: int = 3,
    width: int | str | None = None,
    mlp_ratio: float = 4.0,
    position_grid: tuple[int, int] = (27, 27),
) -> nn.Module:
    """Build a head by name.

    Args:
        name: ``dit``, ``vit``, ``linear`` or ``mlp``.
        condition: D.
        dim: C.
        depth: blocks of a denoiser, layers of ``mlp``.
        width: of a denoiser; None: the paper's for this depth; ``scaled``: in proportion to D.
        mlp_ratio: of a denoiser.
        position_grid: of ``vit``.

    Raises:
        UserError: unknown name, or sizes that do not fit.
    """
    if name not in HEADS:
        raise UserError(f"algorithms.ross.head: unknown head '{name}'{nearest(str(name), HEADS)}")
    if name == "linear":
        return LinearHead(condition, dim)
    if name == "mlp":
        return MLPHead(condition, dim, depth)
    if isinstance(width, str) and width != "scaled":
        raise UserError(f"algorithms.ross.width: '{width}': use a number, null (the paper's) or scaled")
    if isinstance(width, int) and width < 1:
        raise UserError(f"algorithms.ross.width: {width} is less than 1")
    if mlp_ratio <= 0:
        raise UserError(f"algorithms.ross.mlp_ratio: {mlp_ratio} is not positive")
    chosen = scaled_width(condition) if width == "scaled" else width or WIDTH_OF_DEPTH.get(depth, 1024)
    # The paper has 16 heads at width 1024; narrower ones keep the width of a head.
    heads = 16 if chosen in WIDTH_OF_DEPTH.values() else max(1, int(chosen) // HEAD_WIDTH)
    sizes: dict[str, Any] = {
        "width": int(chosen),
        "depth": depth,
        "heads": heads,
        "mlp_ratio": mlp_ratio,
    }
    if name == "vit":
        return ViTDenoiser(condition, dim, position_grid=position_grid, **sizes)
    return DiTDenoiser(condition, dim, **sizes)


def _xavier(layer: nn.Linear) -> nn.Linear:
    nn.init.xavier_uniform_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def _zero(layer: nn.Linear) -> nn.Linear:
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer
