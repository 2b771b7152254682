"""A callback that shows, while training, what ROSS can reconstruct of a few held-out pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from composer.core import Callback, State, Time
from composer.loggers import Logger
from composer.utils import dist

from ...data.batch import split_batch, to_device
from ...data.streaming import StreamingVLMDataset
from ...models.errors import UserError
from ..base import unwrap
from ..strip import strip
from .ross import ROSS
from .sampling import conditions, reconstruct, targets_shown
from .targets import Target


class ROSSPictures(Callback):
    """Sample reconstructions of fixed held-out pictures with fixed noise, at intervals and at the end.

    Writes a strip (picture as the tower saw it, what the target keeps of it, reconstruction) as
    ``<folder>/ba<batch>.png``, and gives it to every logger of Composer's that takes images
    (``ross/reconstruction``). All ranks run the model; rank 0 writes. Training is not touched: nothing is drawn
    from any random state.

    Args:
        remote: dataset with the pictures (its first samples are shown); not one that is trained on.
        images: how many samples.
        interval: between strips, in Composer's notation (``100ba``, ``0.1dur`` is not taken).
        steps: evaluations of the denoiser a reconstruction.
        side: pixels of a picture in the strip.
        folder: where strips are written; default: ``pictures`` beside the stage's checkpoints.
    """

    def __init__(
        self,
        remote: str,
        images: int = 4,
        interval: str = "100ba",
        steps: int = 50,
        side: int = 128,
        folder: str | None = None,
    ):
        for key, value in (("images", images), ("steps", steps), ("side", side)):
            if value < 1:
                raise UserError(f"callbacks.ross_pictures.{key}: {value} is less than 1")
        self.interval = Time.from_timestring(interval)
        if self.interval.unit not in ("ba", "ep", "sp", "tok") or self.interval.value < 1:
            raise UserError(
                f"callbacks.ross_pictures.interval: '{interval}': use 1ba or more, or 1ep or more"
            )
        self.remote, self.images, self.steps, self.side, self.folder = remote, images, steps, side, folder
        self._batch: dict[str, Any] = {}
        self._ross: ROSS | None = None
        self._shown, self._last = 0, -1

    def fit_start(self, state: State, logger: Logger) -> None:
        """Find the method, read and encode the pictures."""
        methods = [a for a in state.algorithms if isinstance(a, ROSS) and not a.is_off()]
        self._ross = methods[0] if methods else None
        if self._ross is None:
            return  # the method is switched off, or not used in this stage
        if type(self._ross.built_target).decode is Target.decode:
            raise UserError(
                f"callbacks.ross_pictures: {self._ross.built_target.identity} cannot be turned into pictures"
            )
        # Stored targets belong to another model's patches, perhaps; a strip needs none.
        dataset = StreamingVLMDataset(remote=self.remote, batch_size=1, shuffle=False, patch_targets="ignore")
        samples = [dataset[i] for i in range(min(self.images, dataset.num_samples))]
        loader: Any = state.train_dataloader
        batch = split_batch(loader.collate_fn(samples), None, training=False)[0]
        if not batch["grids"]:
            raise UserError(
                f"callbacks.ross_pictures.remote: the first samples of {self.remote} have no picture"
            )
        device = next(unwrap(state.model).net.hf.parameters()).device
        self._batch = to_device(batch, device)
        self._ross.placed_target(device)
        self._shown = self._number(state)  # after a resumption the next one is due at the next interval

    def batch_end(self, state: State, logger: Logger) -> None:
        """A strip at each interval."""
        if self._ross is not None and self._number(state) > self._shown:
            self._shown = self._number(state)
            self._show(state, logger)

    def fit_end(self, state: State, logger: Logger) -> None:
        """A last strip."""
        if self._ross is not None and self._last != int(state.timestamp.batch):
            self._show(state, logger)

    def _number(self, state: State) -> int:
        """Intervals that are over."""
        return state.timestamp.get(self.interval.unit).value // self.interval.value

    def _show(self, state: State, logger: Logger) -> None:
        assert self._ross is not None
        self._last = int(state.timestamp.batch)
        model = unwrap(state.model)
        training = model.training
        model.eval()
        with model.net.autocast():
            condition = conditions(model, self._ross, self._batch)
            shown = reconstruct(model, self._ross, self._batch, condition, self.steps)
        model.train(training)
        if dist.get_global_rank() != 0:
            return
        sheet = strip(
            {
                "picture": model.pictures(self._batch),
                "target": targets_shown(model, self._ross, self._batch),
                "reconstruction": shown,
            },
            self.side,
        )
        batches = int(state.timestamp.batch)
        if self.folder is not None:
            folder = Path(self.folder)
            folder.mkdir(parents=True, exist_ok=True)
            sheet.save(folder / f"ba{batches}.png")
        logger.log_images(
            np.asarray(sheet)[None], name="ross/reconstruction", channels_last=True, step=batches
        )
