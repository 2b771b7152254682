"""The end of a run: its last model scored on held-out data, the summary written, the sheet drawn."""

from __future__ import annotations

import gc
import json
import platform
import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from composer.utils import dist
from rich.console import Console

from .. import __version__
from ..algorithms.vift.fusion import Fusion
from ..data.collate import VLMCollator
from ..data.object_store import Unreachable
from ..data.streaming import StreamingVLMDataset
from ..evaluation.adapter import VLMAdapter
from ..evaluation.blind import Majority
from ..evaluation.scorecard import as_table, scorecard
from ..evaluation.sheet import sample_sheet
from ..evaluation.usable import Usable, usable
from ..models.errors import UserError
from ..models.export import load_model
from ..models.vlm import VisionLanguageModel
from . import wall_time
from .builders import construct
from .config import Loaded
from .run_folder import RunFolder, write_atomically
from .schema import DatasetConfig, EvaluationConfig
from .stage_data import build_collator, build_dataset
from .stages import Stage

Answer = TypeVar("Answer")


def evaluate(
    loaded: Loaded,
    stage: Stage,
    folder: RunFolder,
    config: EvaluationConfig,
    console: Console,
    *,
    stages: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Score the run's last model, write the summary, draw the sheet.

    Every rank calls this and scores its share; rank 0 prints and writes.

    Args:
        loaded: the run.
        stage: its last one.
        folder: where its model is and the summary goes.
        config: what to score.
        console: for the table.
        stages: what this process trained, by stage; None: it trained nothing, the run ended before.

    Returns:
        the summary; on other ranks, an empty dictionary.
    """
    model = load_model(folder.model)
    if torch.cuda.is_available() and loaded.run.device != "cpu":
        model.to(torch.device("cuda", dist.get_local_rank()))
    if loaded.run.precision == "amp_bf16":  # as it was trained; half the time on a CPU that has bf16
        model.net.autocast_dtype = torch.bfloat16
    collator = build_collator(model, stage, stage.config.train_loader)
    found = usable(collator.encoder, stored_samples(config))
    majority = None
    if config.majority_from is not None:
        majority = with_dataset(config.majority_from, loaded.run.seed, _majority)
    card = scorecard(
        model,
        collator,
        found,
        majority=majority,
        batch_size=config.batch_size,
        progress=_Told(console),
        fusion=fusion_of(
            config.fusion, lambda key: loaded.where("evaluation", "fusion", *([key] if key else []))
        ),
    )
    if dist.get_global_rank() != 0:
        return {}
    console.print(as_table(card, f"{loaded.run.run_name}: {_what(found)}"))
    name_skipped(folder, found)
    summary = write_summary(folder, loaded, card, stages, found)  # first: a sheet can fail
    if config.pictures and found.samples:
        draw_samples(model, collator, found.samples[: config.pictures], folder)
    return summary


def fusion_of(given: Mapping[str, Any] | None, where: Callable[[str], str]) -> Fusion | None:
    """Ability fusion from its keywords; None: none was asked for.

    Raises:
        UserError: a keyword or a value that it cannot have.
    """
    return None if given is None else construct(Fusion, dict(given), where)


def check_window(loaded: Loaded, model: VisionLanguageModel) -> None:
    """Refuse a window of ability fusion that the model's decoder does not have.

    Raises:
        UserError: it would stop the run after training.
    """
    config = loaded.run.evaluation
    where = lambda key: loaded.where("evaluation", "fusion", *([key] if key else []))  # noqa: E731
    fusion = None if config is None else fusion_of(config.fusion, where)
    if fusion is not None:
        try:
            fusion.coefficients(len(model.anatomy.decoder_layers(model.hf)))
        except UserError as error:
            raise UserError(f"{where('')}: {error}") from error


class _Told:
    """Says now and then how far scoring is: with a large model it takes as long as training did."""

    def __init__(self, console: Console, seconds: float = 30.0):
        self.console, self.seconds, self.last = console, seconds, time.monotonic()

    def __call__(self, row: str, done: int, total: int) -> None:
        if time.monotonic() - self.last >= self.seconds:
            self.last = time.monotonic()
            self.console.print(f"scoring ({row}): {done} of {total} batches")


def stored_samples(config: EvaluationConfig) -> list[dict[str, Any]]:
    """Held-out samples, in the order of storage; every rank calls this."""

    def read(dataset: StreamingVLMDataset) -> list[dict[str, Any]]:
        count = dataset.num_samples if config.limit is None else min(config.limit, dataset.num_samples)
        return [dataset[i] for i in range(count)]

    return with_dataset(config.dataset, 0, read, whole=config.limit is None)


def with_dataset(
    config: DatasetConfig, seed: int, work: Callable[[StreamingVLMDataset], Answer], whole: bool = True
) -> Answer:
    """What ``work`` makes of a dataset, of all of it (``whole``) or of a little.

    Every rank calls this, because Streaming makes datasets together.

    The dataset is gone on all ranks afterwards: Streaming refuses a second one over the same cache, and ranks
    of which only some still hold the first do not find each other.
    """
    dist.barrier()
    dataset = build_dataset(config, 1, seed, whole=whole)
    answer = work(dataset)
    del dataset
    gc.collect()
    dist.barrier()
    return answer


def _majority(dataset: StreamingVLMDataset) -> Majority | None:
    """Only rank 0 shows it, so only rank 0 reads all training samples."""
    if dist.get_global_rank() != 0:
        return None
    return Majority(dataset[i] for i in range(dataset.num_samples))


def check_evaluation(loaded: Loaded, strict: bool = True) -> None:
    """Read index and first sample of the data that is scored when training ends; every rank calls this.

    Args:
        loaded: the run.
        strict: False (``--check``): data may be missing that the run will make, or that cannot be reached from here.

    Raises:
        UserError: it would stop the run after training.
    """
    config = loaded.run.evaluation
    if config is None:
        return
    for key, least in (("limit", 1), ("batch_size", 1), ("pictures", 0)):
        value = getattr(config, key)
        if value is not None and value < least:
            raise UserError(f"{loaded.where('evaluation', key)}: {value}: use {least} or more")
    fusion_of(config.fusion, lambda key: loaded.where("evaluation", "fusion", *([key] if key else [])))
    made = {s.get("out") for kind in ("scenes", "easy_vqa") for s in getattr(loaded.run.prepare, kind)}
    for key in ("dataset", "majority_from"):
        data = getattr(config, key)
        if data is None:
            continue
        remotes = [data.remote, *(s.get("remote") for s in (data.streams or {}).values())]
        try:
            with_dataset(data, loaded.run.seed, _first_sample, whole=False)
        except UserError as error:
            if not strict and (isinstance(error, Unreachable) or any(r in made for r in remotes)):
                continue
            raise UserError(f"{loaded.where('evaluation', key)}: {error}") from error


def _first_sample(dataset: StreamingVLMDataset) -> None:
    try:
        dataset[0]
    except Exception as error:  # whatever a shard's decoder makes of what it finds
        text = str(error).strip().splitlines()
        raise UserError(
            f"dataset: sample 0 cannot be read ({type(error).__name__}: {text[0][:300] if text else ''})"
        ) from error


def draw_samples(
    model: VisionLanguageModel, collator: VLMCollator, samples: list[dict[str, Any]], folder: RunFolder
) -> None:
    """Sheet of pictures with what the model says."""
    answers = VLMAdapter(model, collator, max_new_tokens=16).generate(samples)
    sample_sheet(samples, answers, folder.samples)


def _what(found: Usable) -> str:
    """``exact match on 199 questions of 64 held-out samples``, and what is not among them."""
    text = f"exact match on {found.questions} questions of {len(found.samples)} held-out samples"
    if found.left_out:
        text += f"; {found.left_out} of their questions do not fit into max_seq_len and are left out"
    if found.skipped:
        why = ", ".join(f"{n} {reason}" for reason, n in found.reasons().items())
        text += f"; {len(found.skipped)} samples cannot be used ({why})"
    return text


def name_skipped(folder: RunFolder, found: Usable) -> None:
    """Add held-out samples that cannot be used to the run's list of such samples."""
    if found.skipped:
        with folder.skipped.open("a", encoding="utf-8") as file:
            for one in found.skipped:
                line = {"id": one.id, "reason": one.reason, "detail": one.detail[:500], "data": "evaluation"}
                file.write(json.dumps(line) + "\n")


def write_summary(
    folder: RunFolder,
    loaded: Loaded,
    card: dict[str, Any],
    stages: dict[str, Any] | None,
    found: Usable | None = None,
) -> dict[str, Any]:
    """Write ``summary.json`` (on one rank); ``stages`` and ``found`` as in :func:`evaluate`."""
    import transformers

    if stages is not None:
        wall_time.end(folder)
    before = json.loads(folder.summary.read_text()) if folder.summary.is_file() else {}
    summary = {
        "run_name": loaded.run.run_name,
        "by_kind": {kind: row for kind, row in card.items() if kind != "all"},
        "all": card.get("all"),
        "questions": None if found is None else found.questions,
        "left_out": None if found is None else found.left_out,
        "skipped": None if found is None else found.reasons(),
        "scorer": "exact_match/1",
        "seed": loaded.run.seed,
        "stages": {**before.get("stages", {}), **(stages or {})},
        "seconds": wall_time.seconds(folder),
        "versions": {
            "opsin": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
    }
    write_atomically(folder.summary, json.dumps(summary, indent=1) + "\n")
    return summary
