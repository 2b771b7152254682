"""``opsin eval MODEL CONFIG``: suites asked, analyses made, scores and a report written."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from composer.utils import dist
from rich.console import Console

from .. import __version__
from ..evaluation.adapter import VLMAdapter
from ..evaluation.analysis import Result
from ..evaluation.asking import Asked, ask_suite
from ..evaluation.records import Item, prediction, prompt_hash, write_predictions
from ..evaluation.report import write_report
from ..models.errors import UserError
from .eval_config import Wanted, load_suites
from .finished import open_model
from .run_folder import write_atomically
from .score_files import SCORES, as_table, now, read_scores
from .scoring import fusion_of

PREDICTIONS, REPORT, ANALYSES = "predictions.jsonl", "report.html", "analyses"


@dataclass
class _Told:
    """Says now and then how far a suite is."""

    console: Console
    name: str
    last: float

    def __call__(self, done: int, total: int) -> None:
        if time.monotonic() - self.last >= 30:
            self.last = time.monotonic()
            self.console.print(f"{self.name}: {done} of {total} batches")


def evaluate_model(
    model: str, files: Sequence[str], arguments: Sequence[str], out: Path | None, console: Console
) -> Path:
    """Measure a model as a YAML says; several ranks share the questions, rank 0 writes.

    Args:
        model: run folder, model folder or hub name.
        files: YAMLs, merged left to right.
        arguments: ``key=value``.
        out: folder to write; None: in the run's ``eval/``, else in ``eval/`` here, named after the first YAML.
        console: for tables.

    Returns:
        the folder with ``predictions.jsonl``, ``scores.json``, ``report.html`` and ``analyses/``.

    Raises:
        UserError: whatever the user can mend, before the model is asked where that can be known.
    """
    wanted = load_suites(files, arguments)
    config = wanted.config
    folder = out or default_folder(model, files[0])
    if folder.is_file():
        raise UserError(f"--out {folder}: is a file; choose a folder")
    items = read_items(wanted)
    samples = {name: analysis.samples() for name, analysis in wanted.analyses.items()}
    baseline = None if config.baseline is None else read_scores(Path(config.baseline), "baseline")
    adapter = open_adapter(model, wanted)
    if dist.get_global_rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)  # not after hours of asking
        for name in (
            SCORES,
            REPORT,
        ):  # of an earlier run, they would be taken for this one's if it does not get that far
            (folder / name).unlink(missing_ok=True)
    asked: dict[str, Asked] = {}
    for name, suite in wanted.suites.items():
        told = _Told(console, name, time.monotonic())
        asked[name] = ask_suite(
            adapter,
            name,
            suite,
            items[name],
            blind=config.blind,
            blind_limit=config.blind_limit,
            progress=told,
        )
        if dist.get_global_rank() == 0:  # what was answered is kept, whatever becomes of the rest
            write_predictions(folder / PREDICTIONS, [r for one in asked.values() for r in one.records])
    entries = {name: entry_of(wanted, name, items[name], one) for name, one in asked.items()}
    scores: dict[str, Any] = {**head_of(model), "suites": entries, "analyses": {}}
    if dist.get_global_rank() == 0:  # and what was scored, should an analysis fail
        write_atomically(folder / SCORES, json.dumps(scores, indent=1) + "\n")
    results = {}
    for name, analysis in wanted.analyses.items():  # ranks share their questions, too
        console.print(f"analysis {name}")
        results[name] = analysis.run(adapter, samples[name])
    if dist.get_global_rank() != 0:
        return folder
    scores["analyses"], pictures = write_analyses(folder, results)
    failed = None
    if config.lmms is not None:
        from ..evaluation.lmms.run import run_lmms

        try:
            scores["lmms"] = run_lmms(model, folder / "lmms", **config.lmms)
        except UserError as error:  # what the suites scored is written first
            failed = error
    write_atomically(folder / SCORES, json.dumps(scores, indent=1) + "\n")
    console.print(as_table(scores, f"{model}: {folder}"))
    errors = {name: one.errors for name, one in asked.items() if one.errors}
    for name, count in errors.items():
        first = next(r for r in asked[name].records if "error" in r)
        console.print(
            f"{name}: {count} of {len(items[name])} questions could not be asked and count as wrong; "
            f"the first: {first['id']}: {first['error']}",
            soft_wrap=True,
        )
    by_id = {name: {item.id: item for item in these} for name, these in items.items()}

    def shown(suite: str, question: str) -> list[bytes]:
        return [read() for read in by_id[suite][question].pictures]

    records = [record for one in asked.values() for record in one.records]
    write_report(
        folder / REPORT, scores, records, shown,
        title=f"{Path(model).name}: {', '.join(Path(f).stem for f in files)}",
        wall=config.wall, baseline=baseline, analyses=pictures,
    )  # fmt: skip
    if failed is not None:
        raise failed
    return folder


def write_analyses(
    folder: Path, results: Mapping[str, Result]
) -> tuple[dict[str, dict[str, Any]], list[tuple[str, dict[str, Any], bytes | None]]]:
    """Write ``analyses/NAME.json`` and ``.png``; returns the numbers, and what a report shows."""
    numbers: dict[str, dict[str, Any]] = {}
    shown: list[tuple[str, dict[str, Any], bytes | None]] = []
    for name, result in results.items():
        numbers[name] = result.as_dict()
        (folder / ANALYSES).mkdir(parents=True, exist_ok=True)
        write_atomically(folder / ANALYSES / f"{name}.json", json.dumps(numbers[name], indent=1) + "\n")
        drawn = result.picture(folder / ANALYSES / f"{name}.png")
        shown.append((name, numbers[name], None if drawn is None else drawn.read_bytes()))
    return numbers, shown


def read_items(wanted: Wanted) -> dict[str, list[Item]]:
    """The questions of all suites, before any model is loaded.

    Raises:
        UserError: a suite cannot be read, or has no question.
    """
    items = {}
    for name, suite in wanted.suites.items():
        try:
            items[name] = list(suite.load())[: wanted.config.limit]
            # What a scorer cannot do with these questions it says now, not after they were asked.
            suite.scorer.score([prediction(name, item, "") for item in items[name]])
        except UserError as error:
            raise UserError(f"{wanted.where('suites', name)}: {error}") from error
        if not items[name]:
            raise UserError(f"{wanted.where('suites', name)}: no question in it")
    return items


def open_adapter(model: str, wanted: Wanted) -> VLMAdapter:
    """The model of a command line, as a YAML wants it asked."""
    config = wanted.config
    fusion = fusion_of(config.fusion, lambda key: wanted.where("fusion", *([key] if key else [])))
    if dist.get_world_size() > 1:
        dist.initialize_dist(config.device)
    loaded, collator = open_model(model, config.chat_template, config.system_prompt)
    if config.device != "cpu" and torch.cuda.is_available():
        loaded.to(torch.device("cuda", dist.get_local_rank()))
    if config.precision != "fp32":
        loaded.net.autocast_dtype = torch.bfloat16 if config.precision == "amp_bf16" else torch.float16
    return VLMAdapter(loaded, collator, batch_size=config.batch_size, fusion=fusion)


def default_folder(model: str, config: str) -> Path:
    """Where results go unless ``--out`` says so."""
    path, name = Path(model), Path(config).stem
    if (path / "config.yaml").is_file():
        return path / "eval" / name
    return Path("eval") / f"{path.name}-{name}"


def head_of(model: str) -> dict[str, Any]:
    """What a score is of."""
    import transformers

    return {
        "model": model,
        "opsin": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "created": now(),
    }


def entry_of(wanted: Wanted, name: str, items: Sequence[Item], asked: Asked) -> dict[str, Any]:
    """One suite in ``scores.json``."""
    suite = wanted.suites[name]
    entry = {
        "suite": wanted.registered[name],
        "group": suite.group,
        "mode": suite.mode,
        "prompt_sha256": prompt_hash(item.question for item in items),
        "errors": asked.errors,
        **asked.scores.as_dict(),
    }
    if asked.blind is not None:
        unseen = asked.blind.as_dict()
        entry["blind"] = {"measures": unseen["measures"], "by_kind": unseen["by_kind"]}
    return entry
