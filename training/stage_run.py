"""One stage: model, data, methods and Trainer put together, trained, exported."""

from __future__ import annotations

import gc
import inspect
import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from composer import Trainer
from composer.utils import dist
from composer.utils.parallelism import FSDP2Config, ParallelismConfig
from rich.console import Console

from ..algorithms.base import VisionAlgorithm
from ..data.collate import VLMCollator
from ..data.schema import stable_hash
from ..data.streaming import StreamingVLMDataset
from ..models.adapters import LoraSettings, add_adapters
from ..models.checkpointing import checkpoint_layers
from ..models.compile import CompileSettings, compile_model
from ..models.errors import UserError, nearest
from ..models.export import export_model, load_model
from ..models.parts import parameter_groups, set_trainable
from ..models.vlm import VisionLanguageModel
from . import checkpoints as saved
from .builders import algorithms_of_stage, build_optimizer, build_scheduler, construct, mapped, named
from .compatibility_check import hold, print_warnings
from .config import Loaded
from .guards import EveryParameterTrained, RestoreRandomState, SkippedSamples
from .init_weights import is_checkpoint, load_weights
from .loss_ledger import LossLedger
from .metrics_file import MetricsFile
from .mixture_monitor import MixtureMonitor
from .non_finite import NonFinite
from .preflight import check_batches, check_features, print_methods, print_report
from .progress import ProgressBar
from .registry import callbacks as callback_registry
from .registry import loggers as logger_registry
from .registry import models as model_registry
from .run_folder import RunFolder
from .schema import RunConfig
from .scoring import check_window
from .stage_data import build_evaluators, build_train_spec, device_batch_size, first_samples
from .stages import Stage, find_start

MODEL_FOLDER = "model"


@dataclass
class Finished:
    """A trained stage."""

    model: VisionLanguageModel
    folder: Path
    steps: int
    seconds: float


def build_model(
    loaded: Loaded,
    stage: Stage,
    folder: RunFolder,
    names: list[str],
    meta: bool = False,
    console: Console | None = None,
) -> VisionLanguageModel:
    """The stage's model: from ``model:``, or from what the stage starts from; parts frozen as said."""
    source = None if stage.start is None else find_start(stage.start, folder.root, folder.path, names)
    if stage.start is None or source is None or is_checkpoint(source):
        given = {"meta": meta} if _takes_meta(loaded) else {}
        model = named(model_registry, loaded.run.model, loaded.where, "model", **given)
        if source is not None and stage.start is not None and not meta:
            load_weights(model, source, stage.start.heads, console or Console(stderr=True))
    else:
        model = load_model(
            source,
            bidirectional_images=loaded.run.model.get("bidirectional_images"),
            attn_implementation=loaded.run.model.get("attn_implementation"),
            weights=not meta,
        )
        if stage.start.heads != "keep":
            model.saved_heads = {}
    set_trainable(model, asdict(stage.config.trainable))
    adapters, compiled = ways_of_training(loaded, stage)
    if adapters is not None:
        add_adapters(model, adapters, stable_hash("adapters", loaded.run.seed))
    if stage.config.activation_checkpointing:
        checkpoint_layers(model)
    compile_model(model, compiled)
    return model


def _takes_meta(loaded: Loaded) -> bool:
    """Whether the model's constructor can build it without weights."""
    name = loaded.run.model.get("name")
    if name is None:
        return False
    return (
        "meta" in inspect.signature(model_registry.get(str(name), loaded.where("model", "name"))).parameters
    )


def ways_of_training(loaded: Loaded, stage: Stage) -> tuple[LoraSettings | None, CompileSettings | None]:
    """``peft_config`` and ``compile`` of a stage, checked; None each where it has none.

    Raises:
        UserError: an unknown key or a value that cannot be, with its place.
    """
    config = stage.config
    adapters = config.peft_config
    if adapters is not None and not config.trainable.language_model:
        raise UserError(
            f"{stage.where(loaded, 'peft_config')}: adapters are the language model's, and trainable.language_model: false "
            "freezes it; leave one of them out"
        )
    where = lambda section: lambda *key: stage.where(loaded, section, *key)  # noqa: E731
    return (
        None if adapters is None else LoraSettings.of(adapters, where("peft_config")),
        CompileSettings.of(config.compile, where("compile")),
    )


def parallelism(loaded: Loaded) -> ParallelismConfig | None:
    """``parallelism_config`` as Composer's object.

    Composer ignores keys that it does not know, ``fsdp2`` among them, and trains under DDP without a word; so
    the key is ours and the object is made here.
    """
    given = loaded.run.parallelism_config
    if not given:
        return None
    for key in given:
        if key != "fsdp2":
            raise UserError(
                f"{loaded.where('parallelism_config', key)}: unknown key{nearest(key, ['fsdp2'])}"
            )
    where = lambda key: loaded.where("parallelism_config", "fsdp2", *([key] if key else []))  # noqa: E731
    return ParallelismConfig(fsdp=construct(FSDP2Config, dict(given["fsdp2"] or {}), where))


def assert_sharded(trainer: Trainer) -> None:
    """FSDP2 is really on: every trainable parameter is a DTensor (else ranks would drift apart in silence)."""
    plain = [
        n
        for n, p in trainer.state.model.named_parameters()
        if p.requires_grad and not hasattr(p, "full_tensor")
    ]
    if not trainer.state.fsdp_enabled or plain:
        raise RuntimeError(
            f"FSDP2 was asked for, but {len(plain)} parameters are not sharded, such as {plain[:1]}"
        )


def callback_folders(loaded: Loaded, stage_folder: Path) -> dict[str, dict[str, str]]:
    """Where callbacks that write files have their folder in a stage, unless the configuration says so: keywords by name."""
    made = {n: callback_registry.get(n, loaded.where("callbacks", n)) for n in loaded.run.callbacks}
    return {
        name: {"folder": str(stage_folder / make.folder_name)}
        for name, make in made.items()
        if isinstance(make, type) and hasattr(make, "folder_name")
    }


def non_finite(run: RunConfig, stage_folder: Path) -> NonFinite:
    """What the run does about losses and gradients that are no numbers."""
    log = str(stage_folder / "non_finite.jsonl")
    return NonFinite(run.non_finite, max_skipped_batches=run.max_skipped_batches, log=log)


def train_stage(
    loaded: Loaded, stage: Stage, folder: RunFolder, names: list[str], console: Console
) -> Finished:
    """Train one stage to its end, resuming where a checkpoint says so, and write its model."""
    run, config = loaded.run, stage.config
    started = time.time()
    model = build_model(loaded, stage, folder, names, console=console)
    check_window(loaded, model)
    precision = run.precision
    if precision == "amp_bf16" and (
        run.device == "cpu" or (run.device is None and not torch.cuda.is_available())
    ):
        model.net.autocast_dtype, precision = torch.bfloat16, "fp32"  # Composer refuses amp_bf16 on a CPU
    spec, dataset, collator = build_train_spec(loaded, stage, model, folder)
    stage_folder = folder.stage(stage.name)
    algorithms = algorithms_of_stage(
        loaded,
        stage.name,
        config,
        l2t={"report": str(stage_folder / "l2t_templates.json")},
        vift={"refused_log": str(folder.skipped)},
    )
    print_warnings(console, hold(loaded, config, stage.name, algorithms, model, here=True))
    preflight(loaded, stage, model, dataset, collator, algorithms, console)
    optimizer_where = lambda *key: stage.where(loaded, *key)  # noqa: E731
    decay = float(config.optimizer.get("weight_decay", 0.0))
    lr = float(config.optimizer.get("lr", 2.0e-5))
    optimizer = build_optimizer(
        config, parameter_groups(model, lr, config.lr_by_part, decay), optimizer_where
    )
    model.head_options = {"lr": config.lr_by_part.get("auxiliary", lr), "weight_decay": decay}
    batch = device_batch_size(stage, loaded)
    restore = RestoreRandomState()
    checkpoints = (
        f"{run.save_folder.rstrip('/')}/{stage.name}"
        if run.save_folder
        else str(folder.checkpoints(stage.name))
    )
    parallel = parallelism(loaded)
    sharded = parallel is not None and parallel.fsdp.state_dict_type == "sharded"  # type: ignore[union-attr]
    found = saved.before_resuming(checkpoints, sharded) if run.autoresume else None
    monitors = (
        [] if len(dataset.stream_names) < 2 or "mixture_monitor" in run.callbacks else [MixtureMonitor()]
    )
    trainer = Trainer(
        model=model,
        train_dataloader=spec,
        eval_dataloader=build_evaluators(loaded, stage, model) or None,
        max_duration=config.max_duration,
        optimizers=optimizer,
        schedulers=build_scheduler(config, optimizer_where),
        algorithms=list(algorithms.values()),
        callbacks=[
            SkippedSamples(run.preflight.max_skipped, str(folder.skipped)),
            EveryParameterTrained(),
            restore,
            *monitors,
            *([] if "loss_ledger" in run.callbacks else [LossLedger()]),
            *mapped(
                callback_registry,
                run.callbacks,
                loaded.where,
                "callbacks",
                **callback_folders(loaded, stage_folder),
            ),
            # Last: it may take gradients away that others look at.
            *([] if "non_finite" in run.callbacks else [non_finite(run, stage_folder)]),
        ],
        loggers=[
            MetricsFile(folder.metrics, stage.name),
            *([ProgressBar(stage.name)] if run.progress_bar else []),
            *mapped(logger_registry, run.loggers, loaded.where, "loggers"),
        ],
        run_name=f"{run.run_name}-{stage.name}",
        save_folder=checkpoints,
        save_interval=run.save_interval,
        save_num_checkpoints_to_keep=run.save_num_checkpoints_to_keep,
        save_overwrite=True,
        autoresume=run.autoresume,
        load_path=found or run.load_path,
        device=run.device,
        precision=precision,
        device_train_microbatch_size=min(config.device_train_microbatch_size or batch, batch),
        accumulate_train_batch_on_tokens=config.accumulate_train_batch_on_tokens,
        parallelism_config=parallel,
        dist_timeout=run.dist_timeout,
        progress_bar=False,
        python_log_level=run.python_log_level,
        seed=run.seed,
    )
    try:
        if dist.get_global_rank() == 0:
            print_methods(console, model, algorithms)
        if parallel is not None:
            assert_sharded(trainer)
        if int(trainer.state.timestamp.batch_in_epoch) and "train" in trainer.state.dataset_resumption:
            restore.saved, trainer._rng_state = trainer._rng_state, None
        if trainer.state.max_duration is None or trainer.state.timestamp < trainer.state.max_duration:
            trainer.fit()
        steps, tokens = int(trainer.state.timestamp.batch), int(trainer.state.timestamp.token)
        export_model(
            model,
            stage_folder / MODEL_FOLDER,
            chat_template=collator.encoder.template.jinja,
            heads=True,
            notes={"chat_template": config.chat_template, "system_prompt": config.system_prompt},
        )
    finally:
        trainer.close()
    if dist.get_global_rank() == 0:
        spent = round(time.time() - started, 1)
        folder.mark_finished(stage, stage_folder / MODEL_FOLDER, steps=steps, tokens=tokens, seconds=spent)
    dist.barrier()
    finished = Finished(model, stage_folder / MODEL_FOLDER, steps, time.time() - started)
    del trainer, spec, dataset
    gc.collect()
    return finished


def preflight(
    loaded: Loaded,
    stage: Stage,
    model: VisionLanguageModel,
    dataset: StreamingVLMDataset,
    collator: VLMCollator,
    algorithms: dict[str, Any],
    console: Console,
) -> None:
    """Look at a few batches before the first step."""
    config = loaded.run.preflight
    report = None
    if config.batches:
        count = config.batches * min(device_batch_size(stage, loaded), 32)
        samples = first_samples(dataset, count)
        needs = {
            n: "images"
            for n, a in algorithms.items()
            if isinstance(a, VisionAlgorithm) and "images" in a.needs
        }
        for name, algorithm in algorithms.items():
            if isinstance(algorithm, VisionAlgorithm) and algorithm.is_off():
                needs.pop(name, None)
        report = check_batches(collator, samples, config, stage.name, needs)
        check_features(model, collator, samples, stage.name)
    if dist.get_global_rank() == 0:
        print_report(console, stage.name, model, report)


def copy_model(source: Path, to: Path) -> None:
    """Copy a model folder for use: without the methods' heads."""
    from ..models.export import HEADS

    partial = to.with_name(to.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(source, partial, ignore=shutil.ignore_patterns(HEADS))
    shutil.rmtree(to, ignore_errors=True)
    partial.rename(to)
