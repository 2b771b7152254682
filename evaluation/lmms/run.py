"""A run of lmms-eval in a process of its own, whose results are looked at: it ends with exit status 0 when tasks failed."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import entry_points, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ...models.errors import UserError
from .manifest import CHAT_MODEL, MODEL
from .results import first_error, read_results
from .tasks import CACHE, refuse_taken, refuse_unknown, write_tasks

OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "WANDB_MODE": "disabled",
}

NOT_HANDED_ON = (
    "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT", "GROUP_RANK",
    "LMMS_EVAL_PLUGINS",
)  # fmt: skip
"""Of our environment: the run is a job of its own, and the plugins' variable spoils ``--include_path``."""

LISTS = ("list", "list_groups", "list_tags", "list_subtasks")
"""What lmms-eval takes for a wish to see its tasks."""

LOG, TASKS, OUTPUT = "lmms_eval.log", "tasks", "output"


def run_lmms(
    model: str,
    out: str | Path,
    *,
    tasks: Sequence[str] | str = (),
    local: Mapping[str, Mapping[str, Any]] | None = None,
    include_path: str | None = None,
    limit: int | None = None,
    batch_size: int = 8,
    device: str | None = None,
    offline: bool | None = None,
    processes: int = 1,
    chat: bool = False,
    model_args: Mapping[str, Any] | None = None,
    gen_kwargs: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Ask a model the tasks of lmms-eval.

    Args:
        model: run folder, model folder or hub name.
        out: folder; each run makes one of its own in it, with its log, results, answers and what it was asked.
        tasks: names of tasks and groups that lmms-eval has, or finds in ``include_path``; also one text with commas.
        local: tasks for files that lie here or in object storage, by a name of your own (``tasks.write_tasks``); all of
            them are asked, and those of ``tasks``.
        include_path: folder with further task YAMLs; not together with ``local``.
        limit: only the first questions of each task.
        batch_size: questions a call of the model.
        device: ``cpu``, ``gpu``, ``cuda:1`` ...; None: a GPU if there is one.
        offline: whether nothing may be fetched from a hub; None: as the environment says, and not where all tasks are
            local.
        processes: how many share the questions, each with the model; on GPUs one each.
        chat: ask by messages (``opsin_chat``): pictures between the words; cannot rank.
        model_args: further arguments of ``wrapper.Opsin``: ``max_new_tokens``, ``precision``, ``fuse`` ...
        gen_kwargs: generation arguments that win over the tasks' own.

    Returns:
        ``lmms_eval``: its version; ``folder``; ``tasks``: name -> ``n``, ``primary``, ``measures`` (name -> ``value``,
        ``n``, ``standard_error``, ``unit``), ``samples`` (file of answers, in ``folder``); ``groups``: name -> ``tasks``, ``measures``.

    Raises:
        UserError: lmms-eval is not installed, a task cannot be made, or one has no result: the line names it and the first
            error of the run.
    """
    names, include = check_run(
        tasks=tasks,
        local=local,
        include_path=include_path,
        limit=limit,
        batch_size=batch_size,
        processes=processes,
    )
    folder = _new_folder(Path(out))
    if local:
        include = folder.resolve() / TASKS
        write_tasks(include, local)
    arguments = {
        "pretrained": str(Path(model).resolve()) if Path(model).exists() else model,
        **(model_args or {}),
    }
    command = [
        *(
            []
            if processes == 1
            else ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        ),
        *("-m", "lmms_eval", "--model", CHAT_MODEL if chat else MODEL),
        *("--model_args", _arguments(arguments, "model_args"), "--tasks", ",".join(names)),
        *("--batch_size", str(batch_size), "--output_path", OUTPUT, "--log_samples"),
    ]
    for option, value in (
        ("--include_path", include),
        ("--limit", limit),
        ("--device", device),
        ("--gen_kwargs", _arguments(gen_kwargs or {}, "gen_kwargs") or None),
    ):
        command += [] if value is None else [option, str(value)]
    if offline is None:
        offline = bool(local) and not tasks
    code = _run(command, folder, _environment(offline, device))
    try:
        found = read_results(folder, names)
    except UserError as error:
        why = first_error(folder / LOG, code)
        raise UserError(f"lmms-eval: {error}: {why} (all of it: {folder / LOG})") from error
    # lmms-eval's own word for it is the commit of the folder that it ran in.
    return {"lmms_eval": version("lmms-eval"), "folder": str(folder), **found}


def check_run(
    *,
    tasks: Sequence[str] | str = (),
    local: Mapping[str, Mapping[str, Any]] | None = None,
    include_path: str | None = None,
    limit: int | None = None,
    batch_size: int = 8,
    processes: int = 1,
    **_: Any,
) -> tuple[list[str], Path | None]:
    """What can be known before a run: that lmms-eval is there, and what is asked of it.

    Args:
        tasks, local, include_path, limit, batch_size, processes: as :func:`run_lmms` takes them, and the rest of them.

    Returns:
        names of all tasks, and the folder of further YAMLs.

    Raises:
        UserError: as :func:`run_lmms` says.
    """
    given = [name.strip() for name in tasks.split(",")] if isinstance(tasks, str) else list(tasks)
    names = [*given, *(local or {})]
    if not names:
        raise UserError("lmms: nothing is asked; give tasks: or local:")
    odd = [n for n in names if not isinstance(n, str) or not re.fullmatch(r"[^\s,-][^\s,]*", n) or n in LISTS]
    if odd:
        raise UserError(f"lmms: '{odd[0]}': no name of a task")
    twice = {name for name in names if names.count(name) > 1}
    if twice:
        raise UserError(f"lmms: task {sorted(twice)[0]}: given twice")
    for key, value in (("limit", limit), ("batch_size", batch_size), ("processes", processes)):
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            raise UserError(f"lmms: {key}: {value}: use a number, 1 or more")
    if local and include_path is not None:
        raise UserError(
            "lmms: local and include_path: use one; files can also be named in the YAMLs of the folder"
        )
    include = None if include_path is None else Path(include_path).resolve()
    if include is not None and not include.is_dir():
        raise UserError(f"lmms: include_path: {include_path}: no such folder")
    _refuse_missing()
    refuse_unknown(given, include)
    refuse_taken(list(local or {}))
    return names, include


def _refuse_missing() -> None:
    if find_spec("lmms_eval") is None:
        raise UserError(
            "lmms: lmms-eval is not installed in this environment; install Opsin with the extra 'eval', best in one of its "
            "own (`make .venv-eval/.ready`)"
        )
    if MODEL not in {point.name for point in entry_points(group="lmms_eval.models")}:
        raise UserError(
            "lmms: lmms-eval does not find Opsin's models; install Opsin anew (`pip install -e .`)"
        )


def _new_folder(out: Path) -> Path:
    """A folder that no earlier run wrote in, so that no earlier result is taken for this one's."""
    stamp, number = time.strftime("%Y%m%d-%H%M%S"), 1
    while True:
        folder = out / (stamp if number == 1 else f"{stamp}-{number}")
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            number += 1
        except OSError as error:
            raise UserError(f"lmms: {folder}: cannot be written ({error.strerror or error})") from error


def _arguments(values: Mapping[str, Any], what: str) -> str:
    """``key=value,...`` as lmms-eval reads it; what has a comma, a bracket or a quote goes into quotes."""
    parts = []
    for key, value in values.items():
        text = str(value)
        if any(c in text for c in ",'{}[]") or text != text.strip():
            if '"' in text or what == "gen_kwargs":
                raise UserError(f"lmms: {what}.{key}: {text}: cannot be handed on")
            text = f'"{text}"'
        elif '"' in text:
            raise UserError(f"lmms: {what}.{key}: {text}: cannot be handed on")
        parts.append(f"{key}={text}")
    return ",".join(parts)


def _environment(offline: bool, device: str | None) -> dict[str, str]:
    found = {key: value for key, value in os.environ.items() if key not in NOT_HANDED_ON}
    found["TOKENIZERS_PARALLELISM"] = "false"
    found["PYTHONUNBUFFERED"] = "1"
    if device == "cpu":
        found["ACCELERATE_USE_CPU"] = "true"
    if offline:
        found.pop("HF_TOKEN", None)
        found.update(OFFLINE)
    return found


def _run(command: Sequence[str], folder: Path, environment: dict[str, str]) -> int:
    """Run to the end; what it says goes into the log. The whole group of processes ends with us."""
    with (folder / LOG).open("wb") as log:
        # Tasks drop files where they run.
        process = subprocess.Popen(
            [sys.executable, *command], cwd=folder, env=environment, stdin=subprocess.DEVNULL, stdout=log,
            stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        try:
            return process.wait()
        except BaseException:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait()
            raise
        finally:
            shutil.rmtree(folder / TASKS / CACHE, ignore_errors=True)
