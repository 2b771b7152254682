"""Chat templates: how a stored conversation becomes text, and which character is what.

A conversation is rendered once; every character of the text knows its role and turn, so that labels come
from character spans and never from pieces tokenised apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ..models.errors import UserError, nearest
from .schema import IMAGE_MARK, Role

EOS = "{eos}"
"""Stands for the tokenizer's end-of-sequence token in a template."""


@dataclass(frozen=True)
class Segment:
    """A stretch of rendered text of one role. ``turn`` counts exchanges from 0; -1 before the first."""

    text: str
    role: Role
    turn: int


@dataclass(frozen=True)
class ChatTemplate:
    """Text around each message. ``prefix`` and ``suffix`` strings may hold ``{eos}``.

    Attributes:
        name: registered name.
        system_prompt: used when a conversation brings none; empty: no system message.
        system: (prefix, suffix) of the system message.
        user: (prefix, suffix) of the user's message.
        assistant_prefix: what opens the response; also ends a generation prompt.
        assistant_end: ends the response and is learnt with it (role RESPONSE).
        assistant_suffix: follows the response and is not learnt.
        plain: the user's words are dropped: pictures, then the response (LLaVA's stage-1 format).
        jinja: the same as a Hugging Face chat template, for the exported processor.
    """

    name: str
    system_prompt: str
    system: tuple[str, str]
    user: tuple[str, str]
    assistant_prefix: str
    assistant_end: str
    assistant_suffix: str = ""
    plain: bool = False
    jinja: str = ""

    def for_tokenizer(self, eos_token: str) -> ChatTemplate:
        """The template with ``{eos}`` filled in."""
        fill = lambda text: text.replace(EOS, eos_token)  # noqa: E731
        return replace(
            self,
            system=(fill(self.system[0]), fill(self.system[1])),
            user=(fill(self.user[0]), fill(self.user[1])),
            assistant_prefix=fill(self.assistant_prefix),
            assistant_end=fill(self.assistant_end),
            assistant_suffix=fill(self.assistant_suffix),
            jinja=fill(self.jinja),
        )


class BadConversation(ValueError):
    """A stored conversation that cannot be rendered; the message says why."""


def exchanges(conversation: Sequence[dict[str, str]]) -> tuple[str | None, list[tuple[str, str]]]:
    """Split LLaVA's list into the system prompt (None: not given) and (user, assistant) pairs.

    Raises:
        BadConversation: turns do not alternate, or the last response is missing.
    """
    if not isinstance(conversation, list | tuple) or not all(isinstance(t, dict) for t in conversation):
        raise BadConversation("conversations is no list of turns")
    turns = list(conversation)
    system = None
    if turns and turns[0].get("from") == "system":
        system = turns.pop(0).get("value")
        if not isinstance(system, str):
            raise BadConversation("the system turn has no text in 'value'")
    if not turns or len(turns) % 2:
        raise BadConversation(f"{len(turns)} turns are no sequence of question and answer")
    pairs = []
    for human, gpt in zip(turns[::2], turns[1::2], strict=True):
        if human.get("from") != "human" or gpt.get("from") != "gpt":
            raise BadConversation(
                f"turns should alternate human, gpt; found {human.get('from')}, {gpt.get('from')}"
            )
        if not isinstance(human.get("value"), str) or not isinstance(gpt.get("value"), str):
            raise BadConversation("a turn has no text in 'value'")
        pairs.append((human["value"], gpt["value"]))
    return system, pairs


def asked_alone(users: Sequence[str]) -> list[str]:
    """Independent questions about the pictures of the first one: each as it is asked alone, pictures in front.

    Raises:
        BadConversation: a later question shows pictures of its own, or the first has words before its last one
            (what the others share would then not be what each of them is asked with).
    """
    if any(IMAGE_MARK in user for user in users[1:]):
        raise BadConversation("independent turns: only the first may show pictures")
    *before, words = users[0].split(IMAGE_MARK)
    marks = f"{IMAGE_MARK}\n" * len(before)
    if len(before) > 1:
        if any(piece.strip() for piece in before):
            raise BadConversation("independent turns: words stand before or between the pictures")
        return [marks + words.lstrip(), *(marks + user for user in users[1:])]
    return [users[0], *(marks + user for user in users[1:])]


def user_segments(text: str, turn: int, placeholder: str, template: ChatTemplate) -> list[Segment]:
    """Segments of one user message: pictures, the line breaks around them, the words.

    A single picture is moved to the front of its message, as LLaVA's recipe does, because words before a
    picture cannot see it; several pictures stay where they are.
    """
    if text.count(IMAGE_MARK) == 1:
        text = f"{IMAGE_MARK}\n{text.replace(IMAGE_MARK, '').strip()}"
    pieces = text.split(IMAGE_MARK)
    segments: list[Segment] = []
    for i, piece in enumerate(pieces):
        if i:
            segments.append(Segment(placeholder, Role.IMAGE, turn))
        if template.plain:
            continue
        words = piece
        if i:  # white space next to a picture is formatting, nothing that the user said
            words = words.lstrip()
            _add(segments, piece[: len(piece) - len(words)], Role.MARKER, turn)
        if i < len(pieces) - 1:
            kept = words.rstrip()
            _add(segments, kept, Role.INSTRUCTION, turn)
            _add(segments, words[len(kept) :], Role.MARKER, turn)
        else:
            _add(segments, words, Role.INSTRUCTION, turn)
    return segments


def _add(segments: list[Segment], text: str, role: Role, turn: int) -> None:
    if text:
        segments.append(Segment(text, role, turn))


def render(
    system: str | None,
    pairs: Sequence[tuple[str, str]],
    template: ChatTemplate,
    placeholder: str,
    *,
    first_turn: int = 0,
    open_response: bool = False,
) -> list[Segment]:
    """Render exchanges; joined, the segments' texts are what is tokenised.

    Args:
        system: system prompt of the conversation; None: the template's own.
        pairs: (user, assistant) texts, ``<image>`` marking pictures.
        template: with ``{eos}`` filled in (:meth:`ChatTemplate.for_tokenizer`).
        placeholder: what stands for one picture (``ImageEncoder.placeholder``).
        first_turn: number of the first exchange.
        open_response: leave the last response open, for generation (its text is then not rendered).
    """
    segments: list[Segment] = []
    system = template.system_prompt if system is None else system
    if system and not template.plain:
        _add(segments, template.system[0], Role.MARKER, -1)
        _add(segments, system, Role.SYSTEM, -1)
        _add(segments, template.system[1], Role.MARKER, -1)
    for turn, (user, assistant) in enumerate(pairs, start=first_turn):
        _add(segments, template.user[0], Role.MARKER, turn)
        segments += user_segments(user, turn, placeholder, template)
        _add(segments, template.user[1], Role.MARKER, turn)
        # A generation prompt ends without the space, so the space is the model's to write: where it is a token
        # of its own (Llama's before a digit), the token is learnt.
        opening = template.assistant_prefix.rstrip(" ")
        space = template.assistant_prefix[len(opening) :]
        _add(segments, opening, Role.MARKER, turn)
        if not open_response or turn < first_turn + len(pairs) - 1:
            _add(segments, space + assistant, Role.RESPONSE, turn)
            _add(segments, template.assistant_end, Role.RESPONSE, turn)
            _add(segments, template.assistant_suffix, Role.MARKER, turn)
    return segments


def _jinja(template: ChatTemplate) -> str:
    """Hugging Face form of a template; pictures of a message come first, a line break behind each."""

    def text(value: str) -> str:
        return value.replace("\\", "\\\\").replace("\n", "\\n").replace("'", "\\'")

    words = "" if template.plain else "{{ part['text'] if part is mapping else part }}"
    newline = "" if template.plain else "\\n"
    body = (
        "{%- if message['content'] is string -%}{%- set parts = [{'type': 'text', 'text': message['content']}] -%}"
        "{%- else -%}{%- set parts = message['content'] -%}{%- endif -%}"
    )
    images = (
        "{%- for part in parts if part['type'] == 'image' -%}{{ '<image>" + newline + "' }}{%- endfor -%}"
    )
    said = "{%- for part in parts if part['type'] == 'text' -%}" + words + "{%- endfor -%}"
    answer = "{%- for part in parts if part['type'] == 'text' -%}{{ part['text'] }}{%- endfor -%}"
    out = "{%- for message in messages -%}" + body
    if not template.plain:
        if template.system_prompt:
            out += (
                "{%- if loop.first and message['role'] != 'system' -%}{{ '"
                + text(template.system[0] + template.system_prompt + template.system[1])
                + "' }}{%- endif -%}"
            )
        out += (
            "{%- if message['role'] == 'system' and message['content'] -%}{{ '"
            + text(template.system[0])
            + "' }}"
            + answer
            + "{{ '"
            + text(template.system[1])
            + "' }}{%- endif -%}"
        )
    out += (
        "{%- if message['role'] == 'user' -%}{{ '"
        + text(template.user[0])
        + "' }}"
        + images
        + said
        + "{{ '"
        + text(template.user[1])
        + "' }}{%- endif -%}"
        "{%- if message['role'] == 'assistant' -%}{{ '"
        + text(template.assistant_prefix)
        + "' }}"
        + answer
        + "{{ '"
        + text(template.assistant_end + template.assistant_suffix)
        + "' }}{%- endif -%}"
        "{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{ '"
        + text(template.assistant_prefix.rstrip(" "))
        + "' }}{%- endif -%}"
    )
    return out


def _make(template: ChatTemplate) -> ChatTemplate:
    return replace(template, jinja=_jinja(template))


_VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)

TEMPLATES: dict[str, ChatTemplate] = {
    t.name: _make(t)
    for t in (
        ChatTemplate("plain", "", ("", ""), ("", ""), "", "\n", plain=True),
        ChatTemplate("vicuna_v1", _VICUNA_SYSTEM, ("", " "), ("USER: ", " "), "ASSISTANT: ", EOS),
        ChatTemplate(
            "chatml",
            "",
            ("<|im_start|>system\n", "<|im_end|>\n"),
            ("<|im_start|>user\n", "<|im_end|>\n"),
            "<|im_start|>assistant\n",
            "<|im_end|>",
            "\n",
        ),
    )
}
"""Templates by name: LLaVA's stage-1 format, Vicuna v1 (LLaVA-1.5), ChatML (Qwen, SmolLM)."""


def chat_template(name: str, eos_token: str, system_prompt: str | None = None) -> ChatTemplate:
    """A template by name, filled in for a tokenizer.

    Raises:
        UserError: unknown name.
    """
    if name not in TEMPLATES:
        raise UserError(f"chat_template '{name}': unknown{nearest(name, TEMPLATES)}")
    template = TEMPLATES[name]
    if system_prompt is not None:
        template = _make(replace(template, system_prompt=system_prompt))
    return template.for_tokenizer(eos_token)
