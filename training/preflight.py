"""Checks before the first step, in seconds: what users otherwise learn from a loss of 0 a day later."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from ..algorithms.base import VisionAlgorithm
from ..algorithms.compose import identical_by_construction
from ..data.collate import VLMCollator
from ..data.encode import Status
from ..data.schema import IGNORE_INDEX, Role
from ..models.adapters import count_adapters
from ..models.errors import UserError
from ..models.parts import count_parameters
from ..models.vlm import VisionLanguageModel
from .schema import PreflightConfig


@dataclass
class Report:
    """What a few batches look like."""

    samples: int
    skipped: dict[str, int]
    unlabelled_share: float
    images_per_sample: float
    tokens_per_sample: float
    labelled_share: float
    longest: int
    truncated_turns: int


def check_batches(
    collator: VLMCollator,
    samples: list[dict[str, Any]],
    config: PreflightConfig,
    stage: str,
    needs: dict[str, str],
) -> Report:
    """Build samples as training would and look at the result.

    Args:
        collator: of the stage.
        samples: stored samples.
        config: limits.
        stage: for messages.
        needs: method -> what it needs, where that is pictures.

    Raises:
        UserError: too many samples without a label or unusable; a label on a visual token; visual tokens that
            do not match the pictures; a method that needs pictures and finds none.
    """
    batch = collator(samples)
    status = batch["sample_status"]
    used = int((status == Status.USED).sum())
    skipped = {
        s.name.lower(): int((status == s).sum())
        for s in Status
        if s != Status.USED and bool((status == s).any())
    }
    if used == 0 or sum(skipped.values()) > max(config.max_skipped, 0.0) * len(samples) + 1:
        why = ", ".join(f"{n} {r}" for r, n in skipped.items())
        raise UserError(
            f"preflight of stage {stage}: {len(samples) - used} of {len(samples)} samples cannot be used ({why})"
        )
    labelled = batch["labels"] != IGNORE_INDEX
    if bool((labelled & (batch["roles"] == Role.IMAGE)).any()):
        raise UserError(
            f"preflight of stage {stage}: a visual token has a label; the chat template or tokenizer is wrong"
        )
    if bool(
        (
            labelled & torch.isin(batch["input_ids"], torch.tensor([collator.encoder.images.image_token_id]))
        ).any()
    ):
        raise UserError(f"preflight of stage {stage}: the image token is among the labels")
    expected = int((batch["view_grid"].prod(1)).sum())
    visual = int((batch["roles"] == Role.IMAGE).sum())
    if visual < expected:
        raise UserError(
            f"preflight of stage {stage}: {visual} visual tokens in the text for {expected} patches"
        )
    documents = [(r, d) for r in range(len(labelled)) for d in range(int(batch["document_ids"][r].max()) + 1)]
    empty = sum(not bool(labelled[r][batch["document_ids"][r] == d].any()) for r, d in documents)
    share = empty / max(len(documents), 1)
    if share > config.max_unlabelled:
        raise UserError(
            f"preflight of stage {stage}: {share:.0%} of the samples have no label at all (limit "
            f"preflight.max_unlabelled={config.max_unlabelled:.0%}): does chat_template fit the data?"
        )
    images = int(batch["images_per_row"].sum())
    for method, what in needs.items():
        if what == "images" and images == 0:
            raise UserError(
                f"algorithms.{method}: {used} samples of stage {stage} have no picture, so there is nothing for it to act on"
            )
    tokens = int(batch["attention_mask"].sum())
    lengths = batch["attention_mask"].sum(1)
    return Report(
        len(samples),
        skipped,
        share,
        images / used,
        tokens / used,
        int(labelled.sum()) / tokens,
        int(lengths.max()),
        int(batch["truncated_turns"].sum()),
    )


def check_features(
    model: VisionLanguageModel, collator: VLMCollator, samples: list[dict[str, Any]], stage: str
) -> None:
    """Run tower and projector on one picture: as many features as visual tokens, after this stack's processor."""
    pictured = next((s for s in samples if s["images"][:4] != b"\0\0\0\0"), None)
    if pictured is None:
        return
    batch = collator([pictured])
    if not int(batch["images_per_row"].sum()):
        return
    from ..models.geometry import PER_IMAGE_KEYS, PIXEL_KEY

    parameter = next(model.parameters())
    pixels = {k: batch[k].to(parameter.device) for k in (PIXEL_KEY, *PER_IMAGE_KEYS) if k in batch}
    pixels[PIXEL_KEY] = pixels[PIXEL_KEY].to(parameter.dtype)
    with torch.no_grad():
        features = model.anatomy.image_features(model.hf, pixels).shape[0]
    tokens = int((batch["roles"] == Role.IMAGE).sum())
    if features != tokens:
        raise UserError(
            f"preflight of stage {stage}: a picture gives {features} features and {tokens} image tokens; the processor's "
            "patch_size, num_additional_image_tokens or vision_feature_select_strategy does not fit the model"
        )


def print_report(console: Console, stage: str, model: VisionLanguageModel, report: Report | None) -> None:
    """Trainable parameters by part, and what the data looks like."""
    table = Table(title=f"stage {stage}", title_justify="left", show_edge=False)
    for column in ("part", "trainable", "frozen"):
        table.add_column(column, justify="left" if column == "part" else "right")
    for count in count_parameters(model):
        table.add_row(count.part, f"{count.trainable:,}", f"{count.frozen:,}")
    console.print(table)
    if report is not None:
        skipped = ", ".join(f"{n} {r}" for r, n in report.skipped.items()) or "none"
        if report.truncated_turns:
            skipped += f"; {report.truncated_turns} exchanges left out, they do not fit max_seq_len"
        console.print(
            f"{report.samples} samples looked at: {report.tokens_per_sample:.0f} tokens and "
            f"{report.images_per_sample:.1f} pictures each, {report.labelled_share:.0%} of tokens labelled, "
            f"{report.unlabelled_share:.0%} without a label, longest {report.longest} tokens, skipped: {skipped}"
        )


def print_methods(console: Console, model: VisionLanguageModel, algorithms: Mapping[str, Any]) -> None:
    """How the language model is trained, if by adapters, and what the methods that are on made of their arguments
    (``VisionAlgorithm.about``), after INIT."""
    adapters = count_adapters(model)
    if adapters is not None:
        console.print(
            f"adapters: {adapters.parameters:,} parameters on {adapters.layers} linear layers, "
            f"{adapters.parameters / adapters.base:.2%} of the language model's {adapters.base:,}; merged on export",
            soft_wrap=True,
            highlight=False,
        )
    for name, algorithm in algorithms.items():
        if isinstance(algorithm, VisionAlgorithm) and not algorithm.is_off():
            said = algorithm.about(model)
            if said:
                console.print(f"{name}: {said}", soft_wrap=True, highlight=False)
    same = identical_by_construction(algorithms)
    if same is not None:
        left = ", ".join(same.to) or "no method"
        console.print(
            f"identical by construction to the run with {left}: {same.reason}",
            soft_wrap=True,
            highlight=False,
        )
