"""A LLaVA model from parts: vision tower + language model + a fresh projector, and the processor that fits.

Source: LLaVA 1.5 (arXiv 2310.03744) §3.2: a two-layer MLP from the tower's width to the language model's.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from functools import partial
from typing import Any

import torch
import transformers
from transformers import LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

from .components import grid_side
from .components import load_vision_tower as load_vision_tower  # where it was before
from .errors import UserError
from .own_llava import OwnLlava, OwnLlavaConfig, make_projector
from .towers import TokenTower
from .two_towers import TwoTowers


def llava_from_parts(
    vision_tower: Any,
    language_model: Any,
    *,
    image_token_id: int,
    vision_feature_layer: int | None = None,
    projector_hidden_act: str = "gelu",
    projector_layers: int = 2,
    seed: int = 0,
) -> LlavaForConditionalGeneration:
    """Join a vision tower and a language model by a new projector; both are used as they are, not copied.

    Args:
        vision_tower: a ``PreTrainedModel`` that takes ``pixel_values`` and gives ``hidden_states``; its
            config has ``image_size``, ``patch_size`` and ``hidden_size``. It is brought to the language
            model's dtype and device.
        language_model: a ``PreTrainedModel`` for causal language modelling; tied embeddings stay tied.
        image_token_id: the vocabulary's token that stands for one visual token.
        vision_feature_layer: which of the tower's hidden states; default: the last for our own classes
            (:class:`~opsin.models.towers.TokenTower`, :class:`~opsin.models.two_towers.TwoTowers`), else the last but
            one, as in LLaVA.
        projector_hidden_act: between the projector's layers.
        projector_layers: of the projector. With another number than 2, or a language model whose head has a bias, the
            model is a :class:`~opsin.models.own_llava.OwnLlava`, else of transformers' own class.
        seed: of the projector's weights; PyTorch's global generator is left as it was.

    Returns:
        The model in ``eval`` mode, in the language model's dtype, nothing frozen.

    Raises:
        UserError: the tower's tokens form no grid, or the image token is outside the vocabulary.
    """
    text_config = language_model.config
    if not 0 <= image_token_id < text_config.vocab_size:
        raise UserError(f"image token {image_token_id} is outside the vocabulary of {text_config.vocab_size}")
    side = grid_side(vision_tower.config, type(vision_tower).__name__)
    if vision_feature_layer is None:
        vision_feature_layer = -1 if isinstance(vision_tower, TokenTower | TwoTowers) else -2
    head_bias = getattr(language_model.get_output_embeddings(), "bias", None) is not None
    own = projector_layers != 2 or head_bias
    kind = partial(OwnLlavaConfig, projector_layers, head_bias) if own else LlavaConfig
    config = kind(
        vision_config=vision_tower.config,
        text_config=text_config,
        image_token_index=image_token_id,
        image_seq_length=side * side,
        projector_hidden_act=projector_hidden_act,
        vision_feature_select_strategy="default" if prefix_tokens(vision_tower) else "full",
        vision_feature_layer=vision_feature_layer,
        tie_word_embeddings=text_config.tie_word_embeddings,
        pad_token_id=text_config.pad_token_id,
    )
    with torch.device("meta"):  # an empty frame: its parts come ready made
        model = OwnLlava(config) if own else LlavaForConditionalGeneration(config)  # type: ignore[arg-type]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        projector: Any = make_projector(config) if own else LlavaMultiModalProjector(config)
    model.model.vision_tower = vision_tower.to(language_model.device, language_model.dtype)
    model.model.multi_modal_projector = projector.to(language_model.device, language_model.dtype)
    model.model.language_model = language_model.get_decoder()
    model.lm_head = language_model.get_output_embeddings()
    model.tie_weights()
    if language_model.generation_config is not None:
        model.generation_config = deepcopy(language_model.generation_config)
    return model.eval()


def llava_processor(
    model: LlavaForConditionalGeneration,
    tokenizer: Any,
    *,
    image_mean: Sequence[float],
    image_std: Sequence[float],
    chat_template: str | None = None,
    pad: bool = False,
) -> LlavaProcessor:
    """The processor of a model from :func:`llava_from_parts`: pictures are resized to a square, not cropped.

    Args:
        model: decides picture size, number of visual tokens and image token.
        tokenizer: the language model's.
        image_mean, image_std: per channel, for pixels in 0..1, as the tower was trained.
        chat_template: for messages with pictures; default: the tokenizer's.
        pad: first pad a picture to a square with the mean colour (LLaVA's ``image_aspect_ratio: pad``), so that
            nothing is stretched.
    """
    config = model.config
    vision = config.vision_config
    square = {"height": vision.image_size, "width": vision.image_size}
    # transformers 4 keeps the tensor version, which is the only one in 5, under another name.
    kind = "LlavaImageProcessor" if pad else "CLIPImageProcessor"
    before_5 = int(transformers.__version__.split(".")[0]) < 5
    image_processor = getattr(transformers, f"{kind}Fast" if before_5 else kind)
    prefix = config.vision_feature_select_strategy == "default"
    return LlavaProcessor(
        image_processor=image_processor(
            do_resize=True,
            size=square,
            do_center_crop=False,
            crop_size=square,  # LlavaProcessor counts a picture's tokens by it
            image_mean=list(image_mean),
            image_std=list(image_std),
            **({"do_pad": True} if pad else {}),
        ),
        tokenizer=tokenizer,
        patch_size=vision.patch_size,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        num_additional_image_tokens=int(prefix),
        image_token=tokenizer.convert_ids_to_tokens(config.image_token_id),
        chat_template=chat_template or tokenizer.chat_template,
    )


def prefix_tokens(tower: Any) -> int:
    """0 or 1 tokens before the patches (CLIP's class token), counted on the meta device.

    Raises:
        UserError: another number of tokens than patches, or patches and a class token.
    """
    config = deepcopy(tower.config)
    with torch.device("meta"):
        copy = type(tower)(config).eval()
        pixels = torch.zeros(1, 3, config.image_size, config.image_size, dtype=copy.dtype)
        tokens = copy(pixels, output_hidden_states=True).hidden_states[-1].shape[1]
    patches = grid_side(config, type(tower).__name__) ** 2
    if tokens - patches not in (0, 1):
        raise UserError(
            f"{type(tower).__name__} gives {tokens} tokens for {patches} patches; LLaVA drops at most one"
        )
    return tokens - patches
