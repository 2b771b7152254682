"""``runs/<run_name>/``: what every later tool reads.

config.yaml       the resolved configuration
metrics.jsonl     a line a step, Composer's metric names, with the stage
summary.json      scores by kind of question (trained, blind, blank, majority), seeds, versions, wall time
samples.png       held-out pictures with question, gold and predicted answer
skipped.jsonl     samples that could not be used, with the reason
checkpoints/<stage>/      Composer checkpoints, for resumption
processes.json    when each process of this run began and ended
stages.json, stack.json   what resumption compares: identities of the stages, versions
stages/<stage>/model/     the stage's model as a Hugging Face folder
model/                    the last stage's, for use
"""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers

from ..models.errors import UserError
from .config import Loaded
from .stages import Stage, resolved_yaml


class RunFolder:
    """Paths of a run.

    Args:
        root: folder of all runs (``run_root``).
        name: ``run_name``.
    """

    def __init__(self, root: str | Path, name: str):
        refuse_name(name, "run_name")
        self.root = Path(root)
        self.path = self.root / name
        self.config = self.path / "config.yaml"
        self.metrics = self.path / "metrics.jsonl"
        self.summary = self.path / "summary.json"
        self.samples = self.path / "samples.png"
        self.skipped = self.path / "skipped.jsonl"
        self.model = self.path / "model"

    def stage(self, name: str) -> Path:
        """Folder of a stage."""
        refuse_name(name, "stages")
        return self.path / "stages" / name

    def checkpoints(self, stage: str) -> Path:
        """Folder of a stage's checkpoints."""
        refuse_name(stage, "stages")
        return self.path / "checkpoints" / stage

    def open(self, loaded: Loaded, stages: list[Stage]) -> None:
        """Make the folder, or go on in it.

        Raises:
            UserError: it holds another run: stages begun with other settings under the same name; or it cannot
                be written.
        """
        identity = self.path / "stages.json"
        now = {s.name: s.identity for s in stages}
        try:
            before = json.loads(identity.read_text()) if identity.is_file() else {}
            changed = [n for n in (*now, *before) if before.get(n) != now.get(n)]
            begun = [n for n in changed if self._begun(n, loaded.run.save_folder)]
            if begun:
                raise UserError(
                    f"{self.path}: holds a run with other settings or data (stage {begun[0]}); choose another "
                    f"run_name, or remove the folder. To start from its weights: init_from={self.path}"
                )
            self._refuse_other_stack(stages)
            self.path.mkdir(parents=True, exist_ok=True)
            write_atomically(self.config, resolved_yaml(loaded))
            write_atomically(identity, json.dumps(now, indent=1) + "\n")
        except OSError as error:
            raise UserError(f"{self.path}: cannot be written: {error.strerror or error}") from error
        except ValueError as error:
            raise UserError(
                f"{self.path}: stages.json or stack.json cannot be read ({error}); choose another run_name"
            ) from error

    def _begun(self, stage: str, save_folder: str | None) -> bool:
        """Whether anything of a stage would be lost: a start that failed before its first checkpoint left nothing."""
        if (self.stage(stage) / "done.json").is_file():
            return True
        if save_folder and "://" in save_folder:
            return self.metrics.is_file()  # checkpoints are out of sight; steps were written down here
        folders = [self.checkpoints(stage), *([Path(save_folder) / stage] if save_folder else [])]
        return any(any(folder.glob("*")) for folder in folders)

    def _refuse_other_stack(self, stages: list[Stage]) -> None:
        """Composer checkpoints do not cross major versions of transformers, which name modules anew."""
        marker = self.path / "stack.json"
        now = {"transformers": transformers.__version__, "torch": str(torch.__version__)}
        if marker.is_file():
            before = json.loads(marker.read_text())
            half = [
                s.name for s in stages if self.finished(s) is None and any(self.checkpoints(s.name).glob("*"))
            ]
            if half and before["transformers"].split(".")[0] != now["transformers"].split(".")[0]:
                raise UserError(
                    f"{self.path}: stage {half[0]} was begun with transformers {before['transformers']} and its "
                    f"checkpoints do not load in {now['transformers']}; finish it there, or start another run from "
                    f"an export (`opsin export {self.path} FOLDER`, then init_from=FOLDER)"
                )
        self.path.mkdir(parents=True, exist_ok=True)
        write_atomically(marker, json.dumps(now, indent=1) + "\n")

    def finished(self, stage: Stage) -> Path | None:
        """Model folder of a stage that is done, else None."""
        marker = self.stage(stage.name) / "done.json"
        if not marker.is_file():
            return None
        body = json.loads(marker.read_text())
        model = self.path / body["model"]
        return model if body["identity"] == stage.identity and (model / "config.json").is_file() else None

    def shared(self, stage: Stage) -> Path | None:
        """Model of a finished stage with the same identity in any other run of this root, else None."""
        for marker in sorted(self.root.glob(f"*/stages/{stage.name}/done.json")):
            if marker.is_relative_to(self.path):
                continue
            try:
                body = json.loads(marker.read_text())
            except ValueError:
                continue
            model = marker.parents[2] / body["model"]
            if body["identity"] == stage.identity and (model / "config.json").is_file():
                return model
        return None

    def mark_finished(self, stage: Stage, model: Path, **facts: Any) -> None:
        """Say that a stage is done."""
        relative = os.path.relpath(model, self.path)
        body = {"identity": stage.identity, "model": relative, **facts}
        self.stage(stage.name).mkdir(parents=True, exist_ok=True)
        write_atomically(self.stage(stage.name) / "done.json", json.dumps(body, indent=1) + "\n")


def refuse_name(name: str, place: str) -> None:
    """Names of runs and stages become folders, and parts of Composer's format strings.

    Raises:
        UserError: one that would be another folder, or none.
    """
    odd = not name.isprintable() or any(c in name for c in "/\\{}")
    if odd or name.strip() in ("", ".", "..") or len(name.encode()) > 200:
        raise UserError(f"{place} '{name[:80]}': use a plain name, it becomes a folder".replace("\n", " "))


def refuse_unwritable(path: Path, place: str) -> None:
    """Try to write where a folder is going to be; nothing stays there.

    Raises:
        UserError: it cannot be made or written.
    """
    there = next((p for p in (path, *path.absolute().parents) if p.exists()), Path("/"))
    if not there.is_dir():
        raise UserError(f"{place}: '{there}' is a file, a folder is needed")
    try:
        with tempfile.TemporaryDirectory(prefix=".opsin-", dir=there):
            pass
    except OSError as error:
        raise UserError(f"{place}: cannot write in '{there}': {error.strerror or error}") from error


def write_atomically(path: Path, text: str) -> None:
    """Write a whole file or nothing."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)
