"""A device batch -> micro-batches, for Composer: counted, indexed, and always the same number of them.

Composer's own split cuts every tensor along its first axis and so loses image rows; :func:`vlm_data_spec`
must be given to every Trainer. What travels to the device is decided here, on the CPU: which hidden states
the LM head reads, which positions are patches, what each loss term is divided by.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from composer.core import DataSpec

from ..models.attention import is_plain
from ..models.geometry import PER_IMAGE_KEYS, PIXEL_KEY
from ..models.layout import patch_index, predictors
from ..models.normalise import DENOMINATORS, declare, declared, denominators
from .patch_targets import COLUMN
from .schema import IGNORE_INDEX, Role

_PER_TOKEN = (
    "input_ids",
    "attention_mask",
    "document_ids",
    "branch_ids",
    "turn_ids",
    "image_ids",
    "roles",
    "sentence_ids",
)
_PER_ROW = (
    "document_uid",
    "document_visit",
    "document_sample",
    "refused",
    "views_per_row",
    "images_per_row",
)
_TOKEN, _ROW, _PATCH = "token/", "row/", "patch/"
"""Prefixes under which a method adds its own small tensors to a device batch: (B, L), (B, ...), (P, ...)."""
CUT = "cut/"
"""Prefix under which a method adds a function of a finished micro-batch, called on the CPU; what it returns (a dict) is
added. So shapes that depend on the data are the host's own numbers, and no step has to ask the device for them."""
_PER_VIEW = ("view_document", "view_image", "view_grid", "view_box", "view_start", "view_stride")


def vlm_data_spec(dataloader: Iterable, *, training: bool = True) -> DataSpec:
    """Composer's DataSpec for a loader that yields device batches of :class:`~opsin.data.collate.VLMCollator`.

    Args:
        dataloader: its ``batch_size`` (samples a device batch) fixes the number of micro-batches.
        training: False for evaluation loaders: ranks may then have different numbers of batches.
    """
    size = getattr(dataloader, "batch_size", None)
    return DataSpec(
        dataloader,
        split_batch=partial(split_batch, device_batch_size=size, training=training),
        get_num_samples_in_batch=samples_in_batch,
        get_num_tokens_in_batch=tokens_in_batch,
    )


def samples_in_batch(batch: dict[str, Any]) -> int:
    """Samples of a device batch, blank ones included (resumption counts them); 1 for a micro-batch.

    Composer scales a micro-batch's loss by its share of this number. Equal shares (1/micro-batches) are what
    ``normalise.term`` undoes, so nothing depends on how documents fell into micro-batches.
    """
    return 1 if "label_rows" in batch else int(batch["sample_status"].numel())


def tokens_in_batch(batch: dict[str, Any]) -> dict[str, int]:
    """``total``: tokens that are no padding. ``loss_generating``: labelled ones; 1 for a micro-batch.

    With ``accumulate_train_batch_on_tokens`` Composer scales a micro-batch's loss by its share of the latter;
    see :func:`samples_in_batch`.
    """
    if "label_rows" in batch:
        return {"total": batch["tokens"], "loss_generating": 1}
    labelled = int((batch["labels"] != IGNORE_INDEX).sum())
    return {"total": int(batch["attention_mask"].sum()), "loss_generating": labelled}


def to_device(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Move a micro-batch that no Trainer moves."""
    return {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}


def effective_weights(batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss weight of each token, 0 where nothing is learnt; and the position it is predicted from. (B, L) each.

    A token counts if it has a label, a weight, something before it in its own document, and its document was
    not refused.
    """
    source = predictors(batch["document_ids"].long(), batch["branch_ids"])
    document = batch["document_ids"].long().clamp(min=0)
    learnt = (batch["labels"] != IGNORE_INDEX) & (source >= 0) & ~batch["refused"].gather(1, document)
    return torch.where(learnt, batch["loss_weights"], 0.0), source


def split_batch(
    batch: dict[str, torch.Tensor],
    microbatch_size: int | float | None,
    *,
    device_batch_size: int | None = None,
    training: bool = True,
) -> list[dict[str, Any]]:
    """Cut a device batch into ``ceil(device_batch_size / microbatch_size)`` micro-batches, whatever its rows are.

    Rows (of packed documents, say) are dealt evenly; where there are fewer rows than micro-batches, blank
    ones fill up. When ``training``, counts are summed over all ranks here: every rank must call this once a
    step.

    Args:
        microbatch_size: samples a micro-batch; None: one micro-batch.
        device_batch_size: samples of a full device batch (a last, shorter one is cut into as many parts).

    Returns:
        micro-batches: the batch's keys for their rows, and ``label_rows`` (n,) int64 index into the flattened
        (B * L) hidden states, ``label_targets`` (n,), ``label_weights`` (n,), ``label_roles`` (n,),
        ``label_turns`` (n,), ``label_branches`` (n,), ``label_answer`` (n,) ordinal of the answer a token belongs to or -1,
        ``answers`` (int), ``patch_position``, ``patch_view``, ``patch_row``, ``patch_column`` (P,),
        ``grids`` ((rows, columns) of each view, Python numbers), ``plain_attention`` (bool), ``tokens`` (int),
        ``denominators`` (dict of scalars). ``patch_targets``, where the batch has them, are those of the P patches, as
        are tensors under ``patch/``. Then come what functions under ``cut/`` make of a micro-batch.
    """
    samples = int(batch["sample_status"].numel())
    full = max(samples, device_batch_size or samples) if training else samples
    parts = 1 if microbatch_size is None else max(1, -(-full // int(microbatch_size)))
    weights, source = effective_weights(batch)
    divisors = None
    if training:
        if "lm" not in declared(batch):  # unless a method owns the denominator (L2T)
            declare(batch, "lm", weights.double().sum(), "tokens")
        divisors = denominators(declared(batch), parts)
    rows = batch["input_ids"].shape[0]
    if rows < parts:
        batch, weights, source = _with_blank_rows(batch, weights, source, parts - rows)
        rows = parts
    starts = [rows * i // parts for i in range(parts + 1)]
    first_view = torch.cat([torch.zeros(1, dtype=torch.int64), batch["views_per_row"].cumsum(0)])
    first_image = torch.cat([torch.zeros(1, dtype=torch.int64), batch["images_per_row"].cumsum(0)])
    first_pixel = torch.cat([torch.zeros(1, dtype=torch.int64), batch["pixel_rows"].cumsum(0)])
    first_patch = torch.cat([torch.zeros(1, dtype=torch.int64), batch["view_grid"].prod(1).cumsum(0)])
    per_row = [*_PER_TOKEN, *_PER_ROW, *_added(batch)]
    per_patch = [COLUMN] * (COLUMN in batch) + sorted(k for k in batch if k.startswith(_PATCH))
    cuts: list[Any] = [batch[key] for key in sorted(batch) if key.startswith(CUT)]
    micro = []
    for start, end in pairwise(starts):
        row = slice(start, end)
        part: dict[str, Any] = {key: batch[key][row] for key in per_row}
        part["position_ids"] = batch["position_ids"][..., row, :]
        view = slice(int(first_view[start]), int(first_view[end]))
        part.update({key: batch[key][view] for key in _PER_VIEW})
        part["view_row"] = batch["view_row"][view] - start
        patch = slice(int(first_patch[view.start]), int(first_patch[view.stop]))
        part.update({key: batch[key][patch] for key in per_patch})
        image = slice(int(first_image[start]), int(first_image[end]))
        if image.stop > image.start:
            pixel = slice(int(first_pixel[image.start]), int(first_pixel[image.stop]))
            part[PIXEL_KEY] = batch[PIXEL_KEY][pixel]
            part.update({key: batch[key][image] for key in PER_IMAGE_KEYS if key in batch})
        part.update(_labels(batch, weights, source, row))
        _trim(part)
        part["plain_attention"] = is_plain(part)
        part["tokens"] = int(part["attention_mask"].sum())
        if divisors is not None:
            part[DENOMINATORS] = divisors
        part = _index(part)
        for cut in cuts:
            part.update(cut(part))
        micro.append(part)
    return micro


def _added(batch: dict[str, Any]) -> list[str]:
    """Tensors that methods added to the batch."""
    return sorted(k for k in batch if k.startswith((_TOKEN, _ROW)))


def _labels(
    batch: dict[str, torch.Tensor], weights: torch.Tensor, source: torch.Tensor, row: slice
) -> dict[str, torch.Tensor]:
    """Dense label data of some rows; made sparse by :func:`_index` once the row length is known."""
    return {"labels": batch["labels"][row], "weights": weights[row], "source": source[row]}


def _trim(part: dict[str, Any]) -> None:
    """Cut padding columns that no row of this micro-batch needs."""
    mask = part["attention_mask"]
    used = mask.any(dim=0).nonzero()
    first, last = int(used[0]), int(used[-1]) + 1
    length = mask.shape[1]
    last = min(length, -(-last // 8) * 8)
    first = first // 8 * 8
    if first == 0 and last == length:
        return
    dense = ("position_ids", "labels", "weights", "source")
    for key in (*_PER_TOKEN, *dense, *(k for k in part if k.startswith(_TOKEN))):
        part[key] = part[key][..., first:last]
    if first:
        part["view_start"] = part["view_start"] - first
        part["source"] = torch.where(part["source"] >= 0, part["source"] - first, part["source"])


def _index(part: dict[str, Any]) -> dict[str, Any]:
    """Replace dense labels by an index of labelled tokens, and list the patches."""
    labels, weights, source = part.pop("labels"), part.pop("weights"), part.pop("source")
    length = labels.shape[1]
    row, column = (weights > 0).nonzero(as_tuple=True)
    if len(row) == 0:
        # One row of weight 0, so that the LM head runs and gets a (zero) gradient in every micro-batch.
        part["label_rows"] = torch.zeros(1, dtype=torch.int64)
        part["label_targets"] = torch.zeros(1, dtype=torch.int64)
        part["label_weights"] = torch.zeros(1)
        part["label_roles"] = torch.zeros(1, dtype=torch.int8)
        part["label_turns"] = torch.full((1,), -1, dtype=torch.int16)
        part["label_branches"] = torch.zeros(1, dtype=torch.int16)
        part["label_answer"] = torch.full((1,), -1, dtype=torch.int64)
        part["answers"] = 0
    else:
        part["label_rows"] = row * length + source[row, column]
        part["label_targets"] = labels[row, column]
        part["label_weights"] = weights[row, column]
        part["label_roles"] = part["roles"][row, column]
        part["label_turns"] = part["turn_ids"][row, column]
        part["label_branches"] = part["branch_ids"][row, column]
        response = part["label_roles"] == Role.RESPONSE
        documents, turns = int(part["document_uid"].shape[1]), int(part["turn_ids"].max()) + 2
        key = row * documents + part["document_ids"][row, column].long()
        key = key * turns + part["label_turns"].long() + 1
        _, ordinal = torch.unique_consecutive(key[response], return_inverse=True)
        part["label_answer"] = torch.full_like(row, -1).masked_scatter(response, ordinal)
        part["answers"] = int(ordinal.max()) + 1 if len(ordinal) else 0
    patches = patch_index(
        part["view_row"], part["view_start"], part["view_stride"], part["view_grid"], length
    )
    part["patch_position"], part["patch_view"] = patches.position, patches.view
    part["patch_row"], part["patch_column"] = patches.row, patches.column
    # Shapes as the host's own numbers: no step has to ask the device for them.
    part["grids"] = tuple(map(tuple, part["view_grid"].tolist()))
    return part


def _with_blank_rows(
    batch: dict[str, torch.Tensor], weights: torch.Tensor, source: torch.Tensor, count: int
) -> tuple[dict[str, torch.Tensor], torch.Tensor, torch.Tensor]:
    """Append blank rows: one visible padding token, no labels, no pictures."""
    batch = dict(batch)
    blank = {
        "document_ids": -1,
        "turn_ids": -1,
        "image_ids": -1,
        "labels": IGNORE_INDEX,
        "document_sample": -1,
    }
    for key in (*_PER_TOKEN, *_PER_ROW, "labels", *_added(batch)):
        value = batch[key]
        shape = (count, *value.shape[1:])
        rows = torch.full(shape, blank.get(key, 0), dtype=value.dtype)
        if key == "attention_mask":
            rows[:, 0] = 1
        batch[key] = torch.cat([value, rows])
    positions = batch["position_ids"]
    padding = positions.new_zeros((*positions.shape[:-2], count, positions.shape[-1]))
    batch["position_ids"] = torch.cat([positions, padding], dim=-2)
    weights = torch.cat([weights, weights.new_zeros(count, weights.shape[1])])
    source = torch.cat([source, source.new_full((count, source.shape[1]), -1)])
    return batch, weights, source
