"""A row of somebody's data as a conversation: which column means what, and what its values look like.

Conversations come as LLaVA's ``conversations`` (``from``, ``value``), as OpenAI's ``messages`` (``role``, ``content``: text, or
parts with pictures among them), as ``texts`` (``user``, ``assistant``), as ``question`` and ``answer``, or as a ``caption``.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ...models.errors import UserError, nearest
from ..chat import BadConversation, exchanges
from ..schema import IMAGE_MARK
from .pictures import Unusable

KNOWN: dict[str, tuple[str, ...]] = {
    "id": ("id", "__key__", "uid", "question_id", "sample_id"),
    "image": ("image", "images", "jpg", "jpeg", "png", "webp", "picture", "url", "image_url"),
    "conversations": ("conversations", "conversation"),
    "messages": ("messages",),
    "texts": ("texts",),
    "question": ("question", "query", "instruction"),
    "answer": ("answer", "answers", "response", "output", "multiple_choice_answer"),
    "caption": ("caption", "captions", "text", "txt", "cls"),
}
"""What a column can mean -> its usual names; the first that a row has is taken."""

_TEXT = ("conversations", "messages", "texts", "question", "answer", "caption")
_ROLES = {
    "human": "human", "user": "human", "gpt": "gpt", "assistant": "gpt", "model": "gpt", "system": "system",
}  # fmt: skip


@dataclass(frozen=True)
class Columns:
    """Names of a source's columns.

    Args:
        named: what a column means (a key of :data:`KNOWN`) -> its name. Once one that makes text is named, the
            others that do are not looked for.

    Raises:
        UserError: no such meaning.
    """

    named: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for what in self.named:
            if what not in KNOWN:
                raise UserError(f"--columns {what}=...: unknown{nearest(what, KNOWN)}")

    def names(self, what: str) -> tuple[str, ...]:
        """Names under which a meaning is looked for."""
        if what in self.named:
            return (self.named[what],)
        told = what in _TEXT and any(each in _TEXT for each in self.named)
        return () if told else KNOWN[what]

    def find(self, what: str, row: Mapping[str, Any]) -> Any:
        """A row's value; None where it has none."""
        return next((row[name] for name in self.names(what) if row.get(name) is not None), None)

    def wanted(self, there: Collection[str]) -> list[str]:
        """Those of a table's columns that are read.

        Raises:
            UserError: one that was named is not there, or none makes a conversation.
        """
        for what, name in self.named.items():
            if name not in there:
                raise UserError(f"--columns {what}={name}: there is no column '{name}'{nearest(name, there)}")
        found = [name for what in KNOWN for name in self.names(what) if name in there]
        texts = {name for what in _TEXT for name in self.names(what)}
        if not texts & set(found):
            raise UserError(
                f"none of the columns {', '.join(sorted(there))} makes a conversation by its name; say which does with "
                "--columns question=NAME,answer=NAME,image=NAME (or caption=, conversations=, messages=)"
            )
        return list(dict.fromkeys(found))


def parse_columns(text: str | None) -> Columns:
    """``question=q,answer=a`` of the command line.

    Raises:
        UserError: not of this form, or no such meaning.
    """
    named = {}
    for part in (text or "").split(","):
        what, equals, name = (piece.strip() for piece in part.partition("="))
        if not part.strip():
            continue
        if not (what and equals and name):
            raise UserError(f"--columns '{part}': write meaning=NAME, such as question=q; {', '.join(KNOWN)}")
        named[what] = name
    return Columns(named)


@dataclass(frozen=True)
class Row:
    """A conversation and what its pictures are made of.

    Attributes:
        conversations: LLaVA's list, with a mark for each picture.
        pictures: bytes, or where they lie (path or URL).
        independent: its questions do not build on each other.
    """

    conversations: list[dict[str, str]]
    pictures: list[bytes | str]
    independent: bool = False


def name_of(row: Mapping[str, Any], columns: Columns) -> str:
    """A row's id; empty if it has none that is text or a number."""
    value = columns.find("id", row)
    return "" if isinstance(value, bool | list | dict | bytes | None) else str(value)


def read_row(row: Mapping[str, Any], columns: Columns) -> Row:
    """A row as a conversation.

    Pictures without a mark in the text stand in front of the first question, where LLaVA puts them.

    Raises:
        Unusable: training would refuse it: no conversation, other marks than pictures, an empty answer.
    """
    pictures = list(_pictures(columns.find("image", row)))
    inline: list[bytes | str] = []
    independent = False
    for what in ("conversations", "messages"):
        turns = columns.find(what, row)
        if turns is not None:
            made = _turns(turns, inline)
            break
    else:
        texts = columns.find("texts", row)
        if texts is not None:
            made = [
                turn for each in _items(texts) for turn in _exchange(each.get("user"), each.get("assistant"))
            ]
        else:
            made, independent = _asked(row, columns)
    if inline and pictures:
        raise Unusable("marks", "pictures stand both in the messages and in a column of their own")
    pictures = pictures or inline
    return Row(_marked(made, len(pictures)), pictures, independent)


def _asked(row: Mapping[str, Any], columns: Columns) -> tuple[list[dict[str, str]], bool]:
    """Turns of a question and its answer, of several of both, or of a caption alone; and whether they are several."""
    question, answer = (columns.find(what, row) for what in ("question", "answer"))
    if answer is None:
        answer, question = columns.find("caption", row), question or ""
        if isinstance(answer, list):
            answer = next((a for a in answer if a), None)
    if answer is None:
        raise Unusable("conversation", "the row has neither a conversation nor an answer nor a caption")
    if isinstance(question, list):
        if not isinstance(answer, list) or len(answer) != len(question):
            raise Unusable("conversation", f"{len(question)} questions, and not as many answers")
        turns = [turn for q, a in zip(question, answer, strict=True) for turn in _exchange(q, a)]
        return turns, len(question) > 1
    return _exchange(question or "", answer), False


def _exchange(question: Any, answer: Any) -> list[dict[str, str]]:
    if isinstance(answer, list):  # several people's: what most of them say, of equals the first
        told = [_plain(a.get("answer") if isinstance(a, Mapping) else a) for a in answer]
        answer = Counter(told).most_common(1)[0][0] if told else ""
    return [{"from": "human", "value": _plain(question)}, {"from": "gpt", "value": _plain(answer)}]


def _plain(value: Any) -> str:
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError as error:
            raise Unusable("text", "its text is no UTF-8") from error
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, str | int | float):
        return str(value)
    raise Unusable("conversation", f"a question or answer is a {type(value).__name__}, no text")


def _items(value: Any) -> list[Mapping[str, Any]]:
    """A list of turns, however it is stored: also as JSON text, or as a mapping of lists."""
    if isinstance(value, bytes | str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise Unusable("conversation", "its conversation is text that is no JSON") from error
    if isinstance(value, Mapping) and all(isinstance(column, list) for column in value.values()):
        value = [dict(zip(value, items, strict=False)) for items in zip(*value.values(), strict=False)]
    if not isinstance(value, list) or not all(isinstance(item, Mapping) for item in value):
        raise Unusable("conversation", "its conversation is no list of turns")
    return value


def _turns(value: Any, inline: list[bytes | str]) -> list[dict[str, str]]:
    """Turns of LLaVA's or OpenAI's form; pictures among their parts are added to ``inline``."""
    turns = []
    for item in _items(value):
        role = item.get("from") or item.get("role")
        if role not in _ROLES:
            raise Unusable(
                "conversation", f"a turn is from {str(role)[:40]!r}, not user, assistant or system"
            )
        content = next((item[key] for key in ("value", "content", "text") if item.get(key) is not None), None)
        turns.append({"from": _ROLES[role], "value": _content(content, inline)})
    return turns


def _content(content: Any, inline: list[bytes | str]) -> str:
    if not isinstance(content, list):
        return _plain("" if content is None else content)
    text = ""
    for part in content:
        if isinstance(part, str):
            text += part
            continue
        if not isinstance(part, Mapping):
            raise Unusable("conversation", f"a part of a message is a {type(part).__name__}")
        kind = part.get("type")
        if kind == "text" or (kind is None and isinstance(part.get("text"), str)):
            text += _plain(part.get("text") or "")
        elif kind in ("image", "image_url"):
            url = part.get("image_url")
            found = url.get("url") if isinstance(url, Mapping) else url
            inline += list(
                _pictures(next((v for v in (found, part.get("image"), part.get("url")) if v), None))
            )
            text += f"{IMAGE_MARK}\n"
        else:
            raise Unusable(
                "conversation", f"a part of a message is of type {str(kind)[:40]!r}, not text or image"
            )
    return text.rstrip("\n") if text.endswith(f"{IMAGE_MARK}\n") else text


def _pictures(value: Any) -> Iterable[bytes | str]:
    """Pictures of a column's value: bytes, a path or URL, Hugging Face's ``{bytes, path}``, or a list of these."""
    if value is None or value == "" or value == []:
        return
    if isinstance(value, bytes | str):
        yield value
    elif isinstance(value, Mapping):
        inner = value.get("bytes") or value.get("path") or value.get("url")
        if not isinstance(inner, bytes | str):
            raise Unusable("image", "its picture has neither bytes nor a path")
        yield inner
    elif isinstance(value, list):
        for each in value:
            yield from _pictures(each)
    else:
        raise Unusable("image", f"its picture is a {type(value).__name__}")


def _marked(turns: list[dict[str, str]], pictures: int) -> list[dict[str, str]]:
    """Turns that training takes, with a mark for each picture."""
    try:
        _, pairs = exchanges(turns)
        json.dumps(turns, ensure_ascii=False).encode()
    except BadConversation as error:
        raise Unusable("conversation", str(error)) from error
    except UnicodeEncodeError as error:
        raise Unusable("text", "its text is no Unicode (half of a surrogate pair)") from error
    if not all(answer.strip() for _, answer in pairs):
        raise Unusable("empty answer", "an answer is empty")
    marks = sum(turn["value"].count(IMAGE_MARK) for turn in turns)
    asked = sum(question.count(IMAGE_MARK) for question, _ in pairs)
    if asked != marks:
        raise Unusable("marks", f"{IMAGE_MARK} stands in an answer or a system prompt")
    if pictures and not marks:
        at = next(i for i, turn in enumerate(turns) if turn["from"] == "human")
        words = turns[at]["value"]
        marked = "\n".join([IMAGE_MARK] * pictures) + (f"\n{words}" if words else "")
        return [*turns[:at], {**turns[at], "value": marked}, *turns[at + 1 :]]
    if marks != pictures:
        raise Unusable("marks", f"{marks} {IMAGE_MARK} marks in the questions, {pictures} pictures")
    return turns
