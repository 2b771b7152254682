"""``opsin data latents``: the stored values are the method's own, in the source's numbering, whatever kills it."""

from __future__ import annotations

import io
import json
import multiprocessing
import shutil
import time
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console
from streaming import MDSWriter
from typer.testing import CliRunner

from opsin.algorithms.jarvis import targets as jarvis_targets
from opsin.algorithms.ross.targets.pixels import PixelTarget
from opsin.data.batch import split_batch
from opsin.data.collate import VLMCollator
from opsin.data.loader import build_encoder
from opsin.data.patch_targets import COLUMN, DESCRIPTION, check, unpack, use_stored
from opsin.data.schema import COLUMNS, HASHES, pack_images, unpack_images
from opsin.data.sentences import SIDECAR, SentenceCounts, dataset_hash
from opsin.data.streaming import StreamingVLMDataset
from opsin.models.anatomy import anatomy_of, image_encoder_for
from opsin.models.errors import UserError
from opsin.models.export import export_model
from opsin.models.geometry import geometry_id
from opsin.models.vlm import VisionLanguageModel
from opsin.training import latents, registry
from opsin.training.config import load
from opsin.training.data_app import data_app
from opsin.training.models import scenes_llava
from opsin.training.stage_data import build_dataset

import runs
import zoo

pytestmark = pytest.mark.usefixtures("own_cache")
SAMPLES = [zoo.sample(i, images=i % 3, size=(20 + 4 * (i % 4), 16)) for i in range(24)]
SAMPLES[7]["images"] = SAMPLES[4]["images"]  # a picture that comes again
SAMPLES[10]["images"] = pack_images([b"no picture"])


def write(out: Any, samples: list[dict] = SAMPLES) -> str:
    with MDSWriter(out=str(out), columns=COLUMNS, hashes=list(HASHES), size_limit=2000) as writer:
        for sample in samples:
            writer.write(sample)
    return str(out)


def open_(remote: str, **options: Any) -> StreamingVLMDataset:
    return StreamingVLMDataset(remote=remote, batch_size=4, shuffle=False, **options)


class Family:
    def __init__(self, name: str):
        self.built = zoo.build(name)
        self.images = image_encoder_for(self.built.processor, self.built.hf.config)
        self.shows = anatomy_of(self.built.hf).pictures
        self.target = PixelTarget(cell=2)

    def make(self, source: str, out: Any, *, target: Any = None, **options: Any) -> str:
        said = io.StringIO()
        options = {
            "name": "ross",
            "sidecar": False,
            "threads": 2,
            "console": Console(file=said, width=300),
            **options,
        }
        latents.write(source, str(out), self.images, self.shows, target or self.target, **options)
        return said.getvalue()


@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_stored_values_are_those_of_training_up_to_bf16(family: str, tmp_path: Path) -> None:
    made = Family(family)
    source = write(tmp_path / "data")
    said = made.make(source, tmp_path / "side", sidecar=True)
    assert "24 samples in" in said and "1 could not be read" in said
    dataset = open_(source, patch_targets=str(tmp_path / "side"))
    info = dataset.patch_targets_info
    check(info, made.target.identity, geometry_id(made.images), "ross")
    assert (info.name, info.samples, info.moments_dim) == ("ross", 24, 12)
    encoder = build_encoder(made.built.processor, made.built.hf.config, template="plain", max_seq_len=512)
    batch = VLMCollator(encoder, packing=True)(list(dataset))
    assert int((batch["sample_status"] != 0).sum()) == 1  # the unreadable picture
    compared = 0
    for part in split_batch(batch, 6):
        if "pixel_values" in part:
            online = made.target.moments(made.shows(part, made.built.processor), part["view_grid"].tolist())
            assert torch.equal(part[COLUMN], online.bfloat16())
            compared += len(online)
    assert compared == len(batch[COLUMN]) > 100


def test_a_copy_has_the_rows_and_a_sidecar_the_numbering_of_the_source(tmp_path: Path) -> None:
    family, source = Family("llava"), write(tmp_path / "data")
    counts = SentenceCounts(dataset=dataset_hash((tmp_path / "data/index.json").read_bytes()))
    for sample in SAMPLES:
        counts.add(sample["conversations"])
    counts.save(tmp_path / "data" / SIDECAR)
    said = family.make(source, tmp_path / "copy")
    family.make(source, tmp_path / "side", sidecar=True)
    written = sum(p.stat().st_size for p in (tmp_path / "copy").glob("*.mds"))
    promised = float(said.split(" kB to write")[0].split()[-1]) * 1000
    assert abs(promised - written) < 0.1 * written
    copy = open_(str(tmp_path / "copy"))
    side = json.loads((tmp_path / "side/index.json").read_text())["shards"]  # no dataset by itself
    assert (
        [len(s) for s in copy.shards]
        == [s["samples"] for s in side]
        == [len(s) for s in open_(source).shards]
    )
    with pytest.raises(UserError, match="column 'conversations' is not there"):
        open_(str(tmp_path / "side"), patch_targets="ignore")
    assert len(copy.shards) > 3
    assert [{k: s[k] for k in COLUMNS} for s in copy] == SAMPLES
    joined = open_(source, patch_targets=str(tmp_path / "side"))
    assert [s[COLUMN] for s in joined] == [s[COLUMN] for s in copy]
    assert copy.patch_targets_info.kind == joined.patch_targets_info.kind
    assert copy.sentence_counts().counts == open_(source).sentence_counts().counts
    assert COLUMN not in open_(str(tmp_path / "copy"), patch_targets="ignore")[0]
    assert not (tmp_path / "copy" / ".partial").exists()
    first = [unpack(s[COLUMN]) for s in copy]
    assert torch.equal(first[4][0].values, first[7][0].values) and not first[0] and not first[10][0].grids
    with pytest.raises(UserError, match="not an empty folder"):
        family.make(source, tmp_path / "copy")


class Slow(PixelTarget):
    """Takes its time, as a large auto-encoder does, and fails at a given picture."""

    pictures_at_once = 1

    def __init__(self, seconds: float = 0.0, fails_at: int = -1):
        super().__init__(cell=2)
        self.seconds, self.left = seconds, fails_at

    def moments(self, pictures: Any, grids: Any) -> torch.Tensor:
        time.sleep(self.seconds)
        self.left -= 1
        if self.left == 0:
            raise RuntimeError("out of memory")
        return super().moments(pictures, grids)


def slowly(source: str, out: Path) -> None:
    torch.set_num_threads(1)  # a forked process has none of its parent's threads
    Family("llava").make(source, out, sidecar=True, target=Slow(0.1))


def test_a_killed_process_goes_on_where_it_was(tmp_path: Path) -> None:
    family, source = Family("llava"), write(tmp_path / "data")
    out, whole = tmp_path / "out", tmp_path / "whole"
    family.make(source, whole, sidecar=True)
    child = multiprocessing.get_context("fork").Process(target=slowly, args=(source, out))
    child.start()
    try:
        deadline = time.monotonic() + 60
        while len(list(out.glob("*.mds"))) < 3 and child.is_alive() and time.monotonic() < deadline:
            time.sleep(0.01)
        with pytest.raises(UserError, match="another process is writing there"):
            family.make(source, out, sidecar=True)
    finally:
        child.kill()  # SIGKILL
        child.join()
    there = {p.name: p.stat().st_mtime_ns for p in out.glob("*.mds")}
    assert 3 <= len(there) < len(list(whole.glob("*.mds"))) and not (out / "index.json").exists()
    with pytest.raises(UserError, match=r"no MDS dataset at"):
        open_(str(out))  # what is there does not look like a dataset
    with pytest.raises(UserError, match=r"holds a part of another job \(target: 'ross pixels cell=2"):
        family.make(source, out, sidecar=True, target=PixelTarget(cell=4))
    assert "shards are there already" in family.make(source, out, sidecar=True)
    again = {p.name for p in out.glob("*.mds") if there.get(p.name, 0) == p.stat().st_mtime_ns}
    assert len(again) >= 2  # only one that may not have been noted is written once more
    assert {p.name: p.read_bytes() for p in out.iterdir()} == {
        p.name: p.read_bytes() for p in whole.iterdir()
    }
    assert len(list(open_(source, patch_targets=str(out)))) == 24


def test_a_job_that_failed_goes_on_from_bucket_to_bucket(s3: Path, tmp_path: Path) -> None:
    family, source, out = Family("llava"), write("s3://data/latents/in"), "s3://data/latents/out"
    with pytest.raises(RuntimeError, match="out of memory"):
        family.make(source, out, target=Slow(fails_at=14))
    landed = s3 / "data" / "latents" / "out"
    there = {p.name: p.stat().st_mtime_ns for p in landed.iterdir()}
    assert len(there) > 2 and not (landed / "index.json").exists()
    assert f"{len(there)} shards are there already" in family.make(source, out)
    assert {name: (landed / name).stat().st_mtime_ns for name in there} == there
    family.make(write(tmp_path / "data"), tmp_path / "whole")
    files = {p.name: p.read_bytes() for p in (tmp_path / "whole").iterdir()}
    assert {p.name: p.read_bytes() for p in landed.iterdir()} == files
    copy = open_(out)
    assert copy.patch_targets_info.identity == family.target.identity
    assert [{k: s[k] for k in COLUMNS} for s in copy] == SAMPLES
    with pytest.raises(UserError, match=f"{out}: not empty"):
        family.make(source, out)


def test_a_disk_without_room_is_refused_before_anything_is_computed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    family, source = Family("llava"), write(tmp_path / "data")
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(1000, 0, 1000))
    with pytest.raises(UserError, match=r"out: needs \d+\.\d kB on the disk of .*, where 1.0 kB are free"):
        family.make(source, tmp_path / "out")
    monkeypatch.undo()
    family.make(source, tmp_path / "out", target=PixelTarget(cell=3))  # nothing holds the folder


def test_the_command_reads_model_folders_and_a_run_reads_what_it_wrote(
    tmp_path: Path, scenes: str, capsys: pytest.CaptureFixture
) -> None:
    built = zoo.build("llava")
    folder = export_model(VisionLanguageModel(built.hf, built.processor), tmp_path / "model")
    images, _ = latents.open_pictures(str(folder))
    assert geometry_id(images) == geometry_id(image_encoder_for(built.processor, built.hf.config))
    out = str(tmp_path / "side")
    latents.latents(
        scenes, out, "scenes_llava", target="pixels", settings=["cell=8"], sidecar=True, device="cpu"
    )
    assert "64 pictures computed" in capsys.readouterr().out
    loaded = load([runs.config_file(tmp_path, scenes)], [f"train_loader.dataset.patch_targets={out}"])
    dataset = build_dataset(loaded.run.train_loader.dataset, 4, 17)
    info = dataset.patch_targets_info
    assert info.identity == PixelTarget(cell=8).identity
    assert info.command.endswith("--model scenes_llava --method ross --target pixels --set cell=8 --sidecar")
    assert json.loads((tmp_path / "side" / DESCRIPTION).read_text())["samples"] == 64
    sample = dataset[3]
    assert len(unpack(sample[COLUMN])) == len(unpack_images(sample["images"])) == 1
    for arguments, message in (
        ({"model": "scenes_lava"}, "did you mean 'scenes_llava'"),
        ({"model": str(tmp_path / "none")}, "no run folder, no model folder"),
        ({"method": "rosss"}, "--method: unknown patch_target 'rosss'; did you mean 'ross'"),
        ({"target": "pixel"}, "--target: unknown target 'pixel'; did you mean 'pixels'"),
        ({"settings": ["cel=8"]}, "--target.cel: unknown key; did you mean 'cell'"),
    ):
        chosen = {"model": str(folder), "target": "pixels", **arguments}
        with pytest.raises(UserError) as error:
            latents.latents(scenes, str(tmp_path / "other"), **chosen)
        assert message in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "other").exists()
    assert "ross" in registry.patch_targets.names()


def run_features(*arguments: str) -> Any:
    return CliRunner().invoke(data_app, ["features", *arguments, "--device", "cpu"], catch_exceptions=False)


def test_features_are_stored_as_they_would_be_computed(tmp_path: Path, scenes: str) -> None:
    out = str(tmp_path / "side")
    typed = [scenes, out, "--model", "scenes_llava", "--target", "tower", "--set", "path=scenes", "--sidecar"]
    assert "64 pictures computed" in run_features(*typed).output
    config = runs.config_file(tmp_path, scenes)
    loaded = load([config], [f"train_loader.dataset.patch_targets={out}"])
    dataset = build_dataset(loaded.run.train_loader.dataset, 4, 17)
    info = dataset.patch_targets_info
    assert (
        info.command
        == f"opsin data features {scenes} {out} --model scenes_llava --target tower --set path=scenes --sidecar"
    )
    assert (info.name, info.moments_dim, info.made_with) == ("jarvis", 96, "opsin data features")
    target = jarvis_targets.make_target({"name": "tower", "path": "scenes"})
    assert info.identity == target.identity
    built = scenes_llava()
    encoder = build_encoder(built.processor, built.hf.config, template="plain", max_seq_len=512)
    collator = VLMCollator(encoder)
    batch = collator([dataset[i] for i in range(6)])
    online = target.moments(
        anatomy_of(built.hf).pictures(batch, built.processor), batch["view_grid"].tolist()
    )
    assert len(online) == 6 * 64
    assert torch.equal(batch[COLUMN], online.bfloat16())
    # What a method asks at its start.
    loader = SimpleNamespace(dataset=dataset, collate_fn=collator)
    command = "opsin data features"
    for stored, taken in (("auto", True), ("required", True), ("ignore", False)):
        assert use_stored(loader, "jarvis", stored, target.identity, "algorithms.jarvis", command) == taken
    assert not use_stored(loader, "ross", "auto", target.identity, "algorithms.ross")
    other = jarvis_targets.make_target({"name": "tower", "path": "scenes", "layer": -2}).identity
    for name, stored, identity, message in (
        ("jarvis", "auto", other, r"jarvis\.target: .* make them anew with `opsin data features`"),
        ("other", "required", other, r"jarvis\.stored: .* make them with `opsin data features`"),
    ):
        with pytest.raises(UserError, match=message):
            use_stored(loader, name, stored, identity, "algorithms.jarvis", command)


def test_features_go_on_and_say_what_is_wrong(tmp_path: Path, scenes: str) -> None:
    typed = [scenes, str(tmp_path / "out"), "--model", "scenes_llava", "--target", "tower"]
    for more, message in (
        (["--set", "path=nowhere"], r"^--target\.path 'nowhere': no such folder"),
        ([], r"^--target\.path: a run folder, a model folder or scenes is needed"),
        (["--set", "path=scenes", "--set", "layr=1"], r"^--target\.layr: unknown key; did you mean 'layer'"),
    ):
        with pytest.raises(UserError, match=message):
            run_features(*typed, *more)
    with pytest.raises(UserError, match=r"^--target: unknown target 'vae'; known: features, tower"):
        run_features(*typed[:-1], "vae")
    assert not (tmp_path / "out").exists()
    model = ["--set", "path=scenes", "--set", "layer=-2", "--set", "dtype=bfloat16"]
    latents.latents(
        scenes, str(tmp_path / "same"), "scenes_llava", method="jarvis", target="tower", settings=model[1::2],
        device="cpu", console=Console(quiet=True),
    )  # fmt: skip
    run_features(*typed, *model)
    one, other = (open_(str(tmp_path / name)) for name in ("same", "out"))
    assert one.patch_targets_info.kind == other.patch_targets_info.kind
    assert [s[COLUMN] for s in one] == [s[COLUMN] for s in other]
    assert "--method jarvis" in one.patch_targets_info.command
