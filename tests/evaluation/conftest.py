from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "training"))

from opsin.training.run_folder import RunFolder


@pytest.fixture(scope="session")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A small dataset of scenes."""
    import runs

    return runs.write_scenes(tmp_path_factory.mktemp("data") / "scenes")


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory, scenes: str) -> RunFolder:
    """A run long enough to give some answers that are right; it names no evaluation data."""
    from opsin.training.train import train

    import runs

    learning = {"max_duration": "30ba", "optimizer": {"name": "adamw", "lr": 5e-3}, "save_interval": "30ba"}
    return train(runs.loaded(tmp_path_factory.mktemp("trained"), scenes, **learning))


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("OPSIN_CACHE", str(tmp_path / "cache"))
    before = dict(os.environ)
    yield
    for name in set(os.environ) - set(before):
        del os.environ[name]
