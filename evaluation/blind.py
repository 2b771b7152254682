"""What a model scores that does not look: the rows beside every accuracy."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from PIL import Image

from ..data.schema import IMAGE_MARK, pack_images, unpack_images


def with_other_pictures(samples: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each sample with the pictures of the next one that has as many (the last gets the first's)."""
    by_count: dict[int, list[int]] = {}
    for i, sample in enumerate(samples):
        by_count.setdefault(len(unpack_images(sample["images"])), []).append(i)
    changed = [dict(s) for s in samples]
    for indices in by_count.values():
        for here, there in zip(indices, [*indices[1:], indices[0]], strict=True):
            changed[here]["images"] = samples[there]["images"]
    return changed


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
        samples: training samples (stored form).
    """

    def __init__(self, samples: Iterable[dict[str, Any]]):
        by_question: dict[str, Counter[str]] = {}
        by_kind: dict[str, Counter[str]] = {}
        for sample in samples:
            for question, answer, kind in questions(sample):
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


def questions(sample: dict[str, Any]) -> list[tuple[str, str, str]]:
    """(question without image marks, answer, kind) of each exchange."""
    turns = [t for t in sample["conversations"] if t["from"] != "system"]
    kinds = (sample.get("meta") or {}).get("kinds") or ["all"] * (len(turns) // 2)
    return [
        (human["value"].replace(IMAGE_MARK, "").strip(), gpt["value"].strip(), str(kind))
        for human, gpt, kind in zip(turns[::2], turns[1::2], kinds, strict=True)
    ]
