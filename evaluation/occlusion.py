"""Occlusion: does the answer hang on the object that is asked about, or would any hole in the picture do?

The log-likelihood of the stored answer is taken three times: of the picture as it is, with the asked objects painted over,
and with equal areas elsewhere painted over. If the model looks, the first hole costs many nats and the second few; the
paired difference of both is the number to read. Sums over the answer's tokens, what ends it left out.

What is painted: the box of each object that the answer is about (``meta.asked``, ``meta.objects[i].box``), filled with the
mean colour of the two pixels around it, which leaves no striking patch where the floor is smooth; or mid-grey. The holes
elsewhere are the same boxes moved, chosen by a hash of sample and exchange among all places where they lie in the picture
and touch no asked object; other objects may lie there, as they would in front of any hole. Boxes that overlap move as
one, so that both areas are equal to the pixel. A picture without room is left out and counted.
"""

from __future__ import annotations

import hashlib
import io
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from ..data.chat import BadConversation, asked_alone, exchanges
from ..data.schema import IMAGE_MARK, pack_images, unpack_images
from ..models.errors import UserError
from .adapter import VLMAdapter
from .holes import FILLS, Box, area, painted, places_elsewhere
from .logprobs import AnswerLogprob
from .occlusion_sheet import Example, occlusion_sheet
from .questions import UNNAMED, kinds_of
from .scorers.base import Measure
from .stored_answers import clustered, stored_answers
from .usable import first_exchanges

PICTURES = ("picture", "object", "elsewhere")
"""As it is, with the asked objects painted over, with equal areas elsewhere painted over."""


@dataclass(frozen=True)
class Question:
    """One question about some objects.

    Attributes:
        id, turn, kind: which it is.
        picture: digest of its picture; questions that share it are not independent.
        objects, elsewhere: boxes in pixels that were painted.
        share: of the picture's area that each hole has.
        found: of ``PICTURES``: the answer's log-likelihood.
    """

    id: str
    turn: int
    kind: str
    picture: str
    objects: tuple[Box, ...]
    elsewhere: tuple[Box, ...]
    share: float
    found: dict[str, AnswerLogprob]

    def change(self, hole: str) -> float:
        """Nats that a hole adds to the answer's log-likelihood; below 0: the answer has become less likely."""
        return self.found[hole].sum - self.found["picture"].sum


@dataclass(frozen=True)
class Occlusion:
    """Questions about objects, with holes.

    Attributes:
        fill: one of ``holes.FILLS``.
        questions: in the order of the samples.
        skipped: reason -> questions (samples, where none could be read) that are not among them.
        examples: for :meth:`picture`.
    """

    fill: str
    questions: tuple[Question, ...]
    skipped: dict[str, int] = field(default_factory=dict)
    examples: tuple[Example, ...] = ()

    def measures(self, kind: str = UNNAMED) -> dict[str, Measure]:
        """``change/object``, ``change/elsewhere``, their paired ``difference`` (nats), ``accuracy/P``, ``share``.

        Standard errors are of pictures, not of questions.
        """
        chosen = [q for q in self.questions if kind in (q.kind, UNNAMED)]
        pictures = [q.picture for q in chosen]
        nats = partial(clustered, clusters=pictures, unit="nats")
        return {
            **{f"change/{hole}": nats([q.change(hole) for q in chosen]) for hole in PICTURES[1:]},
            "difference": nats([q.change("object") - q.change("elsewhere") for q in chosen]),
            **{
                f"accuracy/{name}": clustered([float(q.found[name].exact) for q in chosen], pictures)
                for name in PICTURES
            },
            "share": clustered([q.share for q in chosen], pictures),
        }

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        kinds = sorted({q.kind for q in self.questions} - {UNNAMED})
        return {
            "fill": self.fill,
            "questions": len(self.questions),
            "pictures": len({q.picture for q in self.questions}),
            "skipped": dict(sorted(self.skipped.items())),
            "measures": {name: m.as_dict() for name, m in self.measures().items()},
            "by_kind": {
                kind: {name: m.as_dict() for name, m in self.measures(kind).items()} for kind in kinds
            },
        }

    def picture(self, path: str | Path) -> Path:
        """Some questions with their three pictures and log-likelihoods.

        Args:
            path: PNG to write.
        """
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        occlusion_sheet(self.examples, self.measures()).save(path, "PNG", optimize=True)
        return path


def occlusion(
    adapter: VLMAdapter,
    samples: Sequence[dict[str, Any]],
    *,
    fill: str = "border",
    shown: int = 6,
    progress: Callable[[str, int, int], None] | None = None,
) -> Occlusion:
    """Score stored answers with and without holes. Every rank calls this with the same samples.

    Args:
        adapter: the model; with ability fusion, if it has it.
        samples: stored samples of one picture whose ``meta`` knows ``asked`` (for each exchange the indices of its
            objects, or None) and ``objects`` (each with a ``box`` in pixels), as scenes do. Other exchanges are skipped.
        fill: ``border`` or ``grey``.
        shown: questions that :meth:`Occlusion.picture` shows, the first of so many pictures.
        progress: called after each batch with (picture, batches done, batches) of this rank.

    Raises:
        UserError: an unknown fill, or no question about an object that can be used.
    """
    if fill not in FILLS:
        raise UserError(f"fill '{fill}': use {', '.join(FILLS)}")
    skipped: Counter[str] = Counter()
    asked = [one for sample in samples for one in _asked(adapter, sample, skipped)]
    found: dict[str, list[list[AnswerLogprob] | str]] = {}
    for name in PICTURES:
        change = None if name == "picture" else partial(_with_holes, name, fill)
        told = None if progress is None else partial(progress, name)
        found[name] = stored_answers(adapter, asked, change, told)
    questions: list[Question] = []
    examples: dict[str, Example] = {}
    for i, sample in enumerate(asked):
        answers = {name: found[name][i] for name in PICTURES}
        terms = {name: one[-1] for name, one in answers.items() if not isinstance(one, str)}
        if len(terms) < len(PICTURES):
            why = next(one for one in answers.values() if isinstance(one, str))
            skipped[why.partition(":")[0]] += 1
            continue
        holes = sample["holes"]
        digest = hashlib.sha256(sample["images"]).hexdigest()[:16]
        questions.append(
            Question(
                str(sample["id"]), holes["turn"], holes["kind"], digest, holes["object"], holes["elsewhere"],
                holes["share"], terms,
            )
        )  # fmt: skip
        if len(examples) < shown and digest not in examples:
            pictures = {
                name: unpack_images(_with_holes(name, fill, [sample])[0]["images"])[0] for name in PICTURES
            }
            turns = sample["conversations"]
            words = turns[-2]["value"].replace(IMAGE_MARK, "").strip()
            examples[digest] = Example(words, turns[-1]["value"].strip(), pictures, holes["object"], holes["elsewhere"],
                                       {name: one.sum for name, one in terms.items()})  # fmt: skip
    if not questions:
        raise UserError(
            f"occlusion: none of {len(samples)} samples has a question about an object with a box "
            "(meta.asked, meta.objects[].box, one picture) that can be used; scenes have them"
        )
    return Occlusion(fill, tuple(questions), dict(skipped), tuple(examples.values()))


def _asked(adapter: VLMAdapter, sample: dict[str, Any], skipped: Counter[str]) -> list[dict[str, Any]]:
    """The exchanges of a sample that are about objects, each as a sample of its own with its ``holes``."""
    try:
        _, pairs = exchanges(sample["conversations"])
        kinds = kinds_of(sample, len(pairs))
        pictures = unpack_images(sample["images"])
        alone = len(pairs) > 1 and adapter.collator.encoder.independent(sample)
        questions = asked_alone([user for user, _ in pairs]) if alone else []
    except ValueError as error:
        skipped["bad_conversation" if isinstance(error, BadConversation) else "unreadable_image"] += 1
        return []
    meta: Any = sample.get("meta") if isinstance(sample.get("meta"), Mapping) else {}
    about, objects = meta.get("asked") or [], meta.get("objects") or []
    if len(pictures) != 1 or len(about) != len(pairs):
        skipped["no_object"] += len(pairs)
        return []
    try:
        with Image.open(io.BytesIO(pictures[0])) as picture:
            size = picture.size
    except (OSError, ValueError, SyntaxError):
        skipped["unreadable_image"] += 1
        return []
    found = []
    for turn, indices in enumerate(about):
        boxes = _boxes(indices, objects, size)
        elsewhere = places_elsewhere(boxes, size, (sample["id"], turn)) if boxes else None
        if not boxes or elsewhere is None:
            skipped["no_room" if boxes else "no_object"] += 1
            continue
        holes = {"turn": turn, "kind": kinds[turn], "object": boxes, "elsewhere": elsewhere,
                 "share": area(boxes) / (size[0] * size[1])}  # fmt: skip
        one = _alone(sample, turn, questions[turn]) if alone else first_exchanges(sample, turn + 1)
        found.append({**one, "holes": holes})
    return found


def _boxes(indices: Any, objects: Sequence[Mapping[str, Any]], size: tuple[int, int]) -> tuple[Box, ...]:
    """Boxes of the objects that lie in the picture; none if one of them does not, or shows nothing."""
    boxes = []
    for index in indices or ():
        box = objects[index].get("box") if index < len(objects) else None
        if box is None or len(box) != 4:
            return ()
        left, top, right, bottom = (int(v) for v in box)
        if not (0 <= left < right <= size[0] and 0 <= top < bottom <= size[1]):
            return ()
        boxes.append((left, top, right, bottom))
    return tuple(dict.fromkeys(boxes))


def _alone(sample: dict[str, Any], turn: int, question: str) -> dict[str, Any]:
    """One exchange of a sample as it is asked alone."""
    turns = sample["conversations"]
    system, answer = turns[: len(turns) % 2], turns[len(turns) % 2 + 2 * turn + 1]
    return {**sample, "conversations": [*system, {"from": "human", "value": question}, answer]}


def _with_holes(name: str, fill: str, part: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Samples with one kind of hole painted into their picture."""
    if name == "picture":
        return part
    return [
        {**s, "images": pack_images([painted(unpack_images(s["images"])[0], s["holes"][name], fill)])}
        for s in part
    ]
