"""split_batch: always as many micro-batches, each with its own pictures, and an index of exactly what is learnt."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from opsin.data.batch import (
    effective_weights,
    samples_in_batch,
    split_batch,
    tokens_in_batch,
    vlm_data_spec,
)
from opsin.data.collate import VLMCollator
from opsin.data.schema import Role, pack_images
from opsin.models.normalise import DENOMINATORS, declare

import jobs
import zoo

Batch = dict[str, Any]
BAD = {**zoo.sample(9), "images": pack_images([b"broken"])}
POOL = [
    zoo.sample(0, turns=2),
    zoo.sample(1, images=2, size=(16, 40)),
    zoo.sample(2, images=0),
    zoo.sample(3, turns=3, independent=True, size=(40, 20)),
    zoo.sample(4, images=0, turns=2, independent=True),
    zoo.sample(5, images=1, size=(40, 30)),
    BAD,
]


@lru_cache
def collator(family: str = "llava", packing: bool = False, side: str = "right") -> VLMCollator:
    return jobs.collator(zoo.build(family), max_seq_len=480, packing=packing, padding_side=side)


@lru_cache
def collated(family: str, packing: bool, side: str, chosen: tuple[int, ...]) -> Batch:
    samples = [{**POOL[i], "uid": 1000 * place + i + 1} for place, i in enumerate(chosen)]
    return collator(family, packing, side)(samples)


def fresh(family: str, packing: bool, side: str, chosen: tuple[int, ...]) -> Batch:
    return dict(collated(family, packing, side, chosen))


def predecessor(batch: Batch, row: int, column: int) -> int | None:
    """Nearest earlier token of the same document in the same branch or its trunk, by walking back."""
    document, branch = int(batch["document_ids"][row, column]), int(batch["branch_ids"][row, column])
    for c in range(column - 1, -1, -1):
        if int(batch["document_ids"][row, c]) == document and int(batch["branch_ids"][row, c]) in (0, branch):
            return c
    return None


def naive_labels(batch: Batch, rows: range) -> list[tuple]:
    """(row in the micro-batch, predicting column, target, weight, role, turn, answer's name) token by token."""
    found = []
    for r in rows:
        for c in range(batch["input_ids"].shape[1]):
            label, weight = int(batch["labels"][r, c]), float(batch["loss_weights"][r, c])
            document = int(batch["document_ids"][r, c])
            if label == -100 or weight <= 0 or document < 0 or bool(batch["refused"][r, document]):
                continue
            source = predecessor(batch, r, c)
            if source is None:
                continue
            role, turn = int(batch["roles"][r, c]), int(batch["turn_ids"][r, c])
            answer = (r, document, turn) if role == Role.RESPONSE else None
            found.append((r - rows.start, source, label, weight, role, turn, answer))
    return found


def check(batch: Batch, micro: Batch, rows: range) -> None:
    """Hold one micro-batch against the rows of the device batch it was cut from."""
    mask = batch["attention_mask"][rows.start : rows.stop].bool().any(0).nonzero()
    first = int(mask[0]) // 8 * 8
    length = micro["input_ids"].shape[1]
    assert length % 8 == 0 and first + length >= int(mask[-1]) + 1
    assert length < 8 or first + length - 8 < int(mask[-1]) + 1  # no padding column block too many
    for key in ("input_ids", "attention_mask", "position_ids", "document_ids", "roles", "token/x"):
        if key in batch:
            whole = batch[key][..., rows.start : rows.stop, first : first + length]
            assert torch.equal(micro[key], whole), key
    assert torch.equal(micro["document_uid"], batch["document_uid"][rows.start : rows.stop])
    assert micro["tokens"] == int(batch["attention_mask"][rows.start : rows.stop].sum())
    # Labels.
    expected = naive_labels(batch, rows)
    answers: dict[tuple, int] = {}
    for *_, answer in expected:
        if answer is not None:
            answers.setdefault(answer, len(answers))
    assert micro["answers"] == len(answers)
    found = [
        (*divmod(place, length), target, weight, role, turn, ordinal)
        for place, target, weight, role, turn, ordinal in zip(
            *(
                micro[f"label_{k}"].tolist()
                for k in ("rows", "targets", "weights", "roles", "turns", "answer")
            ),
            strict=True,
        )
    ]
    if expected:
        assert found == [
            (r, source - first, label, weight, role, turn, answers.get(answer, -1))
            for r, source, label, weight, role, turn, answer in expected
        ]
    else:  # one row of weight 0, so that the head runs
        assert found == [(0, 0, 0, 0.0, 0, -1, -1)]
    # Patches: every view's tokens in raster order.
    views = [v for v in range(len(batch["view_row"])) if int(batch["view_row"][v]) in rows]
    place = []
    for k, v in enumerate(views):
        grid_rows, columns = batch["view_grid"][v].tolist()
        for i in range(grid_rows):
            for j in range(columns):
                at = int(batch["view_start"][v]) - first + i * int(batch["view_stride"][v]) + j
                place.append(((int(batch["view_row"][v]) - rows.start) * length + at, k, i, j))
    named = ("patch_position", "patch_view", "patch_row", "patch_column")
    assert list(zip(*(micro[k].tolist() for k in named), strict=True)) == place
    assert bool((micro["roles"].flatten()[micro["patch_position"]] == Role.IMAGE).all())
    for key in ("view_document", "view_image", "view_grid", "view_box", "view_stride"):
        assert torch.equal(micro[key], batch[key][views]), key
    assert (micro["view_row"] + rows.start).tolist() == [int(batch["view_row"][v]) for v in views]
    # Pixels.
    images = [i for r, n in enumerate(batch["images_per_row"].tolist()) for i in [r] * n]
    mine = [i for i, r in enumerate(images) if r in rows]
    ends = [0, *batch["pixel_rows"].cumsum(0).tolist()]
    if mine:
        pixels = torch.cat([batch["pixel_values"][ends[i] : ends[i + 1]] for i in mine])
        assert torch.equal(micro["pixel_values"], pixels)
        for key in ("image_sizes", "image_grid_thw"):
            assert (key in micro) == (key in batch)
            if key in batch:
                assert torch.equal(micro[key], batch[key][mine])
    else:
        assert not {"pixel_values", "image_sizes", "image_grid_thw"} & micro.keys()
    packed = bool((micro["document_ids"] > 0).any()) or bool((micro["branch_ids"] > 0).any())
    assert micro["plain_attention"] is not packed


def row_ranges(batch: Batch, parts: int) -> list[range]:
    rows = max(len(batch["input_ids"]), parts)
    return [range(rows * i // parts, rows * (i + 1) // parts) for i in range(parts)]


@settings(max_examples=30, deadline=None)
@given(
    st.sampled_from(zoo.FAMILIES),
    st.booleans(),
    st.sampled_from(["left", "right"]),
    st.lists(st.integers(0, 6), min_size=1, max_size=5).map(tuple),
    st.integers(1, 6),
    st.integers(0, 3),
    st.randoms(use_true_random=False),
)
def test_every_micro_batch_is_its_rows_and_nothing_else(
    family: str, packing: bool, side: str, chosen: tuple[int, ...], size: int, short: int, random: Any
) -> None:
    batch = fresh(family, packing, side, chosen)
    # A method has changed labels and weights; a guard has refused documents; another added a tensor.
    shape = batch["input_ids"].shape
    batch["loss_weights"] = torch.tensor(
        [random.choice([0.0, 0.25, 1.0]) for _ in range(shape.numel())]
    ).view(shape)
    more = torch.tensor([random.random() < 0.3 for _ in range(shape.numel())]).view(shape)
    batch["labels"] = torch.where(more & (batch["document_ids"] >= 0), batch["input_ids"], batch["labels"])
    batch["refused"] = torch.tensor([[random.random() < 0.2 for _ in r] for r in batch["refused"]])
    batch["token/x"] = torch.arange(shape.numel()).view(shape)
    device_batch = len(chosen) + short
    micros = split_batch(batch, size, device_batch_size=device_batch)
    assert len(micros) == math.ceil(device_batch / size)  # whatever the rows are
    padded = _padded(batch, len(micros))
    for micro, rows in zip(micros, row_ranges(batch, len(micros)), strict=True):
        assert len(rows) >= 1
        check(padded, micro, rows)
        assert micro[DENOMINATORS]["lm"].item() == pytest.approx(
            max(sum(w for *_, w, _, _, _ in naive_labels(padded, range(len(padded["input_ids"])))), 1)
            / len(micros)
        )


def _padded(batch: Batch, parts: int) -> Batch:
    """The device batch with blank rows up to the number of parts, written out by hand."""
    missing = parts - len(batch["input_ids"])
    if missing <= 0:
        return batch
    blank = {
        "document_ids": -1, "turn_ids": -1, "image_ids": -1, "labels": -100, "loss_weights": 1, "document_sample": -1,
    }  # fmt: skip
    out = dict(batch)
    for key, value in batch.items():
        if (
            isinstance(value, torch.Tensor)
            and value.shape[:1] == batch["input_ids"].shape[:1]
            and key
            not in (
                "sample_status",
                "truncated_turns",
                "sample_stream",
                "sample_ids",
                "pixel_values",
            )
        ):
            if key in ("image_sizes", "image_grid_thw", "pixel_rows") or key.startswith("view_"):
                continue
            rows = torch.full((missing, *value.shape[1:]), blank.get(key, 0), dtype=value.dtype)
            if key == "attention_mask":
                rows[:, 0] = 1
            out[key] = torch.cat([value, rows])
    if batch["position_ids"].dim() == 3:
        out["position_ids"] = torch.cat(
            [batch["position_ids"], torch.zeros(3, missing, batch["input_ids"].shape[1], dtype=torch.int64)],
            1,
        )
    return out


@pytest.mark.parametrize("packing", [False, True])
def test_the_number_of_parts_depends_on_sizes_alone(packing: bool) -> None:
    batches = [(0, 1, 2, 3, 4, 5, 0, 1), (6,) * 8, (2,) * 8, (0, 6, 6, 6, 6, 6, 6, 2), (3,), (6, 6, 6)]
    for size, parts in ((1, 8), (2, 4), (3, 3), (8, 1), (None, 1), (100, 1)):
        for chosen in batches:
            batch = fresh("llava", packing, "right", chosen)
            assert len(split_batch(batch, size, device_batch_size=8)) == parts


def test_an_evaluation_batch_is_cut_by_its_own_size() -> None:
    batch = fresh("llava", False, "right", (0, 1, 2))
    micros = split_batch(batch, 2, device_batch_size=8, training=False)
    assert [len(m["input_ids"]) for m in micros] == [1, 2]
    assert all(DENOMINATORS not in m for m in micros)


def test_rows_are_dealt_evenly_and_in_order() -> None:
    batch = fresh("llava", False, "right", (0, 1, 2, 3, 5, 0, 1))
    micros = split_batch(batch, 3, device_batch_size=8)
    assert [len(m["input_ids"]) for m in micros] == [2, 2, 3]
    dealt = torch.cat([m["document_uid"] for m in micros])
    assert torch.equal(dealt, batch["document_uid"])


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_nothing_at_all(family: str, packing: bool) -> None:
    micros = split_batch(fresh(family, packing, "right", (6, 6, 6, 6)), 2)
    assert len(micros) == 2
    for micro in micros:
        assert (micro["answers"], micro["label_weights"].tolist()) == (0, [0.0])
        assert float(micro[DENOMINATORS]["lm"]) == 0.5  # max(0, 1) / 2 micro-batches
        assert micro["input_ids"].shape[1] == 8
        assert "pixel_values" not in micro and len(micro["patch_position"]) == 0


def test_refused_documents_lose_their_labels_and_nothing_else() -> None:
    batch = fresh("llava", True, "right", (0, 2, 3))
    whole, _ = effective_weights(batch)
    ((row, d),) = (batch["document_uid"] == 2004).nonzero().tolist()
    batch["refused"] = batch["refused"].clone()
    batch["refused"][row, d] = True
    weights, _ = effective_weights(batch)
    inside = batch["document_ids"] == d
    inside[:row] = inside[row + 1 :] = False
    assert whole[inside].sum() > 0 and weights[inside].sum() == 0
    assert torch.equal(weights[~inside], whole[~inside])


def test_declared_counts_are_divided_for_all_parts_alike() -> None:
    batch = fresh("llava", False, "right", (0, 1, 2, 5))
    declare(batch, "patches", 48)
    declare(batch, "empty", torch.tensor(0))
    micros = split_batch(batch, 1)
    for micro in micros:
        assert float(micro[DENOMINATORS]["patches"]) == 12.0
        assert float(micro[DENOMINATORS]["empty"]) == 0.25
    labelled = int((batch["labels"] != -100).sum())
    assert float(micros[0][DENOMINATORS]["lm"]) == labelled / 4
    owned = fresh("llava", False, "right", (0, 1, 2, 5))
    declare(owned, "lm", 10)  # a method (L2T) that owns the denominator
    assert float(split_batch(owned, 2)[1][DENOMINATORS]["lm"]) == 5.0


def test_splitting_leaves_the_device_batch_as_it_was() -> None:
    batch = fresh("qwen2_5_vl", False, "left", (0, 6))
    before = {k: v.clone() for k, v in batch.items()}
    split_batch(batch, 1, device_batch_size=4)
    assert all(torch.equal(batch[k], v) for k, v in before.items())


def test_counts_for_composer() -> None:
    batch = fresh("llava", True, "right", (0, 6, 2))
    assert samples_in_batch(batch) == 3  # documents before packing, blank ones too: resumption counts them
    counts = tokens_in_batch(batch)
    assert counts == {
        "total": int((batch["document_ids"] >= 0).sum()),
        "loss_generating": int((batch["labels"] != -100).sum()),
    }
    micros = split_batch(batch, 1, device_batch_size=3)
    assert [samples_in_batch(m) for m in micros] == [1, 1, 1]
    assert [tokens_in_batch(m)["loss_generating"] for m in micros] == [1, 1, 1]


def test_the_data_spec_counts_and_splits() -> None:
    loader = DataLoader(POOL[:3], batch_size=2, collate_fn=collator())  # type: ignore[arg-type]
    spec = vlm_data_spec(loader)
    full, last = list(loader)
    assert (spec.get_num_samples_in_batch(full), spec.get_num_samples_in_batch(last)) == (2, 1)
    assert len(spec.split_batch(last, 1)) == 2  # as many as of a full batch
    assert len(vlm_data_spec(loader, training=False).split_batch(last, 1)) == 1
