"""JARVIS's masks made in two ways, part by part: the library's, and the stated procedure's (``jarvis_loop.py``).

For ``jarvis_masks.py``, which times them.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from jarvis_loop import Blocks, place, sample_blocks, write_mask

from opsin.algorithms.jarvis import JARVIS
from opsin.algorithms.jarvis.cut import CODE
from opsin.algorithms.jarvis.sampler import BLOCKS, CONTEXT, MaskConfig
from opsin.data.batch import CUT
from opsin.models import attention
from opsin.models.layout import patch_index
from opsin.models.step import Step

SIDE, IMAGE_TOKEN, BEFORE, BETWEEN, LEFT = 24, 7, 3, 5, 9
"""Patches either way; the token that shows a patch; words before a row's first picture and before another; padding."""


def device_batch(rows: int, pictures: int, length: int, side: int = SIDE) -> dict[str, Any]:
    """What of a device batch concerns masks: full rows, but for up to ``LEFT`` tokens of padding."""
    patches = side * side
    row = torch.arange(rows).repeat_interleave(pictures)
    nth = torch.arange(pictures).repeat(rows)
    start = BEFORE + nth * (patches + BETWEEN)
    assert int(start[-1]) + patches < length - LEFT, "no room for the pictures"
    ids = torch.ones(rows, length, dtype=torch.int64)
    image = torch.full((rows, length), -1, dtype=torch.int16)
    for i in range(pictures):
        here = slice(int(start[i]), int(start[i]) + patches)
        ids[:, here], image[:, here] = IMAGE_TOKEN, i
    valid = torch.arange(length) < length - (torch.arange(rows) % (LEFT + 1))[:, None]
    count = len(row)
    return {
        "input_ids": ids,
        "attention_mask": valid.long(),
        "image_ids": image,
        "document_ids": torch.where(valid, 0, -1).to(torch.int16),
        "branch_ids": torch.zeros(rows, length, dtype=torch.int16),
        "view_grid": torch.full((count, 2), side),
        "view_row": row,
        "view_document": torch.zeros(count, dtype=torch.int64),
        "view_image": nth,
        "view_start": start,
        "view_stride": torch.full((count,), side),
        "document_uid": torch.arange(rows)[:, None] + 1000,
        "document_visit": torch.zeros(rows, 1, dtype=torch.int64),
        "refused": torch.zeros(rows, 1, dtype=torch.bool),
        "plain_attention": True,
    }


class Ours:
    """The library's way, part by part."""

    def __init__(self, plain: dict[str, Any], masks: str | dict[str, Any] = "default"):
        self.plain = plain
        self.method = JARVIS(
            target={"name": "tower", "path": "scenes"},
            masks=masks,
            text_loss="masked",
            ntp_probability=0.0,
        )

    def sampled(self) -> dict[str, Any]:
        """Codes and weights of patches, on the CPU."""
        batch = dict(self.plain)
        self.method.enter(batch)
        return batch

    def cut(self, batch: dict[str, Any]) -> dict[str, Any]:
        """A micro-batch's indexes, on the CPU."""
        part, shape = dict(batch), batch["input_ids"].shape
        found = patch_index(*(part[f"view_{key}"] for key in ("row", "start", "stride", "grid")), shape[1])
        part["patch_position"], part["patch_view"] = found.position, found.view
        part.update(part[CUT + self.method.name](part))
        return part

    def asked(self, part: dict[str, Any]) -> Step:
        """What the method writes into the record of a micro-batch, where the model is."""
        step = Step(part)
        net = SimpleNamespace(auxiliary={self.method.name: SimpleNamespace(latent=None)})
        self.method.ask(SimpleNamespace(step=lambda _: step, net=net), part)  # type: ignore[arg-type]
        return step

    def laid_out(self, batch: dict[str, Any]) -> Step:
        """Both."""
        return self.asked(self.cut(batch))

    @staticmethod
    def written(step: Step, form: str) -> Any:
        """The mask in one of the forms that kernels take."""
        see = step.sees(bidirectional_images=True)
        assert see is not None
        if form == "bool":
            return attention.dense(see)
        return attention.additive(see, torch.float32) if form == "additive" else attention.block_mask(see)


class Loop:
    """The stated way, part by part."""

    def __init__(self, plain: dict[str, Any], pictures: int):
        self.plain, self.pictures, self.config = plain, pictures, MaskConfig()
        self.generator = torch.Generator().manual_seed(0)

    def sampled(self) -> list[list[Blocks]]:
        """Blocks of each row's pictures."""
        return [
            [sample_blocks(self.generator, (SIDE, SIDE), self.config) for _ in range(self.pictures)]
            for _ in self.plain["input_ids"]
        ]

    def laid_out(self, blocks: list[list[Blocks]]) -> Any:
        """Where pictures are, what is hidden and what predicted."""
        return place(self.plain["input_ids"], IMAGE_TOKEN, blocks, SIDE * SIDE)

    def written(self, placed: Any, form: str) -> torch.Tensor:
        """The mask."""
        dtype = torch.bool if form == "bool" else torch.float32
        return write_mask(self.plain["attention_mask"], placed[0], dtype)


def check(ours: Ours, loop: Loop) -> dict[str, float]:
    """Both ways agree: on masks and targets, given ours' blocks; on how much is covered, drawn by either."""
    batch = ours.sampled()
    step = ours.laid_out(batch)
    codes = batch[CODE].view(-1, loop.pictures, SIDE * SIDE)
    blocks = [[Blocks.of(code, loop.config.blocks) for code in row] for row in codes]
    placed = loop.laid_out(blocks)
    assert step.hidden is not None and torch.equal(step.hidden, placed[1])
    part = step.batch
    counts = torch.zeros(placed[1].numel()).index_add_(0, placed[2], torch.ones(len(placed[2])))
    assert torch.equal(counts[part["patch_position"][part["jarvis/targets"]]], part["jarvis/weights"])
    real = part["attention_mask"].bool()  # padding: ours sees itself, wherever it is
    bools = [way.written(s, "bool")[:, 0][real] for way, s in ((ours, step), (loop, placed))]
    floats = [way.written(s, "additive")[:, 0][real] for way, s in ((ours, step), (loop, placed))]
    assert torch.equal(*bools) and torch.equal(*floats), "the masks differ"
    drawn = [one for _ in range(8) for row in loop.sampled() for one in row]
    loops = {
        "targets": sum(len(torch.cat(one.targets).unique()) for one in drawn),
        "context": sum(len(one.context) for one in drawn),
    }
    shares = {f"loop_{key}": value / len(drawn) / SIDE**2 for key, value in loops.items()}
    many = Ours(device_batch(8 * len(codes), loop.pictures, part["input_ids"].shape[1])).sampled()[CODE]
    shares["ours_targets"] = float(((many & BLOCKS) != 0).float().mean())
    shares["ours_context"] = float(((many & CONTEXT) != 0).float().mean())
    for key in ("targets", "context"):
        assert abs(shares[f"loop_{key}"] - shares[f"ours_{key}"]) < 0.04, shares
    return shares
