"""The same yes/no predictions scored by our rules, by lmms-eval's and by hand, with every difference explained.

    python -m opsin.evaluation.lmms.compare predictions.jsonl [--suite NAME] [--out FOLDER]

``by hand`` is what somebody does with a table: the predictions go out as CSV, and ten lines of the standard library count
first words. ``lmms-eval`` are the installed package's own functions of its task ``pope``.
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ...models.errors import UserError
from ..records import read_predictions
from ..scorers.pope import Pope, PopeRead
from ..scorers.yesno import gold_yes_no, llava_pope_rule, read_yes_no
from .forms import installed
from .requests import cut

MEASURES = ("accuracy", "precision", "recall", "f1", "yes_ratio", "gold_yes_ratio", "neither")
Records = Sequence[Mapping[str, Any]]

WHY = {
    "more than the word": "the first word is yes or no, and more follows, if only a full stop: lmms-eval wants the word alone, "
    "and takes everything else for neither",
    "denied later": "no yes or no in front, and a denial further on: LLaVA's rule looks for No, no and not in the first "
    "sentence; by hand only first words count, lmms-eval wants the word alone",
    "other words": "assent or denial in other words (Sure, Nope): our strict reading knows them; LLaVA's rule takes "
    "whatever does not say No, no or not for yes; the others for neither",
    "first word against the rest": "yes or no in front, and LLaVA's rule or the strict reading finds the other, or doubt, in "
    "the sentence",
    "no reading": "neither yes nor no can be read: LLaVA's rule counts it as yes, the others as neither",
    "ranked or not asked": "no answer in words, and nothing that one scorer could take for yes by default",
}
"""Why scorers differ about an answer."""


def compare(records: Records, folder: Path) -> dict[str, Any]:
    """Score predictions in all ways.

    Args:
        records: predictions of one suite of yes/no questions.
        folder: where the CSV goes.

    Returns:
        ``scorers``: name -> measures; ``differences``: for each answer about which they differ ``id``, ``gold``,
        ``output``, ``why`` and the verdict of each scorer; ``agreed``: measures of each scorer on the answers about which
        all agree, which have to be equal but for lmms-eval's ``yes_ratio``.
    """
    ways: dict[str, Callable[[Records], tuple[list[str], dict[str, float | None]]]] = {
        f"{Pope.name}/{Pope.version}": lambda these: _ours(Pope(), these),
        f"{PopeRead.name}/{PopeRead.version}": lambda these: _ours(PopeRead(), these),
        "lmms-eval": _of_lmms,
        "by hand": lambda these: _by_hand(these, folder / "by_hand.csv"),
    }
    verdicts, scores = {}, {}
    for name, way in ways.items():
        verdicts[name], scores[name] = way(records)
    differences, agreed = [], []
    for at, record in enumerate(records):
        said = {name: verdicts[name][at] for name in ways}
        if len(set(said.values())) == 1:
            agreed.append(record)
        else:
            differences.append(
                {
                    "id": record["id"],
                    "gold": gold_yes_no(record),
                    "output": record["output"],
                    "why": why(record),
                    **said,
                }
            )
    return {
        "n": len(records),
        "scorers": scores,
        "differences": differences,
        "agreed": {name: way(agreed)[1] for name, way in ways.items()} if agreed else {},
    }


def why(record: Mapping[str, Any]) -> str:
    """Key of :data:`WHY` for an answer about which scorers differ."""
    text = record["output"]
    if record.get("error") or record.get("logprobs"):
        return "ranked or not asked"
    first, read, llava = _first_word(text), read_yes_no(text), llava_pope_rule(text)
    if first:
        return "more than the word" if first == read == llava else "first word against the rest"
    if read is None:
        return "no reading" if llava == "yes" else "denied later"
    return "denied later" if read == llava == "no" else "other words"


def _ours(scorer: Pope, records: Records) -> tuple[list[str], dict[str, float | None]]:
    marked, scores = scorer.score(records)
    verdicts = [scorer.counts_as(record, record["parsed"]) or "neither" for record in marked]
    numbers = {key: scores.measures[key].value for key in MEASURES if key in scores.measures}
    return verdicts, {**numbers, "neither": verdicts.count("neither") / len(verdicts)}


def _of_lmms(records: Records) -> tuple[list[str], dict[str, float | None]]:
    """By lmms-eval's own functions, which get an answer as its tasks do: cut at an empty line, white space dropped."""
    path = installed() / "tasks" / "pope" / "utils.py"
    spec = importlib.util.spec_from_file_location("lmms_eval_pope", path)
    assert spec is not None and spec.loader is not None
    pope = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(pope)
    results = [
        pope.pope_process_results(
            {"answer": gold_yes_no(record), "question_id": record["id"]}, [cut(record["output"], ["\n\n"])]
        )
        for record in records
    ]
    numbers = {
        name: float(getattr(pope, f"pope_aggregate_{theirs}")([one[f"pope_{theirs}"] for one in results]))
        for name, theirs in zip(
            MEASURES, ("accuracy", "precision", "recall", "f1_score", "yes_ratio"), strict=False
        )
    }
    said = [one["pope_accuracy"]["prediction"] for one in results]
    verdicts = [word if word in ("yes", "no") else "neither" for word in said]
    return verdicts, {**numbers, "neither": verdicts.count("neither") / len(verdicts)}


def _by_hand(records: Records, file: Path) -> tuple[list[str], dict[str, float | None]]:
    """Out as CSV, back, and counted."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w", newline="", encoding="utf-8") as out:
        csv.writer(out).writerows([r["id"], gold_yes_no(r), r["output"]] for r in records)
    with file.open(newline="", encoding="utf-8") as back:
        rows = [(gold, _first_word(output) or "neither") for _, gold, output in csv.reader(back)]
    tp = rows.count(("yes", "yes"))
    fp, fn = rows.count(("no", "yes")), sum(g == "yes" for g, _ in rows) - tp
    numbers = {
        "accuracy": sum(gold == said for gold, said in rows) / len(rows),
        "precision": tp / (tp + fp) if tp + fp else None,
        "recall": tp / (tp + fn) if tp + fn else None,
        "f1": 2 * tp / (2 * tp + fp + fn) if tp + fp else None,
        "yes_ratio": (tp + fp) / len(rows),
        "gold_yes_ratio": (tp + fn) / len(rows),
        "neither": sum(said == "neither" for _, said in rows) / len(rows),
    }
    return [said for _, said in rows], numbers


def _first_word(text: str) -> str | None:
    """``yes`` or ``no`` if the first word is, whatever stands around it."""
    words = text.split()
    word = "".join(c for c in words[0].lower() if c.isalpha()) if words else ""
    return word if word in ("yes", "no") else None


def as_text(found: Mapping[str, Any], examples: int = 3) -> str:
    """Markdown: the table, the differences by what explains them, and what is left."""
    names = list(found["scorers"])
    lines = [f"| {found['n']} answers | " + " | ".join(names) + " |", "|---|" + "---:|" * len(names)]
    for key in MEASURES:
        lines.append(
            f"| {key} | " + " | ".join(_shown(found["scorers"][name].get(key)) for name in names) + " |"
        )
    counts = Counter(one["why"] for one in found["differences"])
    lines += ["", f"{len(found['differences'])} answers are taken differently:"]
    for key, count in counts.most_common():
        lines.append(f"* {count} x **{key}**: {WHY[key]}.")
        for one in [d for d in found["differences"] if d["why"] == key][:examples]:
            said = ", ".join(f"{name}: {one[name]}" for name in names)
            lines.append(f"  * {one['id']} (gold {one['gold']}): {one['output'][:80]!r} -> {said}")
    lines += [
        "",
        "lmms-eval's yes_ratio is that of the gold answers; its precision, recall and F1 leave out answers that are neither.",
    ]
    if left := leftovers(found):
        lines.append(f"NOT explained: on the answers that all take alike, {', '.join(left)} differ.")
    else:
        lines.append(
            f"On the other {found['n'] - len(found['differences'])} answers all scorers give the same numbers."
        )
    return "\n".join(lines) + "\n"


def leftovers(found: Mapping[str, Any]) -> list[str]:
    """Measures that differ on the answers that all scorers take alike: nothing explains these."""
    agreed = found["agreed"]
    left = []
    for key in MEASURES[:4]:
        # 0 is how lmms-eval writes what is not defined.
        values = {round(scores.get(key) or 0.0, 9) for scores in agreed.values()}
        if len(values) > 1:
            left.append(key)
    return left


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the comparison; the exit code is 1 when a difference is not explained."""
    parser = argparse.ArgumentParser(description="Score the same yes/no predictions in four ways.")
    parser.add_argument("predictions", type=Path, help="predictions.jsonl of `opsin eval`")
    parser.add_argument("--suite", help="of several suites the one that is meant")
    parser.add_argument(
        "--out", type=Path, default=Path("scorers"), help="folder for the CSV and the comparison"
    )
    given = parser.parse_args(arguments)
    try:
        records = read_predictions(given.predictions)
        suites = sorted({record["suite"] for record in records})
        if given.suite is None and len(suites) > 1:
            raise UserError(f"--suite: which of {', '.join(suites)}?")
        records = [r for r in records if given.suite in (None, r["suite"])]
        if not records:
            raise UserError(f"--suite {given.suite}: no predictions; there are {', '.join(suites)}")
        found = compare(records, given.out)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    text = as_text(found)
    (given.out / "comparison.md").write_text(text, encoding="utf-8")
    print(text, end="")
    return 1 if leftovers(found) else 0


if __name__ == "__main__":
    sys.exit(main())
