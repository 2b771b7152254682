"""What the attention rows of some questions say: mass by role of the key, and mass on the asked object's patches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..data.batch import split_batch, to_device
from ..data.chat import BadConversation
from ..data.collate import VLMCollator
from ..data.encode import Document, Rejected
from ..data.schema import Role, unpack_images
from ..models.attention import allow
from ..models.step import Step
from ..models.vlm import VisionLanguageModel
from .attention_rows import attention_rows
from .heat_maps import Example, ViewMap
from .patch_cover import covered, overlap, patch_boxes, patch_rows, shares
from .questions import questions

QUERIES = ("last_prompt", "answer")
"""``last_prompt``: the position from which the answer's first token is predicted. ``answer``: all positions that predict
its tokens but the one that ends it (mean), the gold answer before them."""

GROUPS = {
    "visual": Role.IMAGE,
    "system": Role.SYSTEM,
    "marker": Role.MARKER,
    "instruction": Role.INSTRUCTION,
    "response": Role.RESPONSE,
}
"""Keys by what they are in the conversation."""

LEAST_LEFT = 0.5
"""Of another object's area, what the asked object's box must leave for it to be compared with."""


@dataclass(frozen=True)
class Looked:
    """What one question's rows say. N layers.

    Attributes:
        mass: (N, groups), of ``GROUPS``; sums to 1.
        visible: share of visual tokens among the keys that are seen, mean over the rows.
        pointing: (N,) share of the patches' mass on the asked object, against its share of the patches; None: the
            question is not about one object, or no patch shows it.
        others: (N,) the same of the picture's other objects, mean; None: nothing to compare.
        area: share of the patches that show the asked object.
        example: the maps, where they are kept.
    """

    mass: np.ndarray
    visible: float
    pointing: np.ndarray | None = None
    others: np.ndarray | None = None
    area: float | None = None
    example: Example | None = None


@dataclass(frozen=True)
class Rows:
    """Queries of a micro-batch in its order: n positions that answer A questions.

    Attributes:
        row, column: (n,) int64, where they are.
        slot: (n,) int64, ordinal within the row.
        question: (n,) int64, 0 .. A - 1.
        row_of, turn_of: (A,) int64, row and exchange of each question.
    """

    row: torch.Tensor
    column: torch.Tensor
    slot: torch.Tensor
    question: torch.Tensor
    row_of: torch.Tensor
    turn_of: torch.Tensor

    def padded(self, batch: int) -> torch.Tensor:
        """(B, Q) positions, -1 behind."""
        out = torch.full((batch, int(self.slot.max()) + 1), -1)
        out[self.row, self.slot] = self.column
        return out


def query_rows(micro: Mapping[str, Any], queries: str) -> Rows | None:
    """Positions of a micro-batch (on the CPU) that predict answers; None: there are none."""
    length = micro["input_ids"].shape[1]
    answer = micro["label_answer"]
    use = answer >= 0
    if not bool(use.any()):
        return None
    answer, at, turn = answer[use], micro["label_rows"][use], micro["label_turns"][use].long()
    changes = answer[1:] != answer[:-1]
    edge = torch.ones(1, dtype=torch.bool)
    first, last = torch.cat([edge, changes]), torch.cat([changes, edge])
    wanted = first if queries == "last_prompt" else ~last | first
    row = at // length
    row_of, turn_of = row[first], turn[first]
    row, column, question = row[wanted], (at % length)[wanted], answer[wanted]
    count = torch.bincount(row, minlength=micro["input_ids"].shape[0])
    slot = torch.arange(len(row)) - (count.cumsum(0) - count)[row]
    return Rows(row, column, slot, question, row_of, turn_of)


def look(
    model: VisionLanguageModel,
    collator: VLMCollator,
    part: Sequence[tuple[int, Mapping[str, Any]]],
    queries: str,
    kept: set[tuple[int, int]],
) -> list[list[Looked]]:
    """One forward pass about some numbered samples (stored form): for each sample its questions, in order.

    Samples without a picture and those that cannot be encoded have none, and keep their place as blank rows.
    ``kept``: (number, exchange) of questions whose maps are wanted.
    """
    documents = [_document(collator, sample) for _, sample in part]
    plain = VLMCollator(collator.encoder, pad_to_multiple_of=collator.pad_to_multiple_of)
    batch = plain.layout(documents)
    batch["sample_status"] = torch.zeros(len(documents), dtype=torch.int8)
    micro = split_batch(batch, None, training=False)[0]
    device = next(model.parameters()).device
    rows = query_rows(micro, queries)
    if rows is None:  # no question anywhere: ranks of a sharded model still run it together
        attention_rows(model, to_device(micro, device), torch.full((len(part), 1), -1, device=device))
        return [[] for _ in part]
    weights = attention_rows(model, to_device(micro, device), rows.padded(len(part)).to(device)).cpu()
    attention = _mean_by(weights[:, rows.row, rows.slot], rows.question, len(rows.row_of))
    mass = torch.stack(
        [(attention * (micro["roles"] == role)[rows.row_of]).sum(-1) for role in GROUPS.values()], -1
    )
    visible = _visible(model, micro, rows)
    pointed = points(micro, attention, rows, part, documents)
    found: list[list[Looked]] = [[] for _ in part]
    for i, (row, turn) in enumerate(zip(rows.row_of.tolist(), rows.turn_of.tolist(), strict=True)):
        number, sample = part[row]
        own, others, area, box = pointed.get(i, (None, None, None, None))
        example = None
        if (number, turn) in kept:
            question, answer, _ = questions(sample)[turn]
            picture = unpack_images(sample["images"])[0]
            maps = _maps(micro, attention[:, i], row)
            example = Example(question, answer, picture, maps, box, own)
        found[row].append(Looked(mass[:, i].numpy(), float(visible[i]), own, others, area, example))
    return found


def _document(collator: VLMCollator, sample: Mapping[str, Any]) -> Document | None:
    try:
        questions(sample)
        document = collator.encoder(sample)
    except (Rejected, BadConversation):
        return None
    return document if document.images else None


def _mean_by(values: torch.Tensor, group: torch.Tensor, count: int) -> torch.Tensor:
    """(N, n, L) -> (N, count, L): mean over the n that belong to each group."""
    total = values.new_zeros(values.shape[0], count, values.shape[2]).index_add_(1, group, values)
    return total / torch.bincount(group, minlength=count)[None, :, None]


def _visible(model: VisionLanguageModel, micro: dict[str, Any], rows: Rows) -> torch.Tensor:
    """(A,) share of visual tokens among the keys that the rows see, by the model's own rule of visibility."""
    see = Step({**micro, "plain_attention": False}).sees(model.net.bidirectional_images)
    assert see is not None
    seen = allow(
        see, rows.row[:, None], rows.column[:, None], torch.arange(micro["input_ids"].shape[1])[None]
    )
    visual = (seen & (micro["image_ids"] >= 0)[rows.row]).sum(1) / seen.sum(1)
    return _mean_by(visual[None, :, None].double(), rows.question, len(rows.row_of))[0, :, 0]


def one_object(sample: Mapping[str, Any], turn: int) -> tuple[list[float], list[list[float]]] | None:
    """Box of the one object that an exchange is about and those of the others, in pixels; None: there is no such one."""
    meta = sample.get("meta")
    if not isinstance(meta, Mapping):
        return None
    asked, things = meta.get("asked"), meta.get("objects")
    if not asked or not things or turn >= len(asked) or not asked[turn] or len(asked[turn]) != 1:
        return None
    own = asked[turn][0]
    return things[own]["box"], [thing["box"] for i, thing in enumerate(things) if i != own]


def points(
    micro: dict[str, Any],
    attention: torch.Tensor,
    rows: Rows,
    part: Sequence[tuple[int, Mapping[str, Any]]],
    documents: Sequence[Document | None],
) -> dict[int, tuple[np.ndarray, np.ndarray | None, float, tuple[float, ...]]]:
    """Pointing of the questions that are about one object of their sample's only picture.

    Args:
        micro: on the CPU.
        attention: (N, A, L) of each question.
        rows: of the questions.
        part, documents: samples and their documents, a row each.

    Returns:
        question -> pointing (N,), that of the others (N,) or None, share of patches, box in shares of the picture.
    """
    boxes, cut, owner = (
        [],
        [],
        [],
    )  # of every object; what is taken off it; its question. The asked object comes first.
    for i, (row, turn) in enumerate(zip(rows.row_of.tolist(), rows.turn_of.tolist(), strict=True)):
        document, asked = documents[row], one_object(part[row][1], turn)
        if asked is None or document is None or len(document.images) != 1:
            continue
        own, others = asked
        there = shares([own, *others], document.images[0].size)
        boxes.append(there)
        cut.append(torch.cat([torch.zeros(1, 4, dtype=torch.float64), there[:1].expand(len(others), -1)]))
        owner += [i] * len(there)
    if not owner:
        return {}
    box, cuts, question = torch.cat(boxes), torch.cat(cut), torch.tensor(owner)
    patches, (patch_row, column) = patch_boxes(micro), patch_rows(micro)
    mine = (patch_row == rows.row_of[question, None]).double()
    whole = covered(patches, box) * mine
    cover = whole - covered(patches, overlap(box, cuts)) * mine
    area = cover.sum(1) / mine.sum(1)
    on_tokens = torch.zeros(2, len(owner), attention.shape[2], dtype=torch.float64)
    on_tokens = on_tokens.index_add_(2, column, torch.stack([cover, mine]))
    on_box, on_patches = torch.einsum("nkl,skl->snk", attention[:, question].double(), on_tokens)
    ratio = on_box / on_patches / area
    use = (area > 0) & (cover.sum(1) >= LEAST_LEFT * whole.sum(1))
    found = {}
    for start in ((question != question.roll(1)) | (torch.arange(len(owner)) == 0)).nonzero()[:, 0].tolist():
        if not bool(use[start]):
            continue
        rest = (question == question[start]) & use
        rest[start] = False
        others = ratio[:, rest].mean(1).numpy() if bool(rest.any()) else None
        there = tuple(box[start].tolist())
        found[owner[start]] = (ratio[:, start].numpy(), others, float(area[start]), there)
    return found


def _maps(micro: dict[str, Any], attention: torch.Tensor, row: int) -> tuple[ViewMap, ...]:
    """Attention (N, L) of one row on the patches of each view of its first picture."""
    _, column = patch_rows(micro)
    views = ((micro["view_row"] == row) & (micro["view_image"] == 0)).nonzero()[:, 0].tolist()
    return tuple(
        ViewMap(
            attention[:, column[micro["patch_view"] == v]].unflatten(1, micro["grids"][v]).numpy(),
            tuple(micro["view_box"][v].tolist()),
        )
        for v in views
    )
