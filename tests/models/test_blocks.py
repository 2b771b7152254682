"""Block masks: what they may cost, and which blocks they leave out."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from opsin.models.attention import Visibility, block_mask, dense

from masks import Recorder


def layout(batch: int, length: int, images: int = 1, blocks: int = 4, documents: int = 1) -> Visibility:
    """Rows of equal documents, ``images`` masked pictures in each row, ``blocks`` groups in each picture."""
    at = torch.arange(length).expand(batch, length)
    size = length // (images + 1)
    image = torch.where(at < images * size, at // size, -1).to(torch.int16)
    visual = image >= 0
    group = at % (blocks + 2)  # some in a block, some context, some neither
    return Visibility(
        valid=at < length - 8,
        document=(at * documents // length).to(torch.int16),
        branch=torch.zeros(batch, length, dtype=torch.int16),
        image=image,
        bidirectional=visual,
        closed=visual,
        context=visual & (group == blocks),
        group_bits=torch.where(visual & (group < blocks), 1 << group, 0).to(torch.uint8),
        hidden=visual & (group > blocks),
        scope=image,
        preceding=~visual,
    )


def test_nothing_of_the_size_of_a_mask_is_made() -> None:
    length = 8192
    for see in (layout(1, length, images=3), layout(1, length, documents=9)):
        for bits in (torch.uint8, torch.int64):
            assert see.group_bits is not None
            with Recorder() as recorder:
                block_mask(see.with_terms(group_bits=see.group_bits.to(bits)))
            assert 0 < recorder.largest < length * length // 100


def operations(see: Visibility) -> list[str]:
    block_mask(see)
    with Recorder() as recorder:
        block_mask(see)
    return recorder.operations


def test_operations_do_not_grow_with_batch_length_images_or_blocks() -> None:
    made = operations(layout(1, 640))
    assert not [name for name in made if "nonzero" in name or "_local_scalar_dense" in name]  # no waiting
    for other in (
        layout(4, 640),
        layout(1, 2048),
        layout(1, 640, images=3),
        layout(1, 640, blocks=1),
        layout(1, 640, documents=4),
    ):
        assert operations(other) == made


def exact(see: Visibility, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Blocks with something, and blocks with all, (N, N) bool, of the first row."""
    mask = dense(see)[0, 0]
    tiles = mask.unfold(0, size, size).unfold(1, size, size).flatten(2)
    return tiles.any(-1), tiles.all(-1)


def kept(mask: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """The same of a block mask."""
    count = mask.kv_indices.shape[-1]
    partial, full = torch.zeros(2, count, count, dtype=torch.bool)
    for q in range(count):
        partial[q, mask.kv_indices[0, 0, q, : mask.kv_num_blocks[0, 0, q]].long()] = True
        full[q, mask.full_kv_indices[0, 0, q, : mask.full_kv_num_blocks[0, 0, q]].long()] = True
    assert not bool((partial & full).any())
    return partial | full, full


def text(length: int, documents: tuple[int, ...], padding: int = 0) -> Visibility:
    at = torch.arange(length)[None]
    valid = at < length - padding
    document = torch.bucketize(at, torch.tensor(documents), right=True)
    return Visibility(valid, document.where(valid, -1), torch.zeros_like(at), torch.full_like(at, -1))


@pytest.mark.parametrize(
    "see",
    [
        text(512, ()),
        text(512, (), padding=100),
        text(512, (3, 90, 91, 200, 256, 333), padding=60),
        text(512, (128, 256), padding=128),
    ],
    ids=["causal", "padded", "packed", "on block borders"],
)
def test_text_keeps_exactly_the_blocks_it_needs(see: Visibility) -> None:
    some, every = kept(block_mask(see, 32))
    needed, full = exact(see, 32)
    assert torch.equal(some, needed)
    assert torch.equal(every, full)


def test_images_branches_and_scopes_skip_what_is_not_theirs() -> None:
    see = layout(1, 512, images=3)  # pictures of 128 tokens, 128 of text
    closed = see.with_terms(preceding=torch.zeros_like(see.valid))
    for masked in (closed, closed.with_terms(scope=torch.arange(512)[None] // 64)):
        some, _ = kept(block_mask(masked, 32))
        assert torch.equal(some, exact(masked, 32)[0])
    at = torch.arange(512)[None]
    branches = text(512, ())
    branches = Visibility(branches.valid, branches.document, (at // 128).int(), branches.image)
    some, every = kept(block_mask(branches, 32))
    assert torch.equal(some, exact(branches, 32)[0])
    assert torch.equal(every, exact(branches, 32)[1])
