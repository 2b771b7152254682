"""What probes read: visual tokens at every site of a model, and the last prompt token, from one forward pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..data.batch import split_batch, to_device
from ..data.chat import BadConversation
from ..data.collate import VLMCollator
from ..data.encode import Document, Rejected
from ..data.scenes.facts import SceneObject, place
from ..models.errors import UserError
from ..models.geometry import PIXEL_KEY
from ..models.step import Step
from ..models.targets import Target
from ..models.vlm import VisionLanguageModel
from .attention_reading import query_rows
from .patch_cover import covered, patch_boxes, patch_rows, shares
from .questions import questions

TOWER, PROJECTOR = "tower", "projector"
"""Sites before the decoder's layers, which are called 1 .. N: what the projector reads and what it gives."""

OBJECT, PICTURE, LAST = "object", "picture", "last_prompt"
"""What a probe is given: the mean over an object's patches (each weighted by its area in the object's box), over all
patches of a picture, or the token from which an answer's first token is predicted."""

LEAST_VISIBLE = 0.75
"""Objects that are hidden by more than a quarter are not read."""


@dataclass
class Population:
    """Rows of one sort (``OBJECT``, ``PICTURE``, ``LAST``) of some samples. n rows.

    Attributes:
        owner: number of the sample that each row is from, (n,) int64.
        labels: attribute -> label of each row, None where it has none.
        features: site -> (n, channels) float32 on the CPU.
    """

    owner: torch.Tensor
    labels: dict[str, list[str | None]]
    features: dict[str, torch.Tensor]

    @classmethod
    def joined(cls, parts: Sequence[Population]) -> Population:
        """The rows of some populations of one sort, one after the other."""
        first = parts[0]
        return cls(
            torch.cat([part.owner for part in parts]),
            {name: [label for part in parts for label in part.labels[name]] for name in first.labels},
            {site: torch.cat([part.features[site] for part in parts]) for site in first.features},
        )


def features(
    model: VisionLanguageModel,
    collator: VLMCollator,
    part: Sequence[tuple[int, Mapping[str, Any]]],
    layers: Sequence[int],
    targets: Mapping[str, Target] = {},
) -> dict[str, Population] | None:
    """One forward pass about some numbered scenes (stored form, one picture each); None: none of them can be used.

    Args:
        model: in evaluation mode.
        collator: its encoder is used.
        part: (number, sample).
        layers: of the decoder, 1 .. N.
        targets: site -> what a method predicts of the same patches (of a posterior, the mean), on the model's device.
    """
    documents = [_document(collator, sample) for _, sample in part]
    plain = VLMCollator(collator.encoder, pad_to_multiple_of=collator.pad_to_multiple_of)
    batch = plain.layout(documents)
    batch["sample_status"] = torch.zeros(len(documents), dtype=torch.int8)
    micro = split_batch(batch, None, training=False)[0]
    tokens, hidden = tapped(model, to_device(micro, next(model.parameters()).device), layers)
    if PIXEL_KEY not in micro:
        return None
    with torch.no_grad():
        for site, target in targets.items():
            tokens[site] = target.moments(model.pictures(micro), micro["grids"])[:, : target.dim]
    patches, (row, _) = patch_boxes(micro), patch_rows(micro)
    shown = [i for i, document in enumerate(documents) if document is not None]
    whole = (row == torch.tensor(shown)[:, None]).double()
    objects = [(i, thing) for i in shown for thing in _visible(part[i][1])]
    boxes = [shares([t["box"]], document.images[0].size) for i, t in objects if (document := documents[i])]
    on_object = torch.zeros(0, len(row), dtype=torch.float64)
    if objects:
        on_object = covered(patches, torch.cat(boxes)) * (
            row == torch.tensor([i for i, _ in objects])[:, None]
        )
    seen = on_object.sum(1) > 0  # a processor that crops may have cut it off
    objects = [one for one, there in zip(objects, seen.tolist(), strict=True) if there]
    found = {
        OBJECT: Population(
            torch.tensor([part[i][0] for i, _ in objects], dtype=torch.int64),
            {
                "colour": [t["colour"] for _, t in objects],
                "shape": [t["shape"] for _, t in objects],
                "size": [t["size"] for _, t in objects],
                "position": [place(SceneObject(**{**t, "frame": (0, 0, 0)})) for _, t in objects],
            },
            _pooled(tokens, on_object[seen]),
        ),
        PICTURE: Population(
            torch.tensor([part[i][0] for i in shown]),
            {"count": [str(len(part[i][1]["meta"]["objects"])) for i in shown]},
            _pooled(tokens, whole),
        ),
    }
    asked = query_rows(micro, "last_prompt")
    assert asked is not None  # documents that are used have answers
    told = [
        questions(part[i][1])[turn]
        for i, turn in zip(asked.row_of.tolist(), asked.turn_of.tolist(), strict=True)
    ]
    found[LAST] = Population(
        torch.tensor([part[i][0] for i in asked.row_of.tolist()]),
        {
            name: [a if kind == name else None for _, a, kind in told]
            for name in ("colour", "shape", "size", "count")
        },
        {str(k): x[asked.row, asked.column].float().cpu() for k, x in hidden.items()},
    )
    return found


def _document(collator: VLMCollator, sample: Mapping[str, Any]) -> Document | None:
    meta = sample.get("meta")
    if not isinstance(meta, Mapping) or not meta.get("objects"):
        return None
    try:
        questions(sample)
        document = collator.encoder(sample)
    except (Rejected, BadConversation):
        return None
    return document if len(document.images) == 1 else None


def _visible(sample: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [t for t in sample["meta"]["objects"] if t["visible"] >= LEAST_VISIBLE * t["pixels"]]


def _pooled(tokens: Mapping[str, torch.Tensor], weights: torch.Tensor) -> dict[str, torch.Tensor]:
    """(P, C) tokens of each site -> (n, C) means weighted by (n, P)."""
    weights = (weights / weights.sum(1, keepdim=True)).float()
    return {site: (weights.to(x.device) @ x.float()).cpu() for site, x in tokens.items()}


@torch.no_grad()
def tapped(
    model: VisionLanguageModel, micro: dict[str, Any], layers: Sequence[int]
) -> tuple[dict[str, torch.Tensor], dict[int, torch.Tensor]]:
    """Run a micro-batch once: site -> its (P, C) visual tokens, patch by patch; layer -> (B, L, D) hidden states.

    Raises:
        UserError: no such layer, or a family whose tower cannot be read.
    """
    step = Step(micro, taps=set(layers))
    kept: dict[str, torch.Tensor] = {}
    step.edits["probes"] = lambda embeddings: kept.setdefault("embeddings", embeddings)
    read: list[torch.Tensor] = []
    given: list[torch.Tensor] = []

    def keep(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: torch.Tensor) -> None:
        read.append((args[0] if args else next(iter(kwargs.values()))).flatten(0, -2))
        given.append(output.flatten(0, -2))

    handle = _projector(model).register_forward_hook(keep, with_kwargs=True)
    try:
        outputs = model.net(micro, step)
    finally:
        handle.remove()
    hidden = {k: outputs[f"tap{k}"] for k in layers}
    at = micro["patch_position"]
    projected = kept["embeddings"].flatten(0, 1)[at]
    if PIXEL_KEY not in micro:
        return {}, hidden
    tower = projector_input(torch.cat(read), torch.cat(given), projected)
    tokens = {TOWER: tower, PROJECTOR: projected}
    tokens.update({str(k): x.flatten(0, 1)[at] for k, x in hidden.items()})
    return tokens, hidden


def _projector(model: VisionLanguageModel) -> nn.Module:
    """The projector's module (its paths may name single parameters, too)."""
    modules = dict(model.hf.named_modules())
    return next(modules[path] for path in model.anatomy.projector if path in modules)


def projector_input(read: torch.Tensor, given: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """What the projector read to make each of some visual tokens.

    Families cut, join and reorder what comes out of their projectors (tiles, windows), each in its own way; but they
    hand it on unchanged, so a token is found among the outputs by its value. Outputs that are equal to the last bit
    come of equal inputs.

    Args:
        read: (n * k, C): k neighbouring rows make one token.
        given: (n, D), the projector's outputs in its own order.
        tokens: (P, D) visual tokens as the language model gets them.

    Returns:
        (P, k * C).

    Raises:
        UserError: a token is none of the outputs, or rows do not go into tokens.
    """
    each, left = divmod(len(read), len(given))
    key = _hash(given.to(tokens.dtype))
    order = key.argsort()
    wanted = _hash(tokens)
    found = order[torch.searchsorted(key[order], wanted).clamp(max=len(order) - 1)]
    if left or not bool((key[found] == wanted).all()):
        raise UserError(
            "probes: this family changes its projector's outputs, so that its tower's tokens cannot be told"
        )
    return read.unflatten(0, (-1, each)).flatten(1)[found]


def _hash(rows: torch.Tensor) -> torch.Tensor:
    """(n,) int64 of the bits of (n, D) numbers."""
    bits = rows.float().contiguous().view(torch.int32)
    factors = torch.randint(1 << 62, (bits.shape[1],), generator=torch.Generator().manual_seed(0)) | 1
    out = torch.zeros(len(bits), dtype=torch.int64, device=rows.device)
    for start in range(0, bits.shape[1], 256):  # int64 of all channels at once would be twice the tokens
        cut = slice(start, start + 256)
        out += (bits[:, cut].long() * factors[cut].to(rows.device)).sum(1)
    return out
