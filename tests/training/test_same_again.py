"""``benchmarks/same_again.py``: equal means equal to the byte, and nothing to compare is no success."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="module")
def same_again() -> ModuleType:
    path = Path(__file__).resolve().parents[2] / "benchmarks" / "same_again.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def study(root: Path, *runs: str) -> Path:
    """A folder as a study of two stages leaves it."""
    for run in runs:
        files = {
            f"cells/{run}/cell.json": "{}",
            f"cells/{run}/predictions.jsonl": '{"answer": "red"}\n',
            f"runs/{run}/stages.json": json.dumps({"align": "1", "instruct": "2"}),
            f"runs/{run}/stages/align/model/model.safetensors": "first",
            f"runs/{run}/stages/instruct/model/model.safetensors": "second",
            f"runs/{run}/model/model.safetensors": "second",
        }
        for name, text in files.items():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_text(text)
    return root


def test_equal_runs(same_again: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, again = study(tmp_path / "a", "ross-17", "ross-18"), study(tmp_path / "b", "ross-17")
    assert same_again.main([str(first), str(again)]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said == [
        "ross-17: equal to the byte: align, instruct, model, predictions",
        "1 of 1 runs equal; 1 of the study's are not in b",
    ]


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("runs/ross-17/stages/align/model/model.safetensors", "align"),
        ("runs/ross-17/model/model.safetensors", "model"),
        ("cells/ross-17/predictions.jsonl", "predictions"),
    ],
)
@pytest.mark.parametrize("how", ["changed", "missing", "missing in both"])
def test_what_differs_is_named(
    same_again: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], file: str, name: str, how: str
) -> None:
    first, again = study(tmp_path / "a", "ross-17"), study(tmp_path / "b", "ross-17")
    if how == "changed":
        (again / file).write_text("x" * (again / file).stat().st_size)  # as long as before
    else:
        (again / file).unlink()
    if how == "missing in both":
        (first / file).unlink()
    assert same_again.main([str(first), str(again)]) == 1
    assert f"ross-17: differs: {name}\n" in capsys.readouterr().out


def test_nothing_to_compare_is_told(
    same_again: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, other = study(tmp_path / "a", "ross-17"), study(tmp_path / "b", "l2t-17")
    for second, why in (
        (tmp_path / "mistyped", "no study"),
        (first, "is the same folder"),
        (other, "none of its runs"),
    ):
        assert same_again.main([str(first), str(second)]) == 2
        assert why in capsys.readouterr().err
