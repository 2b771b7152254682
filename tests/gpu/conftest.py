"""Tests on a CUDA device: ``make test-gpu``.

``OPSIN_TEST_DEVICE=cpu`` rehearses them without one: the same code; what only a GPU can show is skipped.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

TESTS = Path(__file__).parents[1]
for folder in (TESTS / "algorithms", Path(__file__).parent):  # the table of settings; helpers of these tests
    sys.path.insert(0, str(folder))


@pytest.fixture(scope="session")
def device() -> str:
    """``cuda``, or what ``OPSIN_TEST_DEVICE`` says."""
    wanted = os.environ.get("OPSIN_TEST_DEVICE", "cuda")
    if wanted == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device (OPSIN_TEST_DEVICE=cpu rehearses)")
    return wanted


@pytest.fixture(scope="session")
def cuda(device: str) -> str:
    """For what only a GPU can show."""
    if device != "cuda":
        pytest.skip("needs a CUDA device")
    return device


@pytest.fixture(autouse=True)
def _as_it_was(own_cache: None) -> Iterator[None]:
    """Exact fp32, and no process group that the next test does not expect."""
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    if torch.cuda.is_available():
        torch.cuda.set_sync_debug_mode("default")
        torch.cuda.empty_cache()
