"""Auto-encoders of diffusers: how their weights are loaded."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ....models.errors import UserError, nearest
from ....models.targets.frozen import WHERE, one_line


def autoencoder(
    cls: Any, path: str | None, subfolder: str | None, config: Mapping[str, Any] | None, example: str
) -> Any:
    """An auto-encoder of diffusers, with its weights or, where only ``config`` is given, with random ones.

    Args:
        cls: class of diffusers.
        path: folder or hub name.
        subfolder: inside it.
        config: arguments of ``cls``, in place of a path.
        example: what a path may look like, for the message.

    Raises:
        UserError: neither or both of path and config; no such model, one of another class, weights that are no
            safetensors or not all there.
    """
    if (path is None) == (config is None):
        raise UserError(f"{WHERE}.path: one of path ({example}) and config (random weights) is needed")
    if config is not None:
        return _random(cls, config)
    place = f"{WHERE}.path '{path}'" + (f", subfolder '{subfolder}'" if subfolder else "")
    inside = Path(str(path)) / (subfolder or "")
    if inside.is_dir() and not (inside / "config.json").is_file():
        below = sorted(p.parent.name for p in inside.glob("*/config.json"))
        hint = f"; set subfolder to one of {', '.join(below)}" if below else ""
        raise UserError(f"{place}: no config.json there{hint}")
    if not inside.is_dir() and str(path).startswith(("/", ".", "~")):
        raise UserError(f"{place}: no such folder")
    where: dict[str, Any] = {"subfolder": subfolder} if subfolder else {}
    try:
        stored = cls.load_config(path, **where)
        found = stored.get("_class_name", cls.__name__)
        if found != cls.__name__:
            raise UserError(f"{place}: this is a {found}, a {cls.__name__} is needed")
        module, report = cls.from_pretrained(path, use_safetensors=True, output_loading_info=True, **where)
    except UserError:
        raise
    except Exception as error:  # hub, cache, names, shapes: a dozen kinds
        raise UserError(f"{place}: cannot be loaded ({one_line(error)})") from error
    missing = report.get("missing_keys") or []  # diffusers warns, and leaves them random
    if missing:
        raise UserError(f"{place}: the weights have no '{sorted(missing)[0]}' ({len(missing)} are missing)")
    return module


def _random(cls: Any, config: Mapping[str, Any]) -> Any:
    known = [p for p in inspect.signature(cls.__init__).parameters if p != "self"]
    for key in config:
        if key not in known:
            raise UserError(f"{WHERE}.config.{key}: unknown key{nearest(str(key), known)}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # the same on every rank
        try:
            return cls(**config)
        except Exception as error:
            raise UserError(f"{WHERE}.config: {cls.__name__} refuses it ({one_line(error)})") from error
