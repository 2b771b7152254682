"""A callback that shows, while training, what a method makes of a few fixed held-out pictures; methods subclass it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

import numpy as np
import torch
from composer.core import Callback, State, Time
from composer.loggers import Logger
from composer.utils import dist

from ..data.batch import split_batch, to_device
from ..data.streaming import StreamingVLMDataset
from ..models.errors import UserError
from ..models.vlm import VisionLanguageModel
from .base import VisionAlgorithm, unwrap
from .strip import strip

Method = TypeVar("Method", bound=VisionAlgorithm)


class PictureStrips(Callback, ABC, Generic[Method]):
    """Draw a strip of the same held-out pictures at intervals and at the end.

    Writes ``<folder>/ba<batch>.png`` and gives it to every logger of Composer's that takes images, as
    ``image_name``. All ranks run the model; rank 0 writes. Does nothing in a stage without the method, or where it is
    off. A subclass gives the class attributes and :meth:`draw`, and may have :meth:`enter` and :meth:`prepare`. None
    of them may draw from a random state: training is the same with strips and without.

    Class attributes:
        method: the method that is shown.
        key: the callback's name in a YAML, for messages.
        image_name: under which loggers get the strip.
        folder_name: folder beside the stage's checkpoints where a run has the strips written; each callback has its
            own, so that two of them do not overwrite each other's.

    Args:
        remote: dataset with the pictures (its first samples are shown); not one that is trained on.
        images: how many samples.
        interval: between strips, in Composer's notation (``100ba``, ``0.1dur`` is not taken).
        side: pixels of a picture in the strip.
        folder: where strips are written; None: they are only logged.
    """

    method: type[Method]
    key: ClassVar[str]
    image_name: ClassVar[str]
    folder_name: ClassVar[str]

    def __init__(
        self,
        remote: str,
        images: int = 4,
        interval: str = "100ba",
        side: int = 128,
        folder: str | None = None,
    ):
        self.refuse_below_one(images=images, side=side)
        self.interval = Time.from_timestring(interval)
        if self.interval.unit not in ("ba", "ep", "sp", "tok") or self.interval.value < 1:
            raise UserError(f"callbacks.{self.key}.interval: '{interval}': use 1ba or more, or 1ep or more")
        self.remote, self.images, self.side, self.folder = remote, images, side, folder
        self._batch: dict[str, Any] = {}
        self._algorithm: Method | None = None
        self._shown, self._last = 0, -1

    def refuse_below_one(self, **values: int) -> None:
        """Refuse keywords that count something and are less than 1."""
        for name, value in values.items():
            if value < 1:
                raise UserError(f"callbacks.{self.key}.{name}: {value} is less than 1")

    def enter(self, algorithm: Method, model: VisionLanguageModel, device_batch: dict[str, Any]) -> None:
        """Put into the device batch (on the CPU, not yet split) what the method puts there at BATCH_START.

        Called once, at FIT_START, and only if there is a picture. By default nothing is put there.
        """

    def prepare(self, algorithm: Method, model: VisionLanguageModel, batch: dict[str, Any]) -> None:
        """Make ready for :meth:`draw`, once, at FIT_START, after :meth:`enter`.

        Args:
            algorithm: the method.
            model: the model.
            batch: one micro-batch of all the samples, on the device; the one that :meth:`draw` gets.

        Raises:
            UserError: this cannot be drawn.
        """

    @abstractmethod
    def draw(
        self, model: VisionLanguageModel, algorithm: Method, batch: dict[str, Any]
    ) -> Mapping[str, Sequence[torch.Tensor]]:
        """Columns of the strip: title -> pictures (3, h, w) in [0, 1], one a row, as many in each column.

        Called on all ranks, which run the same modules, in evaluation mode, without gradients and inside the model's
        autocast.
        """

    def fit_start(self, state: State, logger: Logger) -> None:
        """Find the method, read and encode the pictures."""
        found = [a for a in state.algorithms if isinstance(a, self.method) and not a.is_off()]
        self._algorithm = found[0] if found else None
        if self._algorithm is None:
            return  # the method is switched off, or not used in this stage
        # Stored targets belong to another model's patches, perhaps; a strip needs none.
        dataset = StreamingVLMDataset(
            remote=self.remote, batch_size=1, shuffle=False, patch_targets="ignore", whole=False
        )
        samples = [dataset[i] for i in range(min(self.images, dataset.num_samples))]
        loader: Any = state.train_dataloader
        device_batch = loader.collate_fn(samples)
        if not len(device_batch["view_grid"]):
            raise UserError(
                f"callbacks.{self.key}.remote: the first samples of {self.remote} have no picture"
            )
        model = unwrap(state.model)
        self.enter(self._algorithm, model, device_batch)
        # Not as for training: that would count over all ranks, and nothing is learnt here.
        batch = split_batch(device_batch, None, training=False)[0]
        self._batch = to_device(batch, next(model.net.hf.parameters()).device)
        self.prepare(self._algorithm, model, self._batch)
        self._shown = self._number(state)  # after a resumption the next one is due at the next interval

    def batch_end(self, state: State, logger: Logger) -> None:
        """A strip at each interval."""
        if self._algorithm is not None and self._number(state) > self._shown:
            self._shown = self._number(state)
            self._show(state, logger)

    def fit_end(self, state: State, logger: Logger) -> None:
        """A last strip."""
        if self._algorithm is not None and self._last != int(state.timestamp.batch):
            self._show(state, logger)

    def _number(self, state: State) -> int:
        """Intervals that are over."""
        return state.timestamp.get(self.interval.unit).value // self.interval.value

    def _show(self, state: State, logger: Logger) -> None:
        assert self._algorithm is not None
        batches = self._last = int(state.timestamp.batch)
        model = unwrap(state.model)
        training = model.training
        model.eval()
        with torch.no_grad(), model.net.autocast():
            columns = self.draw(model, self._algorithm, self._batch)
        model.end_step()  # a record of these pictures must not be taken for the next strip's
        model.train(training)
        if dist.get_global_rank() != 0:
            return
        sheet = strip(columns, self.side)
        if self.folder is not None:
            folder = Path(self.folder)
            folder.mkdir(parents=True, exist_ok=True)
            sheet.save(folder / f"ba{batches}.png")
        logger.log_images(np.asarray(sheet)[None], name=self.image_name, channels_last=True, step=batches)
