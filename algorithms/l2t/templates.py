"""Which sentences are templates: from a hand list, the data set's own list, or how often they occur."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...data.sentences import SentenceCounts, sentence_key
from ...models.errors import UserError, nearest
from .functional import Template, counted, frequent_sentences, removed_share

SOURCES = ("auto", "list", "dataset", "frequency", "none")


@dataclass(frozen=True)
class TemplateChoice:
    """How templates are chosen; the fields are keywords of ``L2T``, where they are explained.

    Raises:
        UserError: one of them is out of range or names what does not exist.
    """

    source: str = "auto"
    templates: Sequence[str] | str | None = None
    sample: int = 0
    min_count: int = 50
    min_share: float = 1e-3
    top_k: int = 50
    min_words: int = 3
    allow: Sequence[str] = ()
    max_removed: float = 0.5
    report: str | None = None

    def __post_init__(self) -> None:
        one_of("template_source", self.source, SOURCES)
        at_least(0, template_sample=self.sample, min_count=self.min_count, top_k=self.top_k)
        at_least(0, min_words=self.min_words, min_share=self.min_share, max_removed=self.max_removed)
        _sentence_list("allow", self.allow)
        if isinstance(self.templates, str):
            if Path(self.templates).is_file():  # one that is not there yet may come before training starts
                _sentences(self.templates)
        elif self.templates is not None:
            _sentence_list("templates", self.templates)
        if self.source == "list" and self.templates is None:
            raise UserError("algorithms.l2t: template_source 'list' needs templates: a list or a file")

    def choose(self, dataset: Any) -> tuple[list[Template], str]:
        """Templates and where they are from: hand list, the data's own list, sentence frequency, in this order."""
        source = self.source
        if source == "none":
            return [], "none"
        given = None if self.templates is None else [sentence_key(s) for s in _sentences(self.templates)]
        counts = self._counts(dataset, asked=source in ("dataset", "frequency") or given is None)
        tally: Counter[str] = counts.counts if counts is not None else Counter()
        if given is not None and source in ("auto", "list"):
            table, source = counted(given, tally), "list"
        else:
            assert counts is not None
            if source == "dataset" and not counts.templates:
                raise UserError(
                    "algorithms.l2t: the dataset declares no templates of its own; use template_source: frequency"
                )
            if counts.templates and source in ("auto", "dataset"):
                table, source = counted(counts.templates, counts.counts), "dataset"
            else:
                table, source = self._frequent(counts), "frequency"
        share = removed_share(table, counts.words) if counts is not None else None
        self._write_report(table, source, share)
        if share is not None and share > self.max_removed:
            raise UserError(
                f"algorithms.l2t: templates by {source} hold {share:.0%} of all instruction words (limit "
                f"max_removed={self.max_removed:.0%}); genuine questions repeat in this data: give a hand list "
                "(algorithms.l2t.templates: [...]) or template_source: none"
            )
        return table, source

    def _frequent(self, counts: SentenceCounts) -> list[Template]:
        return frequent_sentences(
            counts,
            min_count=self.min_count,
            min_share=self.min_share,
            top_k=self.top_k,
            min_words=self.min_words,
            allow=tuple(sentence_key(a) for a in self.allow),
        )

    def _counts(self, dataset: Any, asked: bool) -> SentenceCounts | None:
        read = getattr(dataset, "sentence_counts", None)
        counts: Any = read(sample=self.sample) if callable(read) else None
        if counts is None and asked:
            raise UserError(
                "algorithms.l2t: no sentence counts beside the training data; make them with `opsin data templates "
                "REMOTE`, or set algorithms.l2t.template_sample, templates, or template_source: none"
            )
        return counts

    def _write_report(self, table: Sequence[Template], source: str, share: float | None) -> None:
        if self.report is None:
            return
        body = {
            "source": source,
            "share_of_instruction_words_removed": share,
            "templates": [{"sentence": t.sentence, "count": t.count} for t in table],
        }
        path = Path(self.report)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(body, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def _sentences(given: Sequence[str] | str) -> list[str]:
    """A list, or the lines of a file."""
    if not isinstance(given, str):
        return list(given)
    try:
        return [line for line in Path(given).read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise UserError(f"algorithms.l2t.templates: cannot read '{given}': {why}") from error


def one_of(key: str, value: str, known: Sequence[str]) -> None:
    """Refuse a value that is not among the known ones."""
    if value not in known:
        raise UserError(f"algorithms.l2t.{key}: '{value}' is unknown{nearest(str(value), known)}")


def at_least(least: int, **values: float) -> None:
    """Refuse values that are smaller."""
    for key, value in values.items():
        if not value >= least:
            raise UserError(f"algorithms.l2t.{key}: expected {least} or more, got {value}")


def _sentence_list(key: str, given: Any) -> None:
    if isinstance(given, dict | str) or not all(isinstance(s, str) for s in given):
        raise UserError(f"algorithms.l2t.{key}: expected a list of sentences, got {given!r}"[:300])
