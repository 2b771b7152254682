"""What can be read linearly where in a model: colour, shape, size, position and number of objects, site by site.

On scenes, the same probe (:mod:`.linear_probe`) is fitted on what the vision tower gives, on what the projector makes of
it, and on every decoder layer's output. It is given

* ``object``: the mean over an object's patches. Colour, shape, size, and the third of the picture that it stands in;
* ``picture``: the mean over all patches. How many objects there are;
* ``last_prompt``: the token from which an answer's first token is predicted. The answer to questions of a kind.

Beside each accuracy stand the same probe fitted on shuffled labels, and the most frequent label. Scenes that are scored
were not fitted on. What a probe reads is there; whether the model uses it is another question, and what a linear probe
does not read may be there in another form.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..data.collate import VLMCollator
from ..data.scenes import SceneConfig, sample
from ..models.errors import UserError
from ..models.targets import Target
from ..models.vlm import VisionLanguageModel
from .line_plot import Panel, Series, line_plot
from .linear_probe import Reading, read
from .probe_features import LAST, OBJECT, PICTURE, Population, features
from .ranks import on_all_ranks
from .scorers.base import Measure

PROBE_SEED = 3_000_000
"""Scenes of a seed that no dataset and no training of ours uses."""

KINDS = ("colour", "shape", "size", "count")
"""Questions whose answers are read off the last prompt token."""

_NATIVE = 336
"""Side of a scene for a model that takes pictures of any size."""
_TITLES = {OBJECT: "an object's visual tokens", PICTURE: "all visual tokens", LAST: "last prompt token"}


@dataclass(frozen=True)
class ReadOut:
    """One probe: what it was given, where, and how well it read what."""

    tokens: str
    attribute: str
    site: str
    reading: Reading

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "tokens": self.tokens,
            "attribute": self.attribute,
            "site": self.site,
            **self.reading.accuracy.as_dict(),
            "shuffled": self.reading.shuffled,
            "majority": self.reading.majority,
            "classes": self.reading.classes,
        }


@dataclass(frozen=True)
class Probes:
    """All read-outs, by tokens, attribute and site (``tower``, ``projector``, decoder layers ``1`` ..).

    Attributes:
        fitted_on, held_out: scenes.
        skipped: samples that are no scenes with objects and one picture, or cannot be encoded.
    """

    read_outs: tuple[ReadOut, ...]
    fitted_on: int
    held_out: int
    skipped: int

    def rows(self, tokens: str, attribute: str) -> dict[str, Reading]:
        """Site -> reading."""
        return {r.site: r.reading for r in self.read_outs if (r.tokens, r.attribute) == (tokens, attribute)}

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "fitted_on": self.fitted_on,
            "held_out": self.held_out,
            "skipped": self.skipped,
            "read_outs": [r.as_dict() for r in self.read_outs],
        }

    def picture(self, path: str | Path) -> Path:
        """Accuracy over sites, a panel for each sort of tokens; dashed: the better of majority and shuffled labels."""
        panels = []
        for tokens in dict.fromkeys(r.tokens for r in self.read_outs):
            own = [r for r in self.read_outs if r.tokens == tokens]
            sites = list(dict.fromkeys(r.site for r in own))
            series = []
            for attribute in dict.fromkeys(r.attribute for r in own):
                found = self.rows(tokens, attribute)
                marks = [max(found[s].majority, found[s].shuffled) for s in sites]
                series.append(Series(attribute, [found[s].accuracy for s in sites]))
                series.append(Series("", [Measure(mark, 0) for mark in marks], dashed=True))
            title = f"read from {_TITLES[tokens]} (dashed: without looking)"
            panels.append(Panel(title, "site", sites, series, low=0, high=1))
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        line_plot(panels, columns=min(3, len(panels))).save(path, "PNG", optimize=True)
        return path


def picture_side(model: VisionLanguageModel) -> int:
    """Side in pixels of the scenes that suit a model: that of its tower's pictures, within what scenes can be."""
    side = getattr(model.hf.config.vision_config, "image_size", None) or _NATIVE
    return min(max(48, side if isinstance(side, int) else max(side)), 1024)


def probe_scenes(
    model: VisionLanguageModel, count: int = 400, seed: int = PROBE_SEED
) -> list[dict[str, Any]]:
    """Scenes for :func:`probes` at the model's own size: one to three objects, attributes drawn uniformly."""
    config = SceneConfig(size=picture_side(model), objects=(1, 3), sign=0, charts=0, kinds=KINDS)
    return [sample(config, seed, "uniform", i) for i in range(count)]


def probes(
    model: VisionLanguageModel,
    collator: VLMCollator,
    samples: Sequence[Mapping[str, Any]] | None = None,
    *,
    layers: Sequence[int] | None = None,
    held_out: float = 0.25,
    batch_size: int = 8,
    targets: Mapping[str, Target] = {},
    only: Collection[tuple[str, str, str]] | None = None,
) -> Probes:
    """Fit all probes. Every rank calls this, and gets the same.

    Args:
        model: in any mode; it is evaluated and put back.
        collator: of its training (encoder and chat template); packing is not used.
        samples: scenes in stored form; default: :func:`probe_scenes`.
        layers: of the decoder, 1 .. N; default: all.
        held_out: share of the scenes (the last ones) that probes are scored on.
        batch_size: pictures a forward pass.
        targets: further sites by name: what methods predict of the same patches, as the tower saw them.
        only: (tokens, attribute, site) of the probes that are wanted; default: all that can be fitted.

    Raises:
        UserError: no such layer, or too few scenes to fit and to score.
    """
    samples = probe_scenes(model) if samples is None else samples
    count = len(model.anatomy.decoder_layers(model.hf))
    chosen = list(range(1, count + 1)) if layers is None else sorted(set(layers))
    wrong = [k for k in chosen if not 1 <= k <= count]
    if wrong:
        raise UserError(f"layers: {wrong[0]}: this model has layers 1 to {count}")
    if not 0 < held_out < 1:
        raise UserError(f"held_out: {held_out}: a share between 0 and 1")
    mode, device = model.training, next(model.parameters()).device
    placed = {site: target.to(device) for site, target in targets.items()}
    model.eval()
    try:
        numbered = list(enumerate(samples))
        parts = on_all_ranks(
            numbered,
            lambda part: [features(model, collator, part, chosen, placed)],
            batch_size,
            even=True,
        )
    finally:
        model.train(mode)
    used = [part for part in parts if part is not None]
    found = {name: Population.joined([part[name] for part in used]) for name in used[0]} if used else {}
    scenes = found[PICTURE].owner.unique() if found else torch.zeros(0)
    scored = round(len(scenes) * held_out)
    if min(scored, len(scenes) - scored) < 2:
        raise UserError(
            f"probes: {len(scenes)} of {len(samples)} samples are scenes with objects; {len(scenes) - scored} to fit on "
            f"and {scored} to score are too few"
        )
    border = int(scenes[len(scenes) - scored])
    jobs = [
        (tokens, attribute, site)
        for tokens, population in found.items()
        for attribute in population.labels
        for site in population.features
        if only is None or (tokens, attribute, site) in only
    ]
    read_outs = on_all_ranks(jobs, lambda part: [_read_out(found, *job, border, device) for job in part])
    known = tuple(r for r in read_outs if r is not None)
    return Probes(known, len(scenes) - scored, scored, len(samples) - len(scenes))


def _read_out(
    found: Mapping[str, Population], tokens: str, attribute: str, site: str, border: int, device: torch.device
) -> ReadOut | None:
    """One probe; None: fewer than two labels to tell apart, or nothing to score."""
    population = found[tokens]
    labels = population.labels[attribute]
    use = torch.tensor([label is not None for label in labels])
    named = [label for label in labels if label is not None]
    fit = population.owner[use] < border
    values = sorted({label for label, fitted in zip(named, fit.tolist(), strict=True) if fitted})
    if len(values) < 2 or bool(fit.all()):
        return None
    y = torch.tensor([values.index(label) if label in values else -1 for label in named])
    x = population.features[site][use].to(device)
    return ReadOut(tokens, attribute, site, read(x, y.to(device), fit.to(device), len(values)))
