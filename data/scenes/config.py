"""What a set of scenes is made of: one frozen record, checked when it is built."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ...models.errors import UserError, nearest
from ..schema import IMAGE_MARK

SHAPES = ("sphere", "cube", "cylinder", "cone")
COLOURS = ("red", "green", "blue", "yellow", "purple", "cyan", "orange", "gray")
SIZES = ("small", "large")
STYLES = ("grounded", "thin")
ENCODINGS = ("png", "jpeg")

KINDS = (
    "colour",
    "shape",
    "size",
    "count",
    "exists",
    "selection",
    "comparison",
    "sign",
    "chart",
    "two_hop",
    "negated_count",
)
"""Question kinds. ``selection`` picks by position ("the leftmost object"), ``comparison`` sets two objects
side by side, ``two_hop`` names an object by its relation to another one only."""

SPLITS = (
    "train",
    "uniform",
    "conflict",
    "aligned",
    "held_out_pairs",
    "minimal_pairs",
    "exists_random",
    "exists_popular",
    "exists_adversarial",
    "text_skill",
)
"""Where a scene's facts come from; :mod:`opsin.data.scenes.splits` says what each one is for."""

STREAMS = ("vqa", "caption", "text", "text_caption", "text_skill", "blind", "mismatched")
"""What is written about a scene; :func:`opsin.data.scenes.sample` says what each one holds."""

MOST_OBJECTS = 6


def known(name: str, value: str, names: Iterable[str]) -> None:
    """Raise a :class:`UserError` with the nearest right name unless ``value`` is one of ``names``."""
    if value not in names:
        raise UserError(f"{name}: unknown '{value}'{nearest(str(value), names)}")


@dataclass(frozen=True)
class SceneConfig:
    """Settings of the generator. Every record is a pure function of (config, seed, split, index, stream).

    Attributes:
        size: side of the square picture, 48 .. 1024 pixels (words on signs need 48).
        objects: fewest and most objects in a scene, 1 .. 6.
        style: ``grounded`` questions presuppose true facts ("what colour is the large cube to the left of the
            small red cone?"); ``thin`` ones say no more than needed ("what colour is the cube?").
        questions: most questions asked about one picture.
        kinds: question kinds asked about pictures (``text_skills`` are left out even when named here).
        text_skills: kinds that ``train`` asks in the ``text_skill`` stream only, never about a picture.
        skew: P(prior colour | shape) in ``train``; the rest is shared evenly by the shape's other colours.
        companions: probability that a further object of a ``train`` scene has the shape that goes along with
            the one before: what gives ``exists_adversarial`` its negatives.
        held_out: number of (colour, shape) pairs that ``train`` neither shows nor names, 0 .. 8.
        world: which colours are priors, which pairs are held out, which shapes go together. Training and
            evaluation sets must share it; ``seed`` may differ.
        sign: probability that a scene has a sign with a word.
        charts: share of pictures that are bar charts (only where ``kinds`` has ``chart``).
        format_prompt: sentence behind every question, or None.
        caption_prompts: instructions of the ``caption`` stream, one is drawn for each picture; none: the
            picture stands alone, as in LLaVA's first stage.
        encoding: ``png`` keeps every pixel, so that facts and pictures agree exactly, and at 64 pixels is
            even smaller than a good JPEG. ``jpeg`` encodes large pictures several times faster: quality 95
            without chroma subsampling, which would smear colours over objects that are a dozen pixels wide.

    Raises:
        UserError: a value is out of range or a name is unknown.
    """

    size: int = 64
    objects: tuple[int, int] = (1, 3)
    style: str = "grounded"
    questions: int = 4
    kinds: tuple[str, ...] = KINDS
    text_skills: tuple[str, ...] = ("two_hop", "negated_count")
    skew: float = 0.75
    companions: float = 0.5
    held_out: int = 4
    world: int = 0
    sign: float = 0.2
    charts: float = 0.1
    format_prompt: str | None = "Answer briefly."
    caption_prompts: tuple[str, ...] = ()
    encoding: str = "png"

    def __post_init__(self) -> None:
        for name in ("objects", "kinds", "text_skills", "caption_prompts"):
            value = getattr(self, name)
            if isinstance(value, str) or not isinstance(value, Iterable):
                raise UserError(f"{name}: a list is needed, got {value!r}")
            object.__setattr__(
                self, name, tuple(value)
            )  # YAML gives lists, and a key of a cache must be hashable
        known("style", self.style, STYLES)
        known("encoding", self.encoding, ENCODINGS)
        for name in ("kinds", "text_skills"):
            for kind in getattr(self, name):
                known(name, kind, KINDS)
        if not self.image_kinds:
            raise UserError(
                f"kinds: nothing to ask about a picture in {list(self.kinds)} without text_skills"
            )
        if not 48 <= self.size <= 1024:
            raise UserError(f"size: 48 to 1024 pixels, got {self.size}")
        if len(self.objects) != 2 or not 1 <= self.objects[0] <= self.objects[1] <= MOST_OBJECTS:
            raise UserError(f"objects: [fewest, most] within 1 to {MOST_OBJECTS}, got {list(self.objects)}")
        if self.questions < 1:
            raise UserError(f"questions: at least 1 a picture, got {self.questions}")
        if not 0 <= self.held_out <= len(COLOURS):
            raise UserError(f"held_out: 0 to {len(COLOURS)} pairs, got {self.held_out}")
        for name in ("skew", "companions", "sign", "charts"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"{name}: a probability from 0 to 1, got {getattr(self, name)}")
        for name, prompts in (
            ("format_prompt", () if self.format_prompt is None else (self.format_prompt,)),
            ("caption_prompts", self.caption_prompts),
        ):
            if any(not isinstance(p, str) or not p.strip() or IMAGE_MARK in p for p in prompts):
                raise UserError(f"{name}: needs words, without '{IMAGE_MARK}', got {list(prompts)}")

    @property
    def image_kinds(self) -> tuple[str, ...]:
        """Kinds that are asked about pictures outside the ``text_skill`` split."""
        return tuple(k for k in self.kinds if k not in self.text_skills)
