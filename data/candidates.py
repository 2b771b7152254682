"""Answers to be scored, laid out so that what they share is run once: a prompt is a trunk, each answer a branch.

The text of each answer is rendered and tokenised in its place, exactly as training does, never apart from its prompt.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ..models.errors import UserError
from ..models.geometry import EncodedImage
from .chat import Segment, asked_alone, exchanges, render
from .encode import ConversationEncoder, Document, Rejected, Status
from .pieces import Piece
from .schema import IMAGE_MARK, Role

BEFORE, ASKED = -1, -2
"""``turn_ids`` of a candidate row: what comes before the exchange that is scored, and that exchange up to the answer."""

SHARES = ("picture", "prompt", "nothing")
"""What answers in one row may share: whatever saves most tokens, the prompt of one question, or nothing."""


@dataclass(frozen=True)
class CandidateRow:
    """One row of a batch. Slot s is an answer: ``turn_ids`` of its tokens are 2s, of those that end it 2s + 1.

    Attributes:
        document: all slots; several are branches, whose trunk is what they share.
        slots: (exchange, candidate) of each.
        prompt: tokens before the first branch, or before the answer where there is one.
        last: of these, tokens from the last exchange on.
    """

    document: Document
    slots: tuple[tuple[int, int], ...]
    prompt: int
    last: int

    def __len__(self) -> int:
        return len(self.document)


def candidate_rows(
    encoder: ConversationEncoder,
    sample: Mapping[str, Any],
    answers: Sequence[Sequence[str]] | None = None,
    share: str = "picture",
) -> list[CandidateRow]:
    """Rows that hold each candidate answer of each exchange of a stored sample once.

    Chained exchanges come after the stored answers of those before them, independent ones stand alone.

    Args:
        encoder: of training.
        sample: stored form.
        answers: for each exchange its candidates; None: the stored answer of each.
        share: one of ``SHARES``.

    Raises:
        Rejected, BadConversation: the sample cannot be used, or one answer with its prompt is longer than
            ``max_seq_len``.
        UserError: ``answers`` do not fit the sample's exchanges, or one is empty.
    """
    if share not in SHARES:
        raise UserError(f"share '{share}': use {', '.join(SHARES)}")
    system, pairs = exchanges(sample["conversations"])
    given = [[answer] for _, answer in pairs] if answers is None else answers
    _checked(sample, len(pairs), given)
    images = encoder.pictures(sample, pairs)
    alone = len(pairs) > 1 and encoder.independent(sample)
    if answers is None and not alone and share == "picture":
        return [_conversation(encoder, system, pairs, images)]
    asked = asked_alone([user for user, _ in pairs]) if alone else [user for user, _ in pairs]
    found: list[list[tuple[tuple[int, int], Piece]]] = []
    for turn, candidates in enumerate(given):
        before = [] if alone else pairs[:turn]
        found.append([])
        for number, answer in enumerate(candidates):
            whole = [*before, (asked[turn], answer)]
            found[-1].append(((turn, number), _piece(encoder, system, whole, images, {len(before): 0})))
    if share == "nothing":
        return [row for group in found for one in group for row in _rows(encoder, [one], images)]
    apart = [row for group in found for row in _rows(encoder, group, images)]
    if not alone or share == "prompt":
        return apart
    together = _rows(encoder, [one for group in found for one in group], images)
    return together if sum(map(len, together)) <= sum(map(len, apart)) else apart


def _checked(sample: Mapping[str, Any], exchanges: int, answers: Sequence[Sequence[str]]) -> None:
    name = sample.get("id")
    if len(answers) != exchanges:
        raise UserError(f"{name}: candidate answers for {len(answers)} exchanges, the sample has {exchanges}")
    for turn, candidates in enumerate(answers):
        if isinstance(candidates, str) or not candidates:
            raise UserError(f"{name}: exchange {turn} has no list of candidate answers")
        if any(not answer.strip() for answer in candidates):
            raise UserError(f"{name}: exchange {turn} has an empty candidate answer")


def _piece(
    encoder: ConversationEncoder,
    system: str | None,
    pairs: Sequence[tuple[str, str]],
    images: Sequence[EncodedImage],
    slots: Mapping[int, int],
) -> Piece:
    """Exchanges as tokens whose ``turns`` say what is scored; ``slots``: exchange -> slot."""
    segments: list[Segment] = []
    for segment in render(system, pairs, encoder.template, encoder.images.placeholder):
        turn = ASKED if segment.turn == len(pairs) - 1 else BEFORE
        if segment.role == Role.RESPONSE and segment.turn in slots:
            previous = segments[-1]  # the template's end follows the answer
            ends = previous.role == Role.RESPONSE and previous.turn == 2 * slots[segment.turn]
            turn = 2 * slots[segment.turn] + ends
        segments.append(replace(segment, turn=turn))
    shown = images[: sum(user.count(IMAGE_MARK) for user, _ in pairs)]
    piece = encoder.tokenise(segments, shown)
    if len(piece.ids) > encoder.max_seq_len:
        raise Rejected(
            Status.TOO_LONG,
            f"prompt and answer have {len(piece.ids)} tokens, more than {encoder.max_seq_len}",
        )
    own = piece.turns[piece.roles == Role.RESPONSE]
    if not np.isin([2 * slot for slot in slots.values()], own).all():
        raise Rejected(Status.EMPTY_ANSWER, "an answer has no token of its own")
    return piece


def _conversation(
    encoder: ConversationEncoder,
    system: str | None,
    pairs: Sequence[tuple[str, str]],
    images: list[EncodedImage],
) -> CandidateRow:
    """The stored answers of a whole conversation, in one pass as in training."""
    piece = _piece(encoder, system, pairs, images, {turn: turn for turn in range(len(pairs))})
    document = encoder.branched(piece, (), images, 1)
    slots = tuple((turn, 0) for turn in range(len(pairs)))
    prompt = int((piece.turns >= 0).argmax())
    return CandidateRow(document, slots, prompt, prompt)


def _rows(
    encoder: ConversationEncoder,
    candidates: Sequence[tuple[tuple[int, int], Piece]],
    images: list[EncodedImage],
) -> list[CandidateRow]:
    """Candidates in as few rows of at most ``max_seq_len`` tokens as go one after the other."""
    trunk = _common([piece for _, piece in candidates])
    rows: list[CandidateRow] = []
    held: list[tuple[tuple[int, int], Piece]] = []
    length = trunk
    for one in candidates:
        more = len(one[1].ids) - trunk
        if held and length + more > encoder.max_seq_len:
            rows.append(_row(encoder, held, trunk, images))
            held, length = [], trunk
        held.append(one)
        length += more
    return [*rows, _row(encoder, held, trunk, images)]


def _row(
    encoder: ConversationEncoder,
    candidates: Sequence[tuple[tuple[int, int], Piece]],
    trunk: int,
    images: list[EncodedImage],
) -> CandidateRow:
    first = candidates[0][1]
    shown = images[: len(first.starts)]
    slots = tuple(key for key, _ in candidates)
    if len(candidates) == 1:  # no branch, so that no mask is needed
        trunk = int((first.turns >= 0).argmax())
        document = encoder.branched(first, (), shown, 1)
    else:
        shared = first.cut(slice(0, trunk))
        shared.starts = first.starts
        branches = [piece.cut(slice(trunk, None)) for _, piece in candidates]
        for slot, branch in enumerate(branches):
            branch.turns = np.where(branch.turns >= 0, branch.turns + 2 * slot, branch.turns)
        document = encoder.branched(shared, branches, shown, 1)
    asked = first.turns[:trunk] == ASKED
    return CandidateRow(document, slots, trunk, trunk - int(asked.argmax()) if asked.any() else 0)


def _common(pieces: Sequence[Piece]) -> int:
    """Tokens that all pieces begin with, up to the first answer."""
    limit = min(int((piece.turns >= 0).argmax()) for piece in pieces)
    for piece in pieces[1:]:
        differ = np.flatnonzero(pieces[0].ids[:limit] != piece.ids[:limit])
        limit = min(limit, int(differ[0]) if len(differ) else limit)
    return limit
