"""A LLaVA with what the class of transformers lacks: other projectors than two layers, and a head with a bias (Phi).

It is transformers' LLaVA in all else. Importing this module registers it with ``AutoConfig`` and
``AutoModelForImageTextToText``: a saved one loads there after ``import opsin.models.own_llava``.
"""

from __future__ import annotations

import re
from typing import Any

from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    LlavaConfig,
    LlavaForConditionalGeneration,
)
from transformers.activations import ACT2FN

from .errors import UserError, nearest

KINDS = ("mlp2x_gelu", "linear", "mlp1x", "mlp3x_gelu", "mlp2x_silu")
"""Some types of projectors, for messages."""


def projector_layers(kind: str) -> tuple[int, str]:
    """Number of layers and activation between them: ``linear`` is one layer, ``mlp<N>x_<activation>`` N (LLaVA's names).

    Raises:
        UserError: no such type.
    """
    if kind in ("linear", "mlp1x"):
        return 1, "linear"
    found = re.fullmatch(r"mlp([1-9])x_(\w+)", kind)
    if found is None or found[2] not in ACT2FN:
        raise UserError(f"'{kind}': no type of projector{nearest(kind, KINDS)}")
    return int(found[1]), found[2]


class Projector(nn.Module):
    """``linear_1`` from the tower's width to the language model's, then as many more as there are layers.

    Args:
        vision, text: widths.
        layers: 1 or more.
        activation: between two layers, as transformers names it.
        bias: of every layer.
    """

    def __init__(self, vision: int, text: int, layers: int, activation: str, bias: bool = True):
        super().__init__()
        self.act = ACT2FN[activation]
        self.layers = layers
        for i in range(1, layers + 1):
            self.add_module(f"linear_{i}", nn.Linear(vision if i == 1 else text, text, bias=bias))

    def forward(self, image_features: Tensor) -> Tensor:
        """(..., vision) -> (..., text)."""
        hidden = self.get_submodule("linear_1")(image_features)
        for i in range(2, self.layers + 1):
            hidden = self.get_submodule(f"linear_{i}")(self.act(hidden))
        return hidden


class OwnLlavaConfig(LlavaConfig):
    """LLaVA's configuration, and:

    Args:
        projector_layers: of the projector; ``projector_hidden_act`` stands between them.
        head_bias: the head has a bias.
    """

    model_type = "opsin_llava"

    def __init__(self, projector_layers: int = 2, head_bias: bool = False, **kwargs: Any):
        super().__init__(**kwargs)
        self.projector_layers, self.head_bias = projector_layers, head_bias


class OwnLlava(LlavaForConditionalGeneration):
    """``LlavaForConditionalGeneration`` with another projector or head; parts have the same names."""

    config_class = OwnLlavaConfig

    def __init__(self, config: OwnLlavaConfig):
        super().__init__(config)
        self.model.multi_modal_projector = make_projector(config)  # type: ignore[assignment]
        if config.head_bias:
            text = config.text_config
            self.lm_head = nn.Linear(text.hidden_size, text.vocab_size)
        self.post_init()


def make_projector(config: Any) -> Projector:
    """The projector that a LLaVA's configuration says; two layers where it says nothing."""
    return Projector(
        config.vision_config.hidden_size,
        config.text_config.hidden_size,
        getattr(config, "projector_layers", 2),
        config.projector_hidden_act,
        config.multimodal_projector_bias,
    )


def _same_names() -> None:
    """Save and load under LLaVA's names: 4.57 keeps these with the class, which ours inherits; 5 in a table."""
    try:
        from transformers import conversion_mapping as table  # type: ignore[attr-defined]
    except ImportError:
        return
    names = table.get_checkpoint_conversion_mapping("llava")
    table.register_checkpoint_conversion_mapping(OwnLlavaConfig.model_type, names, overwrite=True)


_same_names()
AutoConfig.register(OwnLlavaConfig.model_type, OwnLlavaConfig, exist_ok=True)
AutoModelForImageTextToText.register(OwnLlavaConfig, OwnLlava, exist_ok=True)
