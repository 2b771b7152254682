"""``torch.compile`` of what a step spends its time in: decoder layers and the blocks of heads, in place.

What is compiled is each layer's ``forward``, not its call: hooks on the layer (taps, FSDP2's, checkpointing) run
outside, as they do without. ``nn.Module.compile`` would trace them along, and torch takes hooks that come later for
never having come: a tap that is asked for in the second step would not fire. Composer's ``compile_config`` compiles the
whole ``forward``, the batch's bookkeeping with it. Names of parameters, states and exports stay as they are.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .errors import UserError, nearest

if TYPE_CHECKING:
    from .vlm import VisionLanguageModel

MODES = ("default", "max-autotune-no-cudagraphs")
CUDA_GRAPHS = ("reduce-overhead", "max-autotune")

VARIANTS = 64
"""Variants of a layer that may be compiled: with and without a mask, gradient, adapters, training, autocast."""


@dataclass(frozen=True)
class CompileSettings:
    """``compile`` of a stage; the names are those of ``torch.compile``.

    Attributes:
        backend: ``inductor``, or another of ``torch.compiler.list_backends(exclude_tags=())``.
        mode: of inductor: ``default`` or ``max-autotune-no-cudagraphs``.
        dynamic: True: sizes of batches are variables from the start; None: from the second size on; False: each size
            is compiled anew.
        fullgraph: a layer that is not one graph is an error.
    """

    backend: str = "inductor"
    mode: str | None = None
    dynamic: bool | None = True
    fullgraph: bool = False

    @staticmethod
    def of(
        given: Any, place: Callable[..., str] = lambda *key: ".".join(("compile", *key))
    ) -> CompileSettings | None:
        """Settings from a configuration: ``true``, ``false`` or a mapping; None: nothing is compiled.

        Args:
            given: ``compile``.
            place: key -> its place, for messages.

        Raises:
            UserError: an unknown key, or a value that cannot be.
        """
        if given is None or isinstance(given, bool):
            return CompileSettings() if given else None
        if not isinstance(given, Mapping):
            raise UserError(f"{place()}: expected true, false or a mapping, got {given!r}")
        known = [f.name for f in fields(CompileSettings)]
        for key in given:
            if key not in known:
                raise UserError(f"{place(key)}: unknown key{nearest(str(key), known)}")
        made = CompileSettings(**given)
        offered = torch.compiler.list_backends(exclude_tags=())
        if made.backend not in offered:
            raise UserError(
                f"{place('backend')}: '{made.backend}': unknown{nearest(str(made.backend), offered)}"
            )
        for key in ("dynamic", "fullgraph"):
            value = getattr(made, key)
            if not isinstance(value, bool) and not (key == "dynamic" and value is None):
                raise UserError(f"{place(key)}: expected true or false, got {value!r}")
        for key, wrong, instead in (
            ("mode", made.mode in CUDA_GRAPHS, ", ".join(MODES)),
            ("backend", made.backend == "cudagraphs", "inductor"),
        ):
            if wrong:
                raise UserError(
                    f"{place(key)}: '{getattr(made, key)}': its CUDA graphs write over outputs that methods keep; use {instead}"
                )
        if made.mode is not None and (made.mode not in MODES or made.backend != "inductor"):
            hint = nearest(str(made.mode), MODES) if made.backend == "inductor" else "; modes are inductor's"
            raise UserError(f"{place('mode')}: '{made.mode}': unknown{hint}")
        return made


class CompiledForward:
    """The compiled ``forward`` of one module, standing in for it as an attribute of that module.

    A copy of the module (``copy.deepcopy``: a teacher, say) gets one of its own; a compiled function alone would go on
    reading the weights of the module that was copied.
    """

    def __init__(self, module: nn.Module, settings: CompileSettings):
        self.module, self.settings = module, settings
        # Of the class: an instance's attribute is what this one replaces.
        plain = type(module).forward.__get__(module)
        self.compiled = torch.compile(
            plain,
            backend=settings.backend,
            mode=settings.mode,
            dynamic=settings.dynamic,
            fullgraph=settings.fullgraph,
        )
        functools.update_wrapper(self, plain, updated=())

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As the module's own ``forward``."""
        return self.compiled(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> CompiledForward:
        import copy

        return CompiledForward(copy.deepcopy(self.module, memo), self.settings)

    def __reduce__(self) -> Any:
        return CompiledForward, (self.module, self.settings)


def compile_in_place(module: nn.Module, settings: CompileSettings) -> None:
    """Compile a module's ``forward``, once."""
    if not isinstance(module.__dict__.get("forward"), CompiledForward):
        module.forward = CompiledForward(module, settings)  # type: ignore[method-assign]


def compile_model(model: VisionLanguageModel, settings: CompileSettings | None) -> None:
    """Compile the decoder's layers, and from now on the blocks of every head that a method attaches."""
    model.compile_settings = settings
    if settings is None:
        return
    # All layers share one function, and so its number of variants; beyond it torch goes on uncompiled.
    config: Any = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, VARIANTS)
    for layer in model.anatomy.decoder_layers(model.hf):
        compile_in_place(layer, settings)


def compile_head(model: VisionLanguageModel, head: nn.Module) -> int:
    """Compile the blocks of a head: the modules of its ``blocks`` (an ``nn.ModuleList``), if it has some.

    Returns:
        how many were compiled.
    """
    blocks = getattr(head, "blocks", None)
    if model.compile_settings is None or not isinstance(blocks, nn.ModuleList):
        return 0
    for block in blocks:
        compile_in_place(block, model.compile_settings)
    return len(blocks)
