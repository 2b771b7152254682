"""Faults of Composer that are worked around, each sprung on purpose: a test that fails says that upstream has mended it.

Here are those that no other file springs. The rest: gloo's mean, loading that runs code, batches whose pictures are lost
(``test_compat.py``); forms of checkpoints, the link to the newest one (``test_checkpoint_exchange.py``); Streaming's repeats
(``tests/data/test_partition.py``), its shared memory (``test_shared_memory.py``) and what it does when something breaks
(``test_faults.py``).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from composer import Callback, Trainer
from torch.utils.data import DataLoader

from opsin.data.batch import vlm_data_spec
from opsin.models.vlm import VisionLanguageModel
from opsin.training import compat

import jobs
import zoo

compat.apply()
BATCHES = 4


class Resumable(jobs.Samples):
    """A dataset that goes to its place by itself, as Streaming's do."""

    def __init__(self) -> None:
        super().__init__(jobs.mixed_samples(4 * BATCHES), 4, 0, 1)
        self.done = 0

    def state_dict(self, num_samples: int, from_beginning: bool) -> dict[str, int]:
        return {"done": num_samples}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.done = state["done"]

    def __iter__(self) -> Any:
        done, self.done = self.done, 0
        return iter(self.samples[done:])


def trainer(folder: Path, **options: Any) -> Trainer:
    built = zoo.build("llava", seed=1)
    model = VisionLanguageModel(built.hf, built.processor)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("language_model" in name or "projector" in name)
    loader = DataLoader(Resumable(), 4, collate_fn=jobs.collator(built))
    return Trainer(
        model=model, train_dataloader=vlm_data_spec(loader), device="cpu", progress_bar=False, save_folder=str(folder),
        optimizers=torch.optim.AdamW([p for p in model.parameters() if p.requires_grad]), run_name="faults",
        save_overwrite=True, save_interval="1ba", **{"max_duration": f"{BATCHES}ba", **options},
    )  # fmt: skip


class Dice(Callback):
    """What dice show in each step."""

    def __init__(self) -> None:
        self.drawn: list[float] = []

    def after_dataloader(self, state: Any, logger: Any) -> None:
        self.drawn.append(float(torch.rand(())))


def test_composer_still_forgets_random_states_when_a_streaming_run_resumes_within_an_epoch(
    tmp_path: Path,
) -> None:
    """``guards.RestoreRandomState``."""
    whole, rest = Dice(), Dice()
    first = trainer(tmp_path / "a", callbacks=[whole])
    first.fit()
    first.close()
    second = trainer(tmp_path / "b", callbacks=[rest], load_path=str(tmp_path / "a" / "ep0-ba2-rank0.pt"))
    second.fit()
    kept = second._rng_state
    second.close()
    assert len(rest.drawn) == BATCHES - 2
    assert rest.drawn != whole.drawn[2:] and kept is not None, (
        "Composer restores them: RestoreRandomState can go"
    )


def test_composer_still_raises_when_a_finished_run_is_resumed(tmp_path: Path) -> None:
    """``stage_run.train_stage`` asks before it fits."""
    first = trainer(tmp_path)
    first.fit()
    first.close()
    again = trainer(tmp_path, autoresume=True)
    with pytest.raises(ValueError, match="No training would occur"):
        again.fit()
    again.close()


def test_composer_still_ignores_a_key_for_fsdp2_without_a_word(tmp_path: Path) -> None:
    """``stage_run.parallelism`` makes the object, and ``assert_sharded`` looks."""
    made = trainer(tmp_path, parallelism_config={"fsdp2": {}})
    assert not made.state.fsdp_enabled and made.state.fsdp_config is None
    made.close()


def test_composer_still_refuses_bf16_on_a_cpu(tmp_path: Path) -> None:
    """``net.autocast_dtype``, set by ``stage_run.train_stage``."""
    with pytest.raises(ValueError, match="not supported for CPU training"):
        trainer(tmp_path, precision="amp_bf16")
