"""The analyses that a YAML can name: what each looks at unless told otherwise, and its keywords."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..models.errors import UserError
from .adapter import VLMAdapter
from .analysis import Analysis, OfQuestions, Result
from .attention_maps import attention_maps
from .attention_reading import QUERIES
from .benchmarks.items import known
from .benchmarks.own_scenes import scenes
from .occlusion import occlusion
from .probes import PROBE_SEED, probe_scenes, probes
from .suites import Suite
from .visual_contribution import visual_contribution

OBJECTS: dict[str, Any] = {"objects": [1, 3], "charts": 0, "sign": 0}
"""Settings of the scenes that are looked at by default: objects and nothing else."""


class VisualContribution(OfQuestions):
    """How much likelier the right answer is with its picture than with another, a grey or no picture, in nats.

    Args:
        data: questions with pictures; default: scenes.
        limit: the first so many.
    """

    name = "visual_contribution"

    def default_data(self) -> Suite:
        """Questions about colour, shape and size."""
        return scenes(samples=self.limit, kinds=["colour", "shape", "size"], **OBJECTS)

    def run(self, adapter: VLMAdapter, samples: Sequence[dict[str, Any]]) -> Result:
        """See ``visual_contribution.visual_contribution``."""
        return visual_contribution(adapter, samples)


class Occlusion(OfQuestions):
    """What becomes of the answer's log-likelihood when the asked object, or as much elsewhere, is painted over.

    Args:
        data: questions whose ``meta`` has ``asked`` and ``objects``; default: scenes.
        limit: the first so many.
    """

    name = "occlusion"

    def default_data(self) -> Suite:
        """Questions about colour, shape and size of one object."""
        return scenes(samples=self.limit, kinds=["colour", "shape", "size"], **OBJECTS)

    def run(self, adapter: VLMAdapter, samples: Sequence[dict[str, Any]]) -> Result:
        """See ``occlusion.occlusion``."""
        return occlusion(adapter, samples)


class Attention(OfQuestions):
    """Attention by layer, and whether it points at the asked object.

    Args:
        data: questions with pictures; default: scenes.
        limit: the first so many.
        queries: one of ``attention_reading.QUERIES``: whose rows are read.
        shown: questions whose maps are drawn.
    """

    name = "attention"

    def __init__(
        self, data: Suite | None = None, limit: int = 200, queries: str = "last_prompt", shown: int = 4
    ):
        super().__init__(data, limit)
        known("queries", queries, QUERIES)
        if shown < 0:
            raise UserError(f"shown: {shown}: use 0 or more")
        self.queries, self.shown = queries, shown

    def default_data(self) -> Suite:
        """Questions about colour, shape and size of one object."""
        return scenes(samples=self.limit, kinds=["colour", "shape", "size"], **OBJECTS)

    def run(self, adapter: VLMAdapter, samples: Sequence[dict[str, Any]]) -> Result:
        """See ``attention_maps.attention_maps``."""
        return attention_maps(
            adapter.model, adapter.collator, samples,
            queries=self.queries, batch_size=adapter.batch_size, shown=self.shown,
        )  # fmt: skip


class Probes(Analysis):
    """What can be read linearly from the tower, the projector and each layer: colour, shape, size, position, number.

    It makes its own scenes, at the size of the model's pictures.

    Args:
        scenes: how many; probes are fitted on some and scored on others.
        held_out: share that is scored.
        layers: decoder layers that are read; default: all.
        seed: of the scenes.
    """

    name = "probes"

    def __init__(
        self,
        scenes: int = 400,
        held_out: float = 0.25,
        layers: list[int] | None = None,
        seed: int = PROBE_SEED,
    ):
        if scenes < 8:
            raise UserError(f"scenes: {scenes}: use 8 or more")
        if not 0 < held_out < 1:
            raise UserError(f"held_out: {held_out}: use a share between 0 and 1")
        self.scenes, self.held_out, self.layers, self.seed = scenes, held_out, layers, seed

    def samples(self) -> list[dict[str, Any]]:
        """None yet: their size is the model's."""
        return []

    def run(self, adapter: VLMAdapter, samples: Sequence[dict[str, Any]]) -> Result:
        """See ``probes.probes``."""
        return probes(
            adapter.model, adapter.collator, probe_scenes(adapter.model, self.scenes, self.seed),
            layers=self.layers, held_out=self.held_out, batch_size=adapter.batch_size,
        )  # fmt: skip
