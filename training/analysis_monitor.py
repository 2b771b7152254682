"""Analyses made while training: the same questions at every look, numbers in the log, pictures beside the checkpoints."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from composer.core import State
from composer.loggers import Logger
from composer.utils import dist
from PIL import Image

from ..algorithms.base import unwrap
from ..evaluation.adapter import VLMAdapter
from ..models.errors import UserError
from .eval_config import analysis_of
from .looks import Looks
from .schema import Spec


class AnalysisMonitor(Looks):
    """Makes analyses at intervals and at the end of training.

    Ranks share the questions; rank 0 writes ``ba<batch>/<name>.json`` and ``.png``. Not for sharded models: analyses call
    the model as often as their questions want, which differs between ranks; analyse a checkpoint with ``opsin eval``. Numbers are logged as
    ``analyses/NAME/KEY``; pictures that are written go to every logger that takes images, too.

    Args:
        analyses: name -> ``analysis`` (registered; default: the name), ``data`` and its keywords, as ``opsin eval`` takes them.
        interval: between looks, in Composer's notation.
        batch_size: questions a call of the model.
        folder: where they are written; None: only numbers are logged.
    """

    folder_name: ClassVar[str] = "analyses"

    def __init__(
        self,
        analyses: dict[str, Spec],
        interval: str = "1ep",
        batch_size: int = 16,
        folder: str | None = None,
    ):
        if batch_size < 1:
            raise UserError(f"callbacks.analysis_monitor.batch_size: {batch_size} is less than 1")
        if not analyses:
            raise UserError("callbacks.analysis_monitor.analyses: name at least one analysis")
        super().__init__("analysis_monitor", interval)
        place = lambda *keys: ".".join(("callbacks.analysis_monitor", *keys))  # noqa: E731
        self.analyses = {n: analysis_of(n, spec or {}, place, "analyses") for n, spec in analyses.items()}
        self.batch_size, self.folder = batch_size, folder
        self._samples: dict[str, list[dict[str, Any]]] = {}

    def fit_start(self, state: State, logger: Logger) -> None:
        """Read the questions.

        Raises:
            UserError: the model is sharded, or a question cannot be read.
        """
        if state.fsdp_enabled:
            raise UserError(
                "callbacks.analysis_monitor: not with parallelism_config.fsdp2; analyse a finished stage with `opsin eval`"
            )
        self._samples = {name: analysis.samples() for name, analysis in self.analyses.items()}
        self.begin(state)

    def look(self, state: State, logger: Logger) -> None:
        """Analyse, log and write."""
        loader: Any = state.train_dataloader
        adapter = VLMAdapter(unwrap(state.model), loader.collate_fn, batch_size=self.batch_size)
        results = {name: a.run(adapter, self._samples[name]) for name, a in self.analyses.items()}
        for name, result in results.items():
            found = result.as_dict()
            logger.log_metrics({f"analyses/{name}/{key}": value for key, value in numbers(found)})
            if self.folder is None or dist.get_global_rank() != 0:
                continue
            folder = Path(self.folder) / f"ba{self.last}"
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{name}.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
            drawn = result.picture(folder / f"{name}.png")
            if drawn is not None:
                with Image.open(drawn) as picture:
                    shown = np.asarray(picture.convert("RGB"))[None]
                logger.log_images(shown, name=f"analyses/{name}", channels_last=True, step=self.last)


def numbers(tree: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, float]]:
    """Numbers of a nested mapping, by path; lists are left out."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from numbers(value, f"{path}{key}/")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield f"{path}{key}", float(value)
