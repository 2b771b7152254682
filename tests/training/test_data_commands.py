"""``opsin data ...`` that write samples: each goes on where it was, says so, and refuses another job's remains."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import pytest
from PIL import Image

from opsin.data import scenes
from opsin.data.convert import easy_vqa, llava

import runs
from sources import files

pytestmark = pytest.mark.usefixtures("own_cache")
needs_package = pytest.mark.skipif(find_spec("easy_vqa") is None, reason="extra 'real' is not installed")
SMALL = 20_000  # bytes of a shard: the commands' own would need thousands of samples


def stop_at(number: int) -> Callable[[int], None]:
    def stop(done: int) -> None:
        if done == number:
            raise KeyboardInterrupt

    return stop


def goes_on(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
    words: tuple[str, ...],
    out: str,
    landed: Path,
    samples: int,
) -> None:
    """A command, given again."""
    code, said, error = runs.typed(monkeypatch, capsys, *words, "--out", out, "--workers", "1")
    assert code == 0, error
    first, last = said.strip().splitlines()[0], said.strip().splitlines()[-1]
    there, _, rest = first.removeprefix(f"{out}: ").partition(" ")
    assert 0 < int(there) < samples and rest == "samples are there already"
    assert last.startswith(f"{samples} samples in {out}")
    code, said, _ = runs.typed(monkeypatch, capsys, *words, "--out", f"{landed}-whole")
    assert code == 0 and "already" not in said
    assert files(landed) == files(Path(f"{landed}-whole"))
    code, said, error = runs.typed(monkeypatch, capsys, *words, "--out", out)
    assert code == 2 and ("not empty" in error) and error.count("\n") == 1


def test_scenes(
    s3: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(scenes, "write", partial(scenes.write, size_limit=SMALL))
    settings = {"config": scenes.SceneConfig(), "seed": 17, "split": "train", "stream": "vqa", "samples": 80}
    out = "s3://data/scenes"
    with pytest.raises(KeyboardInterrupt):
        scenes.write(out, **settings, progress=stop_at(60))
    code, _, error = runs.typed(
        monkeypatch, capsys, "scenes", "--samples", "80", "--set", "charts=0", "--out", out
    )
    assert code == 2 and "holds a part of another job (config.charts: '" in error and error.count("\n") == 1
    goes_on(monkeypatch, capsys, ("scenes", "--samples", "80"), out, s3 / "data/scenes", 80)


@needs_package
def test_easy_vqa(
    s3: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(easy_vqa, "write", partial(easy_vqa.write, size_limit=SMALL))
    out = "s3://data/easy"
    with pytest.raises(KeyboardInterrupt):
        easy_vqa.write(out, "test", limit=90, progress=stop_at(70))
    words = ("easy-vqa", "--split", "test", "--limit", "90")
    goes_on(monkeypatch, capsys, words, out, s3 / "data/easy", 90)
    code, _, error = runs.typed(monkeypatch, capsys, *words, "--limit", "0", "--out", str(tmp_path / "none"))
    assert code == 2 and error == "opsin: limit: at least 1, got 0\n"


def test_llava(
    s3: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(llava, "write", partial(llava.write, size_limit=SMALL))
    samples, pictures = [], tmp_path / "pictures"
    pictures.mkdir()
    for i in range(40):
        Image.effect_noise((32, 32), i).save(pictures / f"{i}.png")
        turns = [{"from": "human", "value": f"<image>\n{i}?"}, {"from": "gpt", "value": "Yes."}]
        samples.append({"id": str(i), "image": f"{i}.png", "conversations": turns})
    file = tmp_path / "llava.json"
    file.write_text(json.dumps(samples))
    (pictures / "35.png").rename(tmp_path / "away.png")
    words, out = ("llava", str(file), str(pictures)), "s3://data/llava"
    code, _, error = runs.typed(monkeypatch, capsys, *words, "--out", out)
    assert code == 2 and error.startswith("opsin: sample 35 (id '35'): '35.png': no such file in")
    assert not (s3 / "data/llava/index.json").exists()
    (tmp_path / "away.png").rename(pictures / "35.png")
    goes_on(monkeypatch, capsys, words, out, s3 / "data/llava", 40)
