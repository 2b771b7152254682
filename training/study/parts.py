"""Parts that all runs of a study share: trained once, kept under the hash of what they are made by."""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from rich.console import Console

from ...data import scenes as scenes_package
from ...models import tiny, towers
from ...models.errors import UserError, nearest
from ...models.packaged import cache_folder
from ...models.shipped import shipped_file
from .. import autoencoder, fit, pretrain
from . import part_autoencoders, part_kinds

FOLDER, RECORD = "parts", "part.json"
MADE = 1_577_836_800
"""Time of every part's files. A run knows a model on disk by sizes and times, and a part that is made anew is the same part."""
_LIBRARIES = ("torch", "transformers", "timm", "diffusers", "numpy", "pillow")

part_kinds.KINDS.update(part_autoencoders.KINDS)


def check_parts(parts: Mapping[str, Any]) -> None:
    """Look at ``parts:`` of a study.

    Raises:
        UserError: an unknown kind or keyword; the line names the nearest one.
    """
    for name, given in parts.items():
        where = f"study: parts.{name}"
        if not isinstance(given, Mapping) or "kind" not in given:
            raise UserError(f"{where}: needs a kind: {', '.join(part_kinds.KINDS)}")
        kind = given["kind"]
        if not isinstance(kind, str) or kind not in part_kinds.KINDS:
            raise UserError(f"{where}.kind: '{kind}': unknown{nearest(str(kind), part_kinds.KINDS)}")
        parameters = inspect.signature(part_kinds.KINDS[kind]).parameters
        known = [p for p in parameters if p not in ("out", "console")]
        for key, value in given.items():
            if key == "kind":
                continue
            if key not in known:
                raise UserError(f"{where}.{key}: unknown key{nearest(str(key), known)}")
            default = parameters[key].default
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if isinstance(default, int | float) and (
                not number or (isinstance(default, int) and value != int(value)) or value < 0
            ):
                raise UserError(f"{where}.{key}: {value!r}: use a number such as {default}")


def part_folder(given: Mapping[str, Any]) -> Path:
    """Where a part is kept: its name says kind, settings and the code that makes it."""
    options = {k: v for k, v in given.items() if k != "kind"}
    body = json.dumps([given["kind"], sorted(options.items()), _code(given["kind"]), _versions()])
    digest = hashlib.blake2b(body.encode(), digest_size=8).hexdigest()
    return cache_folder() / FOLDER / f"{given['kind']}-{digest}"


def missing_parts(parts: Mapping[str, Any]) -> list[str]:
    """Names of those that are to be trained."""
    return [name for name, given in parts.items() if not (part_folder(given) / RECORD).is_file()]


def variables(parts: Mapping[str, Any]) -> list[str]:
    """``variables.NAME=FOLDER`` of every part: what each run of the study is told."""
    return [f"variables.{name}={part_folder(given)}" for name, given in parts.items()]


def make_parts(parts: Mapping[str, Any], console: Console) -> None:
    """Train what is not there yet; a part that was stopped is begun anew, a finished one is never touched.

    Raises:
        UserError: the cache cannot be written, or a keyword does not fit.
    """
    for name in missing_parts(parts):
        given = parts[name]
        folder = part_folder(given)
        console.print(f"part {name}: {given['kind']} -> {folder}", soft_wrap=True, highlight=False)
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            work = Path(tempfile.mkdtemp(prefix=f"{folder.name}-", dir=folder.parent))
        except OSError as error:
            raise UserError(
                f"cannot write to the cache folder {folder.parent} (set OPSIN_CACHE): {error}"
            ) from error
        try:
            options = {k: v for k, v in given.items() if k != "kind"}
            # A part must not depend on how many cores it was made with.
            threads = torch.get_num_threads()
            torch.set_num_threads(1)
            try:
                part_kinds.KINDS[given["kind"]](work, console, **options)
            finally:
                torch.set_num_threads(threads)
            (work / RECORD).write_text(json.dumps({"kind": given["kind"], **options}, indent=1) + "\n")
            for file in work.rglob("*"):
                os.utime(file, (MADE, MADE))
            if (folder / RECORD).is_file():
                continue  # another process was quicker: its part is in use
            if folder.is_dir():  # without a record: not whole
                shutil.rmtree(folder)
            try:
                work.replace(folder)
            except OSError:
                if not (folder / RECORD).is_file():
                    raise
        finally:
            shutil.rmtree(work, ignore_errors=True)


def _code(kind: str) -> str:
    """Hash of the sources, and of the weights that ship, which decide what a part of this kind is."""
    modules: list[ModuleType] = [part_kinds, pretrain, autoencoder, fit, tiny, towers]
    modules += [part_autoencoders] if kind in part_autoencoders.KINDS else []
    files = [Path(inspect.getfile(m)) for m in modules]
    files += [shipped_file("language_model")] if kind == "language_model" else []  # what it goes on from
    files += sorted(Path(inspect.getfile(scenes_package)).parent.glob("*.py"))
    digest = hashlib.blake2b(digest_size=8)
    for file in files:
        digest.update(file.name.encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()


def _versions() -> list[str]:
    """Those that decide what weights come out of the same code."""
    return [f"{name} {version(name)}" for name in _LIBRARIES]
