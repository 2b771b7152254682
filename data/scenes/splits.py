"""What each split is for, and how its scenes come about.

``train``
    P(colour | shape) is skewed, some (colour, shape) pairs never occur, some shapes go together.
``uniform``
    Every (colour, shape) pair is equally likely, held-out ones included: answers follow from the picture
    alone.
``conflict``, ``aligned``
    One colour question a picture. In ``conflict`` the answer is a colour that ``train`` shows on that shape,
    but not its prior one; in ``aligned`` it is the prior one. The same index gives the same picture and
    question but for that colour.
``held_out_pairs``
    Colour and shape of an object that combines them as ``train`` never does.
``minimal_pairs``
    Scenes 2k and 2k + 1 differ in exactly one fact, share one question and have different answers. Facts take
    turns: colour, shape, size, position, count, existence.
``exists_random``, ``exists_popular``, ``exists_adversarial``
    Scenes as in ``train``; as many questions answered yes as no. What is asked for in vain is any pair, a
    frequent one, or a frequent one that goes along with what is there.
``text_skill``
    Scenes as in ``uniform``, asked the kinds that ``train`` asks in text only.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace

from ...models.errors import UserError
from ..schema import stable_hash
from .compose import Draft, Plain, answered, attempts, free, plain
from .config import COLOURS, SHAPES, SIZES, SPLITS, SceneConfig, known
from .counting import unplanned
from .existence import absent_adversarial, absent_popular, absent_random, exists, pope
from .facts import Facts
from .layout import Attributes, Spot, spots
from .picture import Scene
from .questions import Context, Question, attribute, comparison, selection
from .world import UniformLaw, World, build_world, train_law

FACTS = ("colour", "shape", "size", "position", "count", "existence")
"""What takes turns to differ in ``minimal_pairs``: pair k differs in ``FACTS[k % 6]``."""

_NEGATIVES = {
    "exists_random": absent_random,
    "exists_popular": absent_popular,
    "exists_adversarial": absent_adversarial,
}
_UNIFORM = UniformLaw()


def draft(
    config: SceneConfig, seed: int, split: str, index: int, kinds: tuple[str, ...] | None = None
) -> Draft:
    """Scene number ``index`` of a split, with its questions.

    Args:
        config: settings.
        seed: seed of the split; other seeds give other scenes of the same world.
        split: one of ``SPLITS``.
        index: 0 or above; splits have no end.
        kinds: for ``train`` and ``uniform``, kinds to ask instead of ``config.image_kinds`` (about other
            scenes).

    Raises:
        UserError: unknown split, negative index, or settings that leave nothing to ask.
    """
    known("split", split, SPLITS)
    if index < 0:
        raise UserError(f"index: 0 or above, got {index}")
    world = build_world(config.world, config.held_out)

    def rng(name: str, number: int) -> random.Random:
        return random.Random(stable_hash("scenes", seed, name, number))

    if split in ("train", "uniform", "text_skill"):
        law = train_law(config) if split == "train" else _UNIFORM
        if split == "text_skill":
            kinds = config.text_skills
            if not kinds:
                raise UserError("split text_skill: text_skills is empty, so there is nothing to ask")
        name = split if kinds is None or split == "text_skill" else f"{split}/{'+'.join(kinds)}"
        return free(rng(name, index), config, law, world, kinds or config.image_kinds)
    if split in ("conflict", "aligned"):
        return _against_prior(rng("prior", index), config, world)[split == "conflict"]
    if split == "held_out_pairs":
        if not world.held_out:
            raise UserError("split held_out_pairs: held_out is 0, so no pair is new")
        return _held_out(rng(split, index), config, world)
    if split == "minimal_pairs":
        pair, member = divmod(index, 2)
        return _pair(rng(split, pair), config, world, pair)[member]
    return _pope(rng(split, index), config, world, split)


def _context(rng: random.Random, config: SceneConfig, facts: Facts, world: World) -> Context:
    return Context(rng, config.style, facts, _UNIFORM, world)


def _number(rng: random.Random, config: SceneConfig, least: int = 1) -> int:
    return rng.randint(max(least, config.objects[0]), max(least, config.objects[1]))


def _recolour(scene: Plain, i: int, **changes: str) -> Plain:
    changed = replace(scene.attributes[i], **changes)
    return replace(scene, attributes=(*scene.attributes[:i], changed, *scene.attributes[i + 1 :]))


def _both(
    rng: random.Random,
    config: SceneConfig,
    world: World,
    scenes: list[Plain],
    ask: Callable[[Context], Question | None],
) -> list[Draft] | None:
    """Drafts of two scenes with one question that both answer, and answer differently."""
    first, second = (s.stand(config) for s in scenes)
    if first is None or second is None:
        return None
    question = ask(_context(rng, config, first, world))
    if question is None:
        return None
    one, other = question.solve(first), question.solve(second)
    if one is None or other is None or one.text == other.text:
        return None
    return [Draft(s, (answered(question, s),)) for s in (first, second)]


def _against_prior(rng: random.Random, config: SceneConfig, world: World) -> list[Draft]:
    """Aligned and conflicting draft of one scene."""
    found: list[Draft] = []

    def make() -> Draft | None:
        scene = plain(rng, config, _UNIFORM, _number(rng, config))
        i = rng.randrange(len(scene.attributes))
        shape = scene.attributes[i].shape
        aligned = _recolour(scene, i, colour=world.prior[shape])
        conflict = _recolour(scene, i, colour=rng.choice(world.surprising[shape]))

        def ask(ctx: Context) -> Question | None:
            question = attribute(ctx, "colour", i)
            return question if question and question.prior else None  # its words must name the shape

        both = _both(rng, config, world, [aligned, conflict], ask)
        found[:] = both or ()
        return both[0] if both else None

    attempts(make, "the colour of one object")
    return found


def _held_out(rng: random.Random, config: SceneConfig, world: World) -> Draft:
    def make() -> Draft | None:
        base = plain(rng, config, _UNIFORM, _number(rng, config))
        i = rng.randrange(len(base.attributes))
        colour, shape = rng.choice(sorted(world.held_out))
        scene = _recolour(base, i, colour=colour, shape=shape).stand(config)
        if scene is None:
            return None
        asked = [
            attribute(_context(rng, config, scene, world), name, i)
            for name in rng.sample(("colour", "shape"), 2)
        ]
        exchanges = [answered(q, scene) for q in asked if q][: config.questions]
        return Draft(scene, tuple(exchanges)) if exchanges else None

    return attempts(make, "a held-out pair")


def _pope(rng: random.Random, config: SceneConfig, world: World, split: str) -> Draft:
    law = train_law(config)

    def make() -> Draft | None:
        scene = plain(rng, config, law, _number(rng, config)).stand(config)
        if scene is None:
            return None
        ctx = Context(rng, config.style, scene, law, world)
        asked = pope(ctx, _NEGATIVES[split], config.questions)
        return Draft(scene, tuple(answered(q, scene) for q in asked))

    return attempts(make, "existence")


def _pair(rng: random.Random, config: SceneConfig, world: World, pair: int) -> list[Draft]:
    fact = FACTS[pair % len(FACTS)]
    found: list[Draft] = []

    def make() -> Draft | None:
        scenes, ask = _DIFFER[fact](rng, config)
        both = _both(rng, config, world, scenes, ask)
        found[:] = both or ()
        return both[0] if both else None

    attempts(make, f"a pair that differs in {fact}")
    rng.shuffle(found)
    return [replace(d, pair=pair, fact=fact) for d in found]


Variant = tuple[list[Plain], Callable[[Context], "Question | None"]]
"""Two scenes, and the function that asks about the first one."""


def _attribute_differs(name: str, values: tuple[str, ...]) -> Callable[[random.Random, SceneConfig], Variant]:
    def differ(rng: random.Random, config: SceneConfig) -> Variant:
        scene = plain(rng, config, _UNIFORM, _number(rng, config))
        i = rng.randrange(len(scene.attributes))
        old = getattr(scene.attributes[i], name)
        other = _recolour(scene, i, **{name: rng.choice([v for v in values if v != old])})
        return [scene, other], lambda ctx: attribute(ctx, name, i)

    return differ


def _position_differs(rng: random.Random, config: SceneConfig) -> Variant:
    """One object of at least two goes to the far end of one axis, past all others."""
    n = _number(rng, config, least=2)
    slots = spots(rng, n + 1)  # one of them stays empty in each of the two scenes
    axis = rng.choice(("x", "depth"))
    order = sorted(slots, key=lambda spot: getattr(spot, axis), reverse=rng.random() < 0.5)
    home, away = order[0], replace(order[0], **{axis: getattr(order[-1], axis)})
    base = plain(rng, config, _UNIFORM, n)
    rest = tuple(order[1:-1])
    scenes = [replace(base, spots=(spot, *rest)) for spot in (home, away)]
    return scenes, rng.choice((selection, comparison))


def _fewer(rng: random.Random, config: SceneConfig, least: int) -> tuple[list[Plain], int]:
    scene = plain(rng, config, _UNIFORM, _number(rng, config, least))
    i = rng.randrange(len(scene.attributes))
    attributes: list[Attributes] = [a for j, a in enumerate(scene.attributes) if j != i]
    rest: list[Spot] = [s for j, s in enumerate(scene.spots) if j != i]
    return [scene, replace(scene, attributes=tuple(attributes), spots=tuple(rest))], i


def _count_differs(rng: random.Random, config: SceneConfig) -> Variant:
    scenes, _ = _fewer(rng, config, least=2)
    return scenes, lambda ctx: unplanned(ctx, "count")


def _existence_differs(rng: random.Random, config: SceneConfig) -> Variant:
    scenes, _ = _fewer(rng, config, least=2)
    return scenes, lambda ctx: exists(ctx, "yes")


_DIFFER: dict[str, Callable[[random.Random, SceneConfig], Variant]] = {
    "colour": _attribute_differs("colour", COLOURS),
    "shape": _attribute_differs("shape", SHAPES),
    "size": _attribute_differs("size", SIZES),
    "position": _position_differs,
    "count": _count_differs,
    "existence": _existence_differs,
}


def scene(config: SceneConfig, seed: int, split: str, index: int) -> Scene:
    """Scene number ``index`` of a split: facts, picture, depth and masks, without any text.

    Raises:
        UserError: as :func:`draft`.
    """
    return draft(config, seed, split, index).scene
