"""Visual Contribution: how much likelier the right answer is with its picture than without, in nats.

Each question's stored answer is scored under the same words with four pictures: its own (``image``), another sample's
(``other``), a grey one of the same size (``grey``), none at all (``removed``). Log-likelihoods are sums over the answer's
tokens; what ends it is left out. The contribution against a control is ``image`` minus that control:

    VC = log p(answer | picture, question) - log p(answer | control, question)

With the picture removed this is the definition of arXiv 2503.22215 (L2T), where it is introduced.

**Never rank models by it alone.** It has been seen to fall while accuracy rose: it says how far the picture moves the
answer, not whether to the right one, and a model that has grown surer of its guesses loses more without its picture. What
is taken for "no picture" decides its size and even its sign: on a model with random weights, removing the picture gave
-0.10 and a grey picture +0.11 nats. A grey picture, which training never showed, is mostly noise; another sample's picture
is in the distribution and therefore the control to trust, and a picture removed changes the prompt's length as well. So all
of them stand beside accuracy, with each term.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from ..data.chat import BadConversation, exchanges
from ..data.prompts import without_pictures
from ..data.schema import unpack_images
from ..models.errors import UserError
from .adapter import VLMAdapter
from .blind import with_blank_pictures, with_other_pictures
from .contribution_chart import contribution_chart
from .logprobs import AnswerLogprob
from .questions import UNNAMED, kinds_of
from .scorers.base import Measure
from .stored_answers import clustered, stored_answers

CONDITIONS = ("image", "other", "grey", "removed")
CONTROLS = CONDITIONS[1:]


@dataclass(frozen=True)
class Question:
    """One question under all conditions.

    Attributes:
        id, turn, kind: which it is.
        picture: digest of its pictures; questions that share it are not independent.
        found: condition -> the answer's log-likelihood; without those that could not be had.
    """

    id: str
    turn: int
    kind: str
    picture: str
    found: dict[str, AnswerLogprob]

    def contribution(self, control: str) -> float:
        """Nats by which the answer is likelier with its own picture than under a control."""
        return self.found["image"].sum - self.found[control].sum


@dataclass(frozen=True)
class VisualContribution:
    """Questions with pictures, each under all conditions.

    Attributes:
        questions: in the order of the samples.
        skipped: reason -> samples that are not among them.
    """

    questions: tuple[Question, ...]
    skipped: dict[str, int] = field(default_factory=dict)

    def kinds(self) -> list[str]:
        """Kinds of questions, sorted; those without a name are left to the total."""
        return sorted({q.kind for q in self.questions} - {UNNAMED})

    def measures(self, kind: str = UNNAMED) -> dict[str, Measure]:
        """``accuracy/C`` (share of answers that greedy decoding gives), ``nats/C`` and ``vc/CONTROL`` of one kind.

        Standard errors are of pictures, not of questions. What has no other picture is not in ``other``'s rows.
        """
        chosen = [q for q in self.questions if kind in (q.kind, UNNAMED)]
        rows: dict[str, Measure] = {}
        for condition in CONDITIONS:
            those = [q for q in chosen if condition in q.found]
            pictures = [q.picture for q in those]
            right = [float(q.found[condition].exact) for q in those]
            rows[f"accuracy/{condition}"] = clustered(right, pictures)
            rows[f"nats/{condition}"] = clustered([q.found[condition].sum for q in those], pictures, "nats")
            if condition in CONTROLS:
                gains = [q.contribution(condition) for q in those]
                rows[f"vc/{condition}"] = clustered(gains, pictures, "nats")
        return rows

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "questions": len(self.questions),
            "pictures": len({q.picture for q in self.questions}),
            "skipped": dict(sorted(self.skipped.items())),
            "measures": {name: m.as_dict() for name, m in self.measures().items()},
            "by_kind": {
                kind: {name: m.as_dict() for name, m in self.measures(kind).items()} for kind in self.kinds()
            },
        }

    def picture(self, path: str | Path) -> Path:
        """Accuracy and contributions by kind, with standard errors.

        Args:
            path: PNG to write.
        """
        rows = {kind: self.measures(kind) for kind in self.kinds()} | {"all": self.measures()}
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        contribution_chart(rows, CONDITIONS).save(path, "PNG", optimize=True)
        return path


def visual_contribution(
    adapter: VLMAdapter,
    samples: Sequence[dict[str, Any]],
    *,
    progress: Callable[[str, int, int], None] | None = None,
) -> VisualContribution:
    """Score stored answers under all conditions. Every rank calls this with the same samples.

    Args:
        adapter: the model; with ability fusion, if it has it.
        samples: stored samples with one or several exchanges, of at least two pictures.
        progress: called after each batch with (condition, batches done, batches) of this rank.

    Raises:
        UserError: no sample has a picture and can be used.
    """
    shown, skipped = _with_pictures(samples)

    def told(condition: str) -> Callable[[int, int], None] | None:
        return None if progress is None else partial(progress, condition)

    own = stored_answers(adapter, shown, None, told("image"))
    skipped.update(reason.partition(":")[0] for reason in own if isinstance(reason, str))
    # With a number each, for what has no other picture is left out.
    used = [
        {**s, "number": i} for i, (s, f) in enumerate(zip(shown, own, strict=True)) if not isinstance(f, str)
    ]
    if not used:
        raise UserError(f"visual contribution: none of {len(samples)} samples has a picture and can be used")
    found: dict[int, list[dict[str, AnswerLogprob]]] = {}
    for i, answers in enumerate(own):
        if not isinstance(answers, str):
            found[i] = [{"image": one} for one in answers]
    others = with_other_pictures(used)
    for condition, given, change in (
        ("other", others, None),
        ("grey", used, with_blank_pictures),
        ("removed", used, lambda part: [without_pictures(s) for s in part]),
    ):
        for sample, answers in zip(
            given, stored_answers(adapter, given, change, told(condition)), strict=True
        ):
            if isinstance(answers, str):  # another picture may be one of more tokens than fit
                continue
            for terms, one in zip(found[sample["number"]], answers, strict=True):
                terms[condition] = one
    questions = [
        Question(str(s["id"]), turn, kind, hashlib.sha256(s["images"]).hexdigest()[:16], terms)
        for s in used
        for turn, (kind, terms) in enumerate(
            zip(kinds_of(s, len(found[s["number"]])), found[s["number"]], strict=True)
        )
    ]
    return VisualContribution(tuple(questions), dict(skipped))


def _with_pictures(samples: Sequence[dict[str, Any]]) -> tuple[list[dict[str, Any]], Counter[str]]:
    """Samples that show something, and why the others do not count."""
    shown, skipped = [], Counter()
    for sample in samples:
        try:
            pictures = unpack_images(sample["images"])
            kinds_of(sample, len(exchanges(sample["conversations"])[1]))
        except ValueError as error:
            skipped["bad_conversation" if isinstance(error, BadConversation) else "unreadable_image"] += 1
            continue
        if pictures:
            shown.append(sample)
        else:
            skipped["no_picture"] += 1
    return shown, skipped
