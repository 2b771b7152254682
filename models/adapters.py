"""Low-rank adapters (LoRA) on a language model's linear layers: put in, counted, and merged away again.

Source: arXiv 2106.09685 §4.1: W + (alpha / r) B A with W frozen, A (r, in) random and B (out, r) zero at first. The
layers are those of the ``peft`` package, put in place (``inject_adapter_in_model``), so that every path of
:mod:`.anatomy` still leads where it led. Tower, projector and heads have none: ``trainable`` says whether they are
trained, whole.

Each adapted layer keeps its factor alpha / r as a buffer, so that a state alone can be merged: an export, the
checkpoint of another run, a sharded model whose tensors were gathered.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .errors import UserError, nearest

if TYPE_CHECKING:
    from .vlm import VisionLanguageModel

_NAME = "default"
_BASE, _DOWN, _UP, _SCALE = (
    ".base_layer.",
    f".lora_A.{_NAME}.weight",
    f".lora_B.{_NAME}.weight",
    ".lora_scaling",
)
ALL_LINEAR = "all-linear"
_ELSEWHERE = {
    "modules_to_save": "trainable says which other parts are trained, whole",
    "bias": "biases stay frozen; leave it out",
    "use_dora": "DoRA is not supported; leave it out",
    "inference_mode": "adapters are there to be trained",
    "base_model_name_or_path": "the model is model.pretrained_model_name_or_path",
    "init_from": "start from a run with init_from",
}


@dataclass(frozen=True)
class LoraSettings:
    """``peft_config`` of a stage; the names are peft's and llm-foundry's.

    Attributes:
        r: rank.
        lora_alpha: the update counts lora_alpha / r times (``use_rslora``: / sqrt(r)).
        lora_dropout: of an adapter's input while training, 0 .. 1.
        target_modules: ``all-linear`` (of the decoder's layers), names of linear layers (``q_proj``), or a regular
            expression for their whole paths. Layers outside of the language model's are never taken.
        exclude_modules: the same, left out again.
        layers_to_transform: numbers of the decoder layers that get adapters, 0 .. N - 1; None: all.
        rank_pattern, alpha_pattern: other values of r and lora_alpha by layer name.
        use_rslora: see ``lora_alpha``.
        init_lora_weights: True: B = 0, so that training starts from the model itself; ``gaussian``: the same with a
            normal A; False: B random too (for tests).
    """

    r: int = 8
    lora_alpha: float = 16
    lora_dropout: float = 0.0
    target_modules: Any = ALL_LINEAR
    exclude_modules: Any = None
    layers_to_transform: Any = None
    rank_pattern: Any = None
    alpha_pattern: Any = None
    use_rslora: bool = False
    init_lora_weights: Any = True

    @staticmethod
    def of(
        given: Mapping[str, Any], place: Callable[..., str] = lambda *key: ".".join(("peft_config", *key))
    ) -> LoraSettings:
        """Settings from a configuration.

        Args:
            given: ``peft_config``.
            place: key -> its place, for messages.

        Raises:
            UserError: another adapter than LoRA, an unknown key, or a value that cannot be.
        """
        known = [f.name for f in fields(LoraSettings)]
        kind = given.get("peft_type", "LORA")
        if str(kind).upper() != "LORA":
            raise UserError(f"{place('peft_type')}: '{kind}': LORA is what there is")
        if str(given.get("task_type", "CAUSAL_LM")).upper() != "CAUSAL_LM":
            raise UserError(f"{place('task_type')}: '{given['task_type']}': CAUSAL_LM is what there is")
        own = {k: v for k, v in given.items() if k not in ("peft_type", "task_type")}
        for key, value in own.items():
            if key in _ELSEWHERE and not (key == "bias" and value == "none"):
                raise UserError(f"{place(key)}: not here: {_ELSEWHERE[key]}")
            if key not in known and key != "bias":
                raise UserError(f"{place(key)}: unknown key{nearest(key, known)}")
        made = LoraSettings(**{k: v for k, v in own.items() if k != "bias"})
        for key, wrong in made._wrong().items():
            if wrong:
                raise UserError(f"{place(key)}: {wrong}, got {getattr(made, key)!r}")
        return made

    def _wrong(self) -> dict[str, str | bool]:
        def number(value: Any, least: float, most: float = sys.float_info.max) -> bool:
            return isinstance(value, int | float) and not isinstance(value, bool) and least <= value <= most

        def whole(value: Any) -> bool:
            return type(value) is int and value >= 1

        def pattern(value: Any, fits: Callable[[Any], bool]) -> bool:
            return value is None or (isinstance(value, Mapping) and all(fits(v) for v in value.values()))

        def names(value: Any) -> bool:
            return isinstance(value, str) or (
                isinstance(value, list) and all(isinstance(v, str) for v in value)
            )

        layers = self.layers_to_transform
        layers = layers if isinstance(layers, list) else [] if layers is None else [layers]
        return {
            "r": not whole(self.r) and "expected a whole number, 1 or more",
            "lora_alpha": not (number(self.lora_alpha, 0) and self.lora_alpha > 0)
            and "expected a number above 0",
            "lora_dropout": not (number(self.lora_dropout, 0, 1) and self.lora_dropout < 1)
            and "expected a number, 0 or more and below 1",
            "target_modules": not (self.target_modules and names(self.target_modules))
            and f"expected {ALL_LINEAR}, names of layers or a regular expression",
            "exclude_modules": not (self.exclude_modules is None or names(self.exclude_modules))
            and "expected names of layers or a regular expression",
            "layers_to_transform": not all(type(n) is int and n >= 0 for n in layers)
            and "expected numbers of layers",
            "rank_pattern": not pattern(self.rank_pattern, whole)
            and "expected a mapping of layer names to whole numbers, 1 or more",
            "alpha_pattern": not pattern(self.alpha_pattern, lambda v: number(v, 0) and v > 0)
            and "expected a mapping of layer names to numbers above 0",
            "use_rslora": type(self.use_rslora) is not bool and "expected true or false",
            "init_lora_weights": not (
                type(self.init_lora_weights) is bool or self.init_lora_weights == "gaussian"
            )
            and "expected true, false or gaussian",
        }


def targets(model: VisionLanguageModel, settings: LoraSettings) -> list[str]:
    """Paths inside the decoder of the linear layers that get an adapter.

    Raises:
        UserError: a name that no linear layer of the language model has.
    """
    anatomy, hf = model.anatomy, model.hf
    layers = anatomy.decoder_layers(hf)
    inside = {
        f"{anatomy.layers}.{name}": int(name.split(".")[0])
        for name, module in layers.named_modules()
        if isinstance(module, nn.Linear)
    }
    asked = settings.layers_to_transform
    numbers = None if asked is None else set(asked if isinstance(asked, list) else [asked])
    if numbers is not None and max(numbers, default=0) >= len(layers):
        raise UserError(
            f"peft_config.layers_to_transform: {max(numbers)}: the language model has layers 0 to {len(layers) - 1}"
        )
    chosen = _matching(settings.target_modules, list(inside), anatomy.language_model, "target_modules", hf)
    if settings.exclude_modules is not None:
        out = _matching(settings.exclude_modules, list(inside), anatomy.language_model, "exclude_modules", hf)
        chosen = [name for name in chosen if name not in out]
    chosen = [name for name in chosen if numbers is None or inside[name] in numbers]
    if not chosen:
        raise UserError("peft_config: no layer is left to adapt")
    for key in ("rank_pattern", "alpha_pattern"):
        for name in getattr(settings, key) or {}:
            _refuse_idle(key, str(name), chosen)
    return chosen


def _refuse_idle(key: str, pattern: str, chosen: list[str]) -> None:
    """A pattern that meets no adapted layer: peft would pass over it. Its rule: an expression for the path or its end."""
    try:
        rule = re.compile(rf"(.*\.)?({pattern})$")
    except re.error as error:
        raise UserError(f"peft_config.{key}: '{pattern}' is no regular expression ({error})") from error
    if not any(rule.match(name) for name in chosen):
        ends = {name.rpartition(".")[2] for name in chosen}
        raise UserError(f"peft_config.{key}: no adapted layer is '{pattern}'{nearest(pattern, ends)}")


def _matching(asked: Any, inside: list[str], decoder: str, key: str, hf: nn.Module) -> list[str]:
    if asked == ALL_LINEAR:
        return inside
    found: set[str] = set()
    for one in [asked] if isinstance(asked, str) else asked:
        whole = isinstance(
            asked, str
        )  # a text is an expression for the path, as in peft; a list names endings
        try:
            rule = re.compile(one if whole else rf"(.*\.)?{re.escape(one)}")
        except re.error as error:
            raise UserError(f"peft_config.{key}: '{one}' is no regular expression ({error})") from error
        hits = {name for name in inside if rule.fullmatch(f"{decoder}.{name}")}
        if not hits:
            other = next(
                (n for n, m in hf.named_modules() if isinstance(m, nn.Linear) and rule.fullmatch(n)), None
            )
            if other is not None:
                raise UserError(
                    f"peft_config.{key}: '{one}' is {other}, and adapters go to the language model's layers alone; "
                    "trainable says which other parts are trained, whole"
                )
            ends = {name.rpartition(".")[2] for name in inside}
            raise UserError(f"peft_config.{key}: the language model has no layer '{one}'{nearest(one, ends)}")
        found |= hits
    return [name for name in inside if name in found]


def add_adapters(model: VisionLanguageModel, settings: LoraSettings, seed: int) -> None:
    """Freeze the language model and give its linear layers adapters to be trained, in place.

    Args:
        model: not wrapped yet; parts frozen as the stage says.
        settings: see :class:`LoraSettings`.
        seed: of the adapters' weights; PyTorch's global generator is left as it was.

    Raises:
        UserError: the language model is frozen, a layer is not there, or ``peft`` is not installed.
    """
    own = model.parameters_of(["language_model"])
    if not any(p.requires_grad for p in own):
        raise UserError(
            "peft_config: adapters are the language model's, which trainable.language_model: false freezes; "
            "leave one of them out"
        )
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise UserError("peft_config: needs the package peft; pip install 'opsin[lora]'") from error
    chosen = targets(model, settings)
    config = LoraConfig(
        r=settings.r,
        lora_alpha=settings.lora_alpha,  # type: ignore[arg-type]
        lora_dropout=settings.lora_dropout,
        target_modules=chosen,
        rank_pattern=dict(settings.rank_pattern or {}),
        alpha_pattern=dict(settings.alpha_pattern or {}),
        use_rslora=settings.use_rslora,
        init_lora_weights=settings.init_lora_weights,
    )
    for parameter in own:
        parameter.requires_grad_(False)
    with torch.random.fork_rng(devices=[]), torch.device(own[0].device):
        torch.manual_seed(seed)
        inject_adapter_in_model(config, model.anatomy.decoder(model.hf), _NAME)
    for name in chosen:
        layer: Any = model.anatomy.decoder(model.hf).get_submodule(name)
        scale = torch.tensor(float(layer.scaling[_NAME]), device=own[0].device)
        layer.register_buffer(_SCALE[1:], scale)


@dataclass(frozen=True)
class AdapterCount:
    """How many layers have adapters, and how many parameters these are of those of the language model."""

    layers: int
    parameters: int
    base: int


def count_adapters(model: VisionLanguageModel) -> AdapterCount | None:
    """What :func:`add_adapters` put in; None: nothing (works on the meta device)."""
    decoder = model.anatomy.decoder(model.hf)
    layers = sum(name.endswith(_SCALE[1:]) for name, _ in decoder.named_buffers())
    if not layers:
        return None
    own = sum(p.numel() for n, p in decoder.named_parameters() if ".lora_" in n)
    return AdapterCount(layers, own, sum(p.numel() for p in model.parameters_of(["language_model"])) - own)


def merged(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A state without adapters: W + (alpha / r) B A in place of each adapted W, under W's own name.

    Args:
        state: whole tensors by name; one without adapters is given back as it is.

    Returns:
        tensors in the dtype of W; the product is made in float32.
    """
    adapted = [name.removesuffix(_SCALE) for name in state if name.endswith(_SCALE)]
    if not adapted:
        return dict(state)
    result: dict[str, torch.Tensor] = {}
    for name, value in state.items():
        path, base, kind = name.rpartition(_BASE)
        if base and path in adapted:
            if kind == "weight":
                up, down = state[path + _UP].float(), state[path + _DOWN].float()
                value = (value.float() + state[path + _SCALE].float() * (up @ down)).to(value.dtype)
            result[f"{path}.{kind}"] = value
        elif not name.endswith((_SCALE, _DOWN, _UP)):
            result[name] = value
    return result
