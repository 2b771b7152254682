"""Tasks of lmms-eval asked while training, on local files."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from composer.core import State
from composer.loggers import Logger
from composer.utils import dist

from ..algorithms.base import unwrap
from ..evaluation.adapter import VLMAdapter
from ..evaluation.lmms.tasks import write_tasks
from ..models.errors import UserError
from .looks import Looks
from .schema import Spec


class LmmsMonitor(Looks):
    """Asks tasks of lmms-eval (extra ``eval``) at intervals and at the end of training: ``lmms/TASK/MEASURE``.

    Ranks share the documents. Random states, the model and its mode are as before after each look. Not with sharded
    parameters (FSDP): ranks whose documents are fewer would not wait for the others. The first look imports lmms-eval.

    Args:
        tasks: name -> ``form``, ``path`` ..., as ``evaluation.lmms.tasks.write_tasks`` takes them.
        interval: between looks, in Composer's notation (``500ba``, ``1ep``).
        limit: documents of each task, the first ones.
        batch_size: questions a call of the model.
    """

    def __init__(
        self, tasks: dict[str, Spec], interval: str = "1ep", limit: int | None = None, batch_size: int = 16
    ):
        super().__init__("lmms_monitor", interval)
        for name, value in (("limit", limit), ("batch_size", batch_size)):
            if value is not None and value < 1:
                raise UserError(f"callbacks.lmms_monitor.{name}: {value} is less than 1")
        if not tasks:
            raise UserError("callbacks.lmms_monitor.tasks: name at least one task")
        self.tasks, self.limit, self.batch_size = tasks, limit, batch_size
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._adapter: VLMAdapter | None = None

    def fit_start(self, state: State, logger: Logger) -> None:
        """Write the tasks, each rank for itself."""
        if state.fsdp_enabled:
            raise UserError(
                "callbacks.lmms_monitor: not with sharded parameters; use suite_monitor, or opsin eval"
            )
        loader: Any = state.train_dataloader
        self._adapter = VLMAdapter(unwrap(state.model), loader.collate_fn, batch_size=self.batch_size)
        self._folder = tempfile.TemporaryDirectory(prefix="opsin-lmms-")
        write_tasks(Path(self._folder.name), self.tasks)
        self.begin(state)

    def close(self, state: State, logger: Logger) -> None:
        """Remove the tasks."""
        if self._folder is not None:
            self._folder.cleanup()

    def look(self, state: State, logger: Logger) -> None:
        """Ask the tasks and log their measures."""
        from ..evaluation.lmms.inside import ask_inside

        assert self._adapter is not None and self._folder is not None
        found = ask_inside(self._adapter, self._folder.name, list(self.tasks), limit=self.limit)
        for task, entry in found["tasks"].items():
            measures = {name: measure["value"] for name, measure in entry["measures"].items()}
            logger.log_metrics({f"lmms/{task}/{name}": value for name, value in measures.items()})
        dist.barrier()
