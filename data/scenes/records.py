"""One scene as one sample of Opsin's schema: conversation, picture, facts."""

from __future__ import annotations

import random
from typing import Any

from ...models.errors import UserError
from ..schema import IMAGE_MARK, pack_images, stable_hash
from .captions import caption, describe_facts
from .compose import Draft
from .config import STREAMS, SceneConfig, known
from .language import TEXT_CAPTION_PROMPT
from .picture import encode
from .splits import draft

MISMATCH = 6_000_000
"""How many places further the picture of the ``mismatched`` stream stands in its split. Even, and a multiple of
what takes turns in ``minimal_pairs``, so that the picture is that of another pair which differs in the same fact."""

SKILL_SPLITS = ("train", "uniform", "text_skill")
"""Splits that have a ``text_skill`` stream."""


def sample(config: SceneConfig, seed: int, split: str, index: int, stream: str = "vqa") -> dict[str, Any]:
    """Record ``index`` of a split: a pure function of its arguments.

    Streams:

    * ``vqa``: the picture and its questions. Turns are independent: none needs or reveals another one.
    * ``caption``: the picture, alone or with one of ``config.caption_prompts``, and a caption.
    * ``text``: the twin of ``vqa``: the same questions with the picture's facts in words at the head of the
      first human turn, never a blank. Turns are chained: later ones need that head.
    * ``text_caption``: a caption without its picture, for a language model that is to learn the language.
    * ``text_skill``: as ``text``, about other scenes, with the kinds that ``train`` never asks about
    pictures.
    * ``blind``: the questions of ``vqa`` alone, without picture or facts: what can be learnt of habits.
    * ``mismatched``: ``vqa`` with the picture of another scene, :data:`MISMATCH` places further in the same split;
      ``meta`` is about the scene that is asked about. What is learnt from it is to answer without looking.

    Args:
        config: settings.
        seed: seed of the split.
        split: one of ``SPLITS``.
        index: 0 or above.
        stream: one of ``STREAMS``.

    Returns:
        The columns of :data:`opsin.data.schema.COLUMNS`. ``meta`` holds ``source``, ``split``, ``style``,
        ``stream``,
        ``turns``; ``kinds``, ``asked`` (indices of the objects that the answer is about, or None) and
        ``prior`` (what somebody who knows ``train`` answers blindly, or None), one entry an exchange;
        ``objects``, ``sign``,
        ``chart`` (the facts); ``pair`` (shared by the two scenes of a minimal pair, or None) and ``fact``
        (the one in which they differ, or None).

    Raises:
        UserError: an unknown name, a split that does not have this stream, or settings that leave nothing to
            ask.
    """
    known("stream", stream, STREAMS)
    kinds = None
    if stream == "text_skill":
        if split not in SKILL_SPLITS:
            raise UserError(
                f"stream text_skill: not a stream of split '{split}'; splits: {', '.join(SKILL_SPLITS)}"
            )
        if not config.text_skills:
            raise UserError("stream text_skill: text_skills is empty, so there is nothing to ask")
        kinds = config.text_skills
    drawn = draft(config, seed, split, index, kinds)
    words = random.Random(stable_hash("scenes", seed, split, index, "words", stream))
    if stream in ("caption", "text_caption"):
        conversations = _caption(words, config, drawn, stream)
    else:
        conversations = _exchanges(config, drawn, _head(words, drawn, stream))
    pictures = []
    if stream in ("vqa", "caption"):
        pictures = [encode(drawn.scene.picture, config)]
    elif stream == "mismatched":
        pictures = [encode(draft(config, seed, split, index + MISMATCH).scene.picture, config)]
    return {
        "id": f"scenes/{split}/{seed}/{index:06d}",
        "conversations": conversations,
        "images": pack_images(pictures),
        "meta": _meta(config, seed, split, stream, drawn),
    }


def _head(rng: random.Random, drawn: Draft, stream: str) -> str:
    """What stands before the first question."""
    if stream == "blind":
        return ""
    return f"{IMAGE_MARK if stream in ('vqa', 'mismatched') else describe_facts(rng, drawn.scene)}\n"


def _exchanges(config: SceneConfig, drawn: Draft, head: str) -> list[dict[str, str]]:
    turns: list[dict[str, str]] = []
    for exchange in drawn.exchanges:
        text = exchange.question.text
        if config.format_prompt:
            text += f" {config.format_prompt}"
        turns += [
            {"from": "human", "value": text if turns else head + text},
            {"from": "gpt", "value": exchange.answer.text},
        ]
    return turns


def _caption(rng: random.Random, config: SceneConfig, drawn: Draft, stream: str) -> list[dict[str, str]]:
    text = caption(rng, drawn.scene)
    if stream == "text_caption":
        prompt = TEXT_CAPTION_PROMPT
    else:
        prompt = IMAGE_MARK
        if config.caption_prompts:
            prompt += f"\n{rng.choice(config.caption_prompts)}"
    return [{"from": "human", "value": prompt}, {"from": "gpt", "value": text}]


def _meta(config: SceneConfig, seed: int, split: str, stream: str, drawn: Draft) -> dict[str, Any]:
    scene = drawn.scene
    captioned = stream in ("caption", "text_caption")
    exchanges = () if captioned else drawn.exchanges
    return {
        "source": "scenes",
        "split": split,
        "style": config.style,
        "stream": stream,
        "turns": "chained" if stream in ("text", "text_skill") else "independent",
        "kinds": ["caption"] if captioned else [e.question.kind for e in exchanges],
        "asked": [None] if captioned else [_indices(e.answer.asked) for e in exchanges],
        "prior": [None] if captioned else [e.question.prior for e in exchanges],
        "pair": None if drawn.pair is None else f"scenes/{split}/{seed}/{drawn.pair:06d}",
        "fact": drawn.fact,
        "objects": [thing.as_dict() for thing in scene.objects],
        "sign": scene.sign and scene.sign.word,
        "chart": [{"colour": b.colour, "value": b.value, "box": list(b.box)} for b in scene.bars] or None,
    }


def _indices(asked: tuple[int, ...] | None) -> list[int] | None:
    return None if asked is None else list(asked)
