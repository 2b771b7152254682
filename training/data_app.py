"""``opsin data ...``: the commands' arguments; what they do is in ``data_commands`` and ``latents``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from .convert_commands import convert_commands
from .split_commands import split_commands
from .target_commands import target_commands

data_app = typer.Typer(no_args_is_help=True, help="Make and inspect datasets.")
target_commands(data_app)
split_commands(data_app)
convert_commands(data_app)

# Of the commands that write samples.
NewFolder = Annotated[
    str, typer.Option("--out", help="New folder, or s3://bucket/folder. The same command goes on.")
]
Workers = Annotated[int, typer.Option(min=0, help="Processes that make samples; 0: this one.")]
# Of both commands that store targets.
Source = Annotated[str, typer.Argument(help="Dataset: folder or URL.")]
Out = Annotated[str, typer.Argument(help="New folder, or s3://bucket/folder. The same command goes on.")]
Model = Annotated[
    str, typer.Option(help="Whose patches: run folder, model folder, hub name, or scenes_llava.")
]
Set = Annotated[list[str] | None, typer.Option("--set", help="key=value of the target.")]
Sidecar = Annotated[
    bool, typer.Option("--sidecar", help="Targets alone, for dataset.patch_targets; no copy of the rows.")
]
Device = Annotated[str | None, typer.Option(help="cpu, cuda ...; default: a GPU if there is one.")]
Threads = Annotated[int, typer.Option(min=1, help="Threads that decode pictures.")]


@data_app.command("scenes")
def data_scenes(
    out: NewFolder,
    samples: Annotated[int, typer.Option(help="How many.")] = 1000,
    split: Annotated[str, typer.Option()] = "train",
    stream: Annotated[
        str, typer.Option(help="vqa, caption, text, text_caption, text_skill, blind, mismatched")
    ] = "vqa",
    seed: Annotated[int, typer.Option()] = 17,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="key=value of data.scenes.SceneConfig.")
    ] = None,
    workers: Workers = 0,
) -> None:
    """Procedural scenes with exact facts."""
    from .data_commands import scenes

    scenes(out, samples, split, stream, seed, set_ or [], workers)


@data_app.command("easy-vqa")
def data_easy_vqa(
    out: NewFolder,
    split: Annotated[str, typer.Option(help="train or test")] = "train",
    limit: Annotated[int | None, typer.Option(help="Most samples.")] = None,
    yesno: Annotated[int | None, typer.Option(help="Most yes/no questions a picture.")] = None,
    workers: Workers = 0,
) -> None:
    """The pictures and questions of the easy-vqa package (opsin[real])."""
    from .data_commands import easy_vqa

    easy_vqa(out, split, limit, yesno, workers)


@data_app.command("llava")
def data_llava(
    file: Annotated[str, typer.Argument(metavar="JSON", help="LLaVA's list of samples, or JSON lines.")],
    images: Annotated[str, typer.Argument(metavar="IMAGES", help="Folder of the pictures.")],
    out: NewFolder,
    limit: Annotated[int | None, typer.Option(help="Most samples.")] = None,
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="Leave bad samples out, and name them in skipped.jsonl.")
    ] = False,
    workers: Workers = 0,
) -> None:
    """LLaVA's JSON and a folder of pictures; pictures keep their bytes."""
    from .data_commands import llava

    llava(file, images, out, limit, skip_bad, workers)


@data_app.command("templates")
def data_templates(
    remote: Annotated[str, typer.Argument(help="Dataset: folder or URL.")],
    top: Annotated[int, typer.Option(help="Sentences to show.")] = 30,
) -> None:
    """Count the instruction sentences of a dataset, and write the counts beside its index."""
    from .data_commands import templates

    templates(remote, top, Console())


@data_app.command("inspect")
def data_inspect(
    remote: Annotated[str, typer.Argument(help="Dataset: folder or URL.")],
    samples: Annotated[int, typer.Option(min=0, help="Samples to show.")] = 3,
    model: Annotated[
        str | None,
        typer.Option(
            help="Run folder, model folder or hub name: show its tokens, coloured by role. No weights are read."
        ),
    ] = None,
    chat_template: Annotated[str | None, typer.Option(help="Default: the model's, else vicuna_v1.")] = None,
) -> None:
    """Show what is in a dataset: sizes, kinds, lengths, template sentences, first samples."""
    from .inspect_data import inspect

    inspect(remote, samples, Console(), model, chat_template)


@data_app.command("language-model")
def data_language_model(
    out: Annotated[Path, typer.Option(help="safetensors file to write.")],
    steps: Annotated[int, typer.Option(min=1)] = 1500,
    seed: Annotated[int, typer.Option()] = 0,
) -> None:
    """Train the language model of scenes_llava on text alone (how the shipped weights were made)."""
    from .pretrain import train_language_model
    from .run_folder import refuse_unwritable

    refuse_unwritable(out.parent, f"--out {out}")  # before minutes of training
    train_language_model(out, steps=steps, seed=seed, console=Console(stderr=True))


@data_app.command("vision-tower")
def data_vision_tower(
    out: Annotated[Path, typer.Option(help="safetensors file to write.")],
    steps: Annotated[int, typer.Option(min=1)] = 4000,
    seed: Annotated[int, typer.Option()] = 0,
) -> None:
    """Train the vision tower of scenes_llava as a captioner's (how the shipped weights were made)."""
    from .pretrain import train_vision_tower
    from .run_folder import refuse_unwritable

    refuse_unwritable(out.parent, f"--out {out}")
    train_vision_tower(out, steps=steps, seed=seed, console=Console(stderr=True))


@data_app.command("latents")
def data_latents(
    source: Source,
    out: Out,
    model: Model,
    method: Annotated[str, typer.Option(help="Whose targets: see `opsin registry patch_targets`.")] = "ross",
    target: Annotated[str, typer.Option(help="Kind of target.")] = "vae",
    set_: Set = None,
    sidecar: Sidecar = False,
    device: Device = None,
    threads: Threads = 4,
) -> None:
    """Compute what a method predicts of each patch once, and store it beside the pictures or in them."""
    from .latents import latents

    latents(
        source, out, model, method=method, target=target, settings=set_ or [], sidecar=sidecar, device=device,
        threads=threads, console=Console(),
    )  # fmt: skip


@data_app.command("features")
def data_features(
    source: Source,
    out: Out,
    model: Model,
    target: Annotated[
        str, typer.Option(help="features (a vision model) or tower (a model that lies here).")
    ] = "features",
    set_: Set = None,
    sidecar: Sidecar = False,
    device: Device = None,
    threads: Threads = 4,
) -> None:
    """Compute the features that JARVIS predicts once, and store them: `latents --method jarvis`."""
    from .latents import latents

    latents(
        source, out, model, method="jarvis", target=target, settings=set_ or [], sidecar=sidecar, device=device,
        threads=threads, console=Console(), command="features",
    )  # fmt: skip
