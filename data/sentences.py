"""Sentences of an instruction, and how often each one occurs in a dataset.

L2T calls an instruction sentence a *template* when it is frequent in the training set, and ViFT calls an
image's question *specific* when it is not one of the known caption prompts. Both need the same thing: a
splitter that maps back to characters, and a key under which two writings of a sentence are the same.

Source: L2T (arXiv 2503.22215) says that sentence frequencies over the training set decide; splitter and
normalisation are not given there and are Opsin's own.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from .schema import IMAGE_MARK, stable_hash

SIDECAR = "sentences.json"
"""File beside ``index.json`` that holds a dataset's sentence counts."""

_BREAK = re.compile(
    r"""
    [.?!]+["')\]]*(?=\s|$)      # end of a sentence
    | [。？！]+["')\]」』]*        # full-width forms need no space behind them
    | :(?=\ )                   # "fixed phrase: [0.1, ...]": the phrase repeats, the box does not
    | \n+                       # every line break
    """,
    re.VERBOSE,
)
_LABEL = re.compile(r"(?:^|[\s(])(?:[A-Z]|\d+)\.$")
"""An option label or list number ("A.", "2.") is no end of a sentence."""
_CLOSERS = " \t\r\n.,;:?!。？！\"'"


@dataclass(frozen=True)
class Sentence:
    """One sentence of a text: characters ``start`` .. ``end`` (end excluded) and its key."""

    start: int
    end: int
    key: str


def sentence_key(text: str) -> str:
    """Normalised form: casefolded, white space collapsed, punctuation at the end removed."""
    return " ".join(text.split()).rstrip(_CLOSERS).casefold()


def sentence_id(key: str) -> int:
    """Stable id of a sentence key (``sentence_ids`` of the batch); 0 for the empty key."""
    return stable_hash("sentence", key) if key else 0


def split_sentences(text: str) -> list[Sentence]:
    """Split ``text`` into sentences that tile it: each one starts where the one before ended.

    White space between two sentences belongs to the later one, as a leading space belongs to a token.
    A text without any word gives one sentence with an empty key; the empty text gives none.
    """
    sentences: list[Sentence] = []
    start = 0
    for match in _BREAK.finditer(text):
        end = match.end()
        if match.group()[0] == "." and _LABEL.search(text, start, match.start() + 1):
            continue
        if match.group()[0] == "\n":
            end = match.start()
        key = sentence_key(text[start:end])
        if not key:  # nothing but white space and punctuation so far: let it join what follows
            continue
        sentences.append(Sentence(start, end, key))
        start = end
    if start < len(text):
        key = sentence_key(text[start:])
        if key or not sentences:
            sentences.append(Sentence(start, len(text), key))
        else:
            last = sentences.pop()
            sentences.append(Sentence(last.start, len(text), last.key))
    return sentences


@dataclass
class SentenceCounts:
    """How often each instruction sentence occurs among the samples with pictures of one dataset.

    Attributes:
        turns: number of user turns counted.
        words: number of their words, every occurrence counted.
        counts: sentence key -> number of turns in which it occurs (at most once a turn).
        dataset: hash of the dataset's index, so that counts of another dataset are noticed.
        templates: sentences that the dataset itself declares to be templates (a generator knows them).
    """

    turns: int = 0
    words: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    dataset: str = ""
    templates: tuple[str, ...] = ()

    def add(self, conversation: Iterable[dict[str, str]]) -> None:
        """Count the user turns of one conversation (LLaVA's list of ``from`` and ``value``)."""
        for turn in conversation:
            if turn["from"] != "human":
                continue
            self.turns += 1
            # As the encoder cuts it: a single picture moves to the front, several stay between the words.
            pieces = turn["value"].split(IMAGE_MARK)
            pieces = pieces if len(pieces) > 2 else ["".join(pieces)]
            self.words += sum(len(piece.split()) for piece in pieces)
            self.counts.update({s.key for piece in pieces for s in split_sentences(piece) if s.key})

    def __add__(self, other: SentenceCounts) -> SentenceCounts:
        """Union of two datasets' counts: what a mixture of both would count."""
        return SentenceCounts(
            self.turns + other.turns,
            self.words + other.words,
            self.counts + other.counts,
            _join_names(self.dataset, other.dataset),
            tuple(sorted({*self.templates, *other.templates})),
        )

    def dumps(self) -> str:
        """As JSON, most frequent first. Sentences that occur once are left out: no rule asks for them."""
        kept = {key: count for key, count in self.counts.items() if count > 1 or key in self.templates}
        body = {
            "format": "opsin.sentences/1",
            "dataset": self.dataset,
            "turns": self.turns,
            "words": self.words,
            "templates": list(self.templates),
            "counts": dict(sorted(kept.items(), key=lambda kv: (-kv[1], kv[0]))),
        }
        return json.dumps(body, ensure_ascii=False, indent=1) + "\n"

    def save(self, path: str | Path) -> None:
        """Write :meth:`dumps` to a file."""
        Path(path).write_text(self.dumps(), encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> SentenceCounts:
        """Read what :meth:`save` wrote.

        Raises:
            ValueError: the file is no sentence-count file.
        """
        try:
            body = json.loads(Path(path).read_text(encoding="utf-8"))
            if body["format"] != "opsin.sentences/1":
                raise ValueError(body["format"])
            templates = tuple(body["templates"])
            return cls(
                int(body["turns"]), int(body["words"]), Counter(body["counts"]), body["dataset"], templates
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path}: not a sentence-count file of Opsin ({error})") from error


def dataset_hash(index: bytes) -> str:
    """Name of a dataset's content: the SHA-1 of its ``index.json`` (which holds a hash of every shard)."""
    return hashlib.sha1(index).hexdigest()


def _join_names(*names: str) -> str:
    """One name for a set of dataset hashes, independent of their order."""
    kept = sorted({n for n in names if n})
    return kept[0] if len(kept) == 1 else (f"{stable_hash(*kept):016x}" if kept else "")
