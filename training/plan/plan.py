"""A configuration and some GPUs -> what each stage will need; nothing is trained, downloaded or read."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

from composer.core import Time, TimeUnit

from ...models.errors import UserError
from ...models.parts import count_parameters
from ...models.presets import stand_ins
from ...models.vlm import VisionLanguageModel
from ..check import prepared, refuse_mistakes
from ..config import Loaded
from ..run_folder import RunFolder
from ..stages import Stage, resolve
from .flops import StepOperations
from .hardware import GIB, GPU
from .load import Assumed, Grid, assumed, load_of_sample
from .memory import MemoryModel
from .methods import network_of, workloads
from .ways import remedies, shape_of, ways_of

LATENT_BYTES = 2
"""Stored targets are bfloat16."""


@dataclass
class Asked:
    """What the plan is for.

    Attributes:
        gpus, gpu, gpus_per_node: the machine.
        mfu: share of the GPU's peak that the model's own operations get.
        stored: methods' targets come with the data, as ``opsin data latents`` stores them.
    """

    gpus: int
    gpu: GPU
    gpus_per_node: int = 8
    mfu: float = 0.4
    stored: bool = False


@dataclass
class StagePlan:
    """What a stage needs. Bytes, operations, seconds; ``memory`` by way of training, the stage's own under ``chosen``."""

    name: str
    parts: dict[str, dict[str, int]]
    teachers: dict[str, int]
    assumed: dict[str, Any]
    grid: Grid
    visual_tokens: int
    device_batch: int
    microbatch: int
    longest: int
    chosen: str
    memory: dict[str, dict[str, float]]
    fits: bool
    remedies: list[str]
    operations_a_sample: dict[str, float]
    operations_a_token: float
    operations_a_step: float
    recomputed_a_step: float
    tokens_a_step: float
    steps: int
    seconds_a_step: float
    samples_a_second: float
    tokens_a_second: float
    hours: float
    gpu_hours: float
    read_a_second_a_node: float
    latents_a_sample: dict[str, float]
    latents: dict[str, float] = field(default_factory=dict)


@dataclass
class Plan:
    """Stages, and the configurations that did not come from the hub."""

    asked: Asked
    presets: dict[str, str]
    stages: list[StagePlan]

    def as_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)

    def refuse_misfits(self) -> None:
        """Raise where a stage does not fit into the GPU's memory.

        Raises:
            UserError: the first stage that does not, by how much, and what would help.
        """
        for stage in self.stages:
            if not stage.fits:
                needs = stage.memory[stage.chosen]["needs"]
                help_ = (
                    "; ".join(stage.remedies) or "nothing that this plan knows of: use more or larger GPUs"
                )
                raise UserError(
                    f"stage {stage.name}: needs {needs / GIB:.0f} GiB a GPU ({stage.chosen}), {self.asked.gpu.name} has "
                    f"{self.asked.gpu.memory / GIB:.0f}. What would fit: {help_}"
                )


def make_plan(loaded: Loaded, asked: Asked) -> Plan:
    """Plan every stage of a run.

    Raises:
        UserError: a mistake in the configuration, a batch that cannot be dealt to the GPUs, or a model whose pictures
            have no one size.
    """
    if asked.gpus < 1 or asked.gpus_per_node < 1:
        raise UserError(f"--gpus {asked.gpus}, --gpus-per-node {asked.gpus_per_node}: use 1 or more")
    if not 0 < asked.mfu <= 1:
        raise UserError(f"--mfu {asked.mfu:g}: a share of the GPU's peak, above 0 and at most 1")
    refuse_mistakes(loaded, here=False)
    run, stages = loaded.run, resolve(loaded)
    names = [s.name for s in stages]
    for name in run.plan:
        if name not in names:
            raise UserError(f"{loaded.where('plan', name)}: no stage '{name}'; there are {', '.join(names)}")
    model, presets = stand_ins(run.model)
    loaded = replace(loaded, run=replace(run, model=model))
    folder = RunFolder(run.run_root, run.run_name)
    for stage in stages:  # all mistakes before the first model is built
        assumed(run.plan, stage.name, True, partial(loaded.where, "plan"))
        batch = stage.config.global_train_batch_size
        if batch % asked.gpus:
            near = [n for n in range(1, asked.gpus) if batch % n == 0]
            raise UserError(
                f"{stage.where(loaded, 'global_train_batch_size')}: {batch} cannot be dealt to {asked.gpus} GPUs; use a "
                f"multiple of {asked.gpus}, or --gpus {near[-1] if near else 1}"
            )
    planned = []
    for stage in stages:
        built, algorithms, _ = prepared(loaded, stage, folder, names)
        planned.append(_stage(loaded, stage, built, algorithms, asked))
    return Plan(asked, presets, planned)


def seen(model: VisionLanguageModel) -> tuple[tuple[int, ...], Grid, int]:
    """One picture as the tower gets it, its grid, and its tokens.

    Raises:
        UserError: how large pictures are depends on the pictures.
    """
    vision = getattr(model.hf.config, "vision_config", None)
    side, patch = getattr(vision, "image_size", None), getattr(vision, "patch_size", None)
    if model.anatomy.family != "llava" or not isinstance(side, int) or not isinstance(patch, int):
        raise UserError(
            f"opsin plan knows models whose pictures all have one size (LLaVA, from parts too), not {model.anatomy.family}: "
            "its tokens depend on each picture"
        )
    rows = side // patch
    strategy = getattr(model.hf.config, "vision_feature_select_strategy", "default")
    prefix = 1 if strategy == "full" and getattr(vision, "model_type", "") == "clip_vision_model" else 0
    return (3, side, side), (rows, rows), rows * rows + prefix


def _stage(
    loaded: Loaded, stage: Stage, model: VisionLanguageModel, algorithms: dict[str, Any], asked: Asked
) -> StagePlan:
    config, run = stage.config, loaded.run
    where = partial(loaded.where, "plan")
    picture, grid, visual = seen(model)
    assume = assumed(run.plan, stage.name, config.chat_template == "plain", where)
    operations = StepOperations(model, algorithms, stored=asked.stored)
    sample = load_of_sample(assume, grid, picture, visual)
    by_part = operations.by_part(sample)
    each, again = sum(by_part.values()), operations.recomputed(sample)
    batch = config.global_train_batch_size
    device = batch // asked.gpus
    micro = min(config.device_train_microbatch_size or device, device)
    works = workloads(algorithms, model)
    targets = {n: w.target for n, w in works.items() if w.target is not None}
    if asked.stored:
        works = {n: replace(w, target=None) for n, w in works.items()}
    longest = assume.longest_tokens or min(config.max_seq_len, 4096)
    longest = max(longest, round(sample.tokens))
    shape = shape_of(assume, micro, longest, picture, grid, visual)
    chosen, ways = ways_of(loaded, stage, asked.gpus, device > micro)
    reckon = MemoryModel(model, works)
    found = {name: reckon(shape, way) for name, way in ways.items()}
    fits = found[chosen].needs() <= asked.gpu.memory
    step = batch * each / (asked.gpus * asked.gpu.peak(run.precision) * asked.mfu)
    steps = _steps(config.max_duration, assume, batch)
    latents = {
        n: assume.images * grid[0] * grid[1] * t.moments_dim * LATENT_BYTES for n, t in targets.items()
    }
    nodes = max(1.0, asked.gpus / asked.gpus_per_node)
    stored = sum(latents.values()) if asked.stored else 0.0
    frozen = {n: network_of(t) for n, t in targets.items()}
    return StagePlan(
        name=stage.name,
        parts={c.part: {"trainable": c.trainable, "frozen": c.frozen} for c in count_parameters(model)},
        teachers={n: sum(p.numel() for p in m.parameters()) for n, m in frozen.items() if m is not None},
        assumed=asdict(assume),
        grid=grid,
        visual_tokens=visual,
        device_batch=device,
        microbatch=micro,
        longest=longest,
        chosen=chosen,
        memory={name: m.as_dict() for name, m in found.items()},
        fits=fits,
        remedies=[] if fits else remedies(chosen, found, ways, reckon, assume, shape, asked.gpu.memory),
        operations_a_sample=by_part,
        operations_a_token=each / sample.tokens,
        operations_a_step=each * batch,
        recomputed_a_step=again * batch if config.activation_checkpointing else 0.0,
        tokens_a_step=sample.tokens * batch,
        steps=steps,
        seconds_a_step=step,
        samples_a_second=batch / step,
        tokens_a_second=sample.tokens * batch / step,
        hours=steps * step / 3600,
        gpu_hours=steps * step / 3600 * asked.gpus,
        read_a_second_a_node=batch
        / step
        / nodes
        * (assume.images * assume.image_bytes + 4 * assume.text_tokens + stored),
        latents_a_sample=latents,
        latents={n: size * assume.samples for n, size in latents.items()},
    )


def _steps(duration: str, assume: Assumed, batch: int) -> int:
    """Optimizer steps of a stage; 0 where the size of its data is not known."""
    time = Time.from_timestring(duration)
    if time.unit == TimeUnit.BATCH:
        return int(time.value)
    if time.unit == TimeUnit.EPOCH:
        return int(time.value) * -(-assume.samples // batch)
    if time.unit == TimeUnit.SAMPLE:
        return -(-int(time.value) // batch)
    return 0
