"""What a model scores that does not look: the rows beside every accuracy."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from PIL import Image

from ..data.chat import BadConversation
from ..data.schema import pack_images, unpack_images
from .questions import questions


def with_other_pictures(samples: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each sample with other pictures, as many as it has: the next ones that differ (the last get the first).

    Several samples about one picture all get the same other one, never their own. A sample without any other
    pictures to be had (no picture at all, the same one everywhere, a number of its own) is left out: with its
    own pictures it would not be blind.
    """
    by_count: dict[int, dict[bytes, None]] = {}  # distinct pictures, in order of appearance
    for sample in samples:
        packed = sample["images"]
        by_count.setdefault(len(unpack_images(packed)), {})[packed] = None
    following: dict[bytes, bytes] = {}
    for distinct in by_count.values():
        if len(distinct) > 1:
            pictures = list(distinct)
            following.update(zip(pictures, [*pictures[1:], pictures[0]], strict=True))
    return [{**s, "images": following[s["images"]]} for s in samples if s["images"] in following]


def with_blank_pictures(samples: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each sample with mid-grey pictures of the same size."""
    return [
        {**s, "images": pack_images([_grey(data) for data in unpack_images(s["images"])])} for s in samples
    ]


def _grey(data: bytes) -> bytes:
    with Image.open(io.BytesIO(data)) as picture:
        size = picture.size
    buffer = io.BytesIO()
    Image.new("RGB", size, (128, 128, 128)).save(buffer, "PNG")
    return buffer.getvalue()


class Majority:
    """Answers a question without a picture: by what its exact words got most often in training, else its kind.

    Args:
        samples: training samples (stored form); those that are no conversation teach nothing.
    """

    def __init__(self, samples: Iterable[dict[str, Any]]):
        by_question: dict[str, Counter[str]] = {}
        by_kind: dict[str, Counter[str]] = {}
        for sample in samples:
            try:
                asked = questions(sample)
            except BadConversation:
                continue
            for question, answer, kind in asked:
                by_question.setdefault(question, Counter())[answer] += 1
                by_kind.setdefault(kind, Counter())[answer] += 1
        self.by_question = {q: _most(c) for q, c in by_question.items()}
        self.by_kind = {k: _most(c) for k, c in by_kind.items()}

    def answer(self, question: str, kind: str) -> str:
        """The answer most often right; the empty string for a kind never seen."""
        return self.by_question.get(question, self.by_kind.get(kind, ""))

    def right(self, sample: dict[str, Any]) -> list[bool]:
        """Whether it is right, for each question of a sample."""
        return [self.answer(q, k) == a for q, a, k in questions(sample)]


def _most(counts: Counter[str]) -> str:
    return min(counts, key=lambda a: (-counts[a], a))
