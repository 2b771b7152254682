"""The data of a stage: datasets, encoders, collators and loaders as its YAML describes them."""

from __future__ import annotations

from typing import Any

from composer.core import DataSpec, Evaluator
from composer.utils import dist

from ..data.batch import vlm_data_spec
from ..data.collate import VLMCollator
from ..data.loader import build_encoder, build_loader
from ..data.streaming import StreamingVLMDataset
from ..models.errors import UserError
from ..models.vlm import VisionLanguageModel
from .config import Loaded, to_plain
from .run_folder import RunFolder
from .schema import DatasetConfig, LoaderConfig
from .stages import Stage


def device_batch_size(stage: Stage, loaded: Loaded) -> int:
    """Samples a rank and step: the global batch dealt to all ranks."""
    world, size = dist.get_world_size(), stage.config.global_train_batch_size
    if size % world:
        raise UserError(
            f"{stage.where(loaded, 'global_train_batch_size')}: {size} cannot be dealt to {world} ranks; use a multiple"
        )
    return size // world


def build_dataset(
    config: DatasetConfig,
    batch_size: int,
    seed: int,
    *,
    whole: bool = True,
    tail: str = "share",
    duration: str | None = None,
) -> StreamingVLMDataset:
    """The dataset of a loader; ``whole`` and ``tail``: see there.

    ``duration``: of the training that it is for, whose mixture it gets; else its streams are read as they are.
    """
    options = {k: v for k, v in to_plain(config).items() if v is not None}
    mixture = options.pop("mixture", None)
    if mixture is not None and duration is not None:
        if not options.get("streams"):
            raise UserError("dataset.mixture: there is nothing to mix; name streams (dataset.streams)")
        options["mixture"] = {"duration": duration, **mixture}
    streams, remote = options.pop("streams", None), options.pop("remote", None)
    local, split = options.pop("local", None), options.pop("split", None)
    for name in ("download_retry", "download_timeout"):
        options[name] = getattr(config, name)
    options.setdefault("shuffle_seed", seed)
    if remote and split:
        streams, remote = {"default": {"remote": remote, "local": local, "split": split}}, None
    if streams and "shuffle_seed" in options and config.shuffle_seed is None:
        options["shuffle_seed"] = seed
    return StreamingVLMDataset(
        streams=streams, remote=remote, local=local, batch_size=batch_size, whole=whole, tail=tail, **options
    )


def build_collator(
    model: VisionLanguageModel, stage: Stage, loader: LoaderConfig, **options: Any
) -> VLMCollator:
    """Encoder and collator of a loader."""
    encoder = build_encoder(
        model.processor,
        model.hf.config,
        template=stage.config.chat_template,
        system_prompt=stage.config.system_prompt,
        max_seq_len=stage.config.max_seq_len,
        turns=loader.turns,
    )
    return VLMCollator(
        encoder,
        packing=loader.packing,
        padding_side=loader.padding_side,
        pad_to_multiple_of=loader.pad_to_multiple_of,
        **options,
    )


def build_train_spec(
    loaded: Loaded, stage: Stage, model: VisionLanguageModel, folder: RunFolder
) -> tuple[DataSpec, StreamingVLMDataset, VLMCollator]:
    """The training data as Composer takes it."""
    loader = stage.config.train_loader
    batch = device_batch_size(stage, loaded)
    try:
        tail = "drop" if loader.drop_last else "fill"
        dataset = build_dataset(
            loader.dataset, batch, loaded.run.seed, tail=tail, duration=stage.config.max_duration
        )
    except UserError as error:
        key = ("train_loader", "dataset", *(["remote"] if loader.dataset.remote else []))
        raise UserError(f"{stage.where(loaded, *key)}: {str(error).removeprefix('dataset: ')}") from error
    collator = build_collator(model, stage, loader, skipped_log=folder.skipped)
    data = build_loader(
        collator,
        dataset,
        batch,
        num_workers=loader.num_workers,
        prefetch_factor=loader.prefetch_factor,
        persistent_workers=loader.persistent_workers,
        pin_memory=loader.pin_memory,
        timeout=loader.timeout,
        drop_last=loader.drop_last,
    )
    return vlm_data_spec(data), dataset, collator


def build_evaluators(loaded: Loaded, stage: Stage, model: VisionLanguageModel) -> list[Evaluator]:
    """``eval_loaders`` as Composer evaluators."""
    evaluators = []
    for i, config in enumerate(stage.config.eval_loaders):
        if config.dataset.mixture is not None:
            raise UserError(
                f"{stage.where(loaded, 'eval_loaders')}: eval_loaders.{i}.dataset.mixture: every sample is read once "
                "there; leave it out"
            )
        tail = "drop" if config.drop_last else "share"
        dataset = build_dataset(config.dataset, config.batch_size, loaded.run.seed, tail=tail)
        data = build_loader(
            build_collator(model, stage, config), dataset, config.batch_size,
            num_workers=config.num_workers, prefetch_factor=config.prefetch_factor,
            persistent_workers=False, timeout=config.timeout, drop_last=config.drop_last,
        )  # fmt: skip
        batches = (
            -1 if config.limit is None else max(1, config.limit // config.batch_size // dist.get_world_size())
        )
        evaluators.append(
            Evaluator(
                label=config.label,
                dataloader=vlm_data_spec(data, training=False),
                metric_names=["nll", "exact_match"],
                eval_interval=stage.config.eval_interval,
                subset_num_batches=batches,
                device_eval_microbatch_size=config.batch_size,
            )
        )
    return evaluators


def first_samples(dataset: StreamingVLMDataset, count: int) -> list[dict[str, Any]]:
    """About ``count`` samples from the beginnings of all streams (so that few shards are downloaded)."""
    each = max(1, count // dataset.num_streams)
    picked = []
    for first, size in zip(dataset.sample_offset_per_stream, dataset.samples_per_stream, strict=True):
        picked += [dataset[int(first) + i] for i in range(min(each, int(size)))]
    return picked
