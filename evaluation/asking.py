"""Questions of a suite -> predictions: the one loop that the command, training and analyses share."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from ..data.chat import BadConversation
from ..data.encode import Rejected
from ..data.schema import IMAGE_MARK
from ..models.errors import UserError
from .adapter import VLMAdapter
from .ranks import on_all_ranks
from .records import Item, prediction
from .scorers.base import Scores
from .suites import Suite

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Asked:
    """A suite that was asked and scored.

    Attributes:
        records: marked predictions, in the order of the items.
        scores: of all of them.
        blind: scores of the same questions with another one's pictures; None: not asked.
        errors: questions that could not be asked; their output is empty, their ``error`` says why.
    """

    records: list[dict[str, Any]]
    scores: Scores
    blind: Scores | None
    errors: int


def ask_suite(
    adapter: VLMAdapter,
    name: str,
    suite: Suite,
    items: Sequence[Item],
    *,
    blind: bool = False,
    blind_limit: int | None = None,
    even: bool = False,
    progress: Progress | None = None,
) -> Asked:
    """Ask all items and score the answers; every rank calls this with the same items and gets the same result.

    Args:
        adapter: the model.
        name: of the suite.
        suite: how it is asked and who scores it.
        items: its questions.
        blind: ask them a second time, each with the pictures of another one.
        blind_limit: how many of the first ones; None: all.
        even: all ranks make equally many calls of the model (``ranks.on_all_ranks``); what cannot be asked raises.
        progress: called after each call of the model with (calls done, calls) of this rank.

    Raises:
        UserError: two items have the same id.
    """
    ids = {item.id for item in items}
    if len(ids) < len(items):
        raise UserError(f"suite {name}: {len(items) - len(ids)} of its {len(items)} ids occur more than once")
    options = {"synced_gpus": True} if even else {}  # a rank whose answers are short waits for the others'
    work = partial(_predictions, adapter, name, suite, options)
    ask = partial(on_all_ranks, work=work, chunk=adapter.batch_size, progress=progress, even=even)
    marked, scores = suite.scorer.score(ask(items))
    unseen = None
    if blind:
        others = with_others_pictures(items[:blind_limit])
        unseen = suite.scorer.score(ask(others))[1] if others else None
    return Asked(marked, scores, unseen, sum("error" in record for record in marked))


def with_others_pictures(items: Sequence[Item]) -> list[Item]:
    """Each item with the pictures of one that has as many and other ones, half the suite away.

    Not of its neighbour: that is often its twin (minimal pairs, MMVP, the figures of HallusionBench), whose picture says
    that another answer is right, so that who looks would score below who guesses. Items that have none, or to which no
    other pictures can be given, are left out: they would not be blind. All pictures are read once.
    """
    distinct: dict[
        int, dict[bytes, int]
    ] = {}  # pictures an item -> their digest -> the first item that has them
    digests: list[bytes | None] = []
    for at, item in enumerate(items):
        try:
            digest = hashlib.sha256(
                b"".join(hashlib.sha256(read()).digest() for read in item.pictures)
            ).digest()
        except UserError:  # asking it says what is wrong with it
            digests.append(None)
            continue
        digests.append(digest)
        distinct.setdefault(len(item.pictures), {}).setdefault(digest, at)
    following: dict[bytes, int] = {}
    for count, first in distinct.items():
        if count and len(first) > 1:
            at, half = list(first.values()), len(first) // 2
            following.update(zip(first, [*at[half:], *at[:half]], strict=True))
    return [
        replace(item, pictures=items[following[digest]].pictures)
        for item, digest in zip(items, digests, strict=True)
        if digest is not None and item.pictures and digest in following
    ]


def _predictions(
    adapter: VLMAdapter, name: str, suite: Suite, options: dict[str, Any], items: list[Item]
) -> list[dict[str, Any]]:
    """Predictions for some items; those that cannot be asked do not spoil the others."""
    try:
        return _ask(adapter, name, suite, options, items)
    except (Rejected, BadConversation, UserError) as error:
        if options:  # one call more on this rank, and sharded ranks would wait for each other
            raise
        if len(items) > 1:
            return [line for item in items for line in _predictions(adapter, name, suite, options, [item])]
        why = f"{error.status.name.lower()}: {error.detail}" if isinstance(error, Rejected) else str(error)
        return [_line(suite, name, items[0], "", error=why[:500])]


def _ask(
    adapter: VLMAdapter, name: str, suite: Suite, options: dict[str, Any], items: list[Item]
) -> list[dict[str, Any]]:
    samples = [item.stored() for item in items]
    if suite.mode == "generate":
        said = adapter.generate(samples, max_new_tokens=suite.max_new_tokens, **options)
        return [_line(suite, name, item, one[0]) for item, one in zip(items, said, strict=True)]
    if suite.mode == "follow":
        return _follow(adapter, name, suite, items, samples)
    found = adapter.answer_logprobs(samples, [[list(item.choices)] for item in items])
    lines = []
    for item, exchanges in zip(items, found, strict=True):
        ranked = {
            choice: {"sum": one.sum, "tokens": one.tokens}
            for choice, one in zip(item.choices, exchanges[0], strict=True)
        }
        if any(
            math.isnan(one.sum) for one in exchanges[0]
        ):  # half precision that overflowed, training gone astray
            lines.append(_line(suite, name, item, "", error="its log-likelihoods are not numbers"))
            continue
        best = max(ranked, key=lambda choice: ranked[choice]["sum"])
        lines.append(_line(suite, name, item, best, logprobs=ranked))
    return lines


def _follow(
    adapter: VLMAdapter, name: str, suite: Suite, items: list[Item], samples: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Right answers given word by word, questions about one picture in one row."""
    joined = together(samples)
    found = [one for sample in adapter.answer_logprobs(joined) for one in sample]
    decode = adapter.collator.encoder.tokenizer.decode
    lines = []
    for item, (one,) in zip(items, found, strict=True):
        if math.isnan(one.sum):
            lines.append(_line(suite, name, item, "", error="its log-likelihood is not a number"))
            continue
        # What is likeliest is a word even where greedy decoding would have suppressed it (the image token).
        said = decode(list(one.said), skip_special_tokens=True).strip()
        lines.append(_line(suite, name, item, said, nll=-one.sum))
    return lines


def together(samples: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Samples of one question each; those beside each other with the same pictures joined to one of independent questions.

    Only where each of them reads the same alone: pictures in front, no system prompt of its own.
    """
    joined: list[dict[str, Any]] = []
    for sample in samples:
        last = joined[-1] if joined else None
        user, answer = sample["conversations"][0], sample["conversations"][-1]
        head = user["value"][: len(user["value"]) - len(user["value"].replace(f"{IMAGE_MARK}\n", ""))]
        words = user["value"].removeprefix(head)
        if (
            last is not None
            and head
            and IMAGE_MARK not in words
            and len(sample["conversations"]) == 2 == len(last["conversations"][:2])
            and last["conversations"][0]["from"] == "human"
            and last["conversations"][0]["value"].startswith(head)
            and last["conversations"][0]["value"].count(IMAGE_MARK) == head.count(IMAGE_MARK)
            and last["images"] == sample["images"]
        ):
            last["conversations"] += [{"from": "human", "value": words}, answer]
            last["meta"]["kinds"] += sample["meta"]["kinds"]
        else:
            joined.append({
                **sample, "conversations": list(sample["conversations"]),
                "meta": {**sample["meta"], "kinds": list(sample["meta"]["kinds"])},
            })  # fmt: skip
    return joined


def _line(suite: Suite, name: str, item: Item, output: str, **extra: Any) -> dict[str, Any]:
    return prediction(name, item, output, scorer=suite.scorer.name, **extra)
