"""What a LLaVA is put together from, by name or folder: vision towers, language models, tokenizers, colour statistics.

Each function takes ``weights=False`` for a model that is looked at and not run: it is then built from its
configuration on the current default device (``--check`` uses the meta device).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
)

from .errors import UserError, nearest
from .timm_maps import HEAD, build
from .towers import TokenTower, TokenTowerConfig

TIMM = "timm:"
"""What a tower's name begins with when timm is to build it."""

_OF_TOWER = ("name", "layer", "image_mean", "image_std")
_OF_TIMM = ("weights", "image_size", "stages", "rgb", "standardise", "patch_size")


@dataclass(frozen=True)
class Tower:
    """A vision tower and how it is read.

    Attributes:
        model: takes ``pixel_values`` (B, 3, H, W), gives ``hidden_states``.
        layer: which of its hidden states is read; None: LLaVA's choice (the last but one; of a
            :class:`~opsin.models.towers.TokenTower` the last).
        image_mean, image_std: per channel, for pixels in 0..1, as it was trained.
    """

    model: PreTrainedModel
    layer: int | None
    image_mean: tuple[float, ...]
    image_std: tuple[float, ...]


def load_vision_tower(source: str, *, weights: bool = True, **kwargs: Any) -> PreTrainedModel:
    """A vision tower by name or folder: a transformers vision model, or the vision half of a CLIP or SigLIP.

    A folder of timm's (``config.json`` with ``architecture``, as timm's hub has them), or of transformers' wrapper
    around timm, becomes a :class:`~opsin.models.towers.TokenTower`; for one by timm's own name see :func:`load_tower`.

    Args:
        source: hub name or folder with weights.
        weights: False: random, from the configuration alone.
        kwargs: passed to ``from_pretrained`` (``dtype``, ``revision`` ...).

    Raises:
        UserError: nothing is there, it is no vision model, or its weights are not there.
    """
    folder = Path(source)
    plain = _json(folder / "config.json")
    if "architecture" in plain and plain.get("model_type", "timm_wrapper") == "timm_wrapper":
        return _timm_folder(folder, plain, {}, None, weights)
    try:
        config = AutoConfig.from_pretrained(source)
        config = getattr(config, "vision_config", config)
        grid_side(config, source)
        if not weights:
            return AutoModel.from_config(config, **kwargs)
        model, info = AutoModel.from_pretrained(source, config=config, output_loading_info=True, **kwargs)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot load a vision tower from '{source}': {_first_line(error)}") from error
    _refuse_missing(source, "vision tower", info)
    return model


def load_tower(
    spec: str | Mapping[str, Any],
    where: Callable[[str], str],
    *,
    weights: bool = True,
    layer: int | None = None,
) -> Tower:
    """A tower as a configuration names it.

    Args:
        spec: hub name or folder; ``timm:NAME``; or a mapping with that as ``name`` and ``layer``, ``image_mean``,
            ``image_std``; of timm also ``weights`` (a file; default: what timm's hub has) and the keywords of
            :class:`~opsin.models.towers.TokenTowerConfig`.
        where: key -> its place, for messages.
        weights: False: random, from the configuration alone.
        layer: which hidden state is read where ``spec`` does not say; of a ViT of timm it chooses the block.

    Raises:
        UserError: unknown key, nothing is there, or the colour statistics are not known.
    """
    given: dict[str, Any] = {"name": spec} if isinstance(spec, str) else dict(spec)
    name = given.pop("name", None)
    if not isinstance(name, str) or not name:
        raise UserError(f"{where('name')}: needs a folder, a hub name, or timm:NAME")
    folder = Path(name)
    plain = {} if name.startswith(TIMM) else _json(folder / "config.json")
    from_timm = name.startswith(TIMM) or (
        "architecture" in plain and plain.get("model_type", "timm_wrapper") == "timm_wrapper"
    )
    known = (*_OF_TOWER, *(_OF_TIMM if from_timm else ()))
    for key in given:
        if key not in known:
            more = "" if from_timm or key not in _OF_TIMM else " (it is for towers of timm)"
            raise UserError(f"{where(key)}: unknown key{more}{nearest(key, known)}")
    layer = given.pop("layer", layer)
    if layer is not None and (not isinstance(layer, int) or isinstance(layer, bool)):
        raise UserError(f"{where('layer')}: expected the number of a hidden state, such as -2; got {layer!r}")
    mean, std = (_colour(given.pop(key, None), where(key)) for key in ("image_mean", "image_std"))
    try:
        if from_timm:
            plain = plain or {"architecture": name.removeprefix(TIMM)}
            source = None if name.startswith(TIMM) else folder
            model = _timm_folder(source, plain, given, layer, weights)
            layer = None
        else:
            model = load_vision_tower(name, weights=weights)
    except UserError as error:
        raise UserError(f"{where('')}: {error}") from error
    if mean is None or std is None:
        found = _timm_colours(plain) if from_timm else _colours(name)
        if found is None:
            raise UserError(
                f"{where('')}: '{name}' does not say how pictures are normalised (no image processor there); "
                "give vision_tower: {name: ..., image_mean: [r, g, b], image_std: [r, g, b]}"
            )
        mean, std = mean or found[0], std or found[1]
    return Tower(model, layer, mean, std)


def load_language_model(
    source: str, *, weights: bool = True, dtype: torch.dtype = torch.float32, **kwargs: Any
) -> PreTrainedModel:
    """A causal language model by name or folder, in ``eval`` mode.

    Args:
        source: hub name or folder with weights.
        weights: False: random, from the configuration alone.
        dtype: of its weights in memory.
        kwargs: passed to ``from_pretrained`` (``attn_implementation`` ...).

    Raises:
        UserError: nothing is there, it is no causal language model, or some of its weights are not there.
    """
    try:
        if not weights:
            config = AutoConfig.from_pretrained(source)
            return AutoModelForCausalLM.from_config(config, dtype=dtype, **kwargs).eval()
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source, dtype=dtype, output_loading_info=True, **kwargs
        )
        model, info = loaded
    except (OSError, ValueError, ImportError) as error:
        raise UserError(f"cannot load a language model from '{source}': {_first_line(error)}") from error
    _refuse_missing(source, "language model", info)
    return model.eval()


def load_tokenizer(source: str) -> Any:
    """The tokenizer beside a language model; without a padding token it pads with ``<unk>``, else with its end.

    (Padding is told by the attention mask; LLaVA pads Vicuna with ``<unk>``, too.)

    Raises:
        UserError: there is none, or a slow one only: labels need the place of each token in the text.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError, ImportError) as error:
        raise UserError(f"cannot load a tokenizer from '{source}': {_first_line(error)}") from error
    if not tokenizer.is_fast:
        raise UserError(f"'{source}' has a slow tokenizer only; save a fast one there (tokenizer.json)")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    return tokenizer


def grid_side(config: Any, name: str) -> int:
    """Patches along one side of a tower's picture.

    Raises:
        UserError: its configuration is not one of a vision tower.
    """
    sizes = [getattr(config, key, None) for key in ("image_size", "patch_size", "hidden_size")]
    if not all(isinstance(size, int) and size > 0 for size in sizes):
        raise UserError(
            f"{name} is no LLaVA vision tower: its config needs image_size, patch_size, hidden_size"
        )
    return config.image_size // config.patch_size


def _timm_folder(
    folder: Path | None, plain: Mapping[str, Any], given: Mapping[str, Any], layer: int | None, weights: bool
) -> TokenTower:
    """A timm network as a tower: from timm's hub (``folder`` None) or a folder; ``given``: keywords of a configuration."""
    options = dict(given)
    architecture = str(plain["architecture"])
    file = options.pop("weights", None)
    if file is None:
        file = "timm" if folder is None else str(folder / "model.safetensors")
    with torch.device("meta"):
        net = build(architecture, None)
    if "image_size" not in options:
        options["image_size"] = int(_timm_cfg(plain).get("input_size", (3, 224, 224))[-1])
    if "stages" not in options:
        # A ViT is read where LLaVA reads it, before its last block; a CNN at its end.
        options["stages"] = [-2 if layer is None else layer] if hasattr(net, "num_prefix_tokens") else [HEAD]
    config = TokenTowerConfig(architecture, **options)
    tower = TokenTower(config).eval()
    if weights:
        tower.net = build(architecture, config.image_size, file)
    return tower.eval()


def _timm_cfg(plain: Mapping[str, Any]) -> dict[str, Any]:
    """timm's facts on a network's pictures: ``input_size``, ``mean``, ``std``."""
    from timm.models import get_pretrained_cfg

    stored = plain.get("pretrained_cfg")
    if isinstance(stored, Mapping):
        return dict(stored)
    found = get_pretrained_cfg(str(plain["architecture"]))
    return {} if found is None else found.to_dict()


def _timm_colours(plain: Mapping[str, Any]) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    known = _timm_cfg(plain)
    return (tuple(known["mean"]), tuple(known["std"])) if "mean" in known and "std" in known else None


def _colours(source: str) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """Mean and deviation by which a folder's image processor normalises; None: it has no such processor."""
    try:
        processor: Any = AutoImageProcessor.from_pretrained(source)
    except (OSError, ValueError, KeyError, ImportError):
        return None
    if not getattr(processor, "do_normalize", True):
        return (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    mean, std = (getattr(processor, key, None) for key in ("image_mean", "image_std"))
    return None if mean is None or std is None else (tuple(mean), tuple(std))


def _colour(value: Any, place: str) -> tuple[float, ...] | None:
    if value is None:
        return None
    ok = isinstance(value, list | tuple) and len(value) == 3
    if not ok or not all(isinstance(v, int | float) and not isinstance(v, bool) for v in value):
        raise UserError(f"{place}: expected three numbers (red, green, blue), got {value!r}")
    return tuple(float(v) for v in value)


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}  # no folder, or a broken file: transformers says what is the matter
    return content if isinstance(content, dict) else {}


def _refuse_missing(source: str, what: str, info: Any) -> None:
    missing = sorted(cast(Any, info).get("missing_keys", ()))
    mismatched = [str(m[0]) for m in cast(Any, info).get("mismatched_keys", ())]
    if missing or mismatched:
        shown = ", ".join([*missing, *mismatched][:3])
        raise UserError(
            f"'{source}' lacks {len(missing) + len(mismatched)} tensors of the {what}, which would stay random: {shown}"
        )


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
