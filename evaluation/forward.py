"""Prompts through the model without generating: what probes, attention maps and other analyses look at."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..data.batch import split_batch, to_device
from ..data.collate import VLMCollator
from ..data.encode import Document
from ..data.prompts import Prompt
from ..models.attention import Visibility
from ..models.geometry import PER_IMAGE_KEYS, PIXEL_KEY
from ..models.step import Step
from ..models.vlm import VisionLanguageModel

EMBEDDINGS = 0
"""Layer number of what enters the first decoder layer: words' embeddings and what the projector made of pictures."""


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; each module's mode is put back as it was."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextlib.contextmanager
def drawing(model: nn.Module, seed: int) -> Iterator[None]:
    """Random numbers of the model's device come from a state of their own, seeded here."""
    device = next(model.parameters()).device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


@dataclass(frozen=True)
class PromptBatch:
    """Some prompts, one a row, padded on the right: column c of row r is token c of ``prompts[r]``.

    Attributes:
        prompts: whose documents know roles, pictures and sizes.
        batch: micro-batch on the model's device, as ``data.batch.split_batch`` makes it; nothing in it is labelled.
    """

    prompts: list[Prompt]
    batch: dict[str, Any]


@dataclass(frozen=True)
class PatchView:
    """One grid of patches of a prompt (``models.geometry.View``).

    Attributes:
        image: ordinal of the picture in the prompt.
        grid: (rows, columns).
        box: (left, top, right, bottom) in shares of the original picture; beyond 0..1 where it was padded.
        positions: (rows * columns,) int64, tokens of the prompt, row by row.
    """

    image: int
    grid: tuple[int, int]
    box: tuple[float, float, float, float]
    positions: torch.Tensor


@dataclass(frozen=True)
class Probe:
    """What the decoder makes of one prompt of n tokens.

    Attributes:
        sample, turn: which sample of those given, and which exchange of it.
        hidden: layer -> (n, width) float32 on the CPU; layers are numbered as in :func:`probe`.
        roles: (n,) int8, ``data.schema.Role``.
        image_ids: (n,) int16, ordinal of the picture, -1 for text.
        views: grids of visual tokens, picture by picture.
    """

    sample: int
    turn: int
    hidden: dict[int, torch.Tensor]
    roles: torch.Tensor
    image_ids: torch.Tensor
    views: list[PatchView]


def views_of(document: Document) -> list[PatchView]:
    """Where the patches of a document's pictures are among its tokens."""
    found = []
    for number, (image, first) in enumerate(zip(document.images, document.image_starts, strict=True)):
        for view in image.views:
            rows, columns = view.grid
            at = first + view.start + torch.arange(rows)[:, None] * view.stride + torch.arange(columns)
            found.append(PatchView(number, view.grid, view.box, at.flatten()))
    return found


def batch_of(model: VisionLanguageModel, collator: VLMCollator, prompts: Sequence[Prompt]) -> PromptBatch:
    """Prompts as a micro-batch on the model's device."""
    plain = VLMCollator(collator.encoder, pad_to_multiple_of=collator.pad_to_multiple_of)
    batch = plain.layout([p.document for p in prompts])
    batch["loss_weights"] = torch.zeros_like(batch["loss_weights"])  # earlier answers are context
    batch["sample_status"] = torch.zeros(len(prompts), dtype=torch.int8)
    (micro,) = split_batch(batch, None, training=False)
    return PromptBatch(list(prompts), to_device(micro, next(model.parameters()).device))


def look(
    model: VisionLanguageModel, batch: dict[str, Any], layers: Sequence[int] = ()
) -> dict[int, torch.Tensor]:
    """Run a micro-batch in evaluation mode.

    It goes through ``net.forward``, the only way that also serves sharded models; hooks that a caller has set see it.

    Args:
        model: in any mode; it is evaluated and put back.
        batch: of :class:`PromptBatch`.
        layers: whose outputs are wanted: 1 .. N, ``EMBEDDINGS`` (0) or ``models.step.FINAL`` (-1, after the final norm).

    Returns:
        layer -> (B, L, width) on the device.

    Raises:
        UserError: there is no such layer.
    """
    step = Step(batch, taps={layer for layer in layers if layer != EMBEDDINGS})
    entered: list[torch.Tensor] = []
    if EMBEDDINGS in layers:

        def keep(embeddings: torch.Tensor) -> torch.Tensor:
            entered.append(embeddings)
            return embeddings

        step.edits["look"] = keep
    with evaluating(model):
        outputs = model.net(batch, step)
    found = {layer: outputs[f"tap{layer}"] for layer in step.taps}
    if entered:
        found[EMBEDDINGS] = entered[0]
    return found


def probe(model: VisionLanguageModel, part: PromptBatch, layers: Sequence[int]) -> list[Probe]:
    """Hidden states of some prompts.

    Args:
        model: in any mode; it is evaluated and put back.
        part: the prompts.
        layers: see :func:`look`.
    """
    states = {layer: value.float().cpu() for layer, value in look(model, part.batch, layers).items()}
    return [
        Probe(
            sample=prompt.sample,
            turn=prompt.turn,
            hidden={layer: states[layer][r, : len(prompt.document)].clone() for layer in layers},
            roles=torch.from_numpy(prompt.document.roles),
            image_ids=torch.from_numpy(prompt.document.image_ids),
            views=views_of(prompt.document),
        )
        for r, prompt in enumerate(part.prompts)
    ]


def model_inputs(model: VisionLanguageModel, batch: dict[str, Any]) -> dict[str, Any]:
    """What the Hugging Face model itself takes of a batch; positions it finds by itself."""
    keys = ("input_ids", "attention_mask", PIXEL_KEY, *PER_IMAGE_KEYS)
    arguments = {k: batch[k] for k in keys if k in batch}
    arguments.update(model.anatomy.types(batch))
    return arguments


def prompt_sees(model: VisionLanguageModel, batch: dict[str, Any]) -> Visibility | None:
    """Visibility of a batch whose images see themselves; None: the family's own causal mask says it all."""
    if not model.net.bidirectional_images:
        return None
    return Visibility(
        valid=batch["attention_mask"].bool(),
        document=batch["document_ids"],
        branch=batch["branch_ids"],
        image=batch["image_ids"],
        bidirectional=batch["image_ids"] >= 0,
    )
