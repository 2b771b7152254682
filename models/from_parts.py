"""Stage 1 of every LLaVA begins here: names of a vision tower and a language model -> an ordinary LLaVA.

The image token is added to the language model's vocabulary, its chat template is kept and learns to show
pictures, and the projector is new (or read from a file of LLaVA's).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from .assemble import llava_from_parts, llava_processor, prefix_tokens
from .components import Tower, load_language_model, load_tokenizer, load_tower
from .errors import UserError, nearest
from .own_llava import projector_layers
from .towers import TokenTower
from .two_towers import TwoTowers

ASPECT_RATIOS = ("square", "pad")
"""``square``: a picture is stretched to the tower's square; ``pad``: it is padded to one first, as LLaVA-1.5 does."""

_PROJECTOR_KEYS = ("type", "weights")


def from_parts(
    vision_tower: str | Mapping[str, Any] | Sequence[str | Mapping[str, Any]],
    language_model: str,
    mm_projector: str | Mapping[str, Any] = "mlp2x_gelu",
    *,
    layer: int | None = None,
    image_token: str = "<image>",
    image_aspect_ratio: str = "square",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    weights: bool = True,
    where: Callable[[str], str] = lambda key: f"model.{key}" if key else "model",
) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """A LLaVA and its processor from names.

    Args:
        vision_tower: see :func:`~opsin.models.components.load_tower`; or a list of two or more, whose features are
            joined channel after channel (:class:`~opsin.models.two_towers.TwoTowers`).
        language_model: hub name or folder of a causal language model with its tokenizer.
        mm_projector: type (``mlp2x_gelu``, ``linear``, ``mlp3x_gelu`` ...; see
            :func:`~opsin.models.own_llava.projector_layers`), or ``{type, weights}`` with a file of a trained one
            (LLaVA's ``mm_projector.bin``, or ``.safetensors``).
        layer: hidden state of the tower that is read; None: the last but one, as in LLaVA.
        image_token: stands for one visual token; added to the tokenizer where it is not yet.
        image_aspect_ratio: one of :data:`ASPECT_RATIOS`.
        dtype: of the weights in memory.
        seed: of the projector's weights; PyTorch's global generator is left as it was.
        weights: False: all random, from configurations alone, on the current default device.
        where: key -> its place, for messages.

    Returns:
        The model in ``eval`` mode, nothing frozen, and its processor.

    Raises:
        UserError: a part cannot be found, read or joined to the others; the line says which.
    """
    layers, activation = _projector(mm_projector, where)
    if image_aspect_ratio not in ASPECT_RATIOS:
        raise UserError(
            f"{where('image_aspect_ratio')} '{image_aspect_ratio}': unknown{nearest(image_aspect_ratio, ASPECT_RATIOS)}"
        )
    try:
        tokenizer = load_tokenizer(language_model)
        with torch.random.fork_rng(devices=[]):  # what is drawn here is overwritten
            text = load_language_model(language_model, weights=weights, dtype=dtype)
    except UserError as error:
        raise UserError(f"{where('language_model')}: {error}") from error
    _refuse_text(text, where("language_model"))
    with torch.random.fork_rng(devices=[]):
        tower = _tower(vision_tower, layer, weights, where)
    token_id = add_image_token(text, tokenizer, image_token)
    try:
        model = llava_from_parts(
            tower.model,
            text,
            image_token_id=token_id,
            vision_feature_layer=tower.layer,
            projector_hidden_act=activation,
            projector_layers=layers,
            seed=seed,
        )
    except UserError as error:
        raise UserError(f"{where('vision_tower')}: {error}") from error
    if isinstance(mm_projector, Mapping) and mm_projector.get("weights") is not None:
        load_projector(model, str(mm_projector["weights"]), where("mm_projector"), check=weights)
    generation: Any = model.generation_config
    if generation is not None and generation.pad_token_id is None:
        generation.pad_token_id = tokenizer.pad_token_id
    tokenizer.chat_template = multimodal_template(tokenizer.chat_template, image_token)
    processor = llava_processor(
        model,
        tokenizer,
        image_mean=tower.image_mean,
        image_std=tower.image_std,
        pad=image_aspect_ratio == "pad",
    )
    return model, processor


def _tower(spec: Any, layer: int | None, weights: bool, where: Callable[[str], str]) -> Tower:
    """One tower, or several as one."""
    if isinstance(spec, str | Mapping):
        inside = lambda key: where("vision_tower") + (f".{key}" if key else "")  # noqa: E731
        return load_tower(spec, inside, weights=weights, layer=layer)
    if len(spec) < 2:
        raise UserError(f"{where('vision_towers')}: needs two or more; a single one is vision_tower")
    place = lambda i: lambda key: where("vision_towers") + f".{i}" + (f".{key}" if key else "")  # noqa: E731
    towers = [load_tower(each, place(i), weights=weights, layer=layer) for i, each in enumerate(spec)]
    layers, prefixes = [], []
    for i, tower in enumerate(towers):
        own = isinstance(tower.model, TokenTower)
        layers.append((-1 if own else -2) if tower.layer is None else tower.layer)
        try:
            prefixes.append(prefix_tokens(tower.model))
        except UserError as error:
            raise UserError(f"{place(i)('')}: {error}") from error
    joined = TwoTowers.join(
        [t.model for t in towers],
        layers,
        prefixes,
        [t.image_mean for t in towers],
        [t.image_std for t in towers],
    )
    return Tower(joined, -1, towers[0].image_mean, towers[0].image_std)


def add_image_token(language_model: Any, tokenizer: Any, token: str) -> int:
    """Make ``token`` one of the vocabulary; the embeddings grow where they are too few, both are changed in place.

    New rows of embeddings and head are the mean of the old ones, as LLaVA makes them. (The image token's own are
    never read: visual tokens stand in its place.)

    Returns:
        Its id.
    """
    tokenizer.add_tokens([_special(token)], special_tokens=True)
    token_id = int(tokenizer.convert_tokens_to_ids(token))
    old = language_model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > old:
        with torch.random.fork_rng(devices=[]):
            # A multiple of 64, as tensor cores like it; rows beyond the tokenizer's are never asked for.
            language_model.resize_token_embeddings(len(tokenizer), pad_to_multiple_of=64, mean_resizing=False)
        modules = {language_model.get_input_embeddings(), language_model.get_output_embeddings()}
        with torch.no_grad():
            for rows in {m.weight.data_ptr(): m.weight for m in modules if m is not None}.values():
                rows[old:] = rows[:old].float().mean(dim=0).to(rows.dtype)
            bias = getattr(language_model.get_output_embeddings(), "bias", None)
            if bias is not None:
                bias[old:] = bias[:old].float().mean().to(bias.dtype)
    return token_id


def _special(token: str) -> Any:
    from tokenizers import AddedToken

    return AddedToken(token, special=True, normalized=False)


def multimodal_template(template: str | None, image_token: str) -> str | None:
    """A chat template of text made to take content that is a list of parts, pictures among them.

    Messages whose content is plain text are rendered as before. A template that speaks of pictures itself is
    returned as it is.
    """
    if not isinstance(template, str) or re.search(r"['\"]image", template):
        return template
    return (
        "{%- set opsin = namespace(messages=[]) -%}"
        "{%- for message in messages -%}"
        "{%- if message['content'] is string or message['content'] is not iterable -%}"
        "{%- set opsin.messages = opsin.messages + [message] -%}"
        "{%- else -%}"
        "{%- set content -%}{%- for part in message['content'] -%}"
        "{%- if part['type'] == 'image' -%}{{ '"
        + image_token
        + "\\n' }}{%- else -%}{{ part['text'] }}{%- endif -%}"
        "{%- endfor -%}{%- endset -%}"
        "{%- set opsin.messages = opsin.messages + [dict(message, content=content)] -%}"
        "{%- endif -%}"
        "{%- endfor -%}"
        "{%- set messages = opsin.messages -%}"
    ) + template


def load_projector(model: Any, file: str, where: str, check: bool = True) -> None:
    """Put a trained projector into a LLaVA.

    Args:
        model: its ``multi_modal_projector`` is changed.
        file: ``.safetensors``, or ``.bin``/``.pt`` that holds tensors and nothing else; names may be LLaVA's
            (``model.mm_projector.0.weight``) or transformers' (``multi_modal_projector.linear_1.weight``).
        where: for messages.
        check: False: look whether the file is there, read nothing.

    Raises:
        UserError: no such file, or other tensors.
    """
    path = Path(file)
    if not path.is_file():
        raise UserError(f"{where}.weights: no file '{file}'")
    if not check:
        return
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            stored = load_file(path)
        else:
            stored = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # pickles that would run code, broken files: a dozen kinds
        raise UserError(f"{where}.weights: cannot read '{file}': {str(error).splitlines()[0]}") from error
    projector: nn.Module = model.model.multi_modal_projector
    wanted = projector.state_dict()
    found = {re.sub(r"^.*(mm_projector|multi_modal_projector)\.", "", k): v for k, v in stored.items()}
    # LLaVA counts activations, too: 0, 2, 4 ...; its single layer has no number.
    found = {re.sub(r"^(\d+)\.", lambda m: f"linear_{int(m[1]) // 2 + 1}.", k): v for k, v in found.items()}
    found = {f"linear_1.{k}" if k in ("weight", "bias") else k: v for k, v in found.items()}
    shapes = {k: tuple(v.shape) for k, v in found.items() if k in wanted}
    if shapes != {k: tuple(v.shape) for k, v in wanted.items()}:
        raise UserError(
            f"{where}.weights: '{file}' does not fit: it has {shapes or sorted(stored)[:4]}, "
            f"the projector is { {k: tuple(v.shape) for k, v in wanted.items()} }"
        )
    projector.load_state_dict({k: found[k] for k in wanted})


def _projector(spec: str | Mapping[str, Any], where: Callable[[str], str]) -> tuple[int, str]:
    """Layers of a projector, and the activation between them."""
    given: dict[str, Any] = {"type": spec} if isinstance(spec, str) else dict(spec)
    for key in given:
        if key not in _PROJECTOR_KEYS:
            raise UserError(f"{where('mm_projector')}.{key}: unknown key{nearest(key, _PROJECTOR_KEYS)}")
    try:
        return projector_layers(str(given.get("type", "mlp2x_gelu")))
    except UserError as error:
        raise UserError(f"{where('mm_projector')} {error}") from error


def _refuse_text(text: Any, where: str) -> None:
    """Refuse a language model that cannot be LLaVA's, or of whose logits its class would leave something out."""
    if text.get_decoder() is text or not isinstance(
        getattr(text.get_decoder(), "layers", None), nn.ModuleList
    ):
        raise UserError(
            f"{where}: {type(text).__name__} does not keep its decoder as Llama, Qwen, Mistral or Phi-3 do"
        )
    for key in ("final_logit_softcapping", "logits_scaling", "logit_scale"):
        if getattr(text.config, key, None):
            raise UserError(
                f"{where}: {type(text).__name__} changes its logits ({key}), which LLaVA's class does not"
            )
