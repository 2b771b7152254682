from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def _own_cache(own_cache: None) -> None:
    """Every test here may start runs."""
