"""lmms-eval while training: logged at intervals, and training goes on as if nobody had looked."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

if find_spec("lmms_eval") is None:
    pytest.skip("lmms-eval is not installed; `make test-eval` has it", allow_module_level=True)

import torch
from composer import Trainer
from torch.utils.data import DataLoader

from opsin.data.batch import vlm_data_spec
from opsin.evaluation.lmms.inside import ask_inside
from opsin.evaluation.lmms.tasks import write_tasks
from opsin.models.errors import UserError
from opsin.models.vlm import VisionLanguageModel
from opsin.training.lmms_monitor import LmmsMonitor

import jobs
import zoo


def fit(*callbacks: Any) -> tuple[list[dict[str, float]], list[dict[str, float]]]:
    """Losses of four steps with dropout, and what was logged at each."""
    built = zoo.build("llava", seed=1)
    built.hf.model.language_model.config.attention_dropout = 0.3
    model = VisionLanguageModel(built.hf, built.processor)
    for layer in model.anatomy.decoder_layers(model.hf):
        layer.self_attn.attention_dropout = 0.3
    loader = DataLoader(
        jobs.Samples(jobs.mixed_samples(16), 4, 0, 1), batch_size=4, collate_fn=jobs.collator(built)
    )
    record, logged = jobs.Record(), jobs.Logged()
    trainer = Trainer(
        model=model, train_dataloader=vlm_data_spec(loader), max_duration="4ba", device="cpu", progress_bar=False, seed=3,
        optimizers=torch.optim.AdamW(model.parameters(), 1e-3), callbacks=[record, *callbacks], loggers=[logged],
    )  # fmt: skip
    trainer.fit()
    trainer.close()
    return record.losses, logged.steps


def test_training_with_looks_is_training_without(place: Any) -> None:
    monitor = LmmsMonitor({"our_two": place.local["our_two"]}, interval="2ba", limit=3, batch_size=2)
    plain, _ = fit()
    watched, logged = fit(monitor)
    assert watched == plain and len(plain) == 4 and plain[0] != plain[1]
    shown = [{k: v for k, v in step.items() if k.startswith("lmms/")} for step in logged]
    assert [set(step) for step in shown] == [set(), {"lmms/our_two/exact_match"}] * 2
    assert not Path(monitor._folder.name).exists()  # type: ignore[union-attr]


def test_settings_that_make_no_sense_are_refused() -> None:
    with pytest.raises(UserError, match=r"callbacks.lmms_monitor.interval: 'often'"):
        LmmsMonitor({"a": {}}, interval="often")
    with pytest.raises(UserError, match="name at least one task"):
        LmmsMonitor({})


@pytest.mark.slow
@pytest.mark.world
def test_two_ranks_get_what_one_process_gets(place: Any, ranks: Any, tmp_path: Path) -> None:
    names = ["our_presence", "our_colours"]
    write_tasks(tmp_path, place.local)
    alone = ask_inside(place.adapter, tmp_path, names)
    told = ranks.run("lmms_jobs:ask", timeout=400, model=str(place.model), folder=str(tmp_path), tasks=names)
    assert told == [alone, alone]
