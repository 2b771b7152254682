"""timm networks as makers of feature maps: build one by name, load its weights, name its maps."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from .errors import UserError, nearest

HEAD = "head"
"""Name of the network's last map: behind a CNN's head convolution, behind a ViT's final norm."""


def build(architecture: str, image_size: int | None, weights: str | Path | None = None, **create: Any) -> Any:
    """The network for pictures of one size, without its classifier.

    Args:
        architecture: timm's name.
        image_size: height and width of a picture, in pixels; ``None``: the network's own.
        weights: ``None``: random; ``"timm"``: from timm's hub; a file in timm's names.
        create: further arguments of ``timm.create_model``.

    Raises:
        UserError: no such network or file, weights that do not fit, or a network that cannot give its maps.
    """
    import timm  # slow, and whoever loads a CLIP tower does not need it

    if not timm.is_model(architecture):
        raise UserError(f"timm knows no network '{architecture}'{nearest(architecture, timm.list_models())}")
    from_file = weights not in (None, "timm")
    sized = image_size is not None and _has_input_size(architecture)
    size: dict[str, Any] = {"img_size": image_size} if sized and not from_file else {}
    try:
        net: Any = timm.create_model(
            architecture, pretrained=weights == "timm", num_classes=0, **size, **create
        )
    except Exception as error:  # hub, cache, names and shapes: a dozen kinds
        raise UserError(f"{architecture}: timm cannot build it: {error}") from error
    if from_file:
        _load(net, architecture, Path(weights))
        if sized:  # position embeddings are of the network's own size in the file
            net.set_input_size(img_size=image_size)
    if not hasattr(net, "forward_intermediates"):
        raise UserError(f"{architecture}: timm cannot give this network's maps (no forward_intermediates)")
    return net


def keep_buffers_off_meta(net: nn.Module) -> None:
    """Make buffers that no checkpoint holds (relative positions, rotary angles) again, on the CPU.

    ``from_pretrained`` builds on the meta device, and transformers 4 would leave them there.
    """
    with torch.device("cpu"):
        for module in net.modules():
            lost = [n for n in module._non_persistent_buffers_set if getattr(module, n, None) is not None]
            lost = [name for name in lost if getattr(module, name).is_meta]
            for name in lost:
                setattr(module, name, torch.empty_like(getattr(module, name), device="cpu"))
            if lost and hasattr(module, "init_non_persistent_buffers"):
                cast(Any, module).init_non_persistent_buffers()


@functools.cache
def _has_input_size(architecture: str) -> bool:
    """Whether the network is made for one size of pictures, as ViTs are for their position embeddings."""
    import timm

    with torch.device("meta"):
        return hasattr(timm.create_model(architecture), "set_input_size")


def _load(net: Any, architecture: str, path: Path) -> None:
    """Weights from a file. (timm's own loader takes a file of quite another network without a word.)"""
    from timm.models import load_state_dict

    if not path.is_file():
        raise UserError(f"{architecture}: no weights file '{path}'")
    # Transformers' wrapper around timm saves under a prefix.
    stored = {
        k.removeprefix("timm_model."): v for k, v in load_state_dict(str(path), weights_only=True).items()
    }
    missing = [name for name in net.state_dict() if name not in stored]
    if missing:
        raise UserError(f"{architecture}: '{path}' has no '{missing[0]}' ({len(missing)} are missing)")
    try:
        net.load_state_dict({name: stored[name] for name in net.state_dict()})
    except RuntimeError as error:
        raise UserError(f"{architecture}: '{path}' does not fit: {error}") from error


def feature_maps(net: Any, pixels: Tensor, stages: Sequence[str | int]) -> list[Tensor]:
    """The named maps of one forward pass, (B, C, h, w) each."""
    count = len(net.feature_info)
    wanted = [s % count for s in stages if isinstance(s, int)]
    indices = sorted(set(wanted)) or [count - 1]
    if HEAD not in stages:
        maps = net.forward_intermediates(
            pixels, indices=indices, output_fmt="NCHW", intermediates_only=True, stop_early=True
        )
        last = None
    else:
        last, maps = net.forward_intermediates(pixels, indices=indices, output_fmt="NCHW")
        if last.ndim == 3:  # a ViT's tokens, prefix tokens (class, registers) first
            rows, columns = maps[-1].shape[-2:]
            last = (
                last[:, getattr(net, "num_prefix_tokens", 0) :].transpose(1, 2).unflatten(2, (rows, columns))
            )
        elif getattr(net, "output_fmt", "NCHW") == "NHWC":
            last = last.permute(0, 3, 1, 2)
    by_index: dict[Any, Any] = {**dict(zip(indices, maps, strict=True)), HEAD: last}
    return [by_index[s % count if isinstance(s, int) else s] for s in stages]


@functools.lru_cache(maxsize=64)
def map_shapes(
    architecture: str, image_size: int, stages: tuple[str | int, ...]
) -> list[tuple[int, int, int]]:
    """(channels, height, width) of each stage's map, found on the meta device: no weights, no arithmetic."""
    if not stages:
        raise UserError(f"{architecture}: a token tower needs at least one stage")
    with torch.device("meta"):
        net: Any = build(architecture, image_size).eval()
        count = len(net.feature_info)
        for stage in stages:
            if stage != HEAD and not (isinstance(stage, int) and -count <= stage < count):
                raise UserError(f"{architecture}: no stage {stage!r}; there are 'head' and 0 to {count - 1}")
        maps = feature_maps(net, torch.zeros(1, 3, image_size, image_size), stages)
    return [(m.shape[1], m.shape[2], m.shape[3]) for m in maps]
