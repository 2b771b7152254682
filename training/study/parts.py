"""Parts that all runs of a study share: trained once, kept under the hash of what they are made by."""

from __future__ import annotations

import hashlib
import inspect
import json
import shutil
import tempfile
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from rich.console import Console

from ...algorithms.ross.targets import patches
from ...data import chat, collate, encode, packing, pieces
from ...data import scenes as scenes_package
from ...models import net, timm_maps, tiny, towers, vlm
from ...models.errors import UserError, nearest
from ...models.packaged import cache_folder
from ...models.shipped import shipped_file
from .. import autoencoder, fit, pretrain
from .. import models as training_models
from . import part_autoencoders, part_kinds

FOLDER, RECORD = "parts", "part.json"
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
    body = json.dumps([given["kind"], sorted(options.items()), _code(given), _versions()])
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


def modules_of(kind: str) -> list[ModuleType]:
    """Sources that decide what a part of this kind is, beside those of the scenes."""
    found: list[ModuleType] = [part_kinds, fit, tiny]
    if kind == "language_model":
        found += [pretrain, training_models, vlm, net, collate, encode, pieces, chat, packing]
    elif kind == "context_tower":
        found += [towers, timm_maps]
    elif kind in ("autoencoder", *part_autoencoders.KINDS):
        found += [autoencoder, patches, part_autoencoders]
    return found


def _code(given: Mapping[str, Any]) -> str:
    """Hash of the sources of a part, and of the weights from which it goes on."""
    kind = given["kind"]
    files = [Path(inspect.getfile(m)) for m in modules_of(kind)]
    files += sorted(Path(inspect.getfile(scenes_package)).parent.glob("*.py"))
    if kind == "language_model" and (start := given.get("start", "shipped")):
        files.append(shipped_file(kind) if start == "shipped" else Path(start))
    digest = hashlib.blake2b(digest_size=8)
    for file in files:
        digest.update(file.name.encode() + b"\0" + (file.read_bytes() if file.is_file() else b"") + b"\0")
    return digest.hexdigest()


def _versions() -> list[str]:
    """Those that decide what weights come out of the same code."""
    return [f"{name} {version(name)}" for name in _LIBRARIES]
