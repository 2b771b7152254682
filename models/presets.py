"""Configurations of well-known models for looking at a run where the hub is out of reach: numbers, no weights.

``opsin train --check`` and ``opsin plan`` build models on the meta device. All they need of a hub name are its
configuration, its image processor's settings and the size of its vocabulary; ``yamls/models/*.yaml`` hold these for the
models that the recipes name. Training never reads them.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from .errors import UserError

_KEYS = {"names", "config", "preprocessor", "processor", "tokenizer"}
_folders: tempfile.TemporaryDirectory[str] | None = None
_by_configuration: ContextVar[bool] = ContextVar("by_configuration", default=False)


@contextmanager
def by_configuration() -> Iterator[None]:
    """Within, targets of methods that would be loaded from a hub name with a preset are built from the preset."""
    token = _by_configuration.set(True)
    try:
        yield
    finally:
        _by_configuration.reset(token)


@lru_cache(1)
def presets() -> dict[str, Path]:
    """Hub name -> the file that has its configuration."""
    found: dict[str, Path] = {}
    for file in sorted(Path(str(resources.files("opsin.yamls"))).glob("models/*.yaml")):
        for name in _read(file)["names"]:
            found[str(name)] = file
    return found


def preset_of(name: Any) -> Path | None:
    """The file that stands in for a hub name; None: there is none, or the name is a folder or in the hub's cache."""
    if not isinstance(name, str) or name not in presets() or Path(name).is_dir():
        return None
    from huggingface_hub import try_to_load_from_cache

    return None if isinstance(try_to_load_from_cache(name, "config.json"), str) else presets()[name]


def target_preset(name: Any) -> Path | None:
    """:func:`preset_of` within :func:`by_configuration`, else None."""
    return preset_of(name) if _by_configuration.get() else None


def configuration(file: Path) -> dict[str, Any]:
    """The ``config`` of a preset: what the hub's ``config.json`` says."""
    return dict(_read(file)["config"])


def stand_ins(spec: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """A model's keywords with hub names replaced by folders of presets, where they are needed.

    The folders have configuration, image processor and a tokenizer of the right size whose words mean nothing: enough
    to build the model on the meta device, not to encode text.

    Args:
        spec: the ``model:`` section.

    Returns:
        the keywords, and hub name -> file for each name that was replaced.
    """
    used: dict[str, str] = {}

    def walk(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {k: walk(v) for k, v in value.items()}
        file = preset_of(value)
        if file is None:
            return value
        used[value] = f"yamls/models/{file.name}"
        return str(_folder(file))

    return walk(dict(spec)), used


@lru_cache(32)
def _read(file: Path) -> dict[str, Any]:
    content = yaml.safe_load(file.read_text(encoding="utf-8"))
    if not isinstance(content, dict) or not {"names", "config"} <= set(content) <= _KEYS:
        raise UserError(f"{file}: a preset has names and config, and may have {', '.join(sorted(_KEYS))}")
    return content


@lru_cache(32)
def _folder(file: Path) -> Path:
    """A Hugging Face folder of a preset, without weights; it is gone when the process is."""
    global _folders
    if _folders is None:
        _folders = tempfile.TemporaryDirectory(prefix="opsin-presets-")
    folder, content = Path(_folders.name) / file.stem, _read(file)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(content["config"]))
    for key in ("preprocessor", "processor"):
        if key in content:
            (folder / f"{key}_config.json").write_text(json.dumps(content[key]))
    if "tokenizer" in content:
        _tokenizer(**content["tokenizer"]).save_pretrained(folder)
    return folder


def _tokenizer(size: int, specials: Mapping[str, int] | None = None) -> Any:
    """A tokenizer of ``size`` entries without meaning; ``specials``: token -> id."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    named = {i: token for token, i in (specials or {}).items()}
    words = {named.get(i, f"<entry {i}>"): i for i in range(size)}
    raw = Tokenizer(models.WordLevel(words, unk_token=next(iter(words))))
    raw.add_special_tokens(list(specials or {}))
    ends = {"eos_token": named.get(max(named))} if named else {}
    return PreTrainedTokenizerFast(tokenizer_object=raw, unk_token=next(iter(words)), **ends)
