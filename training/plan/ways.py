"""The ways to train that a plan compares, and what would help where the chosen one does not fit."""

from __future__ import annotations

from dataclasses import replace

from ..config import Loaded
from ..stages import Stage
from .load import Assumed, Grid
from .memory import Memory, MemoryModel, Way
from .rehearsal import Shape


def shape_of(
    assume: Assumed, micro: int, longest: int, picture: tuple[int, ...], grid: Grid, visual: int
) -> Shape:
    """The micro-batch that memory is for: rows of ``longest`` tokens with a picture each."""
    pictures = max(1, round(assume.images)) * micro
    share = assume.labelled_tokens / max(1.0, assume.text_tokens)
    labelled = round(max(0, longest - visual * pictures // micro) * share) * micro
    return Shape(micro, longest, max(1, labelled), pictures, picture, visual, grid)


def ways_of(loaded: Loaded, stage: Stage, gpus: int, accumulated: bool) -> tuple[str, dict[str, Way]]:
    """The ways to train that are compared, and the name of the configuration's own."""
    run, config = loaded.run, stage.config
    autocast = run.precision.startswith("amp_")
    found = {}
    for sharded in (False, True) if gpus > 1 else (False,):
        for checkpointing in (False, True):
            name = way_name(sharded, checkpointing, gpus)
            found[name] = Way(sharded, checkpointing, gpus, autocast, accumulated, config.optimizer)
    own = bool(run.parallelism_config) and gpus > 1
    return way_name(own, config.activation_checkpointing, gpus), found


def way_name(sharded: bool, checkpointing: bool, gpus: int) -> str:
    """Such as ``FSDP2 with checkpointing``."""
    kind = "FSDP2" if sharded else "DDP" if gpus > 1 else "one GPU"
    return f"{kind}{' with checkpointing' if checkpointing else ''}"


def remedies(
    chosen: str,
    found: dict[str, Memory],
    ways: dict[str, Way],
    reckon: MemoryModel,
    assume: Assumed,
    shape: Shape,
    room: float,
) -> list[str]:
    """Changes after which it fits: another way, or the most thrifty way with a smaller micro-batch."""
    keys = {
        (False, True): "activation_checkpointing: true",
        (True, False): "parallelism_config: {fsdp2: {}}",
        (True, True): "parallelism_config: {fsdp2: {}} with activation_checkpointing: true",
    }
    own, said = ways[chosen], []
    for name, way in ways.items():
        if name == chosen or found[name].needs() > room:
            continue
        new = (way.sharded and not own.sharded, way.checkpointing and not own.checkpointing)
        if new in keys:
            said.append(keys[new])
    if said:
        return said
    thrifty = min(ways, key=lambda n: found[n].needs())
    micro = shape.rows // 2
    while micro >= 1:
        smaller = shape_of(assume, micro, shape.length, shape.picture, shape.grid, shape.visual)
        if reckon(smaller, replace(ways[thrifty], accumulated=True)).needs() <= room:
            key = keys.get(
                (
                    ways[thrifty].sharded and not own.sharded,
                    ways[thrifty].checkpointing and not own.checkpointing,
                )
            )
            return [f"device_train_microbatch_size: {micro}{f' with {key}' if key else ''}"]
        micro //= 2
    return []
