"""What is refused before data is made or a model built; and ``--check``: everything built, nothing trained."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from composer.core import Engine, Event, State
from composer.devices import DeviceCPU
from composer.loggers import Logger
from rich.console import Console
from rich.table import Table
from transformers import modeling_utils

from ..algorithms.base import VisionAlgorithm
from ..data.chat import TEMPLATES
from ..data.object_store import Unreachable
from ..models.anatomy import PARTS
from ..models.errors import UserError, nearest
from ..models.parts import count_parameters, parameter_groups
from ..models.presets import by_configuration, stand_ins
from .builders import (
    algorithms_of_stage,
    build_optimizer,
    build_scheduler,
    check_arguments,
    construct,
    mapped,
    place_in,
    used_nowhere,
)
from .compatibility_check import hold, hold_callback, print_warnings
from .config import Loaded
from .preflight import print_methods
from .prepare import refuse_specs
from .ranges import place_in_stage, refuse_other_machine, refuse_out_of_range
from .registry import callbacks as callback_registry
from .registry import loggers as logger_registry
from .registry import models as model_registry
from .run_folder import RunFolder, refuse_name, refuse_unwritable
from .scoring import check_evaluation, check_window
from .stage_data import build_collator, build_dataset, first_samples
from .stage_run import build_model, parallelism, ways_of_training
from .stages import Stage, resolve


def refuse_mistakes(loaded: Loaded, here: bool = True) -> None:
    """Look up every name, keyword and value of every stage, without data and models: in a second, not after a stage.

    Args:
        loaded: the configuration.
        here: it is to be trained on this machine, now: look at its device and folders, too.

    Raises:
        UserError: one that is wrong, with its place.
    """
    run = loaded.run
    stages = resolve(loaded)
    RunFolder(run.run_root, run.run_name)
    for stage in stages:
        refuse_name(stage.name, loaded.where(*(stage.path or ("stage",))))
    refuse_out_of_range(loaded, stages)
    parallelism(loaded)
    if stages[0].start is None or run.model.get("name") is not None:
        _refuse_model(loaded)
    for section, registry in (("callbacks", callback_registry), ("loggers", logger_registry)):
        for name, keywords in getattr(run, section).items():
            where = partial(place_in, loaded.where, section, name)
            make = registry.get(name, where(""))
            check_arguments(make, dict(keywords or {}), where)
            if name in registry.builtin:  # ours do nothing when they are made, and look at values, too
                hold_callback(loaded, stages, name, construct(make, dict(keywords or {}), where))
    for stage in stages:
        _refuse_stage(loaded, stage)
    refuse_specs(loaded)
    if here:
        refuse_other_machine(loaded)
        for key in ("run_root", "save_folder"):
            path = getattr(run, key)
            if path and "://" not in path:
                refuse_unwritable(Path(path.partition("{")[0]), loaded.where(key))


def _refuse_model(loaded: Loaded) -> None:
    place = lambda key: loaded.where("model", *([key] if key else []))  # noqa: E731
    if loaded.run.model.get("name") is None:
        raise UserError(f"{place('name')}: needs a name: one of {', '.join(model_registry.names())}")
    make = model_registry.get(str(loaded.run.model["name"]), place("name"))
    check_arguments(make, {k: v for k, v in loaded.run.model.items() if k != "name"}, place)


def _refuse_stage(loaded: Loaded, stage: Stage) -> None:
    config, where = stage.config, place_in_stage(loaded, stage)
    if config.chat_template not in TEMPLATES:
        hint = nearest(config.chat_template, TEMPLATES)
        raise UserError(f"{where('chat_template')} '{config.chat_template}': unknown{hint}")
    for part in config.lr_by_part:
        if part not in PARTS:
            raise UserError(f"{where('lr_by_part', part)}: unknown part{nearest(part, PARTS)}")
    build_optimizer(config, [{"params": [torch.nn.Parameter(torch.zeros(1))]}], where)
    build_scheduler(config, where)
    ways_of_training(loaded, stage)
    algorithms_of_stage(loaded, stage.name, config)


def check(loaded: Loaded, console: Console) -> None:
    """Build every stage (big models on the meta device), attach the methods' heads, look at two samples.

    Nothing is written, no data is made, and weights are not read.

    Raises:
        UserError: whatever would stop the run for a reason that can be mended.
    """
    run = loaded.run
    refuse_mistakes(loaded, here=False)  # a configuration for a GPU can be looked at without one
    stages = resolve(loaded)
    folder = RunFolder(run.run_root, run.run_name)
    model, used = stand_ins(run.model)
    loaded = replace(loaded, run=replace(run, model=model))
    for name, file in used.items():
        console.print(f"{name}: configuration from {file}, not from the hub", soft_wrap=True)
    mapped(callback_registry, run.callbacks, loaded.where, "callbacks")
    print_warnings(console, used_nowhere(loaded))
    for stage in stages:
        _check_stage(loaded, stage, folder, [s.name for s in stages], console, encodes=not used)
    check_evaluation(loaded, strict=False)


def prepared(
    loaded: Loaded, stage: Stage, folder: RunFolder, names: list[str]
) -> tuple[Any, dict[str, Any], Any]:
    """A stage's model (a big one on the meta device), its methods after INIT, and its optimizer."""
    config = stage.config
    where = lambda *key: stage.where(loaded, *key)  # noqa: E731
    earlier = stage.start is not None and stage.start.path in names
    source = Stage(stage.name, config, stage.path, "", None) if earlier else stage
    with without_initial_weights():
        model = build_model(loaded, source, folder, names, meta=True)
    check_window(loaded, model)
    lr = float(config.optimizer.get("lr", 2.0e-5))
    optimizer = build_optimizer(config, parameter_groups(model, lr, config.lr_by_part, 0.0), where)
    build_scheduler(config, where)
    algorithms = algorithms_of_stage(loaded, stage.name, config)
    state = State(
        rank_zero_seed=loaded.run.seed,
        algorithms=list(algorithms.values()),
        model=model,
        device=DeviceCPU(),
        optimizers=optimizer,
        device_train_microbatch_size=1,
        run_name=loaded.run.run_name,
    )
    with by_configuration():
        Engine(state=state, logger=Logger(state)).run_event(Event.INIT)
    return model, algorithms, optimizer


def without_initial_weights() -> AbstractContextManager[Any]:
    """Leave out what models draw at first, which nobody looks at here and takes most of the time.

    transformers 5 would leave out tied weights with it; there it stays as it is.
    """
    return getattr(modeling_utils, "no_init_weights", nullcontext)()


def _check_stage(
    loaded: Loaded, stage: Stage, folder: RunFolder, names: list[str], console: Console, encodes: bool
) -> None:
    model, algorithms, optimizer = prepared(loaded, stage, folder, names)
    table = Table(title=f"stage {stage.name}", title_justify="left", show_edge=False)
    for column in ("part", "trainable", "frozen", "learning rate"):
        table.add_column(column, justify="left" if column == "part" else "right")
    rates = {g.get("part"): g["lr"] for g in optimizer.param_groups}
    for count in count_parameters(model):
        rate = f"{rates[count.part]:g}" if count.part in rates else "-"
        table.add_row(count.part, f"{count.trainable:,}", f"{count.frozen:,}", rate)
    console.print(table)
    used = ", ".join(f"{n}{' (off)' if getattr(a, 'is_off', bool)() else ''}" for n, a in algorithms.items())
    console.print(f"methods: {used or 'none'}")
    print_methods(console, model, algorithms)
    print_warnings(console, hold(loaded, stage.config, stage.name, algorithms, model))
    console.print(_data(loaded, stage, model, algorithms, encodes))


def _data(loaded: Loaded, stage: Stage, model: Any, algorithms: dict[str, Any], encodes: bool = True) -> str:
    """Tokens a step and steps, from the index and some samples; says so when the data cannot be reached.

    ``encodes``: the model's own tokenizer is there.
    """
    config = stage.config
    prepared = {s.get("out") for kind in ("scenes", "easy_vqa") for s in getattr(loaded.run.prepare, kind)}
    dataset_config = config.train_loader.dataset
    try:
        dataset = build_dataset(
            dataset_config,
            config.global_train_batch_size,
            loaded.run.seed,
            whole=False,
            duration=config.max_duration,
        )
    except UserError as error:
        if dataset_config.remote in prepared and not Path(str(dataset_config.remote)).exists():
            return f"data: {dataset_config.remote} is not there yet; the run will make it (prepare)"
        if isinstance(error, Unreachable):
            return f"data: not reachable from here, so steps and tokens are not known ({error})"
        raise UserError(
            f"{stage.where(loaded, 'train_loader', 'dataset')}: {str(error).removeprefix('dataset: ')}"
        ) from error
    for name, algorithm in algorithms.items():
        if isinstance(algorithm, VisionAlgorithm) and not algorithm.is_off():
            try:
                algorithm.use(dataset, config.max_duration)
            except UserError as error:
                raise UserError(f"{loaded.where('algorithms', name)}: {error}") from error
    steps = dataset.samples_a_rank // config.global_train_batch_size
    if not encodes:
        return (
            f"data: {dataset.num_samples:,} samples, {steps:,} steps an epoch, trained for {config.max_duration}; tokens are "
            "not known without the model's own tokenizer"
        )
    collator = build_collator(model, stage, config.train_loader)
    batch = collator(first_samples(dataset, 8))
    used = max(1, int((batch["sample_status"] == 0).sum()))
    tokens = int(batch["attention_mask"].sum()) / used
    return (
        f"data: {dataset.num_samples:,} samples, about {tokens:.0f} tokens each, "
        f"{tokens * config.global_train_batch_size:,.0f} tokens a step, {steps:,} steps an epoch, "
        f"trained for {config.max_duration}"
    )
