"""Documents -> one device batch: the tensors of the batch contract.

B rows, L tokens a row, N samples, V views, I images, D the most documents in a row. One row holds one
document, or several when packing is on.

===================  ======================  ===========================================================
key                  shape, dtype            meaning
===================  ======================  ===========================================================
input_ids            (B, L) int64            Hugging Face meaning
attention_mask       (B, L) int64            1 for tokens, 0 for padding (a blank row has one 1)
labels               (B, L) int64            the response, as in ordinary instruction tuning; else -100
loss_weights         (B, L) float32          weight of each token's loss (1)
position_ids         (B, L) | (3, B, L)      from 0 in every document
document_ids         (B, L) int16            document in its row, -1 for padding
branch_ids           (B, L) int16            0 for the trunk, 1.. for independent questions on it
turn_ids             (B, L) int16            exchange, -1 before the first
image_ids            (B, L) int16            ordinal of the image in its row, -1 for text
roles                (B, L) int8             schema.Role
sentence_ids         (B, L) int64            stable hash of the instruction sentence, 0: none
document_uid         (B, D) int64            stable sample id, 0: none
document_visit       (B, D) int64            how often the sample was served before
document_sample      (B, D) int64            which sample of the device batch it is, -1: none
refused              (B, D) bool             documents whose labels a method's guard drops
view_row             (V,) int64              row of each view, in order of appearance
view_document        (V,) int64              document in that row
view_image           (V,) int64              ordinal of its image in that document
view_grid            (V, 2) int64            rows and columns of patches
view_box             (V, 4) float32          left, top, right, bottom in the original picture, shares
view_start           (V,) int64              position in the row of its first patch
view_stride          (V,) int64              tokens from one row of patches to the next
views_per_row        (B,) int64              views in each row
images_per_row       (B,) int64              images in each row
pixel_rows           (I,) int64              rows of ``pixel_values`` of each image
pixel_values, ...    family's own            one entry an image (or patch), in order of appearance
patch_targets        (P, M) bfloat16         stored targets of the P patches of all views, view by view, row by
                                             row; only where the dataset has them, absent without pictures
sample_status        (N,) int8               encode.Status of each sample; blank ones keep their place
truncated_turns      (N,) int64              exchanges of each sample that did not fit and were left out
sample_stream        (N,) int16              number of its stream in the dataset, -1: none (what fills up an epoch)
sample_ids           (N, W) uint8            its id in UTF-8, for messages; zeros behind (schema.id_of)
===================  ======================  ===========================================================
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..models.errors import UserError
from ..models.geometry import EncodedImage
from .encode import ConversationEncoder, Document, Rejected, Status
from .packing import first_fit_decreasing
from .patch_targets import COLUMN, stacked
from .schema import IGNORE_INDEX, Role, pack_ids


class VLMCollator:
    """Encode samples and lay them out as a device batch. Picklable: it runs in data-loader workers.

    Args:
        encoder: makes documents of samples.
        packing: put several documents into one row of at most ``encoder.max_seq_len`` tokens.
        padding_side: ``right`` (training) or ``left``.
        pad_to_multiple_of: L is rounded up to this.
        skipped_log: JSONL file to which each unusable sample's id and reason is appended.
    """

    def __init__(
        self,
        encoder: ConversationEncoder,
        *,
        packing: bool = False,
        padding_side: str = "right",
        pad_to_multiple_of: int = 8,
        skipped_log: str | Path | None = None,
    ):
        if padding_side not in ("left", "right"):
            raise UserError(f"padding_side '{padding_side}': use left or right")
        self.encoder = encoder
        self.packing = packing
        self.padding_side = padding_side
        self.pad_to_multiple_of = pad_to_multiple_of
        self.skipped_log = None if skipped_log is None else str(skipped_log)
        tokenizer = encoder.tokenizer
        self.pad_token_id = (
            tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        )
        if self.pad_token_id is None:
            raise UserError("the tokenizer has neither a pad token nor an end-of-sequence token")

    def __call__(self, samples: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """N samples (columns of ``schema.COLUMNS``; ``visit`` when the dataset knows it) -> a device batch.

        Those with ``filler`` (``data/partition.py``) keep their place and are blank.
        """
        documents: list[Document | None] = []
        status = np.zeros(len(samples), dtype=np.int8)
        for i, sample in enumerate(samples):
            if sample.get("filler"):
                documents.append(None)
                status[i] = Status.PADDING
                continue
            try:
                documents.append(self.encoder(sample, visit=int(sample.get("visit", 0))))
            except Rejected as rejected:
                documents.append(None)
                status[i] = rejected.status
                self._note(sample, rejected.status, rejected.detail)
        batch = self.layout(documents)
        batch["sample_status"] = torch.from_numpy(status)
        left_out = [0 if d is None else d.truncated_turns for d in documents]
        batch["truncated_turns"] = torch.tensor(left_out, dtype=torch.int64)
        streams = [-1 if s.get("filler") else s.get("stream_id", 0) for s in samples]
        batch["sample_stream"] = torch.tensor(streams, dtype=torch.int16)
        batch["sample_ids"] = torch.from_numpy(pack_ids([str(s.get("id", "")) for s in samples]))
        return batch

    def layout(self, documents: Sequence[Document | None]) -> dict[str, torch.Tensor]:
        """Documents (None: blank) -> a device batch without what is said of each sample."""
        numbered = list(enumerate(documents))
        if self.packing:
            used = [(i, d) for i, d in numbered if d is not None]
            packed = first_fit_decreasing([len(d) for _, d in used], self.encoder.max_seq_len)
            rows = [[used[i] for i in row] for row in packed] or [[]]
        else:
            rows = [[] if d is None else [(i, d)] for i, d in numbered]
        return self._tensors(rows)

    def _tensors(self, rows: list[list[tuple[int, Document]]]) -> dict[str, torch.Tensor]:
        longest = max((sum(len(d) for _, d in row) for row in rows), default=0)
        multiple = self.pad_to_multiple_of
        length = max(-(-longest // multiple) * multiple, multiple)
        count, most = len(rows), max(1, max(len(row) for row in rows))
        # From the family, not from the documents: a batch may have none.
        axes = self.encoder.images.positions(np.empty(0, np.int64), []).shape[:-1]
        out: dict[str, np.ndarray] = {
            "input_ids": np.full((count, length), self.pad_token_id, np.int64),
            "attention_mask": np.zeros((count, length), np.int64),
            "position_ids": np.zeros((*axes, count, length), np.int64),
            "document_ids": np.full((count, length), -1, np.int16),
            "branch_ids": np.zeros((count, length), np.int16),
            "turn_ids": np.full((count, length), -1, np.int16),
            "image_ids": np.full((count, length), -1, np.int16),
            "roles": np.full((count, length), Role.PAD, np.int8),
            "sentence_ids": np.zeros((count, length), np.int64),
            "document_uid": np.zeros((count, most), np.int64),
            "document_visit": np.zeros((count, most), np.int64),
            "document_sample": np.full((count, most), -1, np.int64),
        }
        views: list[tuple] = []
        images: list[EncodedImage] = []
        views_per_row, images_per_row = np.zeros(count, np.int64), np.zeros(count, np.int64)
        for r, row in enumerate(rows):
            at = 0 if self.padding_side == "right" else length - sum(len(d) for _, d in row)
            if not row:
                # One visible token, so that no softmax of a stock mask runs over nothing.
                out["attention_mask"][r, 0] = 1
            for d, (number, document) in enumerate(row):
                span = slice(at, at + len(document))
                out["input_ids"][r, span] = document.input_ids
                out["attention_mask"][r, span] = 1
                out["position_ids"][..., r, span] = document.position_ids
                out["document_ids"][r, span] = d
                out["branch_ids"][r, span] = document.branch_ids
                out["turn_ids"][r, span] = document.turn_ids
                out["roles"][r, span] = document.roles
                out["sentence_ids"][r, span] = document.sentence_ids
                ordinals = np.where(document.image_ids >= 0, document.image_ids + images_per_row[r], -1)
                out["image_ids"][r, span] = ordinals
                out["document_uid"][r, d] = document.uid
                out["document_visit"][r, d] = document.visit
                out["document_sample"][r, d] = number
                for i, (image, start) in enumerate(zip(document.images, document.image_starts, strict=True)):
                    views += [(r, d, i, v.grid, v.box, at + start + v.start, v.stride) for v in image.views]
                    images.append(image)
                    views_per_row[r] += len(image.views)
                images_per_row[r] += len(document.images)
                at += len(document)
        out["labels"] = np.where(out["roles"] == Role.RESPONSE, out["input_ids"], IGNORE_INDEX)
        out["loss_weights"] = np.ones((count, length), np.float32)
        out["refused"] = np.zeros((count, most), bool)
        column = list(zip(*views, strict=True)) if views else [()] * 7
        out["view_row"] = np.array(column[0], np.int64)
        out["view_document"] = np.array(column[1], np.int64)
        out["view_image"] = np.array(column[2], np.int64)
        out["view_grid"] = np.array(column[3], np.int64).reshape(-1, 2)
        out["view_box"] = np.array(column[4], np.float32).reshape(-1, 4)
        out["view_start"] = np.array(column[5], np.int64)
        out["view_stride"] = np.array(column[6], np.int64)
        out["views_per_row"], out["images_per_row"] = views_per_row, images_per_row
        out["pixel_rows"] = np.array([i.pixel_rows for i in images], np.int64)
        batch = {key: torch.from_numpy(value) for key, value in out.items()}
        batch.update(self.encoder.images.stack(images))
        targets = stacked(images)
        if targets is not None:
            batch[COLUMN] = targets
        return batch

    def _note(self, sample: Mapping[str, Any], status: Status, detail: str) -> None:
        if self.skipped_log is None:
            return
        line = json.dumps({"id": sample.get("id"), "reason": status.name.lower(), "detail": detail[:500]})
        # One short append a sample: the kernel keeps such writes of several workers whole.
        with Path(self.skipped_log).open("a", encoding="utf-8") as file:
            file.write(line + "\n")
