"""ViFT against ordinary tuning, each with and without fusion: ``python benchmarks/vift_cells.py [--quick]``.

The demo's model is trained on scenes from one ``align`` stage a seed, then in five ways at equal steps and batch:

    vqa          questions about pictures (4 a picture), and text-only instructions
    vqa_equal    the same with as many pictures and learnt tokens as ``vift`` (more questions a picture)
    captions     captions alone
    text         text-only instructions alone
    vift         captions and text-only instructions, never a picture with a question

Text-only instructions are scenes told in words, with the questions that ``vqa`` asks about pictures; and two skills
(``two_hop``, ``negated_count``) that no cell ever asks about a picture. The strength of fusion is chosen for each cell on
other scenes with models of other seeds. Seeds are processes, which go on where they were stopped (``--work``).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

CELLS = ("vqa", "vqa_equal", "captions", "text", "vift")
SEEDS, DEV_SEEDS = (1, 2, 3, 4, 5, 6), (101, 102)
PROMPTS = [
    "Describe the picture.",
    "What is in the picture?",
    "Write a short caption.",
    "Tell me what you see.",
]
STRENGTHS = (0.1, 0.35, 0.7, 1.4)
RATIOS = (0.0, 1.0)
SCENES: dict[str, Any] = {"objects": [1, 2], "charts": 0, "sign": 0}
KINDS = ["colour", "size", "shape"]
YAMLS = Path(__file__).parents[1] / "yamls"


def datasets(work: Path, samples: int) -> dict[str, dict[str, Any]]:
    """What ``prepare`` makes, by name: its arguments."""
    common = {"split": "train", "samples": samples, **SCENES}
    text = {"kinds": [*KINDS, "two_hop", "negated_count"]}
    made = {
        "alignment": {"stream": "caption", "seed": 11},
        "captions": {"stream": "caption", "seed": 12, "caption_prompts": PROMPTS},
        "vqa": {"stream": "vqa", "seed": 13, "kinds": KINDS},
        "vqa_equal": {"stream": "vqa", "seed": 13, "kinds": KINDS, "questions": 8},
        "text": {"stream": "text", "seed": 14, "kinds": KINDS},
        "skill": {"stream": "text_skill", "seed": 15, **text},
    }
    return {name: {"out": str(work / "data" / name), **common, **of} for name, of in made.items()}


def overlay(cell: str, work: Path, samples: int, steps: int) -> dict[str, Any]:
    """The cell as a YAML."""
    words = {"text": 0.5, "skill": 0.5}
    weights = {
        "vqa": {"vqa": 2.0, **words},
        "vqa_equal": {"vqa_equal": 2.0, **words},
        "captions": {"captions": 1.0},
        "text": words,
        "vift": {"captions": 2.0, **words},
    }[cell]
    kind = {"captions": "caption", "text": "text", "skill": "text"}
    streams = {
        name: {"remote": str(work / "data" / name), "kind": kind.get(name, "instruction")} for name in weights
    }
    mixture = {} if len(weights) == 1 else {"mixture": {"weights": weights, "batches": "single"}}
    return {
        "prepare": {"scenes": list(datasets(work, samples).values())},
        "stages": {
            "align": {"train_loader": {"dataset": {"remote": str(work / "data" / "alignment")}}},
            "instruct": {
                "train_loader": {
                    "num_workers": 0,
                    "dataset": {"remote": None, "streams": streams, **mixture},
                },
                "max_duration": f"{steps}ba",
            },
        },
        "algorithms": {"l2t": False, **({"vift": {"caption_prompts": PROMPTS}} if cell == "vift" else {})},
        "evaluation": None,
        "progress_bar": False,
        "run_root": str(work / "runs"),
    }


def train(cell: str, seed: int, work: Path, samples: int, steps: int) -> Path:
    """Train one cell of one seed, or find it trained."""
    from omegaconf import OmegaConf
    from rich.console import Console

    from opsin.training.config import load
    from opsin.training.train import train as run

    file = work / f"{cell}.yaml"
    OmegaConf.save(OmegaConf.create(overlay(cell, work, samples, steps)), file)
    loaded = load([str(YAMLS / "quickstart.yaml"), str(file)], [f"seed={seed}", f"run_name={cell}-{seed}"])
    return run(loaded, Console(stderr=True, quiet=True)).path


def held_out(quick: bool, dev: bool) -> dict[str, list[dict[str, Any]]]:
    """Scenes to be asked about, by what they measure."""
    from opsin.data.scenes import SceneConfig, sample

    shown: dict[str, Any] = {**SCENES, "objects": (1, 2)}
    plain = SceneConfig(**shown, kinds=tuple(KINDS))
    skill = SceneConfig(**shown, questions=2)
    seed, few = (900, 5) if dev else (901, 1)
    few *= 6 if quick else 1

    def made(config: Any, split: str, stream: str, numbers: Sequence[int]) -> list[dict[str, Any]]:
        return [sample(config, seed, split, i, stream) for i in numbers]

    pairs = [i for i in range(720 // few) if i // 2 % 6 < 3]  # those that differ in colour, shape or size
    return {
        "image": made(plain, "uniform", "vqa", range(300 // few)),
        "text_skill": made(skill, "text_skill", "vqa", range(240 // few)),
        "minimal_pairs": made(plain, "minimal_pairs", "vqa", pairs),
        "conflict": made(plain, "conflict", "vqa", range(300 // few)),
        "text": made(plain, "uniform", "text", range(150 // few)),
        "skill_in_text": made(skill, "uniform", "text_skill", range(150 // few)),
    }


def asked(model: Any, collator: Any, samples: list[dict[str, Any]], fusion: Any) -> list[dict[str, Any]]:
    """What the model says to each question, in one record each."""
    from opsin.evaluation.adapter import VLMAdapter
    from opsin.evaluation.questions import questions

    adapter = VLMAdapter(model, collator, max_new_tokens=3, batch_size=64, fusion=fusion)
    told = []
    for sample, texts in zip(samples, adapter.generate(samples), strict=True):
        meta = sample["meta"]
        for turn, ((_, answer, kind), text) in enumerate(zip(questions(sample), texts, strict=True)):
            told.append(
                {
                    "kind": kind, "pair": meta["pair"], "exact": text == answer,
                    "begins": text.split()[: len(answer.split())] == answer.split(),
                    "prior": meta["prior"][turn] is not None and text.split()[:1] == [meta["prior"][turn]],
                }
            )  # fmt: skip
    return told


def measured(model: Any, collator: Any, sets: dict[str, Any], fusion: Any = None, few: bool = False) -> dict:
    """Every column of the table, 0 .. 1; ``few``: pictures alone, where fusion can act."""
    from opsin.data.prompts import without_pictures

    row: dict[str, float] = {}

    def put(name: str, values: list[bool]) -> None:
        row[name] = sum(values) / len(values)

    for how in ("exact", "begins"):
        for name in ("image", "text_skill", "conflict", "minimal_pairs", "text", "skill_in_text"):
            if few and (name in ("text", "skill_in_text")):
                continue
            key = f"said/{name}"
            if how == "exact":
                row[key] = asked(model, collator, sets[name], fusion)  # type: ignore[assignment]
            told: Any = row[key]
            put(f"{how}/{name}", [t[how] for t in told])
            if name == "image":
                for kind in KINDS:
                    put(f"{how}/image/{kind}", [t[how] for t in told if t["kind"] == kind])
            if name == "minimal_pairs":
                pairs: dict[str, bool] = {}
                for t in told:
                    pairs[t["pair"]] = pairs.get(t["pair"], True) and t[how]
                put(f"{how}/minimal_pairs", list(pairs.values()))
    put("prior/conflict", [t["prior"] for t in row["said/conflict"]])  # type: ignore[union-attr]
    if not few and fusion is None:
        blind = asked(model, collator, [without_pictures(s) for s in sets["image"]], None)
        for how in ("exact", "begins"):
            put(f"{how}/no_picture", [t[how] for t in blind])
    return {k: v for k, v in row.items() if not k.startswith("said/")}


def fusions() -> list[dict[str, float]]:
    """The sweep."""
    return [{"strength": g, "ratio": r} for g in STRENGTHS for r in RATIOS]


def one_seed(seed: int, options: argparse.Namespace, work: Path) -> None:
    """Train and measure all cells of a seed; writes one file a cell."""
    from opsin.algorithms.vift import Fusion
    from opsin.training.finished import open_model

    dev, chosen = seed in DEV_SEEDS, options.chosen and json.loads(options.chosen)
    sets = held_out(options.quick, dev)
    for cell in options.cells:
        out = work / ("fused" if chosen else "measured") / f"{cell}-{seed}.json"
        if out.is_file():
            continue
        run = train(cell, seed, work, options.samples, options.steps)
        model, collator = open_model(str(run), None)
        found: dict[str, Any] = {}
        if chosen:
            found["fused"] = measured(model, collator, sets, Fusion(**chosen[cell]), few=True)
        else:
            found["plain"] = measured(model, collator, sets)
            found["learnt"] = learnt(run)
            if dev:
                found["sweep"] = [
                    {**how, **measured(model, collator, sets, Fusion(**how), few=True)} for how in fusions()
                ]
            elif cell == options.cells[0]:
                found["before"] = before(run, collator, sets)
        out.parent.mkdir(exist_ok=True)
        out.write_text(json.dumps(found))


def before(run: Path, collator: Any, sets: dict[str, Any]) -> dict[str, float]:
    """What the model that all cells of a seed start from knows of text."""
    from opsin.training.finished import open_model

    aligned, _ = open_model(str(run / "stages" / "align" / "model"), "vicuna_v1")
    told = {name: asked(aligned, collator, sets[name], None) for name in ("text", "skill_in_text")}
    return {f"exact/{name}": sum(t["exact"] for t in of) / len(of) for name, of in told.items()}


def chosen_strengths(work: Path, cells: Sequence[str], dev: Sequence[int]) -> dict[str, dict[str, float]]:
    """For each cell the setting that answers most image questions right (first words) on the dev scenes."""
    best = {}
    for cell in cells:
        sweeps = [json.loads((work / "measured" / f"{cell}-{s}.json").read_text())["sweep"] for s in dev]
        score = [sum(sweep[i]["begins/image"] for sweep in sweeps) for i in range(len(fusions()))]
        best[cell] = fusions()[score.index(max(score))]
    return best


def learnt(run: Path) -> dict[str, int]:
    """Samples and learnt tokens by stream, as the run logged them."""
    last: dict[str, int] = {}
    for line in (run / "metrics.jsonl").read_text().splitlines():
        values = json.loads(line)
        last.update(
            {k: int(v) for k, v in values.items() if k.startswith(("mixture/samples", "mixture/learnt"))}
        )
    return last


def main() -> None:
    """Run what is not there yet, choose strengths, print and save the table."""
    made = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    made.add_argument("--quick", action="store_true", help="one seed, few steps and scenes: to see it run")
    made.add_argument("--work", default="runs/vift_cells", help="folder for data, runs and what was measured")
    made.add_argument("--steps", type=int, default=500)
    made.add_argument("--samples", type=int, default=4000)
    made.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    made.add_argument("--cells", nargs="+", default=list(CELLS), choices=CELLS)
    made.add_argument("--jobs", type=int, default=2, help="seeds at once")
    made.add_argument("--one", type=int, help=argparse.SUPPRESS)
    made.add_argument("--chosen", help=argparse.SUPPRESS)
    options = made.parse_args()
    work = Path(options.work).resolve()
    work.mkdir(parents=True, exist_ok=True)
    if options.one is not None:
        one_seed(options.one, options, work)
        return
    from vift_table import report_cells

    prepare_data(work, options.samples)
    seeds = options.seeds[:1] if options.quick else options.seeds
    dev = DEV_SEEDS[:1] if options.quick else DEV_SEEDS
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}

    def run(seed: int, *more: str) -> None:
        command = [sys.executable, __file__, *sys.argv[1:], "--one", str(seed), *more]
        subprocess.run(command, check=True, env=environment)

    with ThreadPoolExecutor(options.jobs) as pool:
        list(pool.map(run, [*dev, *seeds]))
        best = chosen_strengths(work, options.cells, dev)
        list(pool.map(lambda seed: run(seed, "--chosen", json.dumps(best)), seeds))
    report_cells(work, list(seeds), list(dev), best, options)


def prepare_data(work: Path, samples: int) -> None:
    """Scenes that all runs share, made before any of them starts."""
    from opsin.data.scenes import SceneConfig
    from opsin.data.scenes.write import write

    for given in datasets(work, samples).values():
        if not (Path(given["out"]) / "index.json").is_file():
            given = dict(given)
            out, split, stream, seed, count = (
                given.pop(k) for k in ("out", "split", "stream", "seed", "samples")
            )
            write(out, config=SceneConfig(**given), seed=seed, split=split, stream=stream, samples=count)


if __name__ == "__main__":
    main()
