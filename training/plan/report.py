"""A plan as tables, and what it assumes in words."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from .hardware import GIB
from .memory import RESERVE, SLACK
from .plan import Plan, StagePlan

_PARTS = (
    "weights",
    "gradients",
    "optimizer",
    "buckets",
    "teachers",
    "gathered",
    "activations",
    "update",
    "total",
    "needs",
)


def show(plan: Plan, console: Console) -> None:
    """Print every stage."""
    asked = plan.asked
    for name, file in plan.presets.items():
        console.print(f"{name}: configuration from {file}, not from the hub", soft_wrap=True, highlight=False)
    console.print(
        f"{asked.gpus} x {asked.gpu.name} ({asked.gpu.memory / GIB:.0f} GiB), {asked.gpus_per_node} a node, MFU {asked.mfu:.0%}",
        highlight=False,
    )
    for stage in plan.stages:
        _stage(plan, stage, console)
    for line in assumptions(plan):
        console.print(f"- {line}", soft_wrap=True, highlight=False)


def _stage(plan: Plan, stage: StagePlan, console: Console) -> None:
    console.print()
    parts = _table(f"stage {stage.name}: parameters", "part", "trainable", "frozen")
    for part, count in stage.parts.items():
        parts.add_row(part, f"{count['trainable']:,}", f"{count['frozen']:,}")
    for name, count in stage.teachers.items():
        parts.add_row(f"{name}'s target", "0", f"{count:,}")
    console.print(parts)
    titles = ["GiB a GPU", *_PARTS]
    sizes = _table(
        f"stage {stage.name}: memory, micro-batch of {stage.microbatch} rows of {stage.longest:,} tokens",
        *titles,
    )
    for way, found in stage.memory.items():
        mark = " *" if way == stage.chosen else ""
        over = found["needs"] > plan.asked.gpu.memory
        cells = [f"{found[key] / GIB:.1f}" for key in _PARTS]
        cells[-1] += " !" if over else ""
        sizes.add_row(f"{way}{mark}", *cells)
    console.print(sizes)
    work = _table(f"stage {stage.name}: operations", "part", "GFLOP a sample", "share")
    whole = sum(stage.operations_a_sample.values())
    for part, count in stage.operations_a_sample.items():
        if count:
            work.add_row(part, f"{count / 1e9:,.1f}", f"{count / whole:.1%}")
    work.add_row("all", f"{whole / 1e9:,.1f}", "100.0%")
    console.print(work)
    again = f" (and {stage.recomputed_a_step / 1e15:.2f} recomputed)" if stage.recomputed_a_step else ""
    console.print(
        f"{stage.operations_a_token / 1e9:.1f} GFLOP a token, {stage.operations_a_step / 1e15:.2f} PFLOP a step{again}; "
        f"{stage.tokens_a_second:,.0f} tokens and {stage.samples_a_second:,.0f} samples a second, {stage.seconds_a_step:.2f} s a step",
        soft_wrap=True, highlight=False,
    )  # fmt: skip
    if stage.steps:
        time = f"{stage.steps:,} steps: {stage.hours:.1f} hours, {stage.gpu_hours:,.0f} GPU-hours"
    else:
        time = f"hours are not known: give plan.{stage.name}.samples"
    console.print(
        f"{time}; reads {stage.read_a_second_a_node / 1e6:,.1f} MB a second and node",
        soft_wrap=True,
        highlight=False,
    )
    for name, size in stage.latents_a_sample.items():
        whole_set = f", {stage.latents[name] / 1e9:,.0f} GB in all" if stage.latents.get(name) else ""
        console.print(f"{name}: stored targets are {size / 1e3:,.0f} kB a sample{whole_set}", highlight=False)


def assumptions(plan: Plan) -> list[str]:
    """What the numbers stand on."""
    said = []
    for stage in plan.stages:
        a = stage.assumed
        samples = f"{a['samples']:,} samples" if a["samples"] else "samples not known"
        said.append(
            f"{stage.name}: no data is read; assumed {samples} of {a['text_tokens']:g} words' tokens ({a['labelled_tokens']:g} "
            f"labelled) and {a['images']:g} pictures of {a['image_bytes'] / 1e3:g} kB (plan.{stage.name} of the YAML)"
        )
    return [
        *said,
        "operations: two a multiply-add, all pairs of a row's tokens, padding and recomputation left out; MFU is of these",
        "memory: the most at any moment, of the longest rows, found by running the modules on tensors without data; * is the "
        "configuration's own way, ! does not fit",
        f"needs: total, {SLACK:.0%} for fragments and {RESERVE / GIB:g} GiB for driver and libraries (both guesses); what FSDP2 "
        "gathers is reckoned, not rehearsed",
        "hours: training alone, without start, evaluation, checkpoints and waiting for data",
    ]


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", show_edge=False)
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right", no_wrap=True)
    return table
