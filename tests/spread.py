"""Which file of tests goes to which process when, where they run side by side (pytest-xdist).

Files go out whole, and xdist hands out those with the most tests first. Here the longest do not have the most: one of two
tests that restart whole runs would come last, with another one already behind it, and the other process would wait.
"""

from __future__ import annotations

from typing import Any

import pytest

LONG = (
    "data/test_faults.py",
    "training/test_checkpoint_exchange.py",
    "training/test_elastic.py",
    "algorithms/test_matrix_ranks.py",
    "training/test_vift_run.py",
    "models/test_lora.py",
    "training/test_study.py",
    "algorithms/test_matrix_subsets.py",
    "training/test_train.py",
    "training/test_compatibility.py",
    "data/test_caches.py",
    "training/test_plan.py",
    "algorithms/test_jarvis_interplay.py",
    "training/test_jarvis_run.py",
    "training/test_ross_run.py",
    "training/test_monitors.py",
    "algorithms/test_matrix_composer.py",
    "algorithms/test_matrix_normalisation.py",
    "training/test_non_finite.py",
    "algorithms/test_vift.py",
    "algorithms/test_l2t.py",
    "training/test_exact_resume.py",
    "training/test_mixture_run.py",
    "algorithms/test_matrix_resumption.py",
    "models/test_compile.py",
    "models/test_generation_and_export.py",
    "evaluation/test_probes.py",
    "evaluation/test_opsin_eval.py",
    "data/test_shared_memory.py",
    "data/test_shards.py",
    "training/test_latents.py",
    "training/test_split_commands.py",
    "algorithms/test_jarvis_figure.py",
)
"""Files that take half a minute and more, about the longest first; all others follow as they are collected."""

TOGETHER = {"training/test_elastic.py": "training/test_checkpoint_exchange.py"}
"""File -> the one whose process it shares: both begin with the run of ``restarts.one``."""


def _place(path: str) -> int:
    """Where a file (``.../tests/data/test_x.py``) comes."""
    return next((number for number, name in enumerate(LONG) if path.endswith(name)), len(LONG))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if hasattr(config, "workerinput"):
        items.sort(key=lambda item: _place(item.path.as_posix()))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    if config.option.dist != "loadfile":
        return None
    from xdist.scheduler import LoadFileScheduling

    class Spread(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            path = super()._split_scope(nodeid)
            for file, other in TOGETHER.items():
                if path.endswith(file):
                    return path.removesuffix(file) + other
            return path

    config.option.loadscopereorder = False
    return Spread(config, log)
