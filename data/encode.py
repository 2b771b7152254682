"""One stored sample -> one document of tokens, each of which knows its role, turn and sentence.

The text is rendered once and tokenised once with offsets; roles and sentences come from character spans.
A sample that cannot be used is refused with a reason, never half used.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

import numpy as np
from PIL import Image

from ..models.errors import UserError
from ..models.geometry import EncodedImage, ImageEncoder
from .chat import BadConversation, ChatTemplate, Segment, asked_alone, exchanges, render
from .patch_targets import attach
from .schema import IMAGE_MARK, Role, stable_hash, unpack_images
from .sentences import sentence_id, split_sentences


class Status(IntEnum):
    """Why a sample is blank in its batch (``sample_status``); 0: it is used."""

    USED = 0
    BAD_CONVERSATION = 1
    IMAGE_COUNT = 2
    UNREADABLE_IMAGE = 3
    EMPTY_ANSWER = 4
    TOO_LONG = 5
    REFUSED = 6
    PADDING = 7
    """No sample: it fills the last batch of an epoch, and is not counted."""


class Rejected(Exception):
    """A sample cannot be used."""

    def __init__(self, status: Status, detail: str):
        super().__init__(f"{status.name.lower()}: {detail}")
        self.status = status
        self.detail = detail


@dataclass
class Document:
    """One sample as tokens. n tokens, all arrays (n,) unless said.

    Attributes:
        input_ids: int64.
        roles: int8, :class:`~opsin.data.schema.Role`.
        turn_ids: int16, exchange the token belongs to; -1 before the first.
        branch_ids: int16, 0 for what all share; 1.. for independent questions about the same picture.
        image_ids: int16, ordinal of the picture in this document; -1 for text.
        sentence_ids: int64, stable hash of the instruction sentence the token lies in; 0: none.
        position_ids: int64, (n,) or (3, n).
        images: the pictures, in order; ``image_starts[i]`` is the index of picture i's first token.
        uid: stable sample id, 1 .. 2**63 - 1.
        visit: how often this sample was served before.
        truncated_turns: exchanges that did not fit and were left out whole.
    """

    input_ids: np.ndarray
    roles: np.ndarray
    turn_ids: np.ndarray
    branch_ids: np.ndarray
    image_ids: np.ndarray
    sentence_ids: np.ndarray
    position_ids: np.ndarray
    images: list[EncodedImage]
    image_starts: list[int]
    uid: int
    visit: int = 0
    truncated_turns: int = 0

    def __len__(self) -> int:
        return len(self.input_ids)


@dataclass
class _Piece:
    """A rendered and tokenised stretch, image tokens expanded."""

    ids: np.ndarray
    roles: np.ndarray
    turns: np.ndarray
    images: np.ndarray
    sentences: np.ndarray
    starts: list[int] = field(default_factory=list)

    def cut(self, part: slice) -> _Piece:
        return _Piece(
            self.ids[part], self.roles[part], self.turns[part], self.images[part], self.sentences[part]
        )


def _joined(pieces: Sequence[_Piece]) -> _Piece:
    return _Piece(
        np.concatenate([p.ids for p in pieces]),
        np.concatenate([p.roles for p in pieces]),
        np.concatenate([p.turns for p in pieces]),
        np.concatenate([p.images for p in pieces]),
        np.concatenate([p.sentences for p in pieces]),
    )


class ConversationEncoder:
    """Turns stored samples into documents. Picklable: it lives in data-loader workers.

    Args:
        tokenizer: a fast Hugging Face tokenizer (offsets are needed).
        images: the family's image encoder.
        template: chat template, filled in for the tokenizer.
        max_seq_len: longest document in tokens; whole exchanges are dropped from the end to fit.
        turns: ``meta`` (as the sample's ``meta.turns`` says, else chained), ``chained`` or ``independent``.

    Raises:
        UserError: the tokenizer has no offsets, or does not know the image token.
    """

    def __init__(
        self,
        tokenizer: Any,
        images: ImageEncoder,
        template: ChatTemplate,
        *,
        max_seq_len: int = 2048,
        turns: str = "meta",
    ):
        if not getattr(tokenizer, "is_fast", False):
            raise UserError(f"{type(tokenizer).__name__} has no character offsets: load the fast tokenizer")
        if turns not in ("meta", "chained", "independent"):
            raise UserError(f"turns '{turns}': use meta, chained or independent")
        probe = tokenizer(images.placeholder, add_special_tokens=False)["input_ids"]
        if probe.count(images.image_token_id) != 1:
            raise UserError(
                f"the tokenizer splits the image token {images.placeholder!r} into {len(probe)} pieces; "
                f"add it as a special token with id {images.image_token_id}"
            )
        self.tokenizer = tokenizer
        self.images = images
        self.template = template
        self.max_seq_len = max_seq_len
        self.turns = turns

    def __call__(self, sample: Mapping[str, Any], visit: int = 0) -> Document:
        """Encode one sample (columns of ``schema.COLUMNS``).

        Raises:
            Rejected: the sample cannot be used; ``status`` and ``detail`` say why.
            UserError: its stored targets are not those of its pictures and this model.
        """
        try:
            system, pairs = exchanges(sample["conversations"])
        except BadConversation as error:
            raise Rejected(Status.BAD_CONVERSATION, str(error)) from error
        for turn, (_, answer) in enumerate(pairs):
            if not answer.strip():
                raise Rejected(Status.EMPTY_ANSWER, f"exchange {turn} has no answer")
        pictures = self._pictures(sample, pairs)
        uid = sample.get("uid") or stable_hash(sample["id"])
        if len(pairs) > 1 and self.independent(sample):
            try:
                questions = asked_alone([user for user, _ in pairs])
            except BadConversation as error:
                raise Rejected(Status.BAD_CONVERSATION, str(error)) from error
            alone = [(question, answer) for question, (_, answer) in zip(questions, pairs, strict=True)]
            return self._independent(system, alone, pictures, uid, visit)
        return self._chained(system, pairs, pictures, uid, visit)

    def independent(self, sample: Mapping[str, Any]) -> bool:
        """Whether the exchanges of a sample are questions that do not build on each other."""
        if self.turns == "meta":
            meta = sample.get("meta")
            return isinstance(meta, Mapping) and meta.get("turns") == "independent"
        return self.turns == "independent"

    def prompt(self, system: str | None, pairs: list[tuple[str, str]], sample: Mapping[str, Any]) -> Document:
        """Exchanges whose last response is left open, for generation; the pictures are the sample's.

        Raises:
            Rejected: the pictures do not fit the text, or the prompt is longer than ``max_seq_len``.
        """
        shown = self._pictures(sample, pairs)
        segments = render(system, pairs, self.template, self.images.placeholder, open_response=True)
        piece = self._tokenise(segments, shown)
        if len(piece.ids) > self.max_seq_len:
            raise Rejected(
                Status.TOO_LONG, f"the prompt has {len(piece.ids)} tokens, more than {self.max_seq_len}"
            )
        branches = np.zeros(len(piece.ids), dtype=np.int16)
        return self._document(piece, branches, self.images.positions(piece.images, shown), shown, 1, 0, 0)

    def _pictures(self, sample: Mapping[str, Any], pairs: Sequence[tuple[str, str]]) -> list[EncodedImage]:
        """Decode and process; the first pictures are enough where the last exchanges are left out."""
        marks = sum(user.count(IMAGE_MARK) for user, _ in pairs)
        try:
            encoded = unpack_images(sample["images"])
        except ValueError as error:
            raise Rejected(Status.UNREADABLE_IMAGE, str(error)) from error
        total = sum(
            t.get("value", "").count(IMAGE_MARK) for t in sample["conversations"] if t.get("from") == "human"
        )
        if total != len(encoded) or any(IMAGE_MARK in answer for _, answer in pairs):
            raise Rejected(
                Status.IMAGE_COUNT, f"{total} image marks in the questions, {len(encoded)} pictures"
            )
        images = []
        for i, data in enumerate(encoded[:marks]):
            try:
                with Image.open(io.BytesIO(data)) as picture:
                    images.append(self.images.encode(picture.convert("RGB")))
            except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
                raise Rejected(Status.UNREADABLE_IMAGE, f"picture {i}: {error}") from error
        attach(sample, encoded, images)
        return images

    def _chained(
        self,
        system: str | None,
        pairs: list[tuple[str, str]],
        images: list[EncodedImage],
        uid: int,
        visit: int,
    ) -> Document:
        kept = len(pairs)
        while kept:
            shown = images[: sum(user.count(IMAGE_MARK) for user, _ in pairs[:kept])]
            piece = self._tokenise(
                render(system, pairs[:kept], self.template, self.images.placeholder), shown
            )
            if len(piece.ids) <= self.max_seq_len:
                return self._document(
                    piece,
                    np.zeros(len(piece.ids), dtype=np.int16),
                    self.images.positions(piece.images, shown),
                    shown,
                    uid,
                    visit,
                    len(pairs) - kept,
                )
            # Each exchange has a known number of tokens: go straight to the number of exchanges that fit.
            ends = np.searchsorted(np.maximum.accumulate(piece.turns), np.arange(kept), side="right")
            kept = min(kept - 1, int((ends <= self.max_seq_len).sum()))
        raise Rejected(Status.TOO_LONG, f"the first exchange alone has more than {self.max_seq_len} tokens")

    def _independent(
        self,
        system: str | None,
        pairs: list[tuple[str, str]],
        images: list[EncodedImage],
        uid: int,
        visit: int,
    ) -> Document:
        """Questions that share the picture: one trunk, one branch a question, each as if it stood alone."""
        pieces = []
        for turn, pair in enumerate(pairs):
            segments = render(system, [pair], self.template, self.images.placeholder, first_turn=turn)
            pieces.append(self._tokenise(segments, images))
        trunk = _common_trunk(pieces)
        shared = pieces[0].cut(slice(0, trunk))
        shared.turns = np.full(trunk, -1, dtype=np.int16)
        branches, length = [], trunk
        for piece in pieces:
            branch = piece.cut(slice(trunk, None))
            if length + len(branch.ids) > self.max_seq_len:
                break
            branches.append(branch)
            length += len(branch.ids)
        if not branches:
            raise Rejected(
                Status.TOO_LONG, f"the first exchange alone has more than {self.max_seq_len} tokens"
            )
        joined = _joined([shared, *branches])
        joined.starts = pieces[0].starts
        lengths = [len(b.ids) for b in branches]
        branch_ids = np.repeat(np.arange(len(branches) + 1), [trunk, *lengths]).astype(np.int16)
        positions = self.images.positions(shared.images, images)
        following = int(positions.max(initial=-1)) + 1
        after = np.concatenate([following + np.arange(n) for n in lengths])
        tail = after if positions.ndim == 1 else np.broadcast_to(after, (positions.shape[0], len(after)))
        positions = np.concatenate([positions, tail], axis=-1)
        return self._document(joined, branch_ids, positions, images, uid, visit, len(pairs) - len(branches))

    def _document(
        self,
        piece: _Piece,
        branch_ids: np.ndarray,
        positions: np.ndarray,
        images: list[EncodedImage],
        uid: int,
        visit: int,
        truncated: int,
    ) -> Document:
        return Document(
            input_ids=piece.ids,
            roles=piece.roles,
            turn_ids=piece.turns,
            branch_ids=branch_ids,
            image_ids=piece.images,
            sentence_ids=piece.sentences,
            position_ids=positions,
            images=images,
            image_starts=piece.starts,
            uid=int(uid),
            visit=visit,
            truncated_turns=truncated,
        )

    def _tokenise(self, segments: Sequence[Segment], images: Sequence[EncodedImage]) -> _Piece:
        """Tokenise rendered segments once and read roles, turns and sentences off the character spans."""
        text = "".join(s.text for s in segments)
        lengths = [len(s.text) for s in segments]
        # Role and turn of every character; the extra one at the end serves empty spans.
        role_of = np.repeat(
            np.array([*(int(s.role) for s in segments), int(Role.MARKER)], np.int8), [*lengths, 1]
        )
        turn_of = np.repeat(np.array([*(s.turn for s in segments), -1], np.int16), [*lengths, 1])
        sentence_of = np.zeros(len(text) + 1, np.int64)
        start = 0
        for segment, length in zip(segments, lengths, strict=True):
            if segment.role == Role.INSTRUCTION:
                for sentence in split_sentences(segment.text):
                    sentence_of[start + sentence.start : start + sentence.end] = sentence_id(sentence.key)
            start += length
        encoded = self.tokenizer(text, return_offsets_mapping=True, return_attention_mask=False)
        ids = np.asarray(encoded["input_ids"], np.int64)
        first, last, empty = _character_span(
            text, np.asarray(encoded["offset_mapping"], np.int64).reshape(-1, 2)
        )
        # The template says where a text ends; a tokenizer's own EOS would close a prompt that is to be answered.
        end = len(ids) - int(np.argmin(empty[::-1])) if len(ids) else 0
        ids, first, last, empty = ids[:end], first[:end], last[:end], empty[:end]
        inside = (role_of[first] == role_of[last]) & ~empty
        # A token that straddles two roles belongs to neither, so it is never learnt.
        roles = np.where(inside, role_of[first], np.int8(Role.MARKER)).astype(np.int8)
        turns = np.where(empty, np.int16(-1), turn_of[first]).astype(np.int16)
        sentences = np.where(inside & (sentence_of[first] == sentence_of[last]), sentence_of[first], 0)
        is_image = ids == self.images.image_token_id
        # Wrapper tokens around a picture (vision start, vision end) are template text.
        roles = np.where(roles == Role.IMAGE, np.where(is_image, roles, np.int8(Role.MARKER)), roles).astype(
            np.int8
        )
        if int(is_image.sum()) != len(images):
            raise Rejected(Status.IMAGE_COUNT, "the text itself contains the model's image token")
        return _expand(_Piece(ids, roles, turns, np.where(is_image, 0, -1), sentences), images)


def _character_span(text: str, offsets: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """First and last character of each token, leading white space ignored; and which tokens have none."""
    space = np.fromiter((c.isspace() for c in text), bool, len(text))
    index = np.arange(len(text) + 1)
    # Index of the next character that is no white space.
    following = np.minimum.accumulate(np.where(np.append(space, False), len(text), index)[::-1])[::-1]
    start, end = offsets[:, 0], offsets[:, 1]
    # Some tokenizers cut spaces off a token's span: one of spaces alone reaches back to the token before it.
    before = np.concatenate([[0], np.maximum.accumulate(end)[:-1]])
    start = np.where((end <= start) & (start > 0), before, start)
    empty = end <= start
    first = np.where(following[start] < end, following[start], start)
    return np.where(empty, len(text), first), np.where(empty, len(text), np.maximum(end - 1, 0)), empty


def _expand(piece: _Piece, images: Sequence[EncodedImage]) -> _Piece:
    """Replace each image token by its picture's tokens."""
    counts = np.ones(len(piece.ids), np.int64)
    where = np.flatnonzero(piece.images == 0)
    counts[where] = [len(i.token_ids) for i in images]
    out = _Piece(
        np.repeat(piece.ids, counts),
        np.repeat(piece.roles, counts),
        np.repeat(piece.turns, counts),
        np.repeat(piece.images, counts).astype(np.int16),
        np.repeat(piece.sentences, counts),
    )
    starts = (np.cumsum(counts) - counts)[where]
    for ordinal, (start, image) in enumerate(zip(starts, images, strict=True)):
        span = slice(start, start + len(image.token_ids))
        out.ids[span] = image.token_ids
        out.roles[span] = Role.IMAGE
        out.images[span] = ordinal
    out.starts = [int(s) for s in starts]
    return out


def _common_trunk(pieces: Sequence[_Piece]) -> int:
    """Length of the tokens that all pieces share: system prompt and pictures, never words of a question."""
    limit = min(len(p.ids) for p in pieces)
    for piece in pieces:
        words = np.flatnonzero((piece.roles == Role.INSTRUCTION) | (piece.roles == Role.RESPONSE))
        limit = min(limit, int(words[0]) if len(words) else limit)
    for piece in pieces[1:]:
        differ = np.flatnonzero(pieces[0].ids[:limit] != piece.ids[:limit])
        limit = min(limit, int(differ[0]) if len(differ) else limit)
    return limit
