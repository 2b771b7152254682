"""A vision tower made from any timm network, CNN or ViT, that Hugging Face's LLaVA takes for a ViT.

LLaVA reads ``hidden_states[vision_feature_layer]`` of its tower and expects tokens, (B, N, C). A CNN gives
maps, (B, C, H, W), of several resolutions, and Hugging Face's own timm wrapper hands them on as they are.
:class:`TokenTower` lays chosen maps on one common grid and returns one token a cell.

Importing this module registers the tower with ``AutoConfig`` and ``AutoModel``: a saved LLaVA with such a
tower loads with ``LlavaForConditionalGeneration.from_pretrained`` after ``import opsin.models.towers``.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

from .errors import UserError
from .timm_maps import HEAD, build, feature_maps, keep_buffers_off_meta, map_shapes


class TokenTowerConfig(PretrainedConfig):
    """What a :class:`TokenTower` is made of.

    Args:
        architecture: timm's name of the network.
        image_size: height and width of a picture, in pixels.
        stages: maps that make a token, joined along the channels in this order: ``"head"``, or an index into
            timm's ``feature_info`` (what timm calls ``out_indices``: a CNN's resolutions, a ViT's blocks;
            negative counts from the end). A ViT's blocks are read without the final norm, as LLaVA does.
        rgb: also give each token the mean of ``pixel_values`` in its cell (three channels, in the units of
            the image processor).
        standardise: bring every channel to mean 0 and deviation 1 by the statistics that
            :meth:`TokenTower.set_statistics` stored. Raw maps share a large mean, beside which what differs
            between pictures is small: a projector without a norm of its own learns several times slower.
        patch_size: side of a token's cell in pixels; default: that of the first stage. Finer maps are
            averaged within a cell, coarser ones repeated.
        hidden_size: channels of a token. Derived; a stored value that differs from the network's is refused.

    Raises:
        UserError: unknown network or stage, or maps that do not fit on one grid.
    """

    model_type = "opsin_token_tower"

    def __init__(
        self,
        architecture: str = "tf_efficientnet_lite0",
        image_size: int = 128,
        stages: Sequence[str | int] = (HEAD,),
        rgb: bool = False,
        standardise: bool = False,
        patch_size: int | None = None,
        hidden_size: int | None = None,
        num_channels: int = 3,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        shapes = map_shapes(architecture, image_size, tuple(stages))
        patch_size = patch_size or image_size // shapes[0][1]
        _check_grid(architecture, image_size, patch_size, tuple(stages), shapes)
        derived = sum(channels for channels, _, _ in shapes) + (3 if rgb else 0)
        if hidden_size not in (None, derived):
            raise UserError(
                f"{architecture}: stages {list(stages)} give {derived} channels, not {hidden_size}"
            )
        if num_channels != 3:
            raise UserError(f"a token tower reads RGB pictures: num_channels is 3, not {num_channels}")
        self.architecture = architecture
        self.image_size = image_size
        self.stages = list(stages)
        self.rgb = rgb
        self.standardise = standardise
        self.patch_size = patch_size
        self.hidden_size = derived
        self.num_channels = num_channels

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of tokens."""
        side = self.image_size // self.patch_size
        return side, side


class TokenTower(PreTrainedModel):
    """A timm network whose maps become tokens. It has timm's parameters and no others.

    With ``config.standardise`` it also has the buffers ``token_mean`` and ``token_std``, (hidden_size,).

    A tower without a trainable parameter stays in ``eval`` mode whatever ``train()`` says: else a frozen
    network's batch norms would go on averaging over the training set.
    """

    config_class = TokenTowerConfig
    base_model_prefix = "token_tower"
    main_input_name = "pixel_values"
    # timm chooses the attention kernel by itself, so every choice made for the language model is fine.
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = True

    def __init__(self, config: TokenTowerConfig):
        super().__init__(config)
        self.net: Any = build(config.architecture, config.image_size)
        keep_buffers_off_meta(self.net)
        if config.standardise:
            self.register_buffer("token_mean", torch.zeros(config.hidden_size))
            self.register_buffer("token_std", torch.ones(config.hidden_size))
        self.post_init()

    @classmethod
    def from_timm(cls, architecture: str, weights: str | Path | None = "timm", **config: Any) -> TokenTower:
        """Build a tower in ``eval`` mode.

        Args:
            architecture: timm's name of the network.
            weights: ``"timm"``: the pretrained weights that timm knows, from its hub; a file
                (``.safetensors``, ``.pth``) in timm's names; ``None``: random.
            config: the other arguments of :class:`TokenTowerConfig`.

        Raises:
            UserError: no such network or file, or the weights do not fit.
        """
        tower = cls(TokenTowerConfig(architecture, **config))
        if weights is not None:
            tower.net = build(architecture, tower.config.image_size, weights)
        return tower.eval()

    def _init_weights(self, module: nn.Module) -> None:
        # timm has initialised its modules; transformers 5 asks for the buffers that no checkpoint holds.
        if hasattr(module, "init_non_persistent_buffers"):
            cast(Any, module).init_non_persistent_buffers()

    def train(self, mode: bool = True) -> TokenTower:
        """``nn.Module.train``, except that a frozen tower stays in ``eval`` mode."""
        return super().train(mode and any(p.requires_grad for p in self.parameters()))

    def set_statistics(self, mean: Tensor, std: Tensor) -> None:
        """Store what ``config.standardise`` subtracts and divides by.

        Args:
            mean, std: (hidden_size,) of raw tokens, over pictures and cells. Channels that hardly vary are
                divided by 0.01 at least.

        Raises:
            UserError: the tower was built without ``standardise``.
        """
        if not self.config.standardise:
            raise UserError("this vision tower takes no statistics: build it with standardise=True")
        self.get_buffer("token_mean").copy_(mean)
        self.get_buffer("token_std").copy_(std.clamp_min(0.01))

    @torch.no_grad()
    def fit_statistics(self, pixel_values: Tensor) -> None:
        """Measure and store the statistics on pictures of the data: (B, 3, H, W), some hundreds.

        Raises:
            UserError: the tower was built without ``standardise``.
        """
        self.set_statistics(*(f(self.config.hidden_size) for f in (torch.zeros, torch.ones)))
        raw = self.tokens(pixel_values).flatten(0, 1)
        self.set_statistics(raw.mean(0), raw.std(0))

    def tokens(self, pixel_values: Tensor) -> Tensor:
        """One token a cell, row by row.

        Args:
            pixel_values: (B, 3, image_size, image_size) float, normalised as the network was trained.

        Returns:
            (B, rows * columns, hidden_size), in the tower's dtype.

        Raises:
            UserError: pictures of another size.
        """
        size = self.config.image_size
        if pixel_values.shape[1:] != (3, size, size):
            raise UserError(
                f"the vision tower reads (B, 3, {size}, {size}) pictures, got {tuple(pixel_values.shape)}"
            )
        pixel_values = pixel_values.to(self.dtype)
        maps = feature_maps(self.net, pixel_values, self.config.stages)
        if self.config.rgb:
            maps.append(pixel_values)
        cells = torch.cat([_on_grid(m, self.config.grid) for m in maps], dim=1)
        # Under autocast the maps are bfloat16 and the pixels are not.
        tokens = cells.flatten(2).transpose(1, 2).to(self.dtype)
        if self.config.standardise:
            tokens = (tokens - self.get_buffer("token_mean")) / self.get_buffer("token_std")
        return tokens

    def forward(
        self,
        pixel_values: Tensor,
        output_hidden_states: bool | int | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPooling | tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        """Tokens in the form of a Hugging Face vision model.

        ``hidden_states`` is always given and has one entry, the tokens: ``vision_feature_layer=-1`` with
        ``vision_feature_select_strategy="full"`` reads them. ``pooler_output`` is their mean, (B, C).
        """
        tokens = self.tokens(pixel_values)
        values: dict[str, Any] = {"pooler_output": tokens.mean(dim=1), "hidden_states": (tokens,)}
        output = BaseModelOutputWithPooling(last_hidden_state=cast(Any, tokens), **values)
        return output.to_tuple() if return_dict is False else output


def _check_grid(
    architecture: str,
    image_size: int,
    patch_size: int,
    stages: tuple[str | int, ...],
    shapes: Sequence[tuple[int, int, int]],
) -> None:
    if image_size % patch_size:
        raise UserError(f"{architecture}: image_size {image_size} is no multiple of patch_size {patch_size}")
    side = image_size // patch_size
    for stage, (_, height, width) in zip(stages, shapes, strict=True):
        if height != width or (height % side and side % height):
            raise UserError(
                f"{architecture}: the {height}x{width} map of stage {stage!r} does not fit on {side}x{side}"
                f" tokens (image_size {image_size}, patch_size {patch_size})"
            )


def _on_grid(cells: Tensor, grid: tuple[int, int]) -> Tensor:
    """(B, C, h, w) -> (B, C, rows, columns): finer maps are averaged within a cell, coarser ones repeated."""
    (height, width), (rows, columns) = cells.shape[-2:], grid
    if height > rows:
        return F.avg_pool2d(cells, (height // rows, width // columns))
    if height < rows:
        return cells.repeat_interleave(rows // height, dim=2).repeat_interleave(columns // width, dim=3)
    return cells


AutoConfig.register(TokenTowerConfig.model_type, TokenTowerConfig, exist_ok=True)
AutoModel.register(TokenTowerConfig, TokenTower, exist_ok=True)
