"""Masked prediction in attention: the predicate against JARVIS' procedure (fact sheet, section 3.1), step by step."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest
import torch
from torch.nn import functional as F
from torch.nn.attention.flex_attention import create_mask, flex_attention

from opsin.models import attention
from opsin.models.attention import Visibility, additive, block_mask, dense, mask_mod

from masks import materialised

LENGTH = 40


@dataclass
class Image:
    """A picture at positions ``start`` to ``stop``; without ``masked`` it is an ordinary bidirectional one."""

    start: int
    stop: int
    masked: bool
    blocks: list[set[int]] = field(default_factory=list)
    context: set[int] = field(default_factory=set)

    def unused(self) -> set[int]:
        return set(range(self.start, self.stop)) - self.context - set().union(*self.blocks)


@dataclass
class Document:
    start: int
    stop: int
    images: list[Image]


@dataclass
class Layout:
    """Rows of packed documents; what of a row belongs to none is padding."""

    rows: list[list[Document]]
    hide_unused: bool
    preceding: bool

    def images(self) -> Iterator[tuple[int, int, Image]]:
        """Row, ordinal in the row, image."""
        for b, row in enumerate(self.rows):
            yield from ((b, i, image) for i, image in enumerate(im for doc in row for im in doc.images))


def draw_image(rng: random.Random, start: int, size: int) -> Image:
    image = Image(start, start + size, masked=rng.random() < 0.75)
    positions = range(image.start, image.stop)
    if image.masked:
        for _ in range(rng.randint(1, 3)):  # blocks may overlap
            low = rng.choice(positions)
            image.blocks.append(set(positions[low - start : low - start + rng.randint(1, 4)]))
        free = sorted(set(positions) - set().union(*image.blocks))
        image.context = set(rng.sample(free, rng.randint(1, len(free)))) if free else set()
        if not image.context:  # every query needs something to see
            image.blocks, image.context = [], set(positions)
    return image


def draw_document(rng: random.Random, start: int, limit: int) -> Document:
    at, images = start + rng.randint(0, 3), []
    for _ in range(rng.choice((0, 1, 1, 1, 2, 3))):
        size = rng.randint(1, 9)
        if at + size > limit:
            break
        images.append(draw_image(rng, at, size))
        at += size + rng.randint(0, 3)
    return Document(start, min(limit, max(at, start + 1) + rng.randint(0, 3)), images)


def draw_layout(seed: int) -> Layout:
    rng = random.Random(seed)
    rows = []
    for _ in range(2):
        at, limit = rng.choice((0, 0, 3)), LENGTH - rng.choice((0, 0, 5))
        documents = []
        for _ in range(rng.choice((1, 1, 2, 9))):
            if at < limit:
                documents.append(draw_document(rng, at, limit))
                at = documents[-1].stop
        rows.append(documents)
    return Layout(rows, rng.random() < 0.5, rng.random() < 0.5)


def procedure(layout: Layout) -> torch.Tensor:
    """(B, L, L) bool by the steps of the fact sheet; each within one document, images from left to right."""
    out = torch.zeros(len(layout.rows), LENGTH, LENGTH, dtype=torch.bool)
    for mask, row in zip(out, layout.rows, strict=True):
        for doc in row:
            positions = range(doc.start, doc.stop)
            text = set(positions) - {p for image in doc.images for p in range(image.start, image.stop)}
            for (
                q
            ) in positions:  # step 0: causal; the square of each image; other documents and padding: no keys
                for k in range(doc.start, q + 1):
                    mask[q, k] = True
            for image in doc.images:
                for q in range(image.start, image.stop):
                    for k in range(image.start, image.stop):
                        mask[q, k] = True
            for image in doc.images:
                if not image.masked:
                    continue
                for q in range(image.start, image.stop):  # step 1: rows of visual queries, towards whatever
                    for k in range(LENGTH):
                        mask[q, k] = False
                for q in range(image.start, doc.stop):  # step 2: context columns
                    for k in image.context:
                        mask[q, k] = True
                for block in image.blocks:  # step 3
                    for q in block:
                        for k in block:
                            mask[q, k] = True
                for q in range(image.stop, doc.stop):  # step 4: target columns of what follows
                    for block in image.blocks:
                        for k in block:
                            mask[q, k] = True
                if layout.preceding:  # ours: text before the picture stays visible
                    for q in range(image.start, image.stop):
                        for k in text:
                            if k < q:
                                mask[q, k] = True
            if layout.hide_unused:  # ours: what is neither context nor target is seen by nobody
                for image in doc.images:
                    if image.masked:
                        for q in positions:
                            for k in image.unused():
                                mask[q, k] = False
    return out


def visibility(layout: Layout) -> Visibility:
    """The layout as a method fills it."""
    shape = (len(layout.rows), LENGTH)
    ints = {name: torch.full(shape, -1, dtype=torch.int16) for name in ("document", "image")}
    bools = {name: torch.zeros(shape, dtype=torch.bool) for name in ("valid", "closed", "context")}
    bits = torch.zeros(shape, dtype=torch.uint8)
    for b, row in enumerate(layout.rows):
        for ordinal, doc in enumerate(row):
            ints["document"][b, doc.start : doc.stop] = ordinal
            bools["valid"][b, doc.start : doc.stop] = True
    for b, ordinal, image in layout.images():
        ints["image"][b, image.start : image.stop] = ordinal
        bools["closed"][b, image.start : image.stop] = image.masked
        bools["context"][b, list(image.context)] = True
        for j, block in enumerate(image.blocks):
            bits[b, list(block)] |= 1 << j
    visual = ints["image"] >= 0
    see = Visibility(
        **ints, **bools, branch=torch.zeros(shape, dtype=torch.int16), bidirectional=visual, group_bits=bits
    )
    if layout.hide_unused:
        see = see.with_terms(hidden=bools["closed"] & ~bools["context"] & (bits == 0))
    return see.with_terms(preceding=~visual) if layout.preceding else see


def test_the_predicate_is_the_step_by_step_procedure_on_300_random_layouts() -> None:
    seen = {"overlap": 0, "images": 0, "documents": 0, "mixed": 0, "unused": 0}
    for seed in range(300):
        layout = draw_layout(seed)
        see, expected = visibility(layout), procedure(layout)
        made = dense(see)[:, 0]
        assert torch.equal(made[see.valid], expected[see.valid]), f"layout {seed}: {layout}"
        assert bool(made[see.valid].any(-1).all()), f"layout {seed} has an empty row"
        images = [image for _, _, image in layout.images()]
        seen["overlap"] += any(sum(map(len, im.blocks)) > len(set().union(*im.blocks)) for im in images)
        seen["images"] += any(len(doc.images) > 1 for row in layout.rows for doc in row)
        seen["documents"] += any(len(row) > 1 for row in layout.rows)
        seen["mixed"] += len({image.masked for image in images}) == 2
        seen["unused"] += any(image.masked and image.unused() for image in images)
    assert min(seen.values()) > 50, seen  # the layouts are not trivial


@pytest.mark.parametrize("seed", range(12))
def test_every_form_is_the_same_on_masked_layouts(seed: int) -> None:
    see = visibility(draw_layout(seed))
    expected = dense(see)
    batch = expected.shape[0]
    assert torch.equal(additive(see, torch.float32) == 0, expected)
    assert torch.equal(create_mask(mask_mod(see), batch, None, LENGTH, LENGTH, device="cpu"), expected)
    assert torch.equal(materialised(block_mask(see, 8), LENGTH), expected)


def test_pieces_in_which_a_cpu_writes_masks_leave_no_seams(monkeypatch: pytest.MonkeyPatch) -> None:
    see = visibility(draw_layout(1))
    expected = procedure(draw_layout(1))[see.valid]
    for piece in (1, 2 * LENGTH * 7, 1 << 18):  # one query at a time, seven, all
        monkeypatch.setattr(attention, "CPU_PIECE", piece)
        assert torch.equal(dense(see)[:, 0][see.valid], expected)
        assert torch.equal((additive(see, torch.bfloat16) == 0)[:, 0][see.valid], expected)


@pytest.mark.parametrize("seed", range(6))
def test_masked_attention_is_the_same_in_sdpa_and_flex(seed: int) -> None:
    see = visibility(draw_layout(seed))
    torch.manual_seed(seed)
    q, k, v = torch.randn(3, len(see.valid), 2, LENGTH, 8).unbind(0)
    direct = F.scaled_dot_product_attention(q, k, v, attn_mask=dense(see))
    assert bool(direct.isfinite().all())
    torch.testing.assert_close(
        flex_attention(q, k, v, block_mask=block_mask(see)), direct, atol=1e-5, rtol=1e-4
    )


@pytest.mark.parametrize("seed", range(20))
def test_no_blocks_and_all_context_is_the_mask_of_bidirectional_images(seed: int) -> None:
    layout = draw_layout(seed)
    layout.preceding = layout.hide_unused = False
    for _, _, image in layout.images():
        image.masked, image.blocks, image.context = True, [], set(range(image.start, image.stop))
    see = visibility(layout)
    plain = Visibility(see.valid, see.document, see.branch, see.image, see.bidirectional)
    visual = see.image >= 0
    own = (see.image[:, :, None] == see.image[:, None]) & visual[:, :, None]
    open_, closed = dense(plain)[:, 0], dense(see)[:, 0]
    assert torch.equal(closed[~visual], open_[~visual])
    assert torch.equal(closed[visual], (open_ & own)[visual])  # less what comes before the picture
    # With the text before it, only earlier pictures are missing.
    with_text = dense(see.with_terms(preceding=~visual))[:, 0]
    earlier = visual[:, None] & ~own & visual[:, :, None]
    assert torch.equal(with_text, open_ & ~earlier)


def test_an_unused_query_sees_context_and_not_itself() -> None:
    image = Image(1, 6, True, blocks=[{2, 3}, {3, 4}], context={1})
    made = dense(visibility(Layout([[Document(0, 8, [image])]], False, False)))[0, 0, :8, :8].int().tolist()
    assert made == [
        [1, 0, 0, 0, 0, 0, 0, 0],  # text before: causal
        [0, 1, 0, 0, 0, 0, 0, 0],  # context: context
        [0, 1, 1, 1, 0, 0, 0, 0],  # first block, and the token in both blocks
        [0, 1, 1, 1, 1, 0, 0, 0],  # in both
        [0, 1, 0, 1, 1, 0, 0, 0],  # second block
        [0, 1, 0, 0, 0, 0, 0, 0],  # unused
        [1, 1, 1, 1, 1, 1, 1, 0],  # text after
        [1, 1, 1, 1, 1, 1, 1, 1],
    ]


def test_two_views_of_a_picture_are_masked_on_their_own() -> None:
    image = Image(0, 6, True, context={0, 3})
    see = visibility(Layout([[Document(0, 7, [image])]], False, False))
    scope = torch.full_like(see.image, -1)
    scope[0, :3], scope[0, 3:6] = 4, 9
    made = dense(see.with_terms(scope=scope))[0, 0]
    for q in range(6):
        assert made[q].nonzero().flatten().tolist() == [0 if q < 3 else 3]
    assert made[6].sum() == 7
