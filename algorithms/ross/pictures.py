"""A callback that shows, while training, what ROSS can reconstruct of a few held-out pictures."""

from __future__ import annotations

from typing import Any

import torch

from ...models.errors import UserError
from ...models.vlm import VisionLanguageModel
from ..picture_strips import PictureStrips
from .ross import ROSS
from .sampling import conditions, reconstruct, targets_shown
from .targets import Target


class ROSSPictures(PictureStrips[ROSS]):
    """Sample reconstructions of fixed held-out pictures with fixed noise, at intervals and at the end.

    Columns: picture as the tower saw it, what the target keeps of it, reconstruction; see :class:`PictureStrips`.

    Args:
        remote: dataset with the pictures (its first samples are shown); not one that is trained on.
        images: how many samples.
        interval: between strips, in Composer's notation (``100ba``, ``0.1dur`` is not taken).
        steps: evaluations of the denoiser a reconstruction.
        side: pixels of a picture in the strip.
        folder: where strips are written; default: ``pictures`` beside the stage's checkpoints.
    """

    method = ROSS
    key = "ross_pictures"
    image_name = "ross/reconstruction"
    folder_name = "pictures"

    def __init__(
        self,
        remote: str,
        images: int = 4,
        interval: str = "100ba",
        steps: int = 50,
        side: int = 128,
        folder: str | None = None,
    ):
        super().__init__(remote, images, interval, side, folder)
        self.refuse_below_one(steps=steps)
        self.steps = steps

    def prepare(self, algorithm: ROSS, model: VisionLanguageModel, batch: dict[str, Any]) -> None:
        """Refuse targets without a decoder; place the others."""
        target = algorithm.built_target
        if type(target).decode is Target.decode:
            raise UserError(f"callbacks.{self.key}: {target.identity} cannot be turned into pictures")
        algorithm.placed_target(batch["patch_position"].device)

    def draw(
        self, model: VisionLanguageModel, algorithm: ROSS, batch: dict[str, Any]
    ) -> dict[str, list[torch.Tensor]]:
        """Picture, what the target keeps of it, reconstruction."""
        condition = conditions(model, algorithm, batch)
        shown = reconstruct(model, algorithm, batch, condition, self.steps)
        # The target is encoded in full precision, as it is for training.
        with torch.autocast(condition.device.type, enabled=False):
            kept = targets_shown(model, algorithm, batch)
            return {"picture": model.pictures(batch), "target": kept, "reconstruction": shown}
