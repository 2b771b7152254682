"""Jobs that run in one process or on all ranks of the pool: small trainings with recorded numbers."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import torch
from composer import Callback, Trainer
from composer.loggers import LoggerDestination
from composer.utils import dist, reproducibility
from torch.utils.data import DataLoader, IterableDataset

from opsin.data.batch import vlm_data_spec
from opsin.data.chat import chat_template
from opsin.data.collate import VLMCollator
from opsin.data.encode import ConversationEncoder
from opsin.models.anatomy import image_encoder_for
from opsin.models.parts import parameter_groups, set_trainable
from opsin.models.vlm import VisionLanguageModel
from opsin.training import compat

import zoo
from prepared import prepare

warnings.filterwarnings("ignore")
compat.apply()


class Samples(IterableDataset):
    """A fixed list of samples, dealt to ranks: global batch g of size G gives rank r its r-th share."""

    def __init__(self, samples: list[dict], device_batch: int, rank: int, world: int):
        size = device_batch * world
        self.samples = [
            s
            for start in range(0, len(samples) - size + 1, size)
            for s in samples[start + rank * device_batch : start + (rank + 1) * device_batch]
        ]

    def __len__(self) -> int:
        return len(self.samples)

    def __iter__(self) -> Iterator[dict]:
        return iter(self.samples)


def collator(
    built: zoo.Built, template: str = "vicuna_v1", max_seq_len: int = 400, **options: Any
) -> VLMCollator:
    images = image_encoder_for(built.processor, built.hf.config)
    tokenizer = built.processor.tokenizer
    encoder = ConversationEncoder(
        tokenizer, images, chat_template(template, tokenizer.eos_token), max_seq_len=max_seq_len
    )
    return VLMCollator(encoder, **options)


def mixed_samples(count: int, images: str = "mixed") -> list[dict]:
    """Samples with unequal numbers of images, turns and labels.

    ``images``: ``mixed``; ``first_half`` of every 4 only (so that with two ranks one has none); ``none``.
    """
    samples = []
    for i in range(count):
        number = {"mixed": (1, 0, 2, 1)[i % 4], "first_half": 1 + i % 2 if i % 4 < 2 else 0, "none": 0}[
            images
        ]
        samples.append(zoo.sample(i, images=number, turns=1 + i % 3, independent=i % 5 == 0 and number == 1))
    return samples


class Logged(LoggerDestination):
    """What is logged, a dict a step."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []
        self._now: dict[str, float] = {}

    def log_metrics(self, metrics: dict, step: int | None = None) -> None:
        self._now.update({k: float(v) for k, v in metrics.items()})

    def batch_checkpoint(self, state: Any, logger: Any) -> None:
        self.steps.append(self._now)
        self._now = {}


class Record(Callback):
    """Losses and gradients of every step, and which documents this rank was dealt."""

    def __init__(self) -> None:
        self.losses: list[dict[str, float]] = []
        self.gradients: list[dict[str, torch.Tensor]] = []
        self.uids: list[list[int]] = []

    def batch_start(self, state: Any, logger: Any) -> None:
        self.uids.append(state.batch["document_uid"].flatten().tolist())

    def after_train_batch(self, state: Any, logger: Any) -> None:
        self.gradients.append(gradients_of(state.model))

    def batch_end(self, state: Any, logger: Any) -> None:
        self.losses.append(dict(state.total_loss_dict))


def gradients_of(model: Any) -> dict[str, torch.Tensor]:
    """Full gradients by name, sharded ones put together."""
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is None:
            continue
        grad = parameter.grad
        if hasattr(grad, "full_tensor"):
            grad = grad.full_tensor()
        found[name.removeprefix("module.").replace("._checkpoint_wrapped_module", "")] = (
            grad.detach().cpu().clone()
        )
    return found


def weights_of(model: Any) -> dict[str, torch.Tensor]:
    """Full weights by name, sharded ones put together."""
    found = {}
    for name, parameter in model.named_parameters():
        value = parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter
        found[name.removeprefix("module.")] = value.detach().cpu().clone()
    return found


def train(
    family: str = "llava",
    samples: list[dict] | None = None,
    *,
    global_batch: int = 8,
    microbatch: int | None = None,
    steps: int = 2,
    parallel: str = "ddp",
    packing: bool = False,
    size: int = 16,
    bidirectional: bool = False,
    algorithms: list[tuple[str, dict]] = (),
    callbacks: list[tuple[str, dict]] = (),
    trainable: dict[str, bool] | None = None,
    accumulate_on_tokens: bool = False,
    precision: str = "fp32",
    device: Any = "cpu",
    lr: float = 1e-2,
    seed: int = 3,
    trainer: dict[str, Any] | None = None,
    autocast: bool = False,
    prepared: dict[str, Any] | None = None,
    keep: bool = False,
    **options: Any,
) -> dict[str, Any]:
    """Train a tiny model for some steps; the same function in one process and on ranks.

    ``algorithms``, ``callbacks``: (``module:class``, keyword arguments). ``autocast``: to bfloat16, as a run does where Composer
    refuses ``amp_bf16``. ``prepared``: keywords of ``prepared.prepare`` (adapters, compiled layers, checkpointing).
    Returns losses, gradients, weights; with ``keep`` the model, too.
    """
    world, rank = dist.get_world_size(), dist.get_global_rank()
    built = zoo.build(family, seed=1, size=size)
    model = VisionLanguageModel(built.hf, built.processor, bidirectional_images=bidirectional)
    model.net.autocast_dtype = torch.bfloat16 if autocast else None
    set_trainable(model, trainable or {"vision_tower": False, "mm_projector": True, "language_model": True})
    if prepared:
        prepare(model, **prepared)
    device_batch = global_batch // world
    samples = mixed_samples(global_batch * steps) if samples is None else samples
    dataset = Samples(samples, device_batch, rank, world)
    loader = DataLoader(
        dataset, batch_size=device_batch, collate_fn=collator(built, packing=packing, **options)
    )
    record, logged = Record(), Logged()
    optimizer = torch.optim.AdamW(parameter_groups(model, lr, {}, 0.0))
    config = None
    if parallel == "fsdp2":
        from composer.utils.parallelism import FSDP2Config, ParallelismConfig

        config = ParallelismConfig(fsdp=FSDP2Config())
    fit = Trainer(
        model=model,
        train_dataloader=vlm_data_spec(loader),
        optimizers=optimizer,
        algorithms=[_make(name, kwargs) for name, kwargs in algorithms],
        callbacks=[record, *(_make(name, kwargs) for name, kwargs in callbacks)],
        loggers=[logged],
        max_duration=f"{steps}ba",
        device=device,
        precision=precision,
        device_train_microbatch_size=microbatch or device_batch,
        accumulate_train_batch_on_tokens=accumulate_on_tokens,
        parallelism_config=config,
        progress_bar=False,
        seed=seed,
        **(trainer or {}),
    )
    fsdp_on = bool(fit.state.fsdp_enabled)
    plain = [
        n for n, p in fit.state.model.named_parameters() if p.requires_grad and not hasattr(p, "full_tensor")
    ]
    fit.fit()
    result = {
        "losses": record.losses,
        "logged": logged.steps,
        "gradients": record.gradients,
        "weights": weights_of(fit.state.model),
        "fsdp": fsdp_on,
        "plain_parameters": plain,
        "keys": [list(loss) for loss in record.losses],
        "uids": record.uids,
    }
    if keep:
        result["model"] = fit.state.model
    fit.close()
    reproducibility.seed_all(0)
    return result


def _make(name: str, kwargs: dict) -> Any:
    import importlib

    module, cls = name.split(":")
    return getattr(importlib.import_module(module), cls)(**kwargs)


def gloo_reduce_scatter_average() -> float:
    """What the backend makes of ``ReduceOp.AVG`` over ranks that bring 1 and 3: 2, or the sum 4."""
    world = dist.get_world_size()
    out = torch.zeros(1)
    given = torch.full((world,), float(1 + 2 * dist.get_global_rank()))
    torch.distributed.reduce_scatter_tensor(out, given, op=torch.distributed.ReduceOp.AVG)
    return float(out)


def run_yaml(files: list[str], arguments: list[str] = ()) -> dict[str, Any]:
    """A whole run on all ranks; whether and how its Trainer was sharded."""
    from opsin.training import stage_run
    from opsin.training.config import load
    from opsin.training.train import train as run

    seen: list[tuple[bool, list[str]]] = []
    stock = stage_run.assert_sharded

    def spy(trainer: Any) -> None:
        plain = [n for n, p in trainer.state.model.named_parameters() if not hasattr(p, "full_tensor")]
        seen.append((bool(trainer.state.fsdp_enabled), plain))
        stock(trainer)

    stage_run.assert_sharded = spy
    try:
        folder = run(load(files, arguments))
    finally:
        stage_run.assert_sharded = stock
    return {"folder": str(folder.path), "sharded": seen}


def refused_dataset(remote: str) -> str | None:
    """The line with which a dataset is refused on this rank."""
    from opsin.data.streaming import StreamingVLMDataset
    from opsin.models.errors import UserError

    try:
        StreamingVLMDataset(remote=remote, batch_size=1, shuffle=False)
    except UserError as error:
        return str(error)
    return None


def job_of_dataset(remote: str) -> tuple[str, str]:
    """The job to which this rank belongs, and where a dataset of it keeps its locks."""
    from opsin.data import shared_memory
    from opsin.data.streaming import StreamingVLMDataset

    dataset = StreamingVLMDataset(remote=remote, batch_size=1, shuffle=False)
    return shared_memory.job().token, dataset._cache_filelock_path


def served(
    batch_size: int, workers: int, epochs: int, options: dict[str, Any], remote: str | None = None
) -> list[list[list[str]]]:
    """Ids of the device batches that this rank gets, epoch by epoch."""
    import multiprocessing

    from opsin.data.loader import build_loader
    from opsin.data.streaming import StreamingVLMDataset

    dataset = StreamingVLMDataset(remote=remote, batch_size=batch_size, **options)
    loader = build_loader(list, dataset, batch_size, num_workers=workers, persistent_workers=False)  # type: ignore[arg-type]
    if workers:  # as in a run; the pool's ranks would spawn them, which imports everything again
        loader.multiprocessing_context = "fork"
    # The pool's ranks are daemons, which may not start workers; these are gone when the loader is at its end.
    daemon = multiprocessing.current_process()._config  # type: ignore[attr-defined]
    before, daemon["daemon"] = daemon["daemon"], False
    try:
        return [[[s["id"] for s in batch] for batch in loader] for _ in range(epochs)]
    finally:
        daemon["daemon"] = before
