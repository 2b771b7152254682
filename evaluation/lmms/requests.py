"""What lmms-eval asks -> stored samples and arguments of ``generate``: pure functions, without lmms-eval."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError

from ...data.schema import IMAGE_MARK, pack_images
from ...models.errors import UserError

GENERATE = (
    "do_sample", "temperature", "top_p", "top_k", "num_beams", "max_new_tokens", "min_new_tokens", "length_penalty",
    "repetition_penalty", "no_repeat_ngram_size",
)  # fmt: skip
"""Generation arguments of a task that ``generate`` of transformers gets; ``until`` cuts its answers."""

SAMPLING = ("temperature", "top_p", "top_k")
"""What only sampling looks at; a greedy call that is given them warns."""

WITHOUT_MEANING = ("until", "max_gen_toks", "image_aspect_ratio")
"""Not handed on, and no loss: read elsewhere here, or about the pictures of another model."""


def pictures_of(visuals: Any, where: str) -> list[bytes]:
    """The pictures that a task shows, encoded without loss.

    Args:
        visuals: what ``doc_to_visual`` returned: None, or PIL pictures or files, in lists of any depth.
        where: task and document, for messages.

    Raises:
        UserError: something that is no picture (a video, a sound), or that cannot be read.
    """
    return [_encoded(visual, where) for visual in _flat(visuals)]


def _flat(visuals: Any) -> Iterator[Any]:
    if isinstance(visuals, list | tuple):
        for visual in visuals:
            yield from _flat(visual)
    elif visuals is not None:
        yield visuals


def _encoded(visual: Any, where: str) -> bytes:
    if isinstance(visual, str | Path):
        try:
            with Image.open(visual) as picture:
                picture.load()
                visual = picture
        except UnidentifiedImageError as error:
            raise UserError(
                f"{where}: {visual} is no picture; this model sees pictures only, no video and no sound"
            ) from error
        except (OSError, ValueError, Image.DecompressionBombError) as error:
            raise UserError(
                f"{where}: picture {visual}: {getattr(error, 'strerror', None) or error}"
            ) from error
    if not isinstance(visual, Image.Image):
        raise UserError(
            f"{where}: shows a {type(visual).__name__}; this model sees pictures only, no video and no sound"
        )
    buffer = io.BytesIO()
    visual.convert("RGB").save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def question_of(words: str, pictures: int, where: str) -> str:
    """The user's turn with its marks: those that the words have, else all pictures in front.

    Raises:
        UserError: the words have marks, but not one a picture.
    """
    marks = words.count(IMAGE_MARK)
    if marks and marks != pictures:
        raise UserError(f"{where}: {marks} {IMAGE_MARK} marks in the words, {pictures} pictures")
    return words if marks else f"{IMAGE_MARK}\n" * pictures + words


def stored(name: str, turns: Sequence[tuple[str, str]], pictures: Sequence[bytes]) -> dict[str, Any]:
    """A sample whose last exchange is to be answered.

    Args:
        name: its id.
        turns: (``system`` | ``human`` | ``gpt``, text), the last one the question.
        pictures: in the order of the marks.
    """
    return {
        "id": name,
        "conversations": [{"from": role, "value": text} for role, text in [*turns, ("gpt", "")]],
        "images": pack_images(pictures),
        "meta": {"turns": "chained"},
    }


def sample_of_messages(name: str, messages: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """A sample from chat messages: ``{"role": ..., "content": text or parts}``, a part a text or an image.

    Raises:
        UserError: messages that are no conversation, or a part that is neither words nor a picture.
    """
    roles = {"system": "system", "user": "human", "assistant": "gpt"}
    turns: list[tuple[str, str]] = []
    pictures: list[bytes] = []
    for message in messages:
        role = roles.get(str(message.get("role")))
        if role is None:
            raise UserError(f"{name}: a message of '{message.get('role')}'; known: {', '.join(roles)}")
        text = ""
        content = message.get("content") or []
        for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
            if part.get("type") == "text":
                words = str(part.get("text", ""))
                if IMAGE_MARK in words:
                    raise UserError(
                        f"{name}: {IMAGE_MARK} in the words of a message, whose pictures are parts of it"
                    )
                text += words
            elif part.get("type") == "image":
                (picture,) = pictures_of([part.get("url", part.get("image"))], name)
                pictures.append(picture)
                text += f"{IMAGE_MARK}\n"
            else:
                raise UserError(f"{name}: a message with a {part.get('type')}; this model sees pictures only")
        if turns and turns[-1][0] == role:  # two messages of the same speaker are one turn
            text = f"{turns.pop()[1]}\n{text}"
        turns.append((role, text))
    if not turns or turns[-1][0] != "human":
        raise UserError(f"{name}: the last message is no question of the user")
    return stored(name, turns, pictures)


def generation(given: Mapping[str, Any], longest: int) -> tuple[dict[str, Any], list[str], list[str]]:
    """A task's ``generation_kwargs`` -> (arguments of ``generate``, stop strings, keys that have no effect).

    Args:
        given: the task's own, which is not changed: lmms-eval shares it between requests.
        longest: ``max_new_tokens`` where the task names none.
    """
    options = {key: value for key, value in given.items() if key in GENERATE and value is not None}
    options.setdefault("max_new_tokens", given.get("max_gen_toks") or longest)
    options["max_new_tokens"] = int(options["max_new_tokens"])
    warm = float(options.get("temperature", 0) or 0) > 0
    options["do_sample"] = bool(options.get("do_sample", warm)) and ("temperature" not in options or warm)
    if not options["do_sample"]:
        for key in SAMPLING:
            options.pop(key, None)
    until = given.get("until") or []
    stops = [until] if isinstance(until, str) else [str(stop) for stop in until]
    ignored = sorted(set(given) - set(GENERATE) - set(WITHOUT_MEANING))
    return options, [stop for stop in stops if stop], ignored


def cut(text: str, stops: Sequence[str]) -> str:
    """An answer up to the first stop string."""
    ends = [text.find(stop) for stop in stops]
    return text[: min((end for end in ends if end >= 0), default=len(text))].strip()


def batch_key(options: Mapping[str, Any], stops: Sequence[str]) -> str:
    """Requests with the same key may be answered by one call of ``generate``."""
    return json.dumps([options, list(stops)], sort_keys=True, default=str)
