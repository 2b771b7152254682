"""Rendered segments -> tokens that know their role, turn, picture and sentence; nothing here knows a sample."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..models.geometry import EncodedImage
from .chat import Segment
from .schema import Role
from .sentences import sentence_id, split_sentences


@dataclass
class Piece:
    """A rendered and tokenised stretch. n tokens, all arrays (n,).

    Attributes:
        ids: int64.
        roles: int8, :class:`~opsin.data.schema.Role`.
        turns: int16, what ``Segment.turn`` says where the token begins; -1 for tokens without text.
        images: int16, ordinal of the picture, -1 for text; before :func:`expand` 0 for every image token.
        sentences: int64, stable hash of the instruction sentence the token lies in; 0: none.
        starts: index of each picture's first token.
    """

    ids: np.ndarray
    roles: np.ndarray
    turns: np.ndarray
    images: np.ndarray
    sentences: np.ndarray
    starts: list[int] = field(default_factory=list)

    def cut(self, part: slice) -> Piece:
        """Some of its tokens, without ``starts``."""
        return Piece(
            self.ids[part], self.roles[part], self.turns[part], self.images[part], self.sentences[part]
        )


def joined(pieces: Sequence[Piece]) -> Piece:
    """One after the other, without ``starts``."""
    return Piece(
        np.concatenate([p.ids for p in pieces]),
        np.concatenate([p.roles for p in pieces]),
        np.concatenate([p.turns for p in pieces]),
        np.concatenate([p.images for p in pieces]),
        np.concatenate([p.sentences for p in pieces]),
    )


def tokenise(tokenizer: Any, image_token_id: int, segments: Sequence[Segment]) -> Piece:
    """Tokenise rendered segments once and read roles, turns and sentences off the character spans.

    Args:
        tokenizer: a fast Hugging Face tokenizer.
        image_token_id: one such token stands for each picture, see :func:`expand`.
        segments: of ``chat.render``.
    """
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
    encoded = tokenizer(text, return_offsets_mapping=True, return_attention_mask=False)
    ids = np.asarray(encoded["input_ids"], np.int64)
    first, last, empty = _character_span(text, np.asarray(encoded["offset_mapping"], np.int64).reshape(-1, 2))
    # The template says where a text ends; a tokenizer's own EOS would close a prompt that is to be answered.
    end = len(ids) - int(np.argmin(empty[::-1])) if len(ids) else 0
    ids, first, last, empty = ids[:end], first[:end], last[:end], empty[:end]
    inside = (role_of[first] == role_of[last]) & ~empty
    # A token that straddles two roles belongs to neither, so it is never learnt.
    roles = np.where(inside, role_of[first], np.int8(Role.MARKER)).astype(np.int8)
    turns = np.where(empty, np.int16(-1), turn_of[first]).astype(np.int16)
    sentences = np.where(inside & (sentence_of[first] == sentence_of[last]), sentence_of[first], 0)
    is_image = ids == image_token_id
    # Wrapper tokens around a picture (vision start, vision end) are template text.
    roles = np.where(roles == Role.IMAGE, np.where(is_image, roles, np.int8(Role.MARKER)), roles).astype(
        np.int8
    )
    return Piece(ids, roles, turns, np.where(is_image, 0, -1), sentences)


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


def expand(piece: Piece, images: Sequence[EncodedImage], image_token_id: int) -> Piece:
    """Replace each image token by its picture's tokens; there are as many as pictures.

    What is no image token among them (names of tiles, line breaks between them) is a marker, which shows nothing.
    """
    counts = np.ones(len(piece.ids), np.int64)
    where = np.flatnonzero(piece.images == 0)
    counts[where] = [len(i.token_ids) for i in images]
    out = Piece(
        np.repeat(piece.ids, counts),
        np.repeat(piece.roles, counts),
        np.repeat(piece.turns, counts),
        np.repeat(piece.images, counts).astype(np.int16),
        np.repeat(piece.sentences, counts),
    )
    starts = (np.cumsum(counts) - counts)[where]
    for ordinal, (start, image) in enumerate(zip(starts, images, strict=True)):
        span = slice(start, start + len(image.token_ids))
        visual = image.token_ids == image_token_id
        out.ids[span] = image.token_ids
        out.roles[span] = np.where(visual, Role.IMAGE, Role.MARKER)
        out.images[span] = np.where(visual, ordinal, -1)
    out.starts = [int(s) for s in starts]
    return out


def common_trunk(pieces: Sequence[Piece]) -> int:
    """Length of the tokens that all pieces share: system prompt and pictures, never words of a question."""
    limit = min(len(p.ids) for p in pieces)
    for piece in pieces:
        words = np.flatnonzero((piece.roles == Role.INSTRUCTION) | (piece.roles == Role.RESPONSE))
        limit = min(limit, int(words[0]) if len(words) else limit)
    for piece in pieces[1:]:
        differ = np.flatnonzero(pieces[0].ids[:limit] != piece.ids[:limit])
        limit = min(limit, int(differ[0]) if len(differ) else limit)
    return limit
