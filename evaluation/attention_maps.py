"""Where does a model look when it answers? Attention to the picture by layer, and whether it points at what is asked.

Rows are read at positions that predict an answer (``QUERIES``), averaged over heads. Of each layer:

* **mass** of visual tokens and of the other tokens, by their role in the conversation; they sum to 1. The first token of
  a conversation, on which many models park attention, counts under ``marker``.
* **relative**: mass of visual tokens against their share of the keys that the query may see. 1 is what attention that
  does not care would give: a long picture gets much mass for its length alone.
* **pointing**: of the mass on patches, the share on the asked object's, divided by the object's share of all patches.
  1 is chance. A patch counts by the part of its area that lies in the object's box; where a family shows a picture in
  several views (thumbnail and tiles), every token counts once, for its own view. Newline and class tokens are no patches.
* **pointing_other**: the same for what else stands in the picture (what its box shares with the asked object's is left
  out), and **pointing_gain**, the difference question by question: an object draws attention because it is an object,
  and is asked for or not.

Attention says where a layer reads, not what comes of it: the answer may rest on tokens that got little. Standard errors
take questions for independent; those of one picture share its tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..data.collate import VLMCollator
from ..models.errors import UserError, nearest
from ..models.vlm import VisionLanguageModel
from .attention_reading import GROUPS, QUERIES, Looked, look, one_object
from .heat_maps import Example, heat_sheet
from .line_plot import Panel, Series, line_plot, stacked
from .ranks import on_all_ranks
from .scorers.base import Measure, mean

POINTING = ("pointing", "pointing_other", "pointing_gain")


@dataclass(frozen=True)
class AttentionMaps:
    """Attention by layer (one entry a layer in every tuple), and some questions to look at.

    Attributes:
        queries: one of ``QUERIES``.
        questions: read; ``skipped``: samples that cannot be encoded or have no picture.
        mass: group -> share of attention.
        relative: mass of visual tokens against their share of keys.
        pointing: row of ``POINTING`` -> ratio (a difference of ratios for the last).
        overall: the same rows and ``visual``, ``relative``, averaged over layers before questions are.
        area: mean share of patches that show the asked object.
        examples: for :meth:`picture`.
    """

    queries: str
    questions: int
    skipped: int
    mass: dict[str, tuple[Measure, ...]]
    relative: tuple[Measure, ...]
    pointing: dict[str, tuple[Measure, ...]]
    overall: dict[str, Measure]
    area: Measure
    examples: tuple[Example, ...] = ()

    @property
    def layers(self) -> int:
        """Of the language model."""
        return len(self.relative)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        rows = {**{f"mass/{k}": v for k, v in self.mass.items()}, "relative": self.relative, **self.pointing}
        return {
            "queries": self.queries,
            "questions": self.questions,
            "skipped": self.skipped,
            "area": self.area.as_dict(),
            "overall": {name: measure.as_dict() for name, measure in self.overall.items()},
            "by_layer": {name: [m.as_dict() for m in row] for name, row in rows.items()},
        }

    def picture(self, path: str | Path, layers: Sequence[int] | None = None) -> Path:
        """Curves over layers, and below them heat maps over pictures.

        Args:
            path: PNG to write.
            layers: 1 .. N, whose maps are drawn; default: five from the first to the last.
        """
        names = tuple(str(i + 1) for i in range(self.layers))
        chosen = _spread(self.layers) if layers is None else list(layers)
        wrong = [i for i in chosen if not 1 <= i <= self.layers]
        if wrong:
            raise UserError(f"layers: {wrong[0]}: this model has layers 1 to {self.layers}")
        text = [Series(group, self.mass[group]) for group in GROUPS]
        panels = [
            Panel(f"attention of {self.queries.replace('_', ' ')} rows", "layer", names, text, low=0, high=1)
        ]
        if self.pointing["pointing"][0].n:
            titles = {"pointing": "asked object", "pointing_other": "other objects"}
            curves = [
                Series(title, self.pointing[row]) for row, title in titles.items() if self.pointing[row][0].n
            ]
            panels.append(
                Panel("pointing: mass against area (1 is chance)", "layer", names, curves, low=0, mark=1)
            )
        sheets = [line_plot(panels)]
        if self.examples:
            sheets.append(heat_sheet(self.examples, chosen))
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        stacked(sheets).save(path, "PNG", optimize=True)
        return path


def _spread(layers: int, most: int = 5) -> list[int]:
    return sorted(
        {1 + round(i * (layers - 1) / max(1, min(most, layers) - 1)) for i in range(min(most, layers))}
    )


def attention_maps(
    model: VisionLanguageModel,
    collator: VLMCollator,
    samples: Sequence[Mapping[str, Any]],
    *,
    queries: str = "last_prompt",
    batch_size: int = 8,
    shown: int = 4,
) -> AttentionMaps:
    """Read the attention that answers are predicted with, the gold answer before them. Every rank calls this.

    Args:
        model: in any mode; it is evaluated and put back. Its attention implementation is put back, too.
        collator: of its training (encoder and chat template); packing is not used.
        samples: stored form. Those whose ``meta`` has ``asked`` and ``objects`` (scenes) are asked where they point;
            others tell their mass.
        queries: one of ``QUERIES``.
        batch_size: pictures a forward pass; memory grows with pictures x questions x heads x tokens.
        shown: questions whose maps are kept.

    Raises:
        UserError: unknown ``queries``, or no sample has a picture and can be encoded.
    """
    if queries not in QUERIES:
        raise UserError(f"queries: unknown '{queries}'{nearest(queries, QUERIES)}")
    kept = _to_show(samples, shown)
    mode = model.training
    model.eval()
    try:
        found = on_all_ranks(
            list(enumerate(samples)),
            lambda part: look(model, collator, part, queries, kept),
            batch_size,
            even=True,
        )
    finally:
        model.train(mode)
    looked = [one for of_sample in found for one in of_sample]
    if not looked:
        raise UserError(f"attention: none of {len(samples)} samples has a picture and can be encoded")
    return summary(looked, queries, skipped=sum(not of_sample for of_sample in found))


def _to_show(samples: Sequence[Mapping[str, Any]], shown: int) -> set[tuple[int, int]]:
    """(number, exchange) of the questions whose maps are kept: the first about one object of each of the first samples.

    Where too few samples have such a question, first questions of others.
    """
    turns = [
        next((t for t in range(len(sample["conversations"]) // 2) if one_object(sample, t)), None)
        for sample in samples
    ]
    about = [(i, turn) for i, turn in enumerate(turns) if turn is not None]
    return set([*about, *((i, 0) for i, turn in enumerate(turns) if turn is None)][:shown])


def summary(looked: Sequence[Looked], queries: str, skipped: int = 0) -> AttentionMaps:
    """Means over questions, with their standard errors."""
    mass = np.stack([one.mass for one in looked]).astype(float)  # (questions, N, groups)
    visible = np.array([one.visible for one in looked])
    about = [one for one in looked if one.pointing is not None]
    beside = [one for one in about if one.others is not None]
    pointing = {
        "pointing": [one.pointing for one in about],
        "pointing_other": [one.others for one in beside],
        "pointing_gain": [one.pointing - one.others for one in beside],  # type: ignore[operator]
    }
    layers = mass.shape[1]
    groups = {name: mass[:, :, i] for i, name in enumerate(GROUPS)}
    groups["text"] = 1 - groups["visual"]
    relative = groups["visual"] / visible[:, None]
    rows = {name: np.stack(v) if v else np.zeros((0, layers)) for name, v in pointing.items()}
    overall = {"visual": (groups["visual"], "share"), "relative": (relative, "ratio")}
    overall.update({name: (value, "ratio") for name, value in rows.items()})
    return AttentionMaps(
        queries=queries,
        questions=len(looked),
        skipped=skipped,
        mass={name: _by_layer(value, "share") for name, value in groups.items()},
        relative=_by_layer(relative, "ratio"),
        pointing={name: _by_layer(value, "ratio") for name, value in rows.items()},
        overall={name: mean(value.mean(1).tolist(), unit) for name, (value, unit) in overall.items()},
        area=mean(one.area for one in about if one.area is not None),
        examples=tuple(one.example for one in looked if one.example is not None),
    )


def _by_layer(values: np.ndarray, unit: str) -> tuple[Measure, ...]:
    """(questions, N) -> a mean over questions for each layer."""
    return tuple(mean(values[:, i].tolist(), unit) for i in range(values.shape[1]))
