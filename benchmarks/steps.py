"""Training steps to be compared: plain loops and trainers, stock and Opsin's.

All of them share one model, one optimizer object and one batch. The learning rate is 0: the optimizer does all
its work, yet weights stay as they are, so every step of every variant must give the same loss.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch
from composer import Callback, Trainer
from composer.utils import map_collection
from measure import Timed, Variant, synchronise
from shapes import Built

from opsin.data.batch import split_batch, vlm_data_spec
from opsin.models.vlm import VisionLanguageModel
from opsin.training import compat

STOCK_KEYS = ("input_ids", "attention_mask", "labels", "pixel_values")


def adamw(hf: torch.nn.Module) -> torch.optim.AdamW:
    """The optimizer of all variants."""
    return torch.optim.AdamW(hf.parameters(), lr=0.0, weight_decay=0.0, fused=True)


def moved(batch: Any, device: str) -> Any:
    """A batch on a device; what is no tensor stays."""
    return map_collection(batch, lambda x: x.to(device) if isinstance(x, torch.Tensor) else x)


def stock_step(built: Built, optimizer: torch.optim.Optimizer, batch: dict, device: str) -> torch.Tensor:
    """One step as the model's documentation has it: ``model(labels=...)``."""
    optimizer.zero_grad(set_to_none=True)
    loss = built.hf(**moved({k: batch[k] for k in STOCK_KEYS}, device), use_cache=False).loss
    loss.backward()
    optimizer.step()
    return loss.detach()


def opsin_step(
    model: VisionLanguageModel, optimizer: torch.optim.Optimizer, batch: dict, device: str
) -> torch.Tensor:
    """One step of Opsin's model, splitting and counting of the batch included."""
    optimizer.zero_grad(set_to_none=True)
    (micro,) = split_batch(dict(batch), None)
    micro = moved(micro, device)
    loss = model.loss(model(micro), micro)["lm"]
    loss.backward()
    optimizer.step()
    model.end_step()
    return loss.detach()


def loop(step: Any, burst: int, device: str) -> Variant:
    """A variant that runs ``burst`` steps of a plain loop."""

    def run() -> Timed:
        seconds, loss = [], torch.zeros(())
        for _ in range(burst):
            synchronise(device)
            begun = time.perf_counter()
            loss = step()
            synchronise(device)
            seconds.append(time.perf_counter() - begun)
        return Timed(seconds, float(loss))

    return run


class Repeated:
    """A loader that yields the same device batch ``count`` times an epoch."""

    def __init__(self, batch: dict, count: int):
        self.batch, self.count = batch, count
        self.batch_size = int(batch["sample_status"].numel())

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[dict]:
        for _ in range(self.count):
            yield dict(self.batch)  # methods write into the dict


class Clock(Callback):
    """Time from one batch's end to the next one's, loading and algorithms included."""

    def __init__(self, device: str):
        self.device = device
        self.marks: list[float] = []
        self.loss = float("nan")

    def _mark(self) -> None:
        synchronise(self.device)
        self.marks.append(time.perf_counter())

    def epoch_start(self, state: Any, logger: Any) -> None:
        self.marks = []
        self._mark()

    def batch_end(self, state: Any, logger: Any) -> None:
        self._mark()
        self.loss = float(state.total_loss_dict["loss/train/lm"])


def composer_trainer(
    model: VisionLanguageModel,
    optimizer: torch.optim.Optimizer,
    batch: dict,
    burst: int,
    device: str,
    algorithms: list[Any] | None = None,
    callbacks: list[Callback] | None = None,
) -> Variant:
    """A variant that runs an epoch of ``burst`` batches in ``composer.Trainer``."""
    compat.apply()
    clock = Clock(device)
    trainer = Trainer(
        model=model,
        train_dataloader=vlm_data_spec(Repeated(batch, burst)),
        optimizers=optimizer,
        algorithms=algorithms or [],
        callbacks=[clock, *(callbacks or [])],
        max_duration="1ep",
        device="gpu" if device == "cuda" else "cpu",
        precision="fp32",
        progress_bar=False,
        seed=0,
    )

    def run() -> Timed:
        trainer.fit(duration="1ep")
        return Timed([b - a for a, b in pairwise(clock.marks)], clock.loss)

    return run


def hf_trainer(
    built: Built, optimizer: torch.optim.Optimizer, batch: dict, burst: int, device: str
) -> Variant | None:
    """A variant that trains ``burst`` steps in Hugging Face's ``Trainer``; None where accelerate is not installed."""
    import transformers
    from transformers.utils import is_accelerate_available

    if not is_accelerate_available():
        return None
    item = {k: batch[k] for k in STOCK_KEYS}
    marks: list[float] = []

    def mark() -> None:
        synchronise(device)
        marks.append(time.perf_counter())

    class Marks(transformers.TrainerCallback):
        def on_epoch_begin(self, *args: Any, **kwargs: Any) -> None:
            mark()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            mark()

    def run() -> Timed:
        marks.clear()
        with tempfile.TemporaryDirectory() as folder:
            arguments = transformers.TrainingArguments(
                output_dir=folder,
                per_device_train_batch_size=1,  # one item is a whole batch
                max_steps=burst,
                lr_scheduler_type="constant",
                max_grad_norm=0.0,
                logging_strategy="no",
                save_strategy="no",
                report_to=[],
                disable_tqdm=True,
                remove_unused_columns=False,
                dataloader_pin_memory=False,
                use_cpu=device == "cpu",
            )
            trainer = transformers.Trainer(
                model=built.hf,
                args=arguments,
                data_collator=lambda items: items[0],
                train_dataset=[item] * burst,  # type: ignore[arg-type]
                optimizers=(optimizer, None),
                callbacks=[Marks()],
            )
            trainer.remove_callback(transformers.PrinterCallback)
            loss = trainer.train().training_loss
        return Timed([b - a for a, b in pairwise(marks)], loss)

    return run
