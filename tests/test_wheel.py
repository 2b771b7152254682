"""What an ordinary install gets: every module, YAML, card and weight; no tests and no benchmarks."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from opsin import __version__

ROOT = Path(__file__).parent.parent
PACKAGES = ("algorithms", "data", "evaluation", "models", "training", "yamls")
ELSEWHERE = shutil.ignore_patterns(
    ".*", "__pycache__", "build", "dist", "runs", "demo-data", "*.egg-info", "docs"
)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """A wheel built from a copy: an old ``build`` folder would lend it modules that are gone."""
    source = tmp_path_factory.mktemp("source") / "opsin"
    shutil.copytree(ROOT, source, ignore=ELSEWHERE)
    out = source.parent / "wheel"
    done = subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(source)],
        cwd=source.parent, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    (built,) = out.glob("*.whl")
    return zipfile.ZipFile(built)


def on_disk(suffix: str) -> set[str]:
    """Files of the packages, as a wheel names them."""
    return {
        f"opsin/{path.relative_to(ROOT).as_posix()}"
        for package in PACKAGES
        for path in (ROOT / package).rglob(f"*{suffix}")
        if "__pycache__" not in path.parts
    }


def inside(wheel: zipfile.ZipFile, suffix: str) -> set[str]:
    return {name for name in wheel.namelist() if name.endswith(suffix) and ".dist-info/" not in name}


def test_every_module_on_disk_is_in_the_wheel_and_nothing_else(wheel: zipfile.ZipFile) -> None:
    """Packages are listed by name in pyproject.toml, so a new folder is easily forgotten."""
    assert inside(wheel, ".py") == on_disk(".py") | {"opsin/__init__.py"}


@pytest.mark.parametrize("suffix", [".yaml", ".safetensors", ".md", ".html", ".css", ".js"])
def test_what_is_no_code_comes_along(wheel: zipfile.ZipFile, suffix: str) -> None:
    assert inside(wheel, suffix) == on_disk(suffix)
    assert suffix == ".md" or on_disk(suffix)


def test_tests_and_benchmarks_stay_at_home(wheel: zipfile.ZipFile) -> None:
    folders = {name.split("/")[1] for name in wheel.namelist() if name.startswith("opsin/")}
    assert folders == {"__init__.py", *PACKAGES}
    assert {name.split("/")[0].split("-")[0] for name in wheel.namelist()} == {"opsin"}


def test_the_wheel_says_what_it_is(wheel: zipfile.ZipFile) -> None:
    names = {name.split(".dist-info/")[1] for name in wheel.namelist() if ".dist-info/" in name}
    assert {"METADATA", "entry_points.txt", "licenses/LICENSE"} <= names
    (folder,) = {name.split("/")[0] for name in wheel.namelist() if ".dist-info/" in name}
    metadata = wheel.read(f"{folder}/METADATA").decode()
    assert f"Version: {__version__}\n" in metadata and "License-Expression: Apache-2.0\n" in metadata
    assert "opsin = opsin.training.cli:main" in wheel.read(f"{folder}/entry_points.txt").decode()
