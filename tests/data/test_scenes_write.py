"""Scenes as shards: they hold what ``sample`` gives, whoever generated it, with the counts beside them."""

from __future__ import annotations

import json
from hashlib import sha1

import pytest

from opsin.data.scenes import SceneConfig, sample, template_sentences, write
from opsin.data.sentences import SIDECAR, SentenceCounts
from opsin.models.errors import UserError

CONFIG = SceneConfig()
SETTINGS = {"config": CONFIG, "seed": 4, "split": "train", "stream": "vqa"}


def test_shards_hold_the_records_and_the_sidecar_their_sentences(tmp_path):
    from streaming import LocalDataset

    out, other = tmp_path / "one", tmp_path / "two"
    other.mkdir()  # an empty folder is welcome
    done: list[int] = []
    counts = write(out, **SETTINGS, samples=150, size_limit=1 << 17, progress=done.append)
    write(str(other), **SETTINGS, samples=150, size_limit=1 << 17, workers=1)
    assert done == list(range(1, 151))
    names = sorted(p.name for p in out.iterdir())
    assert "index.json" in names and SIDECAR in names and len(names) > 3  # several shards
    assert names == sorted(p.name for p in other.iterdir())
    assert all((out / name).read_bytes() == (other / name).read_bytes() for name in names)
    dataset = LocalDataset(str(out))
    assert len(dataset) == 150
    expected = SentenceCounts()
    for i in range(150):
        record = sample(CONFIG, 4, "train", i, "vqa")
        assert dict(dataset[i]) == record
        expected.add(record["conversations"])
    stored = SentenceCounts.load(out / SIDECAR)
    assert stored.dataset == counts.dataset == sha1((out / "index.json").read_bytes()).hexdigest()
    assert stored.templates == counts.templates == template_sentences(CONFIG)
    assert counts.counts == expected.counts and (stored.turns, stored.words) == (
        expected.turns,
        expected.words,
    )
    assert stored.counts["answer briefly"] == stored.turns
    with pytest.raises(UserError, match="not an empty folder"):
        write(out, **SETTINGS, samples=10)


def test_text_streams_count_nothing_and_a_broken_run_leaves_no_index(tmp_path):
    counts = write(tmp_path / "text", **{**SETTINGS, "stream": "text"}, samples=20)
    assert counts.turns == 0 and counts.templates
    assert json.loads((tmp_path / "text" / SIDECAR).read_text())["turns"] == 0

    def stop(done: int) -> None:
        if done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "broken", **SETTINGS, samples=20, progress=stop)
    assert not (tmp_path / "broken" / "index.json").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"samples": 0}, "samples: at least 1"),
        ({"samples": 3, "split": "minimal_pairs"}, "an even number"),
        ({"samples": 3, "split": "uniforms"}, "did you mean 'uniform'"),
        ({"samples": 3, "stream": "captions"}, "did you mean 'caption'"),
    ],
)
def test_wrong_settings_write_nothing(tmp_path, change, message):
    with pytest.raises(UserError, match=message):
        write(tmp_path / "out", **{**SETTINGS, **change})
    assert not (tmp_path / "out").exists()


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "file").write_text("here already")
    with pytest.raises(UserError, match="not an empty folder"):
        write(tmp_path / "file", **SETTINGS, samples=1)
