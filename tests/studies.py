"""Studies with made-up answers about real scenes: what training would have written, without training."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from opsin.evaluation.benchmarks.own_scenes import scenes
from opsin.evaluation.records import Item, prediction, write_predictions
from opsin.evaluation.scorers import make
from opsin.evaluation.study.pictures import keep_suites
from opsin.evaluation.suites import Suite

OBJECTS: dict[str, Any] = {"objects": [2, 2], "charts": 0, "sign": 0}


@lru_cache(8)
def suite_items(name: str, samples: int) -> tuple[Item, ...]:
    """Questions of one of the suites that studies ask here."""
    made = {
        "minimal_pairs": lambda: scenes(
            split="minimal_pairs", samples=samples, ask=["colour", "size"], **OBJECTS
        ),
        "conflict": lambda: scenes(split=["aligned", "conflict"], samples=samples, **OBJECTS),
        "captions": lambda: scenes(stream="caption", samples=samples, **OBJECTS),
        "text": lambda: scenes(stream="text", samples=samples, kinds=["colour", "size"], **OBJECTS),
    }
    return tuple(made[name]().load())


SCORER = {"captions": "scene_captions"}


def cell(name: str, methods: Sequence[str] = (), role: str = "single", **more: Any) -> dict[str, Any]:
    return {
        "name": name,
        "methods": list(methods),
        "role": role,
        "placebo_of": None,
        "matched_to": None,
        **more,
    }


def logit(p: float) -> float:
    return math.log(p / (1 - p))


class StudyMaker:
    """Writes a study folder.

    Args:
        folder: to write.
        cells: as ``study.json`` has them, without seed, folder and status; ``skill`` is what they answer right beyond the
            baseline (logits), ``seeds`` theirs.
        suites: name -> samples.
        base: share of questions that the baseline answers right.
        seed_sd: of skill between seeds (logits).
    """

    def __init__(
        self, folder: Path, cells: Sequence[Mapping[str, Any]], suites: Mapping[str, int], *,
        seeds: Sequence[int] = (17, 18, 19), base: float = 0.6, seed_sd: float = 0.1, factors: Sequence[str] = (),
        primary: tuple[str, str] = ("minimal_pairs", "pair_accuracy"), secondary: Sequence[tuple[str, str]] = (),
        blind: float | None = 0.1, steps: int = 120, pictures: bool = False,
    ):  # fmt: skip
        self.folder, self.suites, self.base, self.seed_sd = folder, dict(suites), base, seed_sd
        self.blind, self.steps = blind, steps
        rows = []
        for one in cells:
            plain = {k: v for k, v in one.items() if k not in ("skill", "seeds", "slower")}
            for seed in one.get("seeds", seeds):
                row = {**plain, "seed": seed, "folder": f"cells/{one['name']}-{seed}", "status": "done", "identical_to": None,
                       "why": None, "tries": 4, "cost": self._cost(one.get("slower", 1.0), seed)}  # fmt: skip
                row |= one.get("at", {}).get(seed, {})
                row.pop("at", None)
                if row["status"] == "done":
                    self._run(folder / row["folder"], one["name"], seed, one.get("skill", 0.0))
                rows.append(row)
        self.study = {
            "name": "made up", "question": "Which methods make the model look harder?", "seeds": list(seeds),
            "baseline": "baseline", "primary": _endpoint(primary), "secondary": [_endpoint(one) for one in secondary],
            "factors": list(factors), "cells": rows,
        }  # fmt: skip
        self.write()
        if pictures:
            asked = {name: suite_items(name, samples) for name, samples in suites.items()}
            keep_suites(
                folder,
                {n: Suite("2d", make("scenes"), lambda items=items: items) for n, items in asked.items()},
            )

    def write(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "study.json").write_text(json.dumps(self.study))

    def _cost(self, slower: float, seed: int) -> dict[str, float]:
        step = 0.21 * slower * (1 + 0.01 * (seed % 3))
        return {
            "seconds": step * 320,
            "seconds_a_step": step,
            "peak_bytes": 6.1e8 * slower**0.5,
            "steps": 320,
            "tokens": 4e5,
        }

    def _run(self, folder: Path, name: str, seed: int, skill: float) -> None:
        records, scores = [], {}
        own = np.random.default_rng([seed, *name.encode()])
        skill += float(own.normal(0, self.seed_sd)) if self.seed_sd else 0.0
        for suite, samples in self.suites.items():
            items = suite_items(suite, samples)
            hardness = np.random.default_rng(5).normal(
                0, 1, len(items)
            )  # of the question, the same for every run
            p = 1 / (1 + np.exp(-(logit(self.base) + skill + hardness)))
            right = (
                np.random.default_rng([seed, 9, len(items)]).random(len(items)) < p
            )  # equal skill: equal answers
            said = [
                prediction(
                    suite, item, item.gold if ok else wrong(item), scorer=SCORER.get(suite, "scenes"),
                    nll=float(-np.log(p[i])),
                )
                for i, (item, ok) in enumerate(zip(items, right, strict=True))
            ]  # fmt: skip
            marked, found = make(SCORER.get(suite, "scenes")).score(said)
            entry = {"suite": "scenes", "group": "2d", "mode": "generate", "errors": 0, **found.as_dict()}
            if self.blind is not None:
                entry["blind"] = {
                    "measures": {
                        k: {**m, "value": 1 - self.blind if k.startswith(("chair", "prior")) else self.blind}
                        for k, m in entry["measures"].items()
                    }
                }
            records, scores[suite] = records + marked, entry
        folder.mkdir(parents=True, exist_ok=True)
        write_predictions(folder / "predictions.jsonl", records)
        (folder / "scores.json").write_text(json.dumps({"model": folder.name, "suites": scores}))
        lines = [
            {"stage": stage, "step": step, "loss/train/lm": (1.6 if stage == "align" else 1.1 - 0.1 * skill) * math.exp(-step / 60) + 0.7 - 0.05 * skill + 0.02 * float(own.normal())}
            for stage in ("align", "instruct") for step in range(1, self.steps + 1)
        ]  # fmt: skip
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        share = {"n": 200, "standard_error": 0.03, "unit": "share"}
        nats = {"n": 200, "standard_error": 0.12, "unit": "nats"}
        measures = {"accuracy/image": {"value": self.base + 0.1 * skill, **share}}
        for at, control in enumerate(("other", "grey", "removed")):
            measures[f"vc/{control}"] = {
                "value": 1.4 - 0.2 * at + 0.3 * skill + 0.05 * float(own.normal()),
                **nats,
            }
        (folder / "analyses").mkdir(exist_ok=True)
        (folder / "analyses/visual_contribution.json").write_text(
            json.dumps(
                {"questions": 200, "pictures": 100, "skipped": {}, "measures": measures, "by_kind": {}}
            )
        )


def _endpoint(one: tuple[str, str]) -> dict[str, str]:
    return dict(zip(("suite", "measure"), one, strict=True))


def wrong(item: Item) -> str:
    """A wrong answer of the right sort; of a caption, one that makes up a thing."""
    if item.meta.get("stream") == "caption":
        return "a large purple cone. " + item.gold
    if item.meta.get("prior") is not None and item.meta["prior"] != item.gold:
        return item.meta["prior"]
    return next((choice for choice in item.choices if choice != item.gold), "no idea")


def default_cells() -> list[dict[str, Any]]:
    """The cells of a study as the default one has them: a factorial of three, a matched pair, placebos, controls."""
    gains = {"ross": 0.1, "l2t": 0.9, "jarvis": 0.0}
    cells = [cell("baseline", (), "baseline")]
    for on in (
        ["ross"],
        ["l2t"],
        ["jarvis"],
        ["ross", "l2t"],
        ["ross", "jarvis"],
        ["l2t", "jarvis"],
        ["ross", "l2t", "jarvis"],
    ):
        skill = sum(gains[m] for m in on) + (0.5 if {"ross", "l2t"} <= set(on) else 0)
        slower = 1 + 0.3 * ("ross" in on) + 0.1 * ("jarvis" in on)
        cells.append(cell("+".join(on), on, "factorial", skill=skill, slower=slower))
    return [
        *cells,
        cell("captions-and-text", (), "baseline", skill=-0.6),
        cell("vift", ["vift"], "single", matched_to="captions-and-text", skill=-1.4),
        cell("l2t: other pictures' instructions", ["l2t"], "placebo", placebo_of="l2t", skill=0.1),
        cell("ross: shuffled targets", ["ross"], "placebo", placebo_of="ross", skill=0.1),
        cell("bidirectional pictures", (), "control", skill=0.25, seeds=(17, 18, 19)),
        cell("blind-trained", (), "control", skill=-2.0,
             at={18: {"status": "failed", "why": "loss is not a number at step 211"}}),
        cell("twice the data", (), "positive", skill=1.1),
        cell("l2t+vift", ["l2t", "vift"], "single", matched_to="captions-and-text",
             at={s: {"status": "identical", "identical_to": "vift", "folder": None} for s in range(17, 23)}),
    ]  # fmt: skip


def default_study(folder: Path, **more: Any) -> StudyMaker:
    """A study as the default one is shaped, small."""
    options: dict[str, Any] = {
        "suites": {"minimal_pairs": 400, "conflict": 60, "captions": 40, "text": 40},
        "seeds": (17, 18, 19, 20, 21, 22), "factors": ("ross", "l2t", "jarvis"),
        "secondary": [("conflict", "balanced_accuracy"), ("captions", "chair_i"), ("minimal_pairs", "nll"), ("text", "accuracy")],
        "pictures": True,
    }  # fmt: skip
    options |= more
    return StudyMaker(folder, default_cells(), options.pop("suites"), **options)
