"""A finished stage with the head of a method: what commands that look at a method's work start from."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch

from ..algorithms.base import VisionAlgorithm
from ..data.collate import VLMCollator
from ..data.streaming import StreamingVLMDataset
from ..models.errors import UserError
from ..models.export import load_model
from ..models.vlm import VisionLanguageModel
from .builders import algorithms_of_stage
from .config import Loaded
from .finished import open_run
from .run_folder import RunFolder
from .stage_data import build_collator
from .stages import Stage, resolve

Method = TypeVar("Method", bound=VisionAlgorithm)


@dataclass
class OpenedMethod(Generic[Method]):
    """A finished stage with the head of a method, and how it encodes samples."""

    folder: RunFolder
    loaded: Loaded
    stage: Stage
    model: VisionLanguageModel
    method: Method
    collator: VLMCollator


def open_method(path: Path, cls: type[Method], *, last: bool = False) -> OpenedMethod[Method]:
    """The last stage of a finished run that was trained with a method: its model in evaluation mode, head and target.

    Args:
        path: the run's folder.
        cls: the method; has ``restore``.
        last: only the run's last stage will do.

    Raises:
        UserError: no finished run, or none of its stages used the method.
    """
    loaded, stage, folder = open_run(path)
    stages = [stage] if last else resolve(loaded)[::-1]
    for stage in stages:
        method = algorithms_of_stage(loaded, stage.name, stage.config).get(cls.name)
        if isinstance(method, cls) and not method.is_off():
            break
    else:
        what = f"stage {stage.name} was trained without" if last else "no stage was trained with"
        raise UserError(f"{path}: {what} {cls.name}")
    model = load_model(
        folder.stage(stage.name) / "model",
        bidirectional_images=loaded.run.model.get("bidirectional_images"),
        attn_implementation=loaded.run.model.get("attn_implementation"),
    ).eval()
    model.to(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    method.restore(model, loaded.run.seed)
    return OpenedMethod(
        folder, loaded, stage, model, method, build_collator(model, stage, stage.config.train_loader)
    )


def distinct_pictures(dataset: StreamingVLMDataset) -> Iterator[dict[str, Any]]:
    """Samples with pictures that were not seen before."""
    seen = set()
    for i in range(dataset.num_samples):
        sample = dataset[i]
        if len(sample["images"]) > 4 and sample["images"] not in seen:
            seen.add(sample["images"])
            yield sample
