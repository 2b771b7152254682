"""Our own scenes as a suite: made on the fly, or a dataset of them (or of any samples in Opsin's form)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import fields
from functools import lru_cache, partial
from typing import Any

from ...data.chat import BadConversation, asked_alone, exchanges
from ...data.scenes import COLOURS, KINDS, SHAPES, SIZES, SPLITS, STREAMS, WORDS, SceneConfig, sample
from ...data.schema import IMAGE_MARK, unpack_images
from ...models.errors import UserError
from ..questions import kinds_of
from ..records import PER_EXCHANGE, Item, Picture
from ..suites import Suite
from .items import known, make_suite

SORTS = (
    COLOURS,
    SHAPES,
    SIZES,
    ("yes", "no"),
    ("left", "right"),
    ("nearer", "farther"),
    ("taller", "shorter"),
    tuple(str(number) for number in range(10)),
    WORDS,
)
"""Answers that a question of the scenes may have: those of the sort that its words ask for."""

GROUPS_OF = {
    "conflict": "hallucination",
    "aligned": "hallucination",
    "exists_random": "hallucination",
    "exists_popular": "hallucination",
    "exists_adversarial": "hallucination",
    "text_skill": "reasoning",
}
"""Split -> group of tables; the others are ``2d``. Streams without a picture are ``text_only``, captions ``captioning``."""

KEPT = 64
"""Samples whose pictures are kept in memory."""
SMALL = 96
"""Pixels a side: scenes of this size and smaller are kept whole."""


def scenes(
    path: str | None = None,
    split: str | list[str] = "uniform",
    samples: int = 400,
    seed: int = 18,
    stream: str = "vqa",
    ask: list[str] | None = None,
    mode: str = "generate",
    max_new_tokens: int = 16,
    limit: int | None = None,
    scorer: str | None = None,
    group: str | None = None,
    **config: Any,
) -> Suite:
    """Questions about scenes, an item an exchange, each asked alone with its picture.

    ``meta`` has what the generator knows: ``split``, ``prior``, ``pair``, ``fact``, ``objects``, ``asked`` ... Several splits
    take turns, two samples each, so that pairs stay together.

    Args:
        path: a dataset (folder or URL) as ``opsin data scenes`` writes it; default: scenes are made on the fly. Its own
            split, seed and stream hold then.
        split: one or several of ``data.scenes.SPLITS``. ``[aligned, conflict]`` tells seeing from habit.
        samples: scenes of each split, or of the dataset. (A dataset may have fewer.)
        seed: of the scenes; a run's own training seed would show those of its training.
        stream: one of ``data.scenes.STREAMS``; ``text`` has the facts in words in place of the picture, ``blind``
            has neither, ``mismatched`` another scene's picture.
        ask: kinds of questions that are asked; default: all.
        mode: ``generate``, ``rank`` (among the answers of the sort that is asked for: ``SORTS``) or ``follow``.
        max_new_tokens, limit: see :func:`.yes_no.pope`.
        scorer: ``scenes``, ``scenes_first_words``, or either with ``@token``; ``scene_captions``. Default: the last one for
            captions, else the first.
        group: of tables; default: by split and stream, ``GROUPS_OF``.
        config: settings of the scenes (``data.scenes.SceneConfig``); training and evaluation share ``world``.

    Raises:
        UserError: a keyword is wrong; or, when it is loaded, the dataset is.
    """
    splits = [split] if isinstance(split, str) else list(split)
    for one in splits:
        known("split", one, SPLITS)
    known("stream", stream, STREAMS)
    for name in config:
        known("scenes", name, [field.name for field in fields(SceneConfig)])
    if not splits or len(set(splits)) < len(splits):
        raise UserError("split: name each split once")
    if mode == "follow" and any(one.startswith("exists_") for one in splits):
        raise UserError("mode: follow: splits exists_... are read as POPE reads sentences; use generate")
    if samples < 1:
        raise UserError(f"samples: {samples}: use 1 or more")
    for kind in (ask or ()) if path is None else ():
        known("ask", kind, (*KINDS, "caption"))
    if path is not None and config:
        raise UserError(f"scenes: {next(iter(config))}: the dataset at path was made with its own settings")
    if "minimal_pairs" in splits and samples % 2:
        raise UserError(f"samples: {samples}: an even number for minimal_pairs")
    read: Callable[[], Iterator[tuple[dict[str, Any], Callable[[], bytes]]]]
    if path is None:
        settings = SceneConfig(**config)
        for one in splits:
            sample(settings, seed, one, 0, stream)  # a setting that is impossible ends here
        read = partial(_made, settings, seed, splits, samples, stream)
    else:
        read = partial(_stored, path, samples)

    def load() -> list[Item]:
        found = [item for stored, packed in read() for item in _items(stored, packed)]
        for kind in (ask or ()) if path is not None else ():
            known("ask", kind, {item.kind for item in found})
        return [item for item in found if not ask or item.kind in ask]

    return make_suite(
        load, path or f"scenes ({', '.join(splits)})", group=group or _group(splits[0], stream),
        scorer=scorer or ("scene_captions" if stream == "caption" else "scenes"),
        mode=mode, max_new_tokens=max_new_tokens, limit=limit,
    )  # fmt: skip


def _group(split: str, stream: str) -> str:
    if stream in ("text", "text_caption", "text_skill", "blind"):
        return "text_only"
    return "captioning" if stream == "caption" else GROUPS_OF.get(split, "2d")


def _made(
    config: SceneConfig, seed: int, splits: list[str], samples: int, stream: str
) -> Iterator[tuple[dict[str, Any], Callable[[], bytes]]]:
    for start in range(0, samples, 2):
        for split in splits:
            for index in range(start, min(start + 2, samples)):
                stored = _scene(config, seed, split, index, stream)
                own = (config, seed, split, index, stream)
                small = config.size <= SMALL
                yield stored, (partial(stored.__getitem__, "images") if small else partial(_packed, *own))


@lru_cache(20000)
def _small_scene(config: SceneConfig, seed: int, split: str, index: int, stream: str) -> dict[str, Any]:
    """A scene of a few kilobytes: a study asks each of its models about the same ones."""
    return sample(config, seed, split, index, stream)


def _scene(config: SceneConfig, seed: int, split: str, index: int, stream: str) -> dict[str, Any]:
    made = _small_scene if config.size <= SMALL else sample
    return made(config, seed, split, index, stream)


@lru_cache(KEPT)
def _packed(config: SceneConfig, seed: int, split: str, index: int, stream: str) -> bytes:
    """Pictures of a scene that is made again: cheaper than keeping all of them."""
    return sample(config, seed, split, index, stream)["images"]


def _stored(path: str, samples: int) -> Iterator[tuple[dict[str, Any], Callable[[], bytes]]]:
    from ...data.source import BadSample
    from ...data.stored import StoredSamples  # torch and Streaming, which take seconds

    source = StoredSamples(path)

    @lru_cache(KEPT)
    def packed(position: int) -> bytes:
        return next(source.records(position, position + 1))["images"]

    for found in source.texts():
        if found.position == samples:
            return
        if isinstance(found, BadSample):
            raise UserError(f"{path}: {found}")
        stored = {"id": found.id, "conversations": found.conversations, "meta": found.meta}
        yield stored, partial(packed, found.position)


def _items(stored: dict[str, Any], packed: Callable[[], bytes]) -> Iterator[Item]:
    """One item an exchange."""
    try:
        system, pairs = exchanges(stored["conversations"])
        meta = dict(stored.get("meta") or {})
        users = _alone([user for user, _ in pairs], meta)
        kinds = kinds_of(stored, len(pairs))
    except BadConversation as error:
        raise UserError(f"sample {stored['id']}: {error}") from error
    shared = {key: value for key, value in meta.items() if key not in ("turns", "kinds", *PER_EXCHANGE)}
    for turn, (user, (_, gold), kind) in enumerate(zip(users, pairs, kinds, strict=True)):
        own = {key: meta[key][turn] for key in PER_EXCHANGE if meta.get(key)}
        pictures: tuple[Picture, ...] = tuple(
            partial(_unpacked, packed, i) for i in range(user.count(IMAGE_MARK))
        )
        choices = next((sort for sort in SORTS if gold in sort), ())
        yield Item(f"{stored['id']}/{turn}", user, pictures, gold, kind, choices, {**shared, **own}, system)


def _alone(users: list[str], meta: dict[str, Any]) -> list[str]:
    """Each question as it is asked alone; of scenes in words, with the facts at the head of the first one.

    Raises:
        BadConversation: the turns of another dataset hang together.
    """
    if meta.get("turns") == "independent" or len(users) == 1:
        return asked_alone(users)
    if meta.get("source") != "scenes":
        raise BadConversation("its turns hang together, so they cannot be asked alone")
    head = users[0].rpartition("\n")[0]
    return [users[0], *(f"{head}\n{user}" for user in users[1:])]


def _unpacked(packed: Callable[[], bytes], which: int) -> bytes:
    return unpack_images(packed())[which]
