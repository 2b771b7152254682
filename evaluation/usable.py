"""Which held-out samples can be scored, looked at once before any row: the others are counted, not stumbled over."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..data.chat import BadConversation, exchanges
from ..data.encode import ConversationEncoder, Rejected
from ..data.schema import IMAGE_MARK, pack_images, unpack_images
from .questions import kinds_of
from .ranks import on_all_ranks


@dataclass(frozen=True)
class Skipped:
    """A sample that cannot be scored, and why."""

    id: str
    reason: str
    detail: str


@dataclass(frozen=True)
class Usable:
    """What of some samples can be scored.

    Attributes:
        samples: stored form, cut to the exchanges that fit into ``max_seq_len``.
        questions: exchanges of these samples.
        left_out: exchanges that were cut off.
        skipped: the samples that cannot be used at all.
    """

    samples: list[dict[str, Any]] = field(default_factory=list)
    questions: int = 0
    left_out: int = 0
    skipped: list[Skipped] = field(default_factory=list)

    def reasons(self) -> dict[str, int]:
        """Skipped samples by reason."""
        return dict(sorted(Counter(s.reason for s in self.skipped).items()))


def usable(encoder: ConversationEncoder, samples: Sequence[dict[str, Any]]) -> Usable:
    """Encode each sample once; every rank calls this with the same samples and gets the same answer."""
    found = on_all_ranks(samples, lambda part: [_look(encoder, s) for s in part])
    kept, count, left_out, skipped = [], 0, 0, []
    for sample, verdict in zip(samples, found, strict=True):
        if isinstance(verdict, Skipped):
            skipped.append(verdict)
            continue
        fitting, truncated = verdict
        kept.append(first_exchanges(sample, fitting) if truncated else sample)
        count, left_out = count + fitting, left_out + truncated
    return Usable(kept, count, left_out, skipped)


def _look(encoder: ConversationEncoder, sample: dict[str, Any]) -> Skipped | tuple[int, int]:
    """(exchanges that fit, exchanges that do not), or why there are none."""
    name = str(sample.get("id"))
    try:
        truncated = encoder(sample).truncated_turns
        asked = len(exchanges(sample["conversations"])[1])
        kinds_of(sample, asked)
    except Rejected as rejected:
        return Skipped(name, rejected.status.name.lower(), rejected.detail)
    except BadConversation as error:
        return Skipped(name, "bad_kinds", str(error))
    return asked - truncated, truncated


def first_exchanges(sample: dict[str, Any], count: int) -> dict[str, Any]:
    """A sample with its first exchanges, their pictures and kinds only."""
    turns = sample["conversations"]
    start = len(turns) % 2  # a system turn
    kept = turns[: start + 2 * count]
    shown = sum(t["value"].count(IMAGE_MARK) for t in kept if t["from"] == "human")
    meta = sample.get("meta")
    if isinstance(meta, Mapping) and meta.get("kinds"):
        meta = {**meta, "kinds": kinds_of(sample, count)}
    images = pack_images(unpack_images(sample["images"])[:shown])
    return {**sample, "conversations": kept, "images": images, "meta": meta}
