"""Registries by name, with descriptions and entry points: how another package adds to Opsin.

A package registers under the entry-point groups ``opsin_algorithms``, ``opsin_models``, ``opsin_datasets``,
``opsin_evaluations``, ``opsin_analyses`` and ``opsin_patch_targets``; Composer's own algorithms, callbacks, loggers, optimizers and schedulers are
reachable by their snake-case names.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import catalogue

from ..models.errors import UserError, nearest

_SINGULAR = {"analyses": "analysis", "evaluations": "suite"}


class Registry:
    """A named table of constructors.

    Args:
        name: also the entry-point group (``opsin_<name>``).
        description: one sentence for ``opsin registry``.
        builtin: name -> ``module:attribute`` of what ships with Opsin; imported when asked for.
        composer: a function that lists Composer's own, by snake-case name.
    """

    def __init__(
        self,
        name: str,
        description: str,
        builtin: dict[str, str],
        composer: Callable[[], dict[str, Any]] | None = None,
    ):
        self.name = name
        self.description = description
        self.builtin = builtin
        self._composer = composer
        self._catalogue = catalogue.create("opsin", name, entry_points=True)

    def register(self, name: str, made: Any) -> None:
        """Add an entry at run time."""
        self._catalogue.register(name, func=made)

    def added(self) -> list[str]:
        """Names that other packages or the program itself added."""
        return sorted(self._catalogue.get_all())

    def names(self) -> list[str]:
        """All names, sorted."""
        extra = self._composer() if self._composer else {}
        return sorted({*self.builtin, *self._catalogue.get_all(), *extra})

    def get(self, name: str, where: str) -> Any:
        """The constructor called ``name``.

        Raises:
            UserError: there is none; the line names the nearest one.
        """
        if name in self.builtin:
            module, attribute = self.builtin[name].split(":")
            return getattr(importlib.import_module(module, "opsin.training"), attribute)
        if name in self._catalogue:
            return self._catalogue.get(name)
        extra = self._composer() if self._composer else {}
        if name in extra:
            return extra[name]
        one = _SINGULAR.get(self.name, self.name.removesuffix("s"))
        raise UserError(f"{where}: unknown {one} '{name}'{nearest(name, self.names())}")


def _snake(name: str) -> str:
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name).lower()


def _public_classes(module: str, base: str, suffix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    package = importlib.import_module(module)
    root = getattr(importlib.import_module(base.rpartition(".")[0]), base.rpartition(".")[2])
    for name in dir(package):
        value = getattr(package, name)
        if isinstance(value, type) and issubclass(value, root) and value is not root:
            found[_snake(name).removesuffix(suffix) if suffix else _snake(name)] = value
    return found


@lru_cache(1)
def _composer_algorithms() -> dict[str, Any]:
    return _public_classes("composer.algorithms", "composer.core.Algorithm")


@lru_cache(1)
def _composer_callbacks() -> dict[str, Any]:
    return _public_classes("composer.callbacks", "composer.core.Callback")


@lru_cache(1)
def _composer_loggers() -> dict[str, Any]:
    found = _public_classes("composer.loggers", "composer.loggers.LoggerDestination")
    # llm-foundry's names
    short = {"tensorboard_logger": "tensorboard", "wand_blogger": "wandb", "wand_b_logger": "wandb",
             "ml_flow_logger": "mlflow", "mlflow_logger": "mlflow", "file_logger": "file",
             "in_memory_logger": "inmemory", "neptune_logger": "neptune", "comet_ml_logger": "comet",
             "slack_logger": "slack"}  # fmt: skip
    return {short.get(name, name): value for name, value in found.items()}


@lru_cache(1)
def _composer_optimizers() -> dict[str, Any]:
    import torch

    found = _public_classes("composer.optim", "torch.optim.Optimizer")
    found.update({_snake(n): getattr(torch.optim, n) for n in ("AdamW", "Adam", "SGD", "RMSprop", "Adagrad")})
    found["adamw"] = torch.optim.AdamW
    return {_rename(n): v for n, v in found.items()}


def _rename(name: str) -> str:
    return {"decoupled_adam_w": "decoupled_adamw", "decoupled_sgdw": "decoupled_sgdw", "adam_w": "adamw",
            "decoupled_sgd_w": "decoupled_sgdw"}.get(name, name)  # fmt: skip


@lru_cache(1)
def _composer_schedulers() -> dict[str, Any]:
    found = _public_classes("composer.optim", "composer.optim.ComposerScheduler", "_scheduler")
    short = {"cosine_annealing_with_warmup": "cosine_with_warmup", "cosine_annealing": "cosine"}
    return {**found, **{s: found[n] for n, s in short.items() if n in found}}


METHODS = {
    "l2t": "opsin.algorithms.l2t:L2T",
    "ross": "opsin.algorithms.ross:ROSS",
    "jarvis": "opsin.algorithms.jarvis:JARVIS",
    "vift": "opsin.algorithms.vift:ViFT",
}
"""Opsin's own methods."""

algorithms = Registry(
    "algorithms",
    "Methods of Opsin, and Composer's own algorithms.",
    {
        **METHODS,
        "gradient_clipping_by_part": "opsin.algorithms.clipping:GradientClippingByPart",
    },
    _composer_algorithms,
)
models = Registry(
    "models",
    "Vision-language models: from a folder or hub name, from parts, or tiny ones for demonstration.",
    {
        "hf_vlm": ".models:hf_vlm",
        "llava_from_parts": ".models:llava_from_parts",
        "scenes_llava": ".models:scenes_llava",
        "smollm2_llava": ".models:smollm2_llava_model",
    },
)
datasets = Registry("datasets", "Data that `prepare:` makes when it is not there yet.", {
    "scenes": ".prepare:scenes",
    "easy_vqa": ".prepare:easy_vqa",
})  # fmt: skip
evaluations = Registry("evaluations", "Suites of questions for `opsin eval` and `suites:`: benchmarks whose files you have, and our scenes.", {
    "cv_bench": "opsin.evaluation.benchmarks:cv_bench",
    "hallusion_bench": "opsin.evaluation.benchmarks:hallusion_bench",
    "mmbench": "opsin.evaluation.benchmarks:mmbench",
    "mmvp": "opsin.evaluation.benchmarks:mmvp",
    "multiple_choice": "opsin.evaluation.benchmarks:multiple_choice",
    "open_answers": "opsin.evaluation.benchmarks:open_answers",
    "pope": "opsin.evaluation.benchmarks:pope",
    "scenes": "opsin.evaluation.benchmarks:scenes",
})  # fmt: skip
analyses = Registry("analyses", "What is looked at in a trained model beyond its scores.", {
    "attention": "opsin.evaluation.analyses:Attention",
    "occlusion": "opsin.evaluation.analyses:Occlusion",
    "probes": "opsin.evaluation.analyses:Probes",
    "visual_contribution": "opsin.evaluation.analyses:VisualContribution",
})  # fmt: skip
callbacks = Registry(
    "callbacks",
    "Callbacks of Opsin, and Composer's own.",
    {
        "analysis_monitor": ".analysis_monitor:AnalysisMonitor",
        "lmms_monitor": ".lmms_monitor:LmmsMonitor",
        "loss_ledger": ".loss_ledger:LossLedger",
        "mixture_monitor": ".mixture_monitor:MixtureMonitor",
        "non_finite": ".non_finite:NonFinite",
        "speed_monitor": ".speed:SpeedMonitor",
        "suite_monitor": ".suite_monitor:SuiteMonitor",
        "jarvis_pictures": "opsin.algorithms.jarvis.pictures:JARVISPictures",
        "ross_pictures": "opsin.algorithms.ross.pictures:ROSSPictures",
    },
    _composer_callbacks,
)
patch_targets = Registry("patch_targets", "What `opsin data latents` computes and stores for a method.", {
    "jarvis": "opsin.algorithms.jarvis.targets:make_target",
    "ross": "opsin.algorithms.ross.targets:make_target",
})  # fmt: skip
loggers = Registry("loggers", "Composer's loggers.", {}, _composer_loggers)
optimizers = Registry("optimizers", "Optimizers of torch and Composer.", {}, _composer_optimizers)
schedulers = Registry("schedulers", "Learning-rate schedules of Composer.", {}, _composer_schedulers)

ALL = (
    algorithms,
    models,
    datasets,
    evaluations,
    analyses,
    patch_targets,
    callbacks,
    loggers,
    optimizers,
    schedulers,
)
