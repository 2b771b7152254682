"""The command line: ``opsin train``, ``opsin data ...``, ``opsin eval``, ``opsin generate``, ``opsin export``."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from .. import __version__
from ..models.errors import UserError, one_line, user_error_in
from .checkpoint_app import checkpoint_app
from .data_app import data_app
from .launch import complete_environment
from .study.commands import ablate, study_app

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)
app.add_typer(data_app, name="data")
app.add_typer(study_app, name="study")
app.command()(ablate)
app.add_typer(checkpoint_app, name="checkpoint")

FUSE = typer.Option(
    "--fuse", help="Strength of ability fusion (ViFT); the method's literal is 0.35. Default: none."
)
FUSE_RATIO = typer.Option(
    "--fuse-ratio", help="What is taken from the states with the picture, beside 1 that is added."
)
FUSE_LAYERS = typer.Option(
    "--fuse-layers", help="Window FIRST-END of decoder layers, END excluded. Default: the upper half."
)
FUSE_ALIGN = typer.Option("--fuse-align", help="suffix, or paper_code.")
FUSE_MODE = typer.Option("--fuse-mode", help="add, or replace.")
DEBUG = typer.Option("--debug", help="Show tracebacks of errors that you can mend, too.")
_debug = False


def main() -> None:
    """Entry point: an error that the user can mend is one line and exit code 2."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        complete_environment(os.environ)
        code = app(standalone_mode=False)
        if isinstance(code, int) and code:  # so typer hands on a command's Exit, in place of raising it
            sys.exit(code)
    except typer.Exit as done:
        sys.exit(done.exit_code)
    except typer.Abort:
        sys.exit(130)
    except UserError as error:
        _report(error)
    except BaseException as error:  # torch's CheckpointException is no Exception
        wrapped = user_error_in(error)  # a refusal in a worker, callback or checkpoint
        if wrapped is None and isinstance(error, RuntimeError):
            from ..data.loader import lost_worker  # here: a typo should not have to wait for it

            wrapped = lost_worker(error)
        if wrapped is not None:
            _report(wrapped)
        if isinstance(error, BrokenPipeError):  # the reader of a pipe has left, as `head` does
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(1)
        if isinstance(error, OSError) and not _debug:
            _report(UserError(f"{type(error).__name__}: {_line(error)}"))
        if type(error).__module__.startswith(("click", "typer")) and hasattr(error, "show"):
            error.show()  # type: ignore[attr-defined]
            sys.exit(2)
        raise


def _report(error: UserError) -> None:
    if _debug:
        raise error
    print(f"opsin: {one_line(error)}", file=sys.stderr, flush=True)
    sys.exit(2)


def _line(error: OSError) -> str:
    """``No space left on device: FILE``; libraries put paragraphs into theirs."""
    text = f"{error.strerror}: {error.filename}" if error.filename is not None else str(error)
    return (text.strip() or "no reason given").splitlines()[0]


def _is_file(argument: str) -> bool:
    """Whether an argument of ``train`` is a YAML: anything without ``=``, and a file whose path has one."""
    return "=" not in argument or Path(argument).is_file()


@app.callback()
def _options(debug: Annotated[bool, DEBUG] = False) -> None:
    global _debug
    _debug = debug


@app.command()
def train(
    config: Annotated[
        list[str], typer.Argument(help="YAML files, merged left to right, then key=value arguments.")
    ],
    check: Annotated[
        bool, typer.Option("--check", help="Build everything without training, and show it.")
    ] = False,
    print_config: Annotated[
        bool, typer.Option("--print-config", help="Print the resolved configuration.")
    ] = False,
    debug: Annotated[bool, DEBUG] = False,
) -> None:
    """Train the stages of a YAML: opsin train a.yaml b.yaml key=value ..."""
    global _debug
    _debug = _debug or debug
    from .config import load

    files = [c for c in config if _is_file(c)]
    loaded = load(files, [c for c in config if not _is_file(c)])
    console = Console(stderr=True, quiet=int(os.environ.get("RANK", "0")) != 0)
    if print_config:
        from .stages import resolved_yaml  # here: it imports what a typo should not have to wait for

        print(resolved_yaml(loaded), end="")
        return
    if check:
        from .check import check as run_check
        from .stages import resolved_yaml

        print(resolved_yaml(loaded), end="")
        run_check(loaded, console)
        return
    from .train import train as run_train

    folder = run_train(loaded, console)
    console.print(f"run folder: {folder.path}", soft_wrap=True)
    if folder.samples.is_file():
        console.print(
            f"held-out pictures with question, gold and predicted answer: {folder.samples}", soft_wrap=True
        )
    methods = [n for n, k in loaded.run.algorithms.items() if k.get("enabled", True)]
    for command in next_commands(files, folder.path, methods):
        console.print(f"next: {command}", soft_wrap=True, highlight=False)


def next_commands(files: list[str], run: Path, methods: list[str]) -> list[str]:
    """Things to try after a run with these methods."""
    from .registry import METHODS

    again = " ".join(files)
    off = [m for m in METHODS if m in methods][:1]
    return [
        *(f"opsin train {again} algorithms.{m}=false run_name={run.name}-without-{m}" for m in off),
        f'opsin generate {run} "What colour is the object?" --image PICTURE.png',
        f"opsin export {run} my-model    # an ordinary Hugging Face folder",
    ]


@app.command()
def plan(
    config: Annotated[
        list[str], typer.Argument(help="YAML files, merged left to right, then key=value arguments.")
    ],
    gpus: Annotated[int, typer.Option(help="How many GPUs.")] = 8,
    gpu: Annotated[str, typer.Option(help="Which: h100, h200, a100-80gb, l40s ...")] = "h100",
    gpus_per_node: Annotated[int, typer.Option(help="GPUs of a node, for what it reads a second.")] = 8,
    mfu: Annotated[float, typer.Option(help="Share of the GPU's peak that is reached.")] = 0.4,
    stored_targets: Annotated[
        bool, typer.Option("--stored-targets", help="Methods' targets come with the data.")
    ] = False,
    json_: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """What a run will need, on paper: parameters, memory a GPU, operations, hours, storage."""
    from .plan.hardware import gpu_named

    kind = gpu_named(gpu)  # a typo should not have to wait for the rest
    from .config import load
    from .plan.plan import Asked, make_plan
    from .plan.report import show

    loaded = load([c for c in config if _is_file(c)], [c for c in config if not _is_file(c)])
    made = make_plan(loaded, Asked(gpus, kind, gpus_per_node, mfu, stored_targets))
    if json_:
        import json

        print(json.dumps(made.as_dict(), indent=1))
    else:
        show(made, Console(width=None if sys.stdout.isatty() else 160))
    made.refuse_misfits()


@app.command()
def algorithms(
    name: Annotated[str | None, typer.Argument(help="Show this method's keywords.")] = None,
) -> None:
    """List the methods, or the keywords of one."""
    from .listing import show_algorithm, show_algorithms

    console = Console()
    if name is None:
        show_algorithms(console)
    else:
        show_algorithm(console, name)


@app.command()
def registry(name: Annotated[str | None, typer.Argument(help="One registry.")] = None) -> None:
    """List everything that a YAML can name: models, data, callbacks, loggers, optimizers, schedulers."""
    from .listing import show_registries

    show_registries(Console(), name)


@app.command("eval")
def evaluate(
    model: Annotated[
        str | None, typer.Argument(help="Run folder; with CONFIG also a model folder or hub name.")
    ] = None,
    config: Annotated[
        list[str] | None,
        typer.Argument(help="YAMLs with suites and analyses, then key=value. None: the run's own table."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for predictions, scores and report.")] = None,
    rescore: Annotated[
        Path | None, typer.Option(help="Score a predictions.jsonl again; needs no model.")
    ] = None,
    scorer: Annotated[
        list[str] | None, typer.Option(help="SUITE=SCORER, with --rescore; may be given several times.")
    ] = None,
    remote: Annotated[str | None, typer.Option(help="Score this dataset instead of the run's own.")] = None,
    limit: Annotated[int | None, typer.Option(help="Score only the first samples.")] = None,
    fuse: Annotated[float | None, FUSE] = None,
    fuse_ratio: Annotated[float, FUSE_RATIO] = 1.0,
    fuse_layers: Annotated[str | None, FUSE_LAYERS] = None,
    fuse_align: Annotated[str, FUSE_ALIGN] = "suffix",
    fuse_mode: Annotated[str, FUSE_MODE] = "add",
) -> None:
    """Measure a model: opsin eval MODEL suites.yaml, or the table of a finished run: opsin eval RUN."""
    fusion = _fusion(fuse, fuse_ratio, fuse_layers, fuse_align, fuse_mode)
    console = Console(quiet=int(os.environ.get("RANK", "0")) != 0)
    if rescore is not None:
        from .score_files import rescore_file

        if model is not None:
            raise UserError("--rescore: needs no model; leave out everything but --scorer and --out")
        target = rescore_file(rescore, scorer or [], out, console)
        console.print(f"scores: {target}", soft_wrap=True)
        return
    if scorer:
        raise UserError("--scorer: goes with --rescore")
    if model is None:
        raise UserError("opsin eval: give a run folder, or MODEL and CONFIG, or --rescore predictions.jsonl")
    if not config:
        from .finished import evaluate_run

        if out is not None:
            raise UserError("--out: goes with a CONFIG; the run's own table goes into its folder")
        evaluate_run(Path(model), remote, limit, Console(), fusion)
        return
    if remote is not None:
        raise UserError("--remote: is for the run's own table; a CONFIG names its data")
    from .evaluate import evaluate_model

    files, arguments = [c for c in config if _is_file(c)], [c for c in config if not _is_file(c)]
    if not files:
        raise UserError(f"opsin eval {model}: give a YAML with suites before {arguments[0]}")
    arguments += [] if limit is None else [f"limit={limit}"]
    if fusion is not None:
        arguments += [f"fusion.{key}={_yaml(value)}" for key, value in fusion.items() if value is not None]
    folder = evaluate_model(model, files, arguments, out, console)
    console.print(f"predictions, scores, report: {folder}", soft_wrap=True)


def _yaml(value: object) -> str:
    """A value of an option as a ``key=value`` argument takes it."""
    return str(value).replace(" ", "")


@app.command()
def reconstruct(
    run: Annotated[str, typer.Argument(help="Run folder; its last stage was trained with ross.")],
    remote: Annotated[str | None, typer.Option(help="Held-out pictures instead of the run's own.")] = None,
    against: Annotated[
        Path | None, typer.Option(help="A second run, measured on the same pictures and noise.")
    ] = None,
    limit: Annotated[int, typer.Option(help="Pictures to measure on.")] = 256,
    times: Annotated[int, typer.Option(help="Times at which the loss is measured.")] = 10,
    pictures: Annotated[int, typer.Option(help="Rows of the strip; 0: none.")] = 6,
    steps: Annotated[int, typer.Option(help="Steps of a reconstruction.")] = 50,
) -> None:
    """ROSS: its loss with the right condition, another picture's and none; and reconstructions to look at."""
    from .reconstruct import reconstruct_run

    reconstruct_run(
        Path(run),
        remote,
        against=against,
        limit=limit,
        times=times,
        pictures=pictures,
        steps=steps,
        console=Console(),
    )


@app.command("hidden-features")
def hidden_features_(
    run: Annotated[str, typer.Argument(help="Run folder; one of its stages was trained with jarvis.")],
    remote: Annotated[str | None, typer.Option(help="Held-out pictures instead of the run's own.")] = None,
    training: Annotated[
        str | None, typer.Option(help="Pictures that guesses are fitted on, instead of the stage's own.")
    ] = None,
    fit: Annotated[int, typer.Option(help="How many of them.")] = 2000,
    limit: Annotated[int, typer.Option(help="Held-out pictures to measure on.")] = 512,
) -> None:
    """JARVIS: its predictions of hidden patches against cheaper guesses, as centred cosines."""
    from .hidden_features import hidden_features

    hidden_features(Path(run), remote, training=training, fit=fit, limit=limit, console=Console())


@app.command()
def generate(
    model: Annotated[str, typer.Argument(help="Run folder, model folder or hub name.")],
    prompt: Annotated[str, typer.Argument(help="What to ask.")],
    image: Annotated[list[Path] | None, typer.Option(help="Picture; may be given several times.")] = None,
    chat_template: Annotated[
        str | None, typer.Option(help="Default: as the run was trained, else vicuna_v1.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option()] = 64,
    fuse: Annotated[float | None, FUSE] = None,
    fuse_ratio: Annotated[float, FUSE_RATIO] = 1.0,
    fuse_layers: Annotated[str | None, FUSE_LAYERS] = None,
    fuse_align: Annotated[str, FUSE_ALIGN] = "suffix",
    fuse_mode: Annotated[str, FUSE_MODE] = "add",
) -> None:
    """Ask a model about pictures."""
    from .finished import ask

    fusion = _fusion(fuse, fuse_ratio, fuse_layers, fuse_align, fuse_mode)
    print(ask(model, prompt, image or [], chat_template, max_new_tokens, fusion=fusion))


def _fusion(
    strength: float | None, ratio: float, layers: str | None, align: str, mode: str
) -> dict[str, Any] | None:
    """Keywords of ``algorithms.vift.fusion.Fusion``; None: no fusion was asked for."""
    if strength is None:
        if layers is not None or (ratio, align, mode) != (1.0, "suffix", "add"):
            raise UserError("--fuse is missing: how strongly? (0.35 is the method's literal)")
        return None
    window = None
    if layers is not None:
        first, dash, end = layers.partition("-")
        if not (dash and first.isdecimal() and end.isdecimal()):
            raise UserError(f"--fuse-layers '{layers}': use FIRST-END, such as 14-28")
        window = [int(first), int(end)]
    return {"strength": strength, "ratio": ratio, "layers": window, "align": align, "mode": mode}


@app.command()
def export(
    run: Annotated[str, typer.Argument(help="Run folder.")],
    out: Annotated[Path, typer.Argument(help="Folder to write.")],
) -> None:
    """Write a run's model as an ordinary Hugging Face folder, and check that plain transformers gives the same logits."""
    from .finished import export_run

    export_run(Path(run), out, Console(stderr=True))


@app.command()
def version() -> None:
    """Versions of Opsin and of what it stands on."""
    from importlib.metadata import PackageNotFoundError
    from importlib.metadata import version as installed

    print(f"opsin {__version__}")
    for package in (
        "mosaicml",
        "mosaicml-streaming",
        "torch",
        "transformers",
        "diffusers",
        "timm",
        "omegaconf",
    ):
        try:
            print(f"{package} {installed(package)}")
        except PackageNotFoundError:
            print(f"{package} not installed")


if __name__ == "__main__":
    main()
