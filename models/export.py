"""Between training and an ordinary Hugging Face folder: safetensors, configuration, processor, chat template.

What is written loads in plain ``transformers`` with the same logits, except for a model whose images see
themselves bidirectionally: the configuration then says so (``opsin.image_attention``), plain
``from_pretrained`` gives other logits, and :func:`load_model` restores them.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

from .adapters import merged
from .anatomy import anatomy_of, image_encoder_for
from .errors import UserError
from .portable import make_portable, portable_names
from .vlm import VisionLanguageModel

IMAGE_MARK = "<image>"
"""A picture in a chat template."""

HEADS = "opsin_heads.safetensors"
"""Heads of methods, beside an export made to continue training; dropped from one made for use."""


def full_state_dict(model: nn.Module) -> dict[str, torch.Tensor]:
    """Whole tensors on the CPU, sharded ones gathered; every rank must call this, rank 0 gets the result."""
    rank_zero = not dist.is_initialized() or dist.get_rank() == 0
    state = {}
    for name, value in model.state_dict().items():
        if hasattr(value, "full_tensor"):
            value = value.full_tensor()
        if rank_zero:
            state[name.removeprefix("module.").replace("_checkpoint_wrapped_module.", "")] = (
                value.detach().cpu()
            )
    return state


def export_model(
    model: VisionLanguageModel,
    folder: str | Path,
    *,
    chat_template: str | None = None,
    heads: bool = False,
    notes: dict[str, Any] | None = None,
) -> Path:
    """Write a model as a Hugging Face folder. Every rank must call this; rank 0 writes, atomically.

    Args:
        model: trained model (may be sharded).
        folder: written whole; an existing one is replaced.
        chat_template: jinja text saved with the processor (``data.chat.ChatTemplate.jinja``).
        heads: also write the methods' heads, to continue training from here.
        notes: kept in ``config.json`` under ``opsin`` (name of the chat template ...), see :func:`describe`.
    """
    folder = Path(folder)
    state = full_state_dict(model)
    if dist.is_initialized() and dist.get_rank() != 0:
        dist.barrier()
        return folder
    hf, prefix = model.hf, "net.hf."
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    attention = "bidirectional" if model.net.bidirectional_images else "causal"
    if model.anatomy.bidirectional_images:
        attention = "the family's"
    hf.config.opsin = {**(notes or {}), "image_attention": attention}
    # Adapters are merged: what is written knows nothing of them.
    weights = merged({k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)})
    hf.save_pretrained(partial, state_dict=portable_names(weights, hf.config), safe_serialization=True)
    if model.processor is not None:
        if chat_template is not None:
            # Written with LLaVA's mark for a picture; the family's own processor looks for its own.
            mark = image_encoder_for(model.processor, hf.config).mark
            chat_template = chat_template.replace(IMAGE_MARK, mark)
            model.processor.chat_template = chat_template
            model.processor.tokenizer.chat_template = chat_template
        model.processor.save_pretrained(partial)
    make_portable(partial, model.processor)
    auxiliary = {
        k.removeprefix("net.auxiliary."): v for k, v in state.items() if k.startswith("net.auxiliary.")
    }
    if heads and auxiliary:
        save_file({k: v.contiguous() for k, v in auxiliary.items()}, partial / HEADS)
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
    if dist.is_initialized():
        dist.barrier()
    return folder


def load_model(
    source: str | Path,
    *,
    bidirectional_images: bool | None = None,
    attn_implementation: str | None = None,
    dtype: str = "float32",
    weights: bool = True,
) -> VisionLanguageModel:
    """A model from a Hugging Face folder or hub name, with its processor.

    Args:
        source: folder (an export of ours, or anybody's) or hub name.
        bidirectional_images: None: as the folder's configuration says.
        attn_implementation: ``sdpa``, ``eager``, ``flex_attention`` ...; None: transformers' choice.
        dtype: of the weights in memory.
        weights: False builds the model from its configuration alone (on the current default device).

    Raises:
        UserError: nothing can be loaded from there, or some of the model's tensors are not in it (a vision
            tower would silently stay random).
    """
    from . import own_llava, two_towers  # noqa: F401  our own classes, if a configuration names one

    name = str(source)
    if not (Path(name) / "config.json").is_file() and (Path(name).is_absolute() or name.startswith(".")):
        raise UserError(f"model '{name}': no folder with a config.json")
    options: dict[str, Any] = {"dtype": getattr(torch, dtype, None)}
    if options["dtype"] is None:
        raise UserError(f"model dtype '{dtype}': no dtype of torch; use float32 or bfloat16")
    if attn_implementation is not None:
        options["attn_implementation"] = attn_implementation
    try:
        if weights:
            loaded: Any = AutoModelForImageTextToText.from_pretrained(
                name, output_loading_info=True, **options
            )
            hf, info = loaded
        else:
            hf, info = (
                AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(name), **options),
                {},
            )
        processor = AutoProcessor.from_pretrained(name)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise UserError(
            f"cannot load a vision-language model from '{name}': {str(error).splitlines()[0]}"
        ) from error
    missing = sorted(info.get("missing_keys", ()))
    mismatched = sorted(str(m[0]) for m in info.get("mismatched_keys", ()))
    if missing or mismatched:
        shown = ", ".join([*missing, *mismatched][:5])
        raise UserError(
            f"'{name}' lacks {len(missing) + len(mismatched)} tensors of the model, which would stay random: {shown}"
        )
    if bidirectional_images is False and anatomy_of(hf).bidirectional_images:
        raise UserError(
            f"model.bidirectional_images: false: visual tokens of a {hf.config.model_type} model see all tokens of their "
            "image by its own rule"
        )
    if bidirectional_images is None:
        noted = getattr(hf.config, "opsin", None) or {}
        bidirectional_images = noted.get("image_attention") == "bidirectional"
    model = VisionLanguageModel(hf, processor, bidirectional_images=bool(bidirectional_images))
    heads = Path(name) / HEADS
    if heads.is_file() and weights:
        model.saved_heads = split_heads(load_file(heads))
    return model


def load_processor(source: str | Path) -> tuple[Any, Any]:
    """Processor and configuration of a Hugging Face folder or hub name: how it sees pictures, without weights.

    Raises:
        UserError: they cannot be loaded from there.
    """
    from . import own_llava, two_towers  # noqa: F401  our own classes, if a configuration names one

    try:
        return AutoProcessor.from_pretrained(str(source)), AutoConfig.from_pretrained(str(source))
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise UserError(
            f"cannot load a processor and its configuration from '{source}': {str(error).splitlines()[0]}"
        ) from error


def split_heads(state: dict[str, torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
    """Tensors of ``auxiliary`` by method."""
    heads: dict[str, dict[str, torch.Tensor]] = {}
    for name, value in state.items():
        method, _, rest = name.partition(".")
        heads.setdefault(method, {})[rest] = value
    return heads


def own_classes(config: Any) -> list[str]:
    """Modules that have to be imported before plain transformers loads such a model: they register our own classes."""
    from .own_llava import OwnLlavaConfig
    from .towers import TokenTowerConfig
    from .two_towers import TwoTowersConfig

    parts = (config, getattr(config, "vision_config", None))
    # (two_towers registers the tower of towers as well)
    return [
        k.__module__
        for k in (OwnLlavaConfig, TokenTowerConfig, TwoTowersConfig)
        if type(parts[k is not OwnLlavaConfig]) is k
    ]


def describe(folder: str | Path) -> dict[str, Any]:
    """What the configuration of an export says about Opsin."""
    return json.loads((Path(folder) / "config.json").read_text()).get("opsin") or {}
