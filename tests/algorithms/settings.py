"""One table of the methods, from which the matrix of tests is made: every subset of them, on data for all of them.

As Composer's ``tests/algorithms/algorithm_settings.py`` does for its own. A new method is a line here (``test_matrix_alone.py``
fails until it has one); everything in ``test_matrix_*.py`` then holds it, alone and beside the others.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

import numpy as np

from opsin.data.schema import pack_images

import zoo
from methods import teacher

Spec = tuple[str, dict[str, Any]]

PROMPT = "Describe the picture."
"""What may stand beside a picture under ViFT."""


@dataclass(frozen=True)
class Setting:
    """A method as the matrix uses it.

    Attributes:
        where: ``module:class``.
        arguments: the smallest with which all of its code acts on an 8x8 grid.
        off: changes of them that switch it off, as its card defines it.
        keys: loss keys of its own.
        pulls: parts that the gradient of its own loss reaches (empty: it has no loss of its own).
        head: whether it attaches one.
        images: whether it does nothing without pictures.
        logs: some of the metrics it logs.
        beside: another method -> changes without which this one would have nothing to do beside it.
        spares: "off" holds on data whose documents it leaves alone.
    """

    where: str
    arguments: Mapping[str, Any]
    off: Mapping[str, Any]
    keys: tuple[str, ...] = ()
    pulls: tuple[str, ...] = ()
    head: bool = False
    images: bool = False
    logs: tuple[str, ...] = ()
    beside: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    spares: bool = False


METHODS: dict[str, Setting] = {
    "ross": Setting(
        "opsin.algorithms.ross:ROSS",
        {"target": {"name": "pixels", "cell": 2}, "width": 64, "depth": 1, "draws": 2, "min_visible": 1},
        {"weight": 0},
        keys=("ross",),
        pulls=("auxiliary", "language_model", "mm_projector"),
        head=True,
        images=True,
    ),
    "l2t": Setting(
        "opsin.algorithms.l2t:L2T",
        {"template_source": "none", "lambda_instruction": 0.3},
        {"lambda_instruction": 0},
        images=True,
        logs=("l2t/loss_I", "l2t/loss_A"),
        beside={"vift": {"on_text_only": True}},
    ),
    "jarvis": Setting(
        "opsin.algorithms.jarvis:JARVIS",
        # Masked words: what is hidden is hidden from everybody, so it meets the other methods wherever it can.
        {"target": teacher(), "layer": 2, "ntp_probability": 0.25, "text_loss": "masked", "log_interval": 1},
        {"weight": 0},
        keys=("jarvis",),
        pulls=("auxiliary", "language_model"),  # visual tokens of the context come from the projector, too
        head=True,
        images=True,
        logs=("jarvis/cosine",),
    ),
    "vift": Setting(
        "opsin.algorithms.vift:ViFT",
        {"max_refused": None, "caption_prompts": [PROMPT], "log_interval": 1},
        {"freeze_vision_on_text_steps": False},
        logs=("vift/refused", "vift/nll/all"),
        spares=True,
    ),
}

SUBSETS: tuple[tuple[str, ...], ...] = tuple(
    names for count in range(len(METHODS) + 1) for names in combinations(METHODS, count)
)

LOUD: Spec = ("methods:Loud", {})
"""Beside any of them: heads that pull at the language model from the first step on (a denoiser begins at 0)."""

MODEL: dict[str, Any] = {"size": 32, "bidirectional": True}
"""The one model of all subsets: 8x8 patches and more, on which blocks can be hidden, and images that see themselves."""


def name_of(subset: Iterable[str]) -> str:
    return "+".join(subset) or "none"


def algorithms(
    subset: Sequence[str], off: Iterable[str] = (), among: Iterable[str] = (), **arguments: Mapping[str, Any]
) -> list[Spec]:
    """Methods of a subset for ``jobs.train``, with loud heads.

    Args:
        subset: their names.
        off: those of them that are switched off.
        among: other methods whose presence is assumed where arguments depend on it.
        arguments: method -> further changes.
    """
    specs = []
    for name in subset:
        setting = METHODS[name]
        given = dict(setting.arguments)
        for other in {*subset, *among} & setting.beside.keys():
            given |= setting.beside[other]
        given |= arguments.get(name, {})
        specs.append((setting.where, given | (setting.off if name in off else {})))
    return [*specs, LOUD]


def own_keys(subset: Sequence[str]) -> list[str]:
    """Loss keys of some methods, in the order of a run: Composer runs what comes after something in reverse order."""
    return [f"loss/train/{key}" for name in reversed(subset) for key in METHODS[name].keys]


def make(name: str, **changes: Any) -> Any:
    """A method by itself."""
    module, cls = METHODS[name].where.split(":")
    return getattr(importlib.import_module(module), cls)(**{**METHODS[name].arguments, **changes})


def told(number: int, images: int, questions: Sequence[str], *, independent: bool = False) -> dict[str, Any]:
    """A stored sample whose user turns have these words; pictures stand in the first one."""
    rng = np.random.default_rng(number)
    turns = []
    for i, said in enumerate(questions):
        answer = " ".join(["It is", *rng.choice(["red", "green", "blue", "small"], rng.integers(1, 6))])
        turns.append({"from": "human", "value": ("<image>\n" * images if i == 0 else "") + said})
        turns.append({"from": "gpt", "value": answer})
    sizes = [(40, 34), (64, 30), (32, 66)]
    pictures = [zoo.picture(1000 * number + i, sizes[(number + i) % 3]) for i in range(images)]
    return {
        "id": f"matrix/{number}", "conversations": turns, "images": pack_images(pictures),
        "meta": {"turns": "independent"} if independent else {},
    }  # fmt: skip


def caption(number: int, images: int = 1) -> dict[str, Any]:
    """Pictures and what is on them; every other one is asked for with a caption prompt."""
    return told(number, images, [PROMPT if number % 2 else ""])


def words(number: int, turns: int = 1) -> dict[str, Any]:
    """Questions without a picture."""
    return told(number, 0, [f"What colour is the {w} cube?" for w in ("small", "large", "left")[:turns]])


def question(number: int, images: int = 1, turns: int = 1, *, independent: bool = False) -> dict[str, Any]:
    """Questions about pictures: what ViFT refuses."""
    asked = [f"Is the {w} object a cone? Answer briefly." for w in ("small", "large", "left")[:turns]]
    return told(number, images, asked, independent=independent)


def unusable(number: int) -> dict[str, Any]:
    """A sample without any answer: it becomes a row of padding."""
    return {**caption(number), "conversations": [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": " "}]}  # fmt: skip


def mixed(first: int = 1) -> list[dict[str, Any]]:
    """Four samples that give every method something to do, with unequal numbers of pictures, turns and labels."""
    return [caption(first, 2), question(first + 1, turns=2), words(first + 2, 3), caption(first + 3)]


def without_questions(first: int = 1) -> list[dict[str, Any]]:
    """Four samples of which ViFT refuses none."""
    return [caption(first, 2), words(first + 1, 2), words(first + 2, 3), caption(first + 3)]


def text_only(first: int = 1, count: int = 4) -> list[dict[str, Any]]:
    return [words(first + i, 1 + i % 3) for i in range(count)]


def short() -> list[dict[str, Any]]:
    """A global batch of 8 with fewer pictures."""
    return [
        caption(1), words(2, 2), question(3), caption(5, 2),
        question(4, independent=True, turns=2), words(6), words(7, 3), caption(8),
    ]  # fmt: skip


def uneven() -> list[dict[str, Any]]:
    """Three global batches of 8: mixed; pictures on the first of four ranks alone; none."""
    many = [
        caption(1), words(2, 2), question(3, turns=3), caption(5, 3),
        question(4, independent=True, turns=2), words(6), words(7, 3), caption(8, 2),
    ]  # fmt: skip
    return [*many, caption(11, 2), question(12), *text_only(20, 6), *text_only(30, 8)]
