"""Answers that are right word for word."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...models.errors import UserError
from .base import Scorer


class Exact(Scorer):
    """``exact``: the answer is the gold one, but for white space around it. Only silence has no reading."""

    name = "exact"

    def parse(self, record: Mapping[str, Any]) -> str | None:
        """The answer in the form in which it is compared; None: there is none."""
        return self.form(record["output"], record) or None

    def right(self, record: Mapping[str, Any], parsed: str | None) -> bool:
        """Whether both have the same form.

        Raises:
            UserError: there is no gold answer.
        """
        gold = self.form(record["gold"], record)
        if not gold:
            raise UserError(f"suite {record.get('suite')}, {record.get('id')}: gold is empty")
        return parsed == gold

    def form(self, text: str, record: Mapping[str, Any]) -> str:
        """What of a text is compared, for the question of ``record``."""
        return text.strip()


class ExactRelaxed(Exact):
    """``exact_relaxed``: as ``exact``, but for case, runs of white space and final full stops.

    For open answers as RealWorldQA's and VLMEvalKit's exact matching have them.
    """

    name = "exact_relaxed"

    def form(self, text: str, record: Mapping[str, Any]) -> str:
        """Lower case, one space between words, no final full stop."""
        return " ".join(text.lower().split()).rstrip(". ")


class FirstWords(Exact):
    """``first_words``: the answer begins with the gold one's words ("red cube" for "red"), for models that do not stop."""

    name = "first_words"

    def form(self, text: str, record: Mapping[str, Any]) -> str:
        """As many words as the gold answer has."""
        return " ".join(text.split()[: len(record["gold"].split())])
