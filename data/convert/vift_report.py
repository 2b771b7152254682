"""What splitting an instruction set for ViFT found: counts, as they lie in ``split.json``."""

from __future__ import annotations

import json
from array import array
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ...models.errors import UserError
from ..messages import shown
from .vift_rule import CAPTIONS, TEXT, Rule, unusable

FREQUENT = 10
"""Sentences that a report shows."""


@dataclass
class Part:
    """The samples of one side: their numbers in the source, and words of answers and exchanges of each."""

    numbers: array[int] = field(default_factory=lambda: array("Q"))
    words: array[int] = field(default_factory=lambda: array("L"))
    exchanges: array[int] = field(default_factory=lambda: array("L"))


@dataclass
class Survey:
    """What the first pass over the samples finds.

    Attributes:
        parts: side -> its samples.
        dropped: reason -> number of samples.
        dropped_exchanges: number of theirs; what is no conversation has none.
        sentences: of the first turns of dropped samples with pictures -> number of samples; no caption prompts.
        kept: sentences that stand beside a caption's pictures.
        with_pictures: number of samples that have pictures.
        bad: the first sample that training could not use either, in words.
    """

    parts: dict[str, Part] = field(default_factory=lambda: {CAPTIONS: Part(), TEXT: Part()})
    dropped: Counter[str] = field(default_factory=Counter)
    dropped_exchanges: int = 0
    sentences: Counter[str] = field(default_factory=Counter)
    kept: set[str] = field(default_factory=set)
    with_pictures: int = 0
    bad: str = ""

    def frequent(self) -> list[tuple[str, int]]:
        """The most frequent of the sentences; among equals in the order of their letters."""
        return sorted(self.sentences.items(), key=lambda each: (-each[1], each[0]))[:FREQUENT]


def make_report(
    read: int, found: Survey, rule: Rule, sides: Mapping[str, tuple[str, Mapping[str, Any] | None]]
) -> dict[str, Any]:
    """The report of a split.

    Args:
        read: number of samples.
        found: what the first pass found of them.
        rule: by which.
        sides: side -> its address, and what was written (``samples``, ``skipped``: reason -> number, ``left_out``:
            numbers of samples); None: nothing.
    """
    dropped, exchanges, report = Counter(found.dropped), found.dropped_exchanges, {}
    for side, (address, written) in sides.items():
        part, left_out = found.parts[side], set((written or {}).get("left_out", ()))
        kept = [i for i, number in enumerate(part.numbers) if number not in left_out] if written else []
        exchanges += sum(part.exchanges[i] for i, number in enumerate(part.numbers) if number in left_out)
        dropped.update({unusable(reason): n for reason, n in (written or {}).get("skipped", {}).items()})
        report[side] = {
            "remote": shown(address) if kept else None,
            "samples": len(kept),
            "answer_words": sum(part.words[i] for i in kept),
            "exchanges": sum(1 if side == CAPTIONS else part.exchanges[i] for i in kept),
            "exchanges_dropped": sum(part.exchanges[i] - 1 for i in kept) if side == CAPTIONS else 0,
        }
    return {
        "format": "opsin.split-vift/1",
        "samples": read,
        **report,
        "dropped": dict(sorted(dropped.items(), key=lambda each: (-each[1], each[0]))),
        "dropped_exchanges": exchanges,
        "first_unusable": found.bad,
        "frequent_sentences": [{"sentence": key, "samples": count} for key, count in found.frequent()],
        "rule": {"built_in": rule.built_in, "prompts": len(rule.prompts), "caption_prompt": rule.caption_prompt},
        "caption_prompts": sorted(found.kept),
        "train_loader": {"dataset": _streams(report)},
    }  # fmt: skip


def _streams(report: Mapping[str, Any]) -> dict[str, Any]:
    """Both datasets as streams of a run, in their natural proportion."""
    kinds = {CAPTIONS: "caption", TEXT: "text"}
    there = [side for side in kinds if report[side]["samples"]]
    streams = {side: {"remote": report[side]["remote"], "kind": kinds[side]} for side in there}
    if len(there) < 2:
        return {"streams": streams}
    return {
        "streams": streams,
        "mixture": {"weights": {side: report[side]["samples"] for side in there}},
    }


def nothing_generic(found: Survey) -> UserError:
    """What to say where the captions would be empty."""
    why = f" (dropped: {listed(found.dropped)})" if found.dropped else ""
    if not found.with_pictures:
        return UserError(f"no sample gives a caption: none has a picture{why}")
    asked = ", ".join(f"'{short(key)}' ({count})" for key, count in found.frequent()[:5])
    return UserError(
        f"no sample gives a caption{why}; the most frequent sentences of first turns with pictures: {asked or 'none'}; put "
        "those that ask nothing specific into a file for --prompts"
    )


def short(key: str, most: int = 60) -> str:
    """A sentence of somebody's, as it may be printed."""
    return "".join(
        c if c.isprintable() else "?" for c in (key if len(key) <= most else f"{key[: most - 3]}...")
    )


def listed(counts: Mapping[str, int]) -> str:
    """Counts in words, the largest first."""
    ordered = sorted(counts.items(), key=lambda each: (-each[1], each[0]))
    return ", ".join(f"{count} {name}" for name, count in ordered)


def dumps(content: Mapping[str, Any]) -> bytes:
    """As JSON."""
    return (json.dumps(content, ensure_ascii=False, indent=1) + "\n").encode("utf-8", "replace")
