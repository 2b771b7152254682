"""Checkpoints across layouts: what one process, DDP and FSDP2 write, the others load; conversion to the bit and back."""

from __future__ import annotations

import os
import shutil
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from composer.callbacks import checkpoint_saver
from composer.utils import checkpoint as stock
from composer.utils import maybe_create_object_store_from_uri

from opsin.models.errors import UserError
from opsin.training import cli, compat
from opsin.training.checkpoints import (
    LATEST,
    SHARDED,
    WHOLE,
    before_resuming,
    convert,
    form_of,
    in_form,
    read,
)

import jobs
import restarts
from ranks import RankPool
from restarts import STEPS, cut_back, equal, flat, served, told

FSDP2 = {"parallelism_config": {"fsdp2": {}}}


@pytest.fixture(scope="module")
def one() -> Path:
    return restarts.one()


@pytest.fixture(scope="module")
def two(ranks: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run on two ranks, sharded."""
    config = restarts.config(tmp_path_factory.mktemp("two"), **FSDP2)
    return Path(ranks.run("restarts:run", files=[config], timeout=240)[0])


def saved(run: Path, batch: int) -> Path:
    [path] = [p for p in (run / "checkpoints" / "instruct").iterdir()
              if p.name.removesuffix("-rank0.pt").endswith(f"-ba{batch}")]  # fmt: skip
    return path


def resumed(whole: Path, tmp_path: Path, batch: int, ranks: RankPool | None, **more: Any) -> Path:
    """The rest of a run under another layout, from the checkpoint that it had made by then."""
    cut_back(whole, tmp_path / "runs" / "four", batch)
    config = restarts.config(tmp_path, **more)
    if ranks is None:
        return Path(restarts.run([config]))
    return Path(ranks.run("restarts:run", files=[config], timeout=240)[0])


def went_on(run: Path, one: Path, batch: int) -> None:
    """Losses, samples and dice of the rest are those of the run that nobody stopped."""
    expected, got = served(one), served(run)
    assert list(got) == list(range(batch, STEPS))
    assert got == {step: expected[step] for step in got}
    restarts.same(told(run), told(one), 1e-5)


def put_back(run: Path, checkpoint: Path) -> None:
    """What was loaded, and saved again at once in the new layout, is to the bit what the checkpoint holds."""
    [again] = [p for p in (run / "stages" / "instruct" / "served" / "resaved").iterdir() if form_of(p)]
    assert form_of(again) != form_of(checkpoint)
    before, after = (flat(read(p)["state"]) for p in (checkpoint, again))
    for part in ("model", "optimizers", "algorithms", "callbacks", "schedulers", "dataset_state"):
        names = {
            n for n in before if n.startswith(f"/{part}/") and not n.endswith("/repr")
        }  # it has an address
        if part == "callbacks":  # Composer's own list of what it has written
            names = {n for n in names if "CheckpointSaver" not in n}
        assert names, part
        different = [n for n in sorted(names) if n not in after or not equal(before[n], after[n])]
        assert not different, different[:5]
    heads = {n.split(".")[2] for n in before if n.startswith("/model/net.auxiliary.")}
    assert heads == {"ross", "jarvis"}


# From one layout to the other, all four methods on


@pytest.mark.world
def test_what_fsdp2_has_begun_one_process_ends(tmp_path: Path, one: Path, two: Path) -> None:
    restarts.same(told(two), told(one), 1e-5)
    run = resumed(two, tmp_path, 4, None)
    went_on(run, one, 4)
    put_back(run, saved(two, 4))
    # From here on in its own form.
    assert form_of(saved(run, 6)) == WHOLE and form_of(run / "checkpoints" / "instruct" / LATEST) == WHOLE


@pytest.mark.world
def test_what_one_process_has_begun_fsdp2_ends(tmp_path: Path, one: Path, ranks: RankPool) -> None:
    run = resumed(one, tmp_path, 4, ranks, **FSDP2)
    went_on(run, one, 4)
    put_back(run, saved(one, 4))
    assert form_of(saved(run, 6)) == SHARDED
    assert not list((run / "checkpoints").rglob(".opsin-converted-*"))


@pytest.mark.slow
@pytest.mark.world
@pytest.mark.parametrize("batch", [2, 8])  # early; between two epochs
def test_what_fsdp2_has_begun_ddp_ends_and_the_reverse(
    tmp_path: Path, one: Path, two: Path, ranks: RankPool, batch: int
) -> None:
    ddp = resumed(two, tmp_path / "a", batch, ranks)
    went_on(ddp, one, batch)
    put_back(ddp, saved(two, batch))
    sharded = resumed(ddp, tmp_path / "b", 8, ranks, **FSDP2)
    if batch < 8:
        went_on(sharded, one, 8)


@pytest.mark.world
def test_a_run_may_be_started_from_either_form_by_name(tmp_path: Path, one: Path, two: Path) -> None:
    """``load_path``, from where nothing may be written."""
    given = tmp_path / "theirs" / "ep0-ba8"
    shutil.copytree(saved(two, 8), given)
    given.parent.chmod(0o555)
    try:
        run = Path(restarts.run([restarts.config(tmp_path, load_path=str(given))]))
    finally:
        given.parent.chmod(0o755)
    restarts.same(told(run), told(one)[8:], 1e-5)


# Conversion


@pytest.mark.world
def test_conversion_and_back_changes_no_bit(tmp_path: Path, one: Path, two: Path) -> None:
    for name, source in (("one", saved(one, 4)), ("two", saved(two, 4))):
        there, back = tmp_path / f"{name}-there", tmp_path / f"{name}-back"
        forms = form_of(source), convert(source, there), convert(there, back)
        assert forms in ((WHOLE, SHARDED, WHOLE), (SHARDED, WHOLE, SHARDED))
        a, b, c = (flat(read(p)) for p in (source, there, back))
        # A distributed checkpoint does not know empty containers; they have no leaves either.
        assert set(a) == set(b) == set(c)
        assert all(equal(a[n], b[n]) and equal(a[n], c[n]) for n in a)
        kinds = {n.split("/")[2] for n in a if n.startswith("/state/")}
        assert {"model", "optimizers", "algorithms", "callbacks", "timestamp", "dataset_state"} <= kinds
        assert any(n.endswith("/exp_avg") and "net.auxiliary.jarvis" in n for n in a)
        assert any(n.startswith("/rng/0/") for n in a)
    assert not list(tmp_path.glob(".*"))


def test_the_command_converts(
    one: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    def typed(*words: str) -> tuple[int, str]:
        monkeypatch.setattr("sys.argv", ["opsin", "checkpoint", "convert", *words])
        with pytest.raises(SystemExit) as left:
            cli.main()
            raise SystemExit(0)
        said = capsys.readouterr()
        return int(left.value.code or 0), said.out + said.err

    source = one / "checkpoints" / "instruct" / LATEST
    code, said = typed(str(source), str(tmp_path / "sharded"))
    assert (
        code == 0 and "sharded" in said and f"batch {STEPS}" in said and "ROSS" in said and "JARVIS" in said
    )
    assert (tmp_path / "sharded" / ".metadata").is_file()
    for words, expected in (
        ((str(source), str(tmp_path / "sharded")), "exists; name a new file or folder"),
        ((str(tmp_path / "nothing"), str(tmp_path / "x")), "no checkpoint (a file ….pt, or a folder with .metadata)"),
    ):  # fmt: skip
        code, said = typed(*words)
        assert code == 2 and expected in said and len(said.strip().splitlines()) == 1


def test_what_cannot_be_converted_is_one_line_and_leaves_nothing(
    tmp_path: Path, one: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    half = tmp_path / "half.pt"
    half.write_bytes(saved(one, 4).read_bytes()[:5000])
    with pytest.raises(UserError, match=r"half\.pt: cannot be read") as error:
        convert(half, tmp_path / "a")
    assert "\n" not in str(error.value)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=1000))
    with pytest.raises(UserError, match=r"GB are needed in .* to convert it, and 0.0 GB are free"):
        convert(saved(one, 4), tmp_path / "b")
    assert [p.name for p in tmp_path.iterdir()] == ["half.pt"]


class Malicious:
    """Unpickled, it makes a folder."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("form", [WHOLE, SHARDED])
def test_conversion_runs_no_code_of_a_checkpoint(tmp_path: Path, form: str) -> None:
    made, source = tmp_path / "made", tmp_path / "given"
    body = {"state": {"model": {"w": torch.ones(2)}, "evil": Malicious(made)}}
    if form == WHOLE:
        torch.save(body, source)
    else:
        dcp.save(body, checkpoint_id=source, no_dist=True)
    # Found by name, as in a run that resumes.
    with (
        pytest.raises(BaseException, match="more than tensors and plain data"),
        in_form(str(source), form == WHOLE),
    ):
        pass
    with pytest.raises(BaseException, match="more than tensors and plain data"):
        convert(source, tmp_path / "to")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["given"]


# Object stores


@pytest.fixture
def stored(s3: Path, one: Path) -> Path:
    """A sharded checkpoint and a whole one of batch 8 in a bucket, and Composer's link to the first."""
    place = s3 / "data" / "checkpoints" / "instruct"
    if not place.is_dir():
        convert(saved(one, 8), place / "ep1-ba8")
        shutil.copy(saved(one, 8), place / "whole.pt")
        (place / f"{LATEST}.symlink").write_text("checkpoints/instruct/ep1-ba8")
    return place


def test_checkpoints_in_an_object_store_are_loaded_in_either_form(stored: Path, one: Path) -> None:
    store = maybe_create_object_store_from_uri("s3://data/checkpoints")
    assert store is not None
    for name, sharded in (("ep1-ba8", False), ("whole.pt", True), (f"{LATEST}.symlink", False)):
        with in_form(f"checkpoints/instruct/{name}", sharded, store) as (path, none):
            assert none is None and form_of(path) == (SHARDED if sharded else WHOLE)
            a, b = flat(read(path)), flat(read(saved(one, 8)))
            assert set(a) == set(b) and all(equal(a[n], b[n]) for n in a)
        assert not Path(path).exists()
    with in_form("checkpoints/instruct/whole.pt", False, store) as given:
        assert given == ("checkpoints/instruct/whole.pt", store)
    assert before_resuming("s3://data/checkpoints/instruct", sharded=True) is None
    found = before_resuming("s3://data/checkpoints/instruct", sharded=False)
    assert found == "s3://data/checkpoints/instruct/ep1-ba8"
    assert before_resuming("s3://data/checkpoints/align", sharded=False) is None


@pytest.mark.slow  # Composer uploads with patience
def test_a_sharded_run_in_an_object_store_goes_on_in_one_process(
    stored: Path, one: Path, tmp_path: Path
) -> None:
    """Stock Composer passes over what FSDP2 has written there, and begins anew."""
    run = Path(restarts.run([restarts.config(tmp_path, save_folder="s3://data/checkpoints")]))
    restarts.same(told(run), told(one)[8:], 1e-6)
    assert list(served(run)) == [8, 9]


# Faults of Composer that are worked around; each test fails when the fault is gone


def test_composer_still_loads_only_the_form_that_it_writes(tmp_path: Path, one: Path) -> None:
    """``compat.load_checkpoints_of_either_form``."""
    convert(saved(one, 2), tmp_path / "sharded")
    unpatched = stock.load_checkpoint._stock  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="load_path must be a directory"):
        stock.load_sharded_checkpoint(str(saved(one, 2)), SimpleNamespace(fsdp_config=object()), None)  # type: ignore[arg-type]
    state: Any = SimpleNamespace(
        run_name="x", fsdp_sharded_state_dict_enabled=False, load_monolith_rank0_only=False
    )
    with pytest.raises((IsADirectoryError, OSError)):
        unpatched(str(tmp_path / "sharded"), state, None)
    compat.apply()
    assert stock.load_checkpoint._stock is unpatched  # type: ignore[attr-defined]


def test_composer_still_takes_its_link_away_before_it_makes_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``checkpoints.before_resuming``."""

    def killed(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    options = {"save_folder": str(tmp_path), "save_interval": "1ba"}
    jobs.train(steps=1, trainer=options)
    assert (tmp_path / LATEST).exists()
    monkeypatch.setattr(checkpoint_saver.os, "symlink", killed)
    with pytest.raises(KeyboardInterrupt):
        jobs.train(steps=1, trainer={**options, "save_overwrite": True})
    monkeypatch.undo()
    assert not (tmp_path / LATEST).exists(), "Composer keeps its link: checkpoints._mend_latest can go"
    before_resuming(str(tmp_path), sharded=False)
    assert (tmp_path / LATEST).resolve().name == "ep0-ba1-rank0.pt"


def test_the_link_is_made_again_to_the_newest_checkpoint_that_is_complete(tmp_path: Path, one: Path) -> None:
    shutil.copy(saved(one, 2), tmp_path)
    convert(saved(one, 4), tmp_path / "ep0-ba4")
    (tmp_path / "ep0-ba6-rank0.pt").write_bytes(
        saved(one, 6).read_bytes()[:-100]
    )  # the kill came while it was written
    (tmp_path / "ep0-ba8").mkdir()
    (tmp_path / "ep0-ba8" / "__0_0.distcp").write_bytes(b"half")
    assert not zipfile.is_zipfile(tmp_path / "ep0-ba6-rank0.pt")
    before_resuming(str(tmp_path), sharded=True)
    assert (tmp_path / LATEST).resolve() == tmp_path / "ep0-ba4"
    (tmp_path / LATEST).unlink()
    (tmp_path / LATEST).symlink_to("ep0-ba2-rank0.pt")
    before_resuming(str(tmp_path), sharded=True)  # one that points to something is believed
    assert (tmp_path / LATEST).resolve().name == "ep0-ba2-rank0.pt"
