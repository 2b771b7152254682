"""What JARVIS's masks may cost from sampler to mask: no operation a row, a picture or a block; nothing of size L * L."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from opsin.algorithms.jarvis import JARVIS
from opsin.data.batch import CUT
from opsin.models import attention
from opsin.models.layout import patch_index
from opsin.models.step import Step

from masks import Recorder

SIDE, GAP = 8, 4
PATCHES = SIDE * SIDE
LENGTH = 3 * (PATCHES + GAP) + 20


def device_batch(rows: int, images: int, length: int = LENGTH) -> dict[str, Any]:
    """What of a device batch JARVIS reads: each row has ``images`` pictures, and padding."""
    row, nth = torch.arange(rows).repeat_interleave(images), torch.arange(images).repeat(rows)
    start = GAP + nth * (PATCHES + GAP)
    image = torch.full((rows, length), -1, dtype=torch.int16)
    for i in range(images):
        image[:, int(start[i]) : int(start[i]) + PATCHES] = i
    valid = (torch.arange(length) < length - 5).expand(rows, length)
    return {
        "input_ids": torch.zeros(rows, length, dtype=torch.int64),
        "attention_mask": valid.long(),
        "image_ids": image,
        "document_ids": torch.where(valid, 0, -1).to(torch.int16),
        "branch_ids": torch.zeros(rows, length, dtype=torch.int16),
        "view_grid": torch.full((len(row), 2), SIDE),
        "view_row": row,
        "view_document": torch.zeros_like(row),
        "view_image": nth,
        "view_start": start,
        "view_stride": torch.full_like(row, SIDE),
        "document_uid": torch.arange(rows)[:, None] + 1,
        "document_visit": torch.zeros(rows, 1, dtype=torch.int64),
        "refused": torch.zeros(rows, 1, dtype=torch.bool),
        "plain_attention": True,
    }


def sampled(method: JARVIS, batch: dict[str, Any]) -> dict[str, Any]:
    batch = dict(batch)
    method.enter(batch)
    return batch


def cut(batch: dict[str, Any]) -> dict[str, Any]:
    part = dict(batch)
    views = (part[f"view_{key}"] for key in ("row", "start", "stride", "grid"))
    found = patch_index(*views, part["input_ids"].shape[1])
    part["patch_position"], part["patch_view"] = found.position, found.view
    part.update(part[CUT + "jarvis"](part))
    return part


def asked(method: JARVIS, part: dict[str, Any]) -> Step:
    """The record of a micro-batch after the method wrote into it."""
    step = Step(part)
    net = SimpleNamespace(auxiliary={"jarvis": SimpleNamespace(latent=None)})
    method.ask(SimpleNamespace(step=lambda _: step, net=net), part)  # type: ignore[arg-type]
    return step


def method_of(blocks: int, text_loss: str = "masked") -> JARVIS:
    """Blocks that fit at the first draw: another one is as many operations more."""
    return JARVIS(
        target={"name": "tower", "path": "scenes"},
        masks={"blocks": blocks, "scale": [0.05, 0.1]},
        text_loss=text_loss,
        ntp_probability=0.0,
    )


def recorded(work: Callable[[], Any]) -> Recorder:
    work()
    with Recorder() as recorder:
        work()
    return recorder


def operations(rows: int, images: int, blocks: int, text_loss: str) -> dict[str, list[str]]:
    """Of each part, from the sampler to each form of the mask."""
    method = method_of(blocks, text_loss)
    batch = device_batch(rows, images)
    drawn = sampled(method, batch)
    part = cut(drawn)
    step = asked(method, part)

    def see() -> Any:
        if text_loss == "unmasked":
            return step.branches["jarvis"].visibility
        return step.sees(bidirectional_images=True)

    parts: dict[str, Callable[[], Any]] = {
        "sampler": lambda: sampled(method, batch),
        "cut": lambda: cut(drawn),
        "ask": lambda: asked(method, part),
        "dense": lambda: attention.dense(see()),
        "additive": lambda: attention.additive(see(), torch.float32),
        "block mask": lambda: attention.block_mask(see()),
    }
    return {name: recorded(one).operations for name, one in parts.items()}


@pytest.mark.parametrize("text_loss", ["masked", "unmasked"])
def test_operations_do_not_grow_with_rows_pictures_or_blocks(
    text_loss: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "CPU_PIECE", 1 << 60)  # as on a GPU: masks in one piece
    made = operations(2, 1, 4, text_loss)
    for rows, images, blocks in ((4, 1, 4), (16, 1, 4), (2, 3, 4), (2, 1, 1), (2, 1, 8), (16, 3, 8)):
        assert operations(rows, images, blocks, text_loss) == made
    alone = operations(1, 1, 4, text_loss)  # on the CPU less is done for a single view
    assert {k: v for k, v in alone.items() if k not in ("sampler", "cut")} == {
        k: v for k, v in made.items() if k not in ("sampler", "cut")
    }


def test_the_device_is_never_waited_for() -> None:
    """What comes after ``cut`` is done where the model is."""
    for text_loss in ("masked", "unmasked"):
        made = operations(2, 3, 4, text_loss)
        for part in ("ask", "dense", "additive", "block mask"):
            assert not [n for n in made[part] if "nonzero" in n or "_local_scalar_dense" in n], part


def test_nothing_of_the_size_of_a_mask_is_made_on_the_way_to_a_block_mask() -> None:
    length = 8192
    method = method_of(4)

    def whole() -> Any:
        step = asked(method, cut(sampled(method, device_batch(1, 3, length))))
        see = step.sees(bidirectional_images=True)
        assert see is not None and see.closed is not None and bool(see.closed.any())
        return attention.block_mask(see)

    assert 0 < recorded(whole).largest < length * length // 100
