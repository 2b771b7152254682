"""Several vision towers that see the same picture as one: their features side by side, channel after channel.

The baseline that reconstructive supervision argues against: a second tower gives a LLaVA what a loss could have taught it
(ROSS, arXiv 2410.09575, compares with CLIP + DINOv2 and the like). Here the first tower's grid is the common one; the
others' features are resized to it and joined along the channels before the projector.

Importing this module registers the tower with ``AutoConfig`` and ``AutoModel``: a saved LLaVA with it loads with
``LlavaForConditionalGeneration.from_pretrained`` after ``import opsin.models.two_towers``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

from . import towers as towers  # registers TokenTower, which may be one of them
from .errors import UserError


class TwoTowersConfig(PretrainedConfig):
    """What a :class:`TwoTowers` is made of; lists have one entry a tower.

    Args:
        towers: configurations, as plain data with their ``model_type``.
        layers: which hidden state of each is read.
        prefixes: 0 or 1 tokens before its patches (a class token), which are dropped.
        image_means, image_stds: (3,) each, by which it wants pixels in 0..1 normalised. The processor normalises for
            the first one; pixels are brought to the others' within the model.
        image_size, patch_size: of the pictures that the model takes, and of a cell of the common grid in them.
            Default: the first tower's; where another one is larger, pictures are, too (a multiple of the grid).

    Attributes:
        hidden_size: channels of a token, all towers'.

    Raises:
        UserError: lists of other lengths, or a tower without a square grid.
    """

    model_type = "opsin_two_towers"

    def __init__(
        self,
        towers: Sequence[dict[str, Any]] = (),
        layers: Sequence[int] = (),
        prefixes: Sequence[int] = (),
        image_means: Sequence[Sequence[float]] = (),
        image_stds: Sequence[Sequence[float]] = (),
        image_size: int | None = None,
        patch_size: int | None = None,
        hidden_size: int | None = None,
        num_channels: int = 3,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        lists = (towers, layers, prefixes, image_means, image_stds)
        if len({len(each) for each in lists}) != 1:
            raise UserError(f"two towers: {[len(each) for each in lists]} entries are not one for each tower")
        self.towers = [dict(each) for each in towers]
        self.layers, self.prefixes = list(layers), list(prefixes)
        self.image_means = [list(each) for each in image_means]
        self.image_stds = [list(each) for each in image_stds]
        self.num_channels = num_channels
        self.image_size, self.patch_size, self.hidden_size = (
            image_size or 0,
            patch_size or 0,
            hidden_size or 0,
        )
        if not towers:  # transformers makes an empty one to compare with
            return
        parts = self.parts()
        side = parts[0].image_size // parts[0].patch_size
        if image_size is None or patch_size is None:
            largest = max(part.image_size for part in parts)
            if largest <= parts[0].image_size:
                image_size, patch_size = parts[0].image_size, parts[0].patch_size
            else:
                patch_size = math.ceil(largest / side)
                image_size = side * patch_size
        self.image_size, self.patch_size = image_size, patch_size
        self.hidden_size = sum(int(part.hidden_size) for part in parts)

    def parts(self) -> list[Any]:
        """The towers' configurations."""
        made = []
        for each in self.towers:
            body = {k: v for k, v in each.items() if k != "model_type"}
            made.append(AutoConfig.for_model(each["model_type"], **body))
        return made

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of tokens."""
        assert self.image_size is not None and self.patch_size is not None
        side = self.image_size // self.patch_size
        return side, side


class TwoTowers(PreTrainedModel):
    """Towers whose tokens are joined; it has their parameters and no others (``towers.0``, ``towers.1`` ...)."""

    config_class = TwoTowersConfig
    base_model_prefix = "two_towers"
    main_input_name = "pixel_values"
    # Each tower has its own attention; what is chosen for the language model is handed to those that know it.
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = True

    def __init__(self, config: TwoTowersConfig):
        super().__init__(config)
        self.towers = nn.ModuleList([AutoModel.from_config(part) for part in config.parts()])
        self.post_init()

    @classmethod
    def join(
        cls,
        models: Sequence[PreTrainedModel],
        layers: Sequence[int],
        prefixes: Sequence[int],
        image_means: Sequence[Sequence[float]],
        image_stds: Sequence[Sequence[float]],
    ) -> TwoTowers:
        """Towers that are there already, as one; they are used as they are, not copied. See :class:`TwoTowersConfig`."""
        config = TwoTowersConfig(
            [model.config.to_dict() for model in models], layers, prefixes, image_means, image_stds
        )
        with torch.device("meta"):
            joined = cls(config)
        joined.towers = nn.ModuleList(models)
        return joined.eval()

    def _init_weights(self, module: nn.Module) -> None:
        """Each tower initialises its own modules; there are no others."""

    def train(self, mode: bool = True) -> TwoTowers:
        """``nn.Module.train``, except that frozen towers stay in ``eval`` mode."""
        super().train(mode)
        for tower in self.towers:
            tower.train(mode and any(p.requires_grad for p in tower.parameters()))
        return self

    def tokens(self, pixel_values: Tensor) -> Tensor:
        """One token a cell of the common grid, row by row.

        Args:
            pixel_values: (B, 3, image_size, image_size) float, normalised for the first tower.

        Returns:
            (B, rows * columns, hidden_size) in the towers' dtype.

        Raises:
            UserError: pictures of another size.
        """
        size = self.config.image_size
        if pixel_values.shape[1:] != (3, size, size):
            raise UserError(
                f"the vision towers read (B, 3, {size}, {size}) pictures, got {tuple(pixel_values.shape)}"
            )
        maps = [self._map(index, pixel_values) for index in range(len(self.towers))]
        joined = torch.cat([self._on_grid(each) for each in maps], dim=1)
        return joined.flatten(2).transpose(1, 2)

    def _map(self, index: int, pixel_values: Tensor) -> Tensor:
        """(B, C, rows, columns) of one tower on its own grid."""
        config, tower = self.config, cast(Any, self.towers[index])
        if index:
            scale, shift = _to_its_colours(
                tuple(config.image_means[0]), tuple(config.image_stds[0]), tuple(config.image_means[index]),
                tuple(config.image_stds[index]), pixel_values.dtype, pixel_values.device,
            )  # fmt: skip
            pixel_values = pixel_values * scale + shift
        side = tower.config.image_size // tower.config.patch_size
        # The first tower's patches are cells of the picture. A tower whose picture is no multiple of its patch never
        # sees the last pixels; given just those that it sees, its grid covers the whole, as the first one's does.
        fits = index == 0 and config.image_size == tower.config.image_size
        wanted = tower.config.image_size if fits else side * tower.config.patch_size
        if pixel_values.shape[-1] != wanted:
            pixel_values = F.interpolate(
                pixel_values.float(), size=(wanted, wanted), mode="bicubic", align_corners=False, antialias=True
            )  # fmt: skip
        states = tower(pixel_values.to(tower.dtype), output_hidden_states=True).hidden_states
        tokens = states[config.layers[index]][:, config.prefixes[index] :]
        return tokens.transpose(1, 2).unflatten(2, (side, side))

    def _on_grid(self, cells: Tensor) -> Tensor:
        if tuple(cells.shape[-2:]) == self.config.grid:
            return cells
        # (antialias: every cell of a finer grid counts)
        resized = F.interpolate(
            cells.float(), size=self.config.grid, mode="bilinear", align_corners=False, antialias=True
        )
        return resized.to(cells.dtype)

    def forward(
        self,
        pixel_values: Tensor,
        output_hidden_states: bool | int | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPooling | tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        """Tokens in the form of a Hugging Face vision model; ``hidden_states`` has one entry, the joined tokens."""
        tokens = self.tokens(pixel_values)
        values: dict[str, Any] = {"pooler_output": tokens.mean(dim=1), "hidden_states": (tokens,)}
        output = BaseModelOutputWithPooling(last_hidden_state=cast(Any, tokens), **values)
        return output.to_tuple() if return_dict is False else output


@lru_cache(32)
def _to_its_colours(
    mean: tuple[float, ...],
    std: tuple[float, ...],
    own_mean: tuple[float, ...],
    own_std: tuple[float, ...],
    dtype: torch.dtype,
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """Factor and summand, (3, 1, 1), from one normalisation to another; made once, as a copy makes the device wait."""
    scale = [a / b for a, b in zip(std, own_std, strict=True)]
    shift = [(a - b) / c for a, b, c in zip(mean, own_mean, own_std, strict=True)]
    made = (torch.tensor(values, dtype=dtype, device=device).view(3, 1, 1) for values in (scale, shift))
    return tuple(made)  # type: ignore[return-value]


AutoConfig.register(TwoTowersConfig.model_type, TwoTowersConfig, exist_ok=True)
AutoModel.register(TwoTowersConfig, TwoTowers, exist_ok=True)
