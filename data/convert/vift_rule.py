"""What one sample is to ViFT: a caption, a text-only instruction, or nothing; no files, no counts.

ViFT learns perception from captions and following instructions from text alone. Of an ordinary instruction set:

1. A sample without pictures is a text-only instruction as it is.
2. A sample with pictures gives a caption where an exchange asks nothing specific: the user's turn without its image marks is
   empty, or every sentence of it is a caption prompt. Of chained turns only the first exchange counts, since later answers
   may build on questions that are left out; of independent turns (``meta.turns``) the first such exchange is taken.
3. Everything else is dropped. A question about a picture cannot become text alone: nobody knows whether it needs the picture.

A sample that training would refuse (``data/encode.py``) is dropped, too.

Source: ViFT (arXiv 2502.11427) for the two kinds of data; the rules are Opsin's own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...models.errors import UserError, nearest
from ..chat import BadConversation, asked_alone, exchanges
from ..schema import IMAGE_MARK, pack_images, stable_hash, unpack_images
from ..sentences import split_sentences
from ..source import Text as SampleText
from .caption_prompts import PATTERN_SOURCE, is_caption_prompt

CAPTIONS, TEXT = "captions", "text"
"""Sides of the split, and names of their folders."""

CAPTION_PROMPTS = ("none", "keep")
"""What becomes of a caption's user turn."""

SPECIFIC = "specific question"
LATER = "nothing generic before a later exchange"
NO_PICTURE = "no picture in the first turn"

_PER_EXCHANGE = ("kinds", "asked", "prior")
"""Lists of ``meta`` with one entry an exchange: what scoring reads, and what scenes write beside it."""


@dataclass(frozen=True)
class Rule:
    """Which sentences are caption prompts, and what becomes of them.

    Attributes:
        prompts: keys (:func:`opsin.data.sentences.sentence_key`) of further ones.
        built_in: Opsin's own patterns count.
        caption_prompt: ``none``: a caption's user turn is the pictures alone; ``keep``: it keeps its words.
    """

    prompts: frozenset[str] = frozenset()
    built_in: bool = True
    caption_prompt: str = "none"

    def __post_init__(self) -> None:
        if self.caption_prompt not in CAPTION_PROMPTS:
            raise UserError(
                f"--caption-prompt {self.caption_prompt}: unknown{nearest(self.caption_prompt, CAPTION_PROMPTS)}"
            )

    def generic(self, user: str) -> bool:
        """Whether a user's turn asks nothing specific."""
        return all(
            key in self.prompts or (self.built_in and is_caption_prompt(key)) for key in sentences(user)
        )

    def job(self) -> dict[str, Any]:
        """What decides, for comparison with an earlier process."""
        return {
            "prompts": f"{stable_hash(*sorted(self.prompts)):016x} ({len(self.prompts)})",
            "built_in": f"{stable_hash(PATTERN_SOURCE):016x}" if self.built_in else "none",
            "caption_prompt": self.caption_prompt,
        }


@dataclass(frozen=True)
class Choice:
    """What a sample is.

    Attributes:
        side: ``captions`` or ``text``; empty: it is dropped.
        reason: why it is dropped.
        exchanges: how many it has; 0 where it is no conversation.
        words: number of words in the answers that are taken.
        exchange: number of the one that makes the caption.
        question: its user's turn as it is asked alone, with its pictures' marks.
        first: keys of the sentences of the first user's turn.
    """

    side: str
    reason: str = ""
    exchanges: int = 0
    words: int = 0
    exchange: int = 0
    question: str = ""
    first: tuple[str, ...] = ()


def sentences(user: str) -> Iterator[str]:
    """Keys of the sentences of a user's turn, cut at its pictures as the encoder cuts it (a single one moves away)."""
    pieces = user.split(IMAGE_MARK)
    for piece in pieces if len(pieces) > 2 else ["".join(pieces)]:
        yield from (sentence.key for sentence in split_sentences(piece) if sentence.key)


def choose(text: SampleText, rule: Rule) -> Choice:
    """What a sample is to ViFT."""
    try:
        system, pairs = exchanges(text.conversations)
        users = [user for user, _ in pairs]
        meta = text.meta
        alone = len(pairs) > 1 and isinstance(meta, Mapping) and meta.get("turns") == "independent"
        asked = asked_alone(users) if alone else users[:1]
    except BadConversation:
        return Choice("", unusable("conversation"))
    count, first = len(pairs), tuple(sentences(users[0]))
    marks = sum(user.count(IMAGE_MARK) for user in users)
    elsewhere = any(IMAGE_MARK in words for words in (system or "", *(answer for _, answer in pairs)))
    if elsewhere or marks != text.pictures:
        return Choice("", unusable("marks"), count, first=first)
    if not text.pictures:
        if not all(answer.strip() for _, answer in pairs):
            return Choice("", unusable("no answer"), count)
        return Choice(TEXT, "", count, sum(len(answer.split()) for _, answer in pairs))
    if IMAGE_MARK not in asked[0]:
        return Choice("", NO_PICTURE, count, first=first)
    generic = [i for i, question in enumerate(asked) if rule.generic(question)]
    for i in generic:
        words = len(pairs[i][1].split())
        if words:
            return Choice(CAPTIONS, "", count, words, i, asked[i], first)
    if generic:
        return Choice("", unusable("no answer"), count, first=first)
    later = any(rule.generic(user) for user in users[len(asked) :])
    return Choice("", LATER if later else SPECIFIC, count, first=first)


def unusable(reason: str) -> str:
    """A reason for dropping a sample that training could not use either."""
    return f"unusable ({reason})"


def caption_of(record: Mapping[str, Any], choice: Choice, rule: Rule) -> dict[str, Any]:
    """A sample's caption: its system turn, the pictures that its question shows, and one exchange.

    Args:
        record: columns of :data:`opsin.data.schema.COLUMNS`.
        choice: what :func:`choose` says of it, of side ``captions``.
        rule: the same rule.
    """
    shown, turns = choice.question.count(IMAGE_MARK), list(record["conversations"])
    begin = 1 if turns[0].get("from") == "system" else 0
    at, pictures = begin + 2 * choice.exchange, unpack_images(record["images"])
    asked = choice.question if rule.caption_prompt == "keep" else "\n".join([IMAGE_MARK] * shown)
    meta = record["meta"]
    if isinstance(meta, Mapping) and choice.exchanges > 1:
        meta = {key: _cut(key, value, choice) for key, value in meta.items()}
    return {
        "id": record["id"],
        "conversations": [*turns[:begin], {**turns[at], "value": asked}, turns[at + 1]],
        "images": pack_images(pictures[:shown]),  # those that a later turn shows are not in this caption
        "meta": meta,
    }


def _cut(key: str, value: Any, choice: Choice) -> Any:
    if key in _PER_EXCHANGE and isinstance(value, list) and len(value) == choice.exchanges:
        return [value[choice.exchange]]
    return value


def read_prompts(file: str | Path) -> frozenset[str]:
    """Keys of the caption prompts in a text file, one a line; a line of several sentences gives each of them.

    Raises:
        UserError: it cannot be read, or holds none.
    """
    try:
        lines = Path(file).expanduser().read_text(encoding="utf-8-sig").splitlines()
    except OSError as error:
        raise UserError(f"--prompts {file}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise UserError(f"--prompts {file}: is no UTF-8 text") from error
    found = frozenset(key for line in lines for key in sentences(line))
    if not found:
        raise UserError(f"--prompts {file}: no sentence in it; write one a line")
    return found
