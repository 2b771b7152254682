"""Packing: the assignment of documents to rows, and that a packed document knows nothing of its neighbours."""

from __future__ import annotations

from functools import lru_cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from opsin.data.batch import effective_weights, split_batch
from opsin.data.packing import first_fit_decreasing
from opsin.models.step import Step
from opsin.models.vlm import VisionLanguageModel

import jobs
import zoo

lengths = st.lists(st.integers(1, 20), max_size=24)


@settings(max_examples=100, deadline=None)
@given(lengths, st.integers(20, 40))
def test_rows_hold_every_document_once_and_no_more_than_they_can(sizes: list[int], capacity: int) -> None:
    rows = first_fit_decreasing(sizes, capacity)
    assert sorted(d for row in rows for d in row) == list(range(len(sizes)))
    assert all(0 < sum(sizes[d] for d in row) <= capacity for row in rows)
    assert all(row == sorted(row) for row in rows)
    assert [row[0] for row in rows] == sorted(row[0] for row in rows)
    # No two rows could be one, as any first-fit rule guarantees.
    totals = sorted(sum(sizes[d] for d in row) for row in rows)
    assert len(rows) < 2 or totals[0] + totals[1] > capacity


@settings(max_examples=60, deadline=None)
@given(lengths, st.integers(20, 40))
def test_the_rule_is_first_fit_decreasing(sizes: list[int], capacity: int) -> None:
    naive: list[list[int]] = []
    for document in sorted(range(len(sizes)), key=lambda d: sizes[d], reverse=True):
        for row in naive:
            if sum(sizes[d] for d in row) + sizes[document] <= capacity:
                row.append(document)
                break
        else:
            naive.append([document])
    assert {frozenset(r) for r in naive} == {frozenset(r) for r in first_fit_decreasing(sizes, capacity)}


def test_equal_lengths_keep_their_order() -> None:
    assert first_fit_decreasing([2, 2, 2, 2], 4) == [[0, 1], [2, 3]]
    assert first_fit_decreasing([], 4) == []
    with pytest.raises(ValueError, match="document 1 has 5 tokens, a row holds 4"):
        first_fit_decreasing([1, 5], 4)


# In the model ----------------------------------------------------------------------------------------------

SAMPLES = [
    zoo.sample(0, turns=2),
    zoo.sample(1, images=2, size=(16, 40)),
    zoo.sample(2, images=0),
    zoo.sample(3, turns=3, independent=True),
    zoo.sample(4, images=0, turns=2),
]


@lru_cache
def built(family: str) -> tuple[zoo.Built, VisionLanguageModel]:
    model = zoo.build(family)
    return model, VisionLanguageModel(model.hf, model.processor).eval()


def learnt(family: str, packing: bool, samples: list[dict] = SAMPLES) -> dict[tuple, list[float]]:
    """(document, turn) -> nll of its labelled tokens, and how many documents share a row."""
    built_, model = built(family)
    collate = jobs.collator(built_, max_seq_len=480, packing=packing)
    batch = collate([{**s, "uid": i + 1} for i, s in enumerate(samples)])
    (micro,) = split_batch(batch, None, training=False)
    with torch.no_grad():
        nll = model.net(micro, Step(micro))["nll"]
    length = micro["input_ids"].shape[1]
    found: dict[tuple, list[float]] = {}
    for k, place in enumerate(micro["label_rows"].tolist()):
        row, column = divmod(place, length)
        document = int(micro["document_uid"][row, micro["document_ids"][row, column]])
        found.setdefault((document, int(micro["label_turns"][k])), []).append(float(nll[k]))
    return found


@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_packed_and_unpacked_give_each_token_the_same_loss(family: str) -> None:
    packed, apart = learnt(family, True), learnt(family, False)
    assert packed.keys() == apart.keys()
    assert jobs.collator(built(family)[0], max_seq_len=480, packing=True)(SAMPLES)["input_ids"].shape[0] < 5
    for key, values in apart.items():
        assert packed[key] == pytest.approx(values, abs=1e-5)


def test_a_document_alone_gives_the_same_loss_as_in_company() -> None:
    company = learnt("llava", True)
    for i, sample in enumerate(SAMPLES):
        for (_, turn), values in learnt("llava", False, [sample]).items():
            assert company[i + 1, turn] == pytest.approx(values, abs=1e-5)


def test_the_first_token_of_a_packed_document_is_never_predicted() -> None:
    batch = jobs.collator(built("llava")[0], packing=True, max_seq_len=480)(SAMPLES)
    batch["labels"] = torch.where(batch["document_ids"] >= 0, batch["input_ids"], -100)  # label everything
    weights, source = effective_weights(batch)
    rows, columns = batch["document_ids"].shape
    seen = 0
    for r in range(rows):
        for c in range(columns):
            document = int(batch["document_ids"][r, c])
            if document < 0 or (c and int(batch["document_ids"][r, c - 1]) == document):
                continue
            seen += 1
            assert source[r, c] == -1
            assert weights[r, c] == 0
    assert seen == len(SAMPLES)
    # Whatever is predicted is predicted from the same document.
    r, c = (source >= 0).nonzero(as_tuple=True)
    assert torch.equal(batch["document_ids"][r, source[r, c]], batch["document_ids"][r, c])
