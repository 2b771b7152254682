"""Stored targets: packed and unpacked, joined to their samples, and in order of the patches in every micro-batch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from streaming import MDSWriter
from torch.utils.data import DataLoader
from transformers import AutoImageProcessor, LlavaImageProcessor

from opsin.data.batch import split_batch
from opsin.data.cells import row_of
from opsin.data.collate import VLMCollator
from opsin.data.loader import build_encoder
from opsin.data.patch_targets import (
    COLUMN,
    DESCRIPTION,
    PatchTargetsInfo,
    PictureTargets,
    check,
    pack,
    picture_hash,
    unpack,
)
from opsin.data.schema import COLUMNS, HASHES, pack_images, unpack_images
from opsin.data.sentences import dataset_hash
from opsin.data.shards import ShardWriter
from opsin.data.streaming import StreamingVLMDataset
from opsin.models.anatomy import image_encoder_for
from opsin.models.errors import UserError, one_line, user_error_in
from opsin.models.geometry import geometry_id

import zoo

pytestmark = pytest.mark.usefixtures("own_cache")
SAMPLES = [zoo.sample(i, images=i % 3, turns=1 + i % 2) for i in range(40)]


@st.composite
def stored(draw: st.DrawFn) -> tuple[list[PictureTargets], int]:
    width = draw(st.integers(1, 5))
    pictures = []
    for _ in range(draw(st.integers(0, 4))):
        grids = tuple(draw(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), max_size=3)))
        values = torch.randn(sum(r * c for r, c in grids), width).bfloat16()
        pictures.append(PictureTargets(draw(st.binary(min_size=8, max_size=8)), grids, values))
    return pictures, width


@settings(max_examples=50, deadline=None)
@given(stored(), st.data())
def test_packed_targets_come_back_and_parts_of_them_do_not(
    given_: tuple[list[PictureTargets], int], data: st.DataObject
) -> None:
    pictures, width = given_
    packed = pack(pictures, width)
    back = unpack(packed)
    assert [(b.picture, b.grids) for b in back] == [(p.picture, p.grids) for p in pictures]
    assert all(torch.equal(b.values, p.values) for b, p in zip(back, pictures, strict=True))
    with pytest.raises(ValueError, match="stored targets"):
        unpack(packed[: data.draw(st.integers(0, len(packed) - 1))])
    with pytest.raises(ValueError, match="stored targets"):
        unpack(packed + b"\0")


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=80))
def test_other_bytes_are_a_value_error_and_nothing_else(noise: bytes) -> None:
    for value in (noise, b"OPT1" + noise):
        try:
            unpack(value)
        except ValueError as error:
            assert "\n" not in str(error)


@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_geometry_survives_saving_and_sees_what_decides_the_pixels(family: str, tmp_path: Path) -> None:
    built = zoo.build(family)
    own = geometry_id(image_encoder_for(built.processor, built.hf.config))
    assert own.startswith(f"{family}; ") and "\n" not in own
    processor = built.processor.image_processor
    processor.image_mean = [0.1, 0.2, 0.3]  # what the model sees of a pixel, not which pixel
    processor.save_pretrained(tmp_path)
    config = type(built.hf.config).from_dict(json.loads(built.hf.config.to_json_string()))
    for fast in (True, False):
        built.processor.image_processor = AutoImageProcessor.from_pretrained(tmp_path, use_fast=fast)
        assert geometry_id(image_encoder_for(built.processor, config)) == own
    key = "longest_edge" if family == "qwen2_5_vl" else "shortest_edge"
    built.processor.image_processor.size = {**dict(processor.size), key: 1200}
    assert geometry_id(image_encoder_for(built.processor, config)) != own


def test_padding_to_a_square_is_geometry() -> None:
    built = zoo.build("llava")
    texts = []
    for pads in (False, True):
        built.processor.image_processor = LlavaImageProcessor(
            size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}, do_pad=pads
        )
        texts.append(geometry_id(image_encoder_for(built.processor, built.hf.config)))
    assert "pad_to_square=[0.481455," in texts[1] and "pad" not in texts[0]


def encoder_of(family: str) -> Any:
    built = zoo.build(family)
    return build_encoder(built.processor, built.hf.config, template="plain", max_seq_len=512)


def with_targets(encoder: Any, sample: dict, number: int) -> dict:
    """Values of a patch: sample, picture, view, row, column."""
    pictures = []
    for p, data in enumerate(unpack_images(sample["images"])):
        (image,) = encoder.pictures(
            {**sample, "images": pack_images([data]), "conversations": ONE}, [("<image>", "")]
        )
        grids = tuple(v.grid for v in image.views)
        values = [[number, p, v, r, c] for v, (rows, columns) in enumerate(grids)
                  for r in range(rows) for c in range(columns)]  # fmt: skip
        pictures.append(PictureTargets(picture_hash(data), grids, torch.tensor(values).bfloat16()))
    return {**sample, COLUMN: pack(pictures, 5)}


ONE = [{"from": "human", "value": "<image>"}]


@pytest.mark.parametrize("family", zoo.FAMILIES)
@pytest.mark.parametrize("layout", [{}, {"packing": True}, {"padding_side": "left"}], ids=str)
def test_every_micro_batch_has_the_targets_of_its_own_patches(family: str, layout: dict) -> None:
    encoder = encoder_of(family)
    samples = [
        with_targets(encoder, zoo.sample(i, images=n, size=(20 + 8 * i, 16)), i)
        for i, n in enumerate((1, 0, 2, 1, 0, 2, 1))
    ]
    samples[3] = {**samples[3], "conversations": []}  # blank in its batch
    collator = VLMCollator(encoder, **layout)
    batch = collator([{**s, "uid": i + 1} for i, s in enumerate(samples)])
    assert batch[COLUMN].dtype == torch.bfloat16
    assert len(batch[COLUMN]) == int(batch["view_grid"].prod(1).sum())
    seen = 0
    for part in split_batch(batch, 1 if "packing" not in layout else 3):
        targets, view = part[COLUMN].float().long(), part["patch_view"]
        uid = part["document_uid"][part["view_row"], part["view_document"]]
        assert targets.shape == (len(part["patch_position"]), 5)
        assert torch.equal(targets[:, 0], (uid - 1)[view]) and torch.equal(
            targets[:, 1], part["view_image"][view]
        )
        assert torch.equal(targets[:, 3], part["patch_row"]) and torch.equal(
            targets[:, 4], part["patch_column"]
        )
        seen += len(targets)
    assert seen == len(batch[COLUMN]) > 0


def test_targets_that_do_not_belong_are_refused_and_never_blanked() -> None:
    encoder = encoder_of("llava")
    collator = VLMCollator(encoder)
    good, other = (with_targets(encoder, zoo.sample(i), i) for i in (1, 2))
    text = with_targets(encoder, zoo.sample(3, images=0), 3)
    bare = zoo.sample(4)
    cut = PictureTargets(unpack(good[COLUMN])[0].picture, ((2, 3),), torch.zeros(6, 5).bfloat16())
    narrow = PictureTargets(*vars(unpack(other[COLUMN])[0]).values())
    narrow.values = narrow.values[:, :3]
    for samples, message in (
        ([{**good, COLUMN: other[COLUMN]}], "sample 'zoo/1': stored patch_targets of picture 0 were made for another picture"),
        ([{**good, COLUMN: text[COLUMN]}], "are those of 0 pictures, it shows 1"),
        ([{**good, COLUMN: pack([cut], 5)}], "another geometry: 2x3 patches, this model has 4x4"),
        ([{**good, COLUMN: good[COLUMN][:-1]}], "cannot be used: stored targets should have"),
        ([good, bare], "1 of a batch's 2 pictures have no stored patch_targets"),
        ([good, {**other, COLUMN: pack([narrow], 3)}], "have [3, 5] values a patch"),
    ):  # fmt: skip
        with pytest.raises(UserError) as error:
            collator(samples)
        assert message in str(error.value) and "\n" not in str(error.value)
    assert COLUMN in collator([good, text])
    assert COLUMN not in collator([bare, text]) and COLUMN not in collator([text])


def test_another_function_or_geometry_is_refused_in_one_line() -> None:
    info = PatchTargetsInfo("ross", "vae 12", "llava; patch=4; size={shortest_edge:16}", 8, "d", 3)
    check(info, info.identity, info.geometry, "algorithms.ross")
    with pytest.raises(
        UserError, match=r"algorithms\.ross: .* made by 'vae 12', this is 'vae 13'; make them anew"
    ):
        check(info, "vae 13", info.geometry, "algorithms.ross")
    with pytest.raises(UserError) as error:
        check(info, info.identity, "llava; patch=4; size={shortest_edge:32}", "algorithms.ross")
    assert "'size={shortest_edge:16}', this model has 'size={shortest_edge:32}'" in str(error.value)


def write(out: Any, samples: list[dict] = SAMPLES) -> str:
    with MDSWriter(out=str(out), columns=COLUMNS, hashes=list(HASHES), size_limit=1500) as writer:
        for sample in samples:
            writer.write(sample)
    return str(out)


def targets_of(sample: dict) -> bytes:
    number = float(sample["id"].split("/")[1])
    pictures = [
        PictureTargets(picture_hash(p), ((4, 4),), torch.full((16, 2), number).bfloat16())
        for p in unpack_images(sample["images"])
    ]
    return pack(pictures, 2)


def write_side(source: str, out: Any, ids: dict[str, str] | None = None, **changes: Any) -> str:
    """Targets in a dataset of their own."""
    dataset = StreamingVLMDataset(remote=source, batch_size=1, shuffle=False)
    stream = dataset.streams[0]
    writer = ShardWriter(str(out), {})
    for number, shard in enumerate(dataset.shards):
        dataset.prepare_shard(number)
        cells = [(ids or {}).get(s["id"], s["id"]).encode() for s in shard]
        rows = [row_of({"id": i, COLUMN: targets_of(s)}, ()) for i, s in zip(cells, shard, strict=True)]
        writer.write(number, {"id": "str", COLUMN: "bytes"}, rows)
    index = dataset_hash((Path(stream.local) / "index.json").read_bytes())
    info = {
        "name": "toy",
        "identity": "toy 1",
        "geometry": "g",
        "moments_dim": 2,
        "dataset": index,
        "samples": 40,
    }
    info = PatchTargetsInfo(**{**info, "index": dataset_hash(writer.index()), **changes})
    writer.finish({DESCRIPTION: info.dumps().encode()})
    return str(out)


def open_(remote: str, **options: Any) -> StreamingVLMDataset:
    return StreamingVLMDataset(remote=remote, **{"batch_size": 4, "shuffle": False, **options})


def served(dataset: StreamingVLMDataset, workers: int) -> list[dict]:
    loader = DataLoader(dataset, 4, num_workers=workers, collate_fn=list, timeout=60 if workers else 0)
    samples = [s for batch in loader for s in batch]
    assert all(s[COLUMN] == targets_of(s) for s in samples)
    return samples


def test_targets_are_joined_to_their_samples_in_any_order_and_after_resumption(tmp_path: Path) -> None:
    source = write(tmp_path / "data")
    side = write_side(source, tmp_path / "side")
    dataset = open_(source, patch_targets=side, shuffle=True, shuffle_seed=3)
    assert dataset.patch_targets_info.identity == "toy 1"
    first = served(dataset, 2)
    assert sorted(s["id"] for s in first) == sorted(s["id"] for s in SAMPLES)
    plain = served_ids(open_(source, shuffle=True, shuffle_seed=3), 2)
    assert [s["id"] for s in first] == plain  # the order is that without targets
    resumed = open_(source, patch_targets=side, shuffle=True, shuffle_seed=3)
    resumed.load_state_dict({**dataset.state_dict(16, True), "epoch": 0})
    assert [s["id"] for s in served(resumed, 2)] == plain[16:]
    assert open_(source).patch_targets_info is None and COLUMN not in open_(source)[0]


def served_ids(dataset: StreamingVLMDataset, workers: int) -> list[str]:
    return [s["id"] for batch in DataLoader(dataset, 4, num_workers=workers, collate_fn=list) for s in batch]


def test_streams_have_targets_of_their_own_and_of_one_kind(tmp_path: Path) -> None:
    one, two = write(tmp_path / "one", SAMPLES[:20]), write(tmp_path / "two", SAMPLES[20:])
    sides = [write_side(one, tmp_path / "s1"), write_side(two, tmp_path / "s2")]
    streams = {n: {"remote": r, COLUMN: s} for n, r, s in zip("ab", (one, two), sides, strict=True)}
    both = StreamingVLMDataset(streams=streams, batch_size=4, shuffle=True)
    assert len(served(both, 0)) == 40
    streams["b"][COLUMN] = write_side(two, tmp_path / "s3", identity="toy 2")
    with pytest.raises(UserError, match="streams 'a' and 'b' have stored patch_targets of different kinds"):
        StreamingVLMDataset(streams=streams, batch_size=4)


def test_targets_in_a_bucket_are_fetched_checked_and_evicted_with_their_samples(
    s3: Path, tmp_path: Path
) -> None:
    source = write("s3://data/joined/rows")
    side = write_side(source, "s3://data/joined/side")
    assert [s["id"] for s in open_(source)] == [s["id"] for s in SAMPLES]  # the rows alone lie here already
    dataset = open_(source, patch_targets=side, cache_limit="24kb", predownload=4)
    kept = [Path(x.local) for x in (dataset.streams[0], dataset.streams[0].targets)]
    assert len(served(dataset, 2)) == len(served(dataset, 0)) == 40
    shards = [len(list(folder.glob("*.mds"))) for folder in kept]
    assert shards[0] < dataset.num_shards and 0 < shards[1] < dataset.num_shards
    # Rows in a folder of somebody's are never evicted with the targets.
    mine = write(tmp_path / "mine")
    assert (tmp_path / "mine/index.json").read_bytes() == (kept[0] / "index.json").read_bytes()
    local = open_(mine, patch_targets=side, cache_limit="24kb", predownload=4)
    assert len(served(local, 0)) == 40 and len(list((tmp_path / "mine").glob("*.mds"))) == dataset.num_shards
    # Damaged on the way: never served.
    damaged = write_side(source, "s3://data/joined/damaged")
    file = s3 / "data/joined/damaged/shard.00001.mds"
    file.write_bytes(file.read_bytes()[:-4] + b"????")
    with pytest.raises(RuntimeError, match="its hash"):
        served(open_(mine, patch_targets=damaged, download_retry=1), 0)


def test_targets_of_another_dataset_are_refused_in_one_line(tmp_path: Path) -> None:
    source, other = write(tmp_path / "data"), write(tmp_path / "other", SAMPLES[5:])
    side = write_side(source, tmp_path / "side")
    fewer = write_side(
        other, tmp_path / "fewer", dataset=dataset_hash((tmp_path / "data/index.json").read_bytes())
    )
    stale = write_side(source, tmp_path / "stale", index="0" * 40)
    nothing = write_side(source, tmp_path / "nothing")
    (tmp_path / "nothing" / DESCRIPTION).unlink()
    for remote, targets, message in (
        (other, side, f"patch_targets '{side}' were made for another dataset than '{other}'"),
        (source, fewer, "35 samples in"),
        (source, stale, "was made for other shards"),
        (source, nothing, f"no {DESCRIPTION} in"),
        (source, str(tmp_path / "sid"), "no MDS dataset at"),
    ):
        with pytest.raises(UserError) as error:
            open_(remote, patch_targets=targets)
        assert message in str(error.value) and "\n" not in str(error.value)
    swapped = write_side(source, tmp_path / "swapped", {"zoo/7": "zoo/8"})
    dataset = open_(source, patch_targets=swapped)
    with pytest.raises(UserError, match="sample 'zoo/8' stands where the dataset has 'zoo/7'"):
        list(dataset)
    with pytest.raises(UserError) as error:
        served(open_(source, patch_targets=swapped), 1)
    line = one_line(user_error_in(error.value))
    assert line.startswith("dataset: patch_targets in") and "\n" not in line
