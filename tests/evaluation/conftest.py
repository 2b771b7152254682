from __future__ import annotations

import pytest

from opsin.training.run_folder import RunFolder


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory, scenes: str) -> RunFolder:
    """A run long enough to give some answers that are right; it names no evaluation data."""
    from opsin.training.train import train

    import runs

    learning = {"max_duration": "30ba", "optimizer": {"name": "adamw", "lr": 5e-3}, "save_interval": "30ba"}
    return train(runs.loaded(tmp_path_factory.mktemp("trained"), scenes, **learning))


@pytest.fixture(autouse=True)
def _own_cache(own_cache: None) -> None:
    """Every test here may start runs."""
