"""The audit of targets: the shipped auto-encoder holds colour and size, and a blind target is found out."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console

from opsin.algorithms.ross.targets import Target, make_target
from opsin.evaluation.target_audit import Audit, as_table, audit, audited_scenes, probe
from opsin.models.errors import UserError
from opsin.models.targets.base import fold
from opsin.training import autoencoder, cli


class Grey(Target):
    """Brightness of each cell: shapes and sizes, but no colour."""

    cell, dim, moments_dim, identity = 8, 4, 4, "grey"  # type: ignore[assignment]

    def encode(self, pictures: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        return fold(torch.nn.functional.avg_pool2d(pictures.mean(1, keepdim=True), 4), 2)


def test_the_shipped_autoencoder_holds_colour_and_size() -> None:
    """Measured with 4,000 + 1,000 scenes: colour .999, size .999 (n = 1526)."""
    rows = audit(make_target("autoencoder"), scenes=1000, held_out=400)
    assert [r.attribute for r in rows] == ["colour", "size"] and all(r.n > 500 for r in rows)
    assert all(r.passed and r.accuracy >= 0.97 for r in rows), rows
    colour, size = rows
    assert colour.majority < 0.25 and colour.elsewhere < 0.25
    assert 0.4 < size.majority < 0.65 and size.elsewhere < 0.75  # a place tells a little of a size


def test_a_target_without_colour_does_not_pass() -> None:
    colour, size = audit(Grey(), scenes=800, held_out=200)
    assert not colour.passed and colour.accuracy < 0.8 and colour.elsewhere < 0.3
    assert size.accuracy > size.elsewhere + 0.2


def test_the_mean_of_a_posterior_is_what_is_read() -> None:
    class WithNoise(Grey):
        moments_dim = 8

        def encode(self, pictures: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
            mean = super().encode(pictures, grid)
            return torch.cat([mean, torch.rand_like(mean)], -1)

    assert audit(WithNoise(), scenes=100, held_out=50) == audit(Grey(), scenes=100, held_out=50)


def test_the_probe_separates_what_is_separable_and_nothing_else() -> None:
    x = torch.randn(600, 6)
    y = x[:, :3].argmax(1)
    assert probe(x[:500], y[:500], x[500:], y[500:], 3) > 0.95
    noise = torch.randint(0, 3, (600,))
    assert probe(x[:500], noise[:500], x[500:], noise[500:], 3) < 0.5


def test_windows_lie_where_the_objects_are() -> None:
    """One token a pixel, with its place as channels: the middle of each window is the object's centre."""
    from opsin.data.scenes import scene
    from opsin.evaluation.target_audit import _windows

    shown = [scene(audited_scenes(), 3, "uniform", i) for i in range(20)]
    asked = [(i, j) for i, s in enumerate(shown) for j in range(len(s.objects))]
    rows, columns = torch.meshgrid(torch.arange(8.0), torch.arange(8.0), indexing="ij")
    maps = torch.stack([rows, columns]).expand(20, 2, 8, 8)
    found = _windows(maps, torch.tensor([i for i, _ in asked]), shown, asked, 8, 3).reshape(-1, 2, 3, 3)
    for (i, j), window in zip(asked, found, strict=True):
        left, top, side = shown[i].objects[j].frame
        row, column = window[:, 1, 1].tolist()
        assert row * 8 <= top + side / 2 < (row + 1) * 8 and column * 8 <= left + side / 2 < (column + 1) * 8


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"window": 2}, "window: an odd number of tokens, got 2"),
        ({"config": audited_scenes(60)}, "size: 60 pixels are no multiple of the target's cell of 8"),
        ({"held_out": 1}, "at least 2 each"),
    ],
)
def test_mistakes(more: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        audit(Grey(), **{"scenes": 10, "held_out": 10, **more})


def test_the_table_says_what_passed() -> None:
    console = Console(width=120, file=io.StringIO())
    console.print(
        as_table([Audit("colour", 100, 0.96, 0.02, 0.13, 0.12), Audit("size", 9, 0.5, 0.1, 0.5, 0.5)], "t")
    )
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "0.960 ±0.020" in text and "passed" in text and "below 0.95" in text


def test_the_commands(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setattr(autoencoder, "_MEASURED", 128)

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["opsin", *arguments])
        try:
            cli.main()
            code = 0
        except SystemExit as left:
            code = int(left.code or 0)
        said = capsys.readouterr()
        return code, said.out, said.err

    code, out, _ = run("data", "autoencoder", "--out", "mine.safetensors", "--steps", "2", "--seed", "1")
    assert code == 0 and (tmp_path / "mine.safetensors").is_file()
    options = ("--scenes", "100", "--held-out", "100")
    code, out, _ = run("data", "audit-target", "autoencoder", "--set", "weights=mine.safetensors", *options)
    assert code == 0 and "colour" in out and "another picture" in out and "passed" in out.splitlines()[-1]
    code, _, err = run("data", "audit-target", "autoencoder", "--set", "weight=mine.safetensors", *options)
    assert code == 2 and "did you mean 'weights'" in err and err.count("\n") == 1
    code, _, err = run("data", "audit-target", "pixls")
    assert code == 2 and "did you mean 'pixels'" in err
    code, _, err = run("data", "audit-target", "pixels", "--set", "cell=9", *options)
    assert code == 2 and "no multiple of the target's cell of 9" in err
