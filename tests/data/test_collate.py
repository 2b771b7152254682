"""The batch contract: keys, shapes and dtypes in one table, and where each document and view came to lie."""

from __future__ import annotations

import json
import pickle
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from opsin.data import collate
from opsin.data.collate import VLMCollator
from opsin.data.encode import Status
from opsin.data.schema import Role, id_of, pack_images, stable_hash
from opsin.models.errors import UserError

import jobs
import zoo

# B rows, L tokens, N samples, D documents in a row, V views, I images, P rows of pixels; 3 axes of M-RoPE.
CONTRACT: dict[str, tuple[str, torch.dtype]] = {
    "input_ids": ("B L", torch.int64),
    "attention_mask": ("B L", torch.int64),
    "labels": ("B L", torch.int64),
    "loss_weights": ("B L", torch.float32),
    "position_ids": ("B L", torch.int64),
    "document_ids": ("B L", torch.int16),
    "branch_ids": ("B L", torch.int16),
    "turn_ids": ("B L", torch.int16),
    "image_ids": ("B L", torch.int16),
    "roles": ("B L", torch.int8),
    "sentence_ids": ("B L", torch.int64),
    "document_uid": ("B D", torch.int64),
    "document_visit": ("B D", torch.int64),
    "document_sample": ("B D", torch.int64),
    "refused": ("B D", torch.bool),
    "view_row": ("V", torch.int64),
    "view_document": ("V", torch.int64),
    "view_image": ("V", torch.int64),
    "view_grid": ("V 2", torch.int64),
    "view_box": ("V 4", torch.float32),
    "view_start": ("V", torch.int64),
    "view_stride": ("V", torch.int64),
    "views_per_row": ("B", torch.int64),
    "images_per_row": ("B", torch.int64),
    "pixel_rows": ("I", torch.int64),
    "sample_status": ("N", torch.int8),
    "truncated_turns": ("N", torch.int64),
    "sample_stream": ("N", torch.int16),
    "sample_ids": ("N W", torch.uint8),
}
PIXELS: dict[str, dict[str, tuple[str, torch.dtype]]] = {
    "llava": {"pixel_values": ("I 3 16 16", torch.float32)},
    "llava_next": {"pixel_values": ("I T 3 16 16", torch.float32), "image_sizes": ("I 2", torch.int64)},
    "qwen2_5_vl": {"pixel_values": ("P 96", torch.float32), "image_grid_thw": ("I 3", torch.int64)},
}

BAD = {**zoo.sample(9), "images": pack_images([b"broken"])}
MIX = [
    zoo.sample(0, turns=2),
    zoo.sample(1, images=2, size=(16, 40)),
    BAD,
    zoo.sample(2, images=0),
    zoo.sample(3, turns=3, independent=True, size=(40, 20)),
]


@lru_cache
def built(family: str) -> zoo.Built:
    return zoo.build(family)


def collator(family: str = "llava", **options: Any) -> VLMCollator:
    return jobs.collator(built(family), **{"max_seq_len": 480, **options})


def follows(batch: dict[str, torch.Tensor], family: str, samples: int) -> dict[str, int]:
    """Hold a batch against the table; the letters' sizes."""
    table = dict(CONTRACT)
    if family == "qwen2_5_vl":
        table["position_ids"] = ("3 B L", torch.int64)
    sizes = {"N": samples, "I": int(batch["images_per_row"].sum()), "P": int(batch["pixel_rows"].sum())}
    if sizes["I"]:
        table.update(PIXELS[family])
    assert batch.keys() == table.keys()
    for key, (shape, dtype) in table.items():
        assert batch[key].dtype == dtype, key
        letters = shape.split()
        assert batch[key].dim() == len(letters), key
        for letter, size in zip(letters, batch[key].shape, strict=True):
            expected = int(letter) if letter.isdigit() else sizes.setdefault(letter, size)
            assert size == expected, (key, letter)
    return sizes


@pytest.mark.parametrize("packing", [False, True], ids=["apart", "packed"])
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_contract(family: str, side: str, packing: bool) -> None:
    batch = collator(family, padding_side=side, packing=packing)(MIX)
    sizes = follows(batch, family, len(MIX))
    assert (sizes["B"], sizes["D"] > 1) == ((5, False) if not packing else (sizes["B"], True))
    assert sizes["L"] % 8 == 0
    assert batch["sample_status"].tolist() == [0, 0, Status.UNREADABLE_IMAGE, 0, 0]
    real = batch["document_ids"] >= 0
    blank = ~real.any(1)
    assert int(blank.sum()) == (0 if packing else 1)
    assert torch.equal(batch["attention_mask"][~blank].bool(), real[~blank])
    assert (batch["roles"] == Role.PAD).equal(~real)
    response = batch["roles"] == Role.RESPONSE
    assert torch.equal(batch["labels"], torch.where(response, batch["input_ids"], -100))
    assert bool((batch["loss_weights"] == 1).all()) and not batch["refused"].any()
    for key, nothing in {"turn_ids": -1, "image_ids": -1, "branch_ids": 0, "sentence_ids": 0}.items():
        assert bool((batch[key][~real] == nothing).all()), key


@pytest.mark.parametrize("packing", [False, True], ids=["apart", "packed"])
@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_documents_and_views_lie_where_the_batch_says(family: str, packing: bool) -> None:
    made = collator(family, packing=packing)
    samples = [{**s, "uid": 100 + i, "visit": i} for i, s in enumerate(MIX)]
    batch = made(samples)
    documents = {100 + i: made.encoder(s, visit=i) for i, s in enumerate(samples) if s["id"] != BAD["id"]}
    view = image = 0
    for row in range(batch["input_ids"].shape[0]):
        before = 0  # images of earlier documents in this row
        for d, uid in enumerate(batch["document_uid"][row].tolist()):
            if not uid:
                continue
            document = documents.pop(uid)
            place = (batch["document_ids"][row] == d).nonzero().flatten()
            start = int(place[0])
            assert place.tolist() == list(range(start, start + len(document)))
            for key in ("input_ids", "roles", "turn_ids", "branch_ids", "sentence_ids", "position_ids"):
                mine = batch[key][..., row, place].numpy()
                assert np.array_equal(mine, getattr(document, key)), key
            shown = document.image_ids >= 0
            assert np.array_equal(
                batch["image_ids"][row, place].numpy()[shown], document.image_ids[shown] + before
            )
            assert batch["document_visit"][row, d] == uid - 100
            for i, picture in enumerate(document.images):
                for v in picture.views:
                    assert (batch["view_row"][view], batch["view_document"][view]) == (row, d)
                    assert batch["view_image"][view] == i
                    assert tuple(batch["view_grid"][view].tolist()) == v.grid
                    assert batch["view_box"][view].tolist() == pytest.approx(list(v.box))
                    at = int(batch["view_start"][view])
                    assert at == start + document.image_starts[i] + v.start
                    assert batch["image_ids"][row, at] == i + before
                    view += 1
                assert batch["pixel_rows"][image] == picture.pixels["pixel_values"].shape[0]
                image += 1
            before += len(document.images)
    assert not documents
    assert (view, image) == (len(batch["view_row"]), len(batch["pixel_rows"]))


@pytest.mark.parametrize("packing", [False, True], ids=["apart", "packed"])
@pytest.mark.parametrize("family", zoo.FAMILIES)
@pytest.mark.parametrize(
    "samples",
    [[BAD, BAD, BAD], [zoo.sample(1, images=0)], [BAD, zoo.sample(1, images=0)]],
    ids=["all bad", "no pictures", "bad and no pictures"],
)
def test_contract_with_nothing_to_show(family: str, packing: bool, samples: list[dict]) -> None:
    batch = collator(family, packing=packing)(samples)
    sizes = follows(batch, family, len(samples))
    assert sizes["I"] == sizes["V"] == 0
    assert bool((batch["attention_mask"].sum(1) >= 1).all())  # no softmax over nothing
    if all(s is BAD for s in samples):
        assert bool((batch["labels"] == -100).all())
        assert sizes["B"] == (1 if packing else 3)
        assert not batch["document_uid"].any()


def test_left_and_right_padding_hold_the_same_tokens() -> None:
    right, left = collator()(MIX), collator(padding_side="left")(MIX)
    for row in range(len(MIX)):
        a, b = (x["document_ids"][row] >= 0 for x in (right, left))
        for key in ("input_ids", "labels", "roles", "position_ids", "image_ids"):
            assert torch.equal(right[key][row, a], left[key][row, b])
        if a.any():
            assert bool(a[0]) and bool(b[-1])
    shift = left["view_start"] - right["view_start"]
    unused = (right["document_ids"] < 0).sum(1)
    assert torch.equal(shift, unused[right["view_row"]])


@pytest.mark.parametrize("multiple", [1, 8, 64])
def test_length_is_the_longest_row_rounded_up(multiple: int) -> None:
    made = collator(pad_to_multiple_of=multiple)
    longest = max(len(made.encoder(s)) for s in MIX if s is not BAD)
    length = made(MIX)["input_ids"].shape[1]
    assert length % multiple == 0
    assert 0 <= length - longest < multiple


def test_ids_and_visits_travel() -> None:
    batch = collator()([{**zoo.sample(1), "uid": 77, "visit": 4}, zoo.sample(2)])
    assert batch["document_uid"].tolist() == [[77], [stable_hash("zoo/2")]]
    assert batch["document_visit"].tolist() == [[4], [0]]


def test_skipped_samples_are_noted(tmp_path: Path) -> None:
    log = tmp_path / "skipped.jsonl"
    made = collator(skipped_log=log)
    made(MIX)
    made([{**zoo.sample(4), "conversations": "nonsense"}, {**BAD, "id": None}])
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert [(x["id"], x["reason"]) for x in lines] == [
        ("zoo/9", "unreadable_image"),
        ("zoo/4", "bad_conversation"),
        (None, "unreadable_image"),
    ]
    assert all(x["detail"] for x in lines)


@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_a_collator_survives_pickling(family: str) -> None:
    # It is sent to data-loader workers where these are spawned.
    made = collator(family, packing=True)
    again = pickle.loads(pickle.dumps(made))
    first, second = made(MIX), again(MIX)
    assert all(torch.equal(first[k], second[k]) for k in first)


def test_unusable_settings_are_refused_in_one_line() -> None:
    with pytest.raises(UserError, match="padding_side 'middle'"):
        collator(padding_side="middle")


def test_the_table_in_the_code_names_every_key() -> None:
    documented = {line.split()[0].strip(",") for line in (collate.__doc__ or "").splitlines() if "(" in line}
    assert CONTRACT.keys() <= documented


def test_a_batch_says_which_sample_each_document_is() -> None:
    """Packed rows have their own order; blank samples have no document; ids and streams are those of the samples."""
    samples = [{**s, "stream_id": i % 3} for i, s in enumerate(MIX)]
    samples.append({"id": "", "filler": True})
    for packing in (False, True):
        batch = collator("llava", packing=packing)(samples)
        owner, uid = batch["document_sample"], batch["document_uid"]
        assert (owner >= 0).equal(uid != 0)
        assert sorted(owner[owner >= 0].tolist()) == [0, 1, 3, 4]
        for sample, one in zip(owner[owner >= 0].tolist(), uid[owner >= 0].tolist(), strict=True):
            assert one == stable_hash(samples[sample]["id"])
        assert batch["sample_stream"].tolist() == [0, 1, 2, 0, 1, -1]
        assert [id_of(row) for row in batch["sample_ids"].tolist()] == [s["id"] for s in samples]
    long = [{**zoo.sample(1), "id": "ä" * 300}, {**zoo.sample(2), "id": "a"}]
    assert [id_of(row) for row in collator("llava")(long)["sample_ids"].tolist()] == ["ä" * 100, "a"]
