"""What one does with a finished run: score it, ask it, give it away."""

from __future__ import annotations

import io
import shutil
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from composer.utils import dist
from PIL import Image, UnidentifiedImageError
from rich.console import Console

from ..algorithms.vift.fusion import Fusion
from ..data.chat import BadConversation
from ..data.collate import VLMCollator
from ..data.encode import Rejected
from ..data.schema import IMAGE_MARK, pack_images
from ..evaluation.adapter import VLMAdapter
from ..evaluation.open_model import open_folder
from ..models.errors import UserError, nearest
from ..models.export import load_model, own_classes
from ..models.vlm import VisionLanguageModel
from .config import Loaded, load
from .run_folder import RunFolder
from .schema import DatasetConfig, EvaluationConfig
from .stages import Stage, resolve


def open_run(path: Path) -> tuple[Loaded, Stage, RunFolder]:
    """Configuration, last stage and folder of a finished run.

    Raises:
        UserError: it is no run folder, or the run did not finish.
    """
    if not (path / "config.yaml").is_file():
        runs = (
            [p.name for p in path.parent.glob("*") if (p / "config.yaml").is_file()]
            if path.parent.is_dir()
            else []
        )
        raise UserError(f"{path}: no run folder (no config.yaml){nearest(path.name, runs)}")
    loaded = load([str(path / "config.yaml")])
    stage = resolve(loaded)[-1]
    folder = RunFolder(path.resolve().parent, path.resolve().name)
    if not (folder.model / "config.json").is_file():
        raise UserError(
            f"{path}: this run has not finished (no model); go on with `opsin train {path / 'config.yaml'}`"
        )
    return loaded, stage, folder


def evaluate_run(
    path: Path,
    remote: str | None,
    limit: int | None,
    console: Console,
    fusion: dict[str, Any] | None = None,
) -> None:
    """Score a run's model and print the table.

    Scores of the run's own data, all of it, as the run says, go into its ``summary.json``; others into ``eval/`` beside it.

    Args:
        path: run folder.
        remote: other data.
        limit: only the first samples.
        console: for the table.
        fusion: keywords of ``algorithms.vift.fusion.Fusion``: also under ability fusion.
    """
    from .scoring import evaluate, fusion_of

    if limit is not None and limit < 1:
        raise UserError(f"--limit {limit}: use 1 or more samples")
    loaded, stage, folder = open_run(path)
    if dist.get_world_size() > 1:
        dist.initialize_dist(loaded.run.device, timeout=loaded.run.dist_timeout)
    config = loaded.run.evaluation
    if remote is not None:
        reference = None if config is None else config.majority_from
        config = EvaluationConfig(
            dataset=DatasetConfig(remote=remote, shuffle=False), majority_from=reference, pictures=0
        )
    if config is None:
        raise UserError(f"{path}: the run names no evaluation data; give --remote FOLDER")
    if fusion is not None:
        fusion_of(fusion, lambda key: "--fuse" if key in ("", "strength") else f"--fuse-{key}")
        config = replace(config, fusion=fusion)
    if remote is not None or limit is not None or fusion is not None:
        folder = _Elsewhere(
            folder
        )  # other data, less of it or another way to answer: the run's own scores stay
        config = replace(config, limit=limit if limit is not None else config.limit, pictures=0)
    evaluate(loaded, stage, folder, config, console)


class _Elsewhere(RunFolder):
    """A run folder whose summary is not to be touched."""

    def __init__(self, folder: RunFolder):
        self.__dict__.update(folder.__dict__)
        self.summary = folder.path / "eval" / time.strftime("%Y%m%d-%H%M%S.json")
        self.skipped = self.summary.with_suffix(".skipped.jsonl")
        self.summary.parent.mkdir(exist_ok=True)


def ask(
    source: str,
    prompt: str,
    pictures: Sequence[Path],
    template: str | None,
    max_new_tokens: int,
    fusion: dict[str, Any] | None = None,
    **options: Any,
) -> str:
    """One greedy answer.

    Args:
        source: run folder, model folder or hub name.
        prompt: what to ask.
        pictures: files; they stand before the words, in order.
        template: chat template; None: that of the run, else ``vicuna_v1``.
        max_new_tokens: longest answer.
        fusion: keywords of ``algorithms.vift.fusion.Fusion``; None: no ability fusion.
        options: further arguments of transformers' ``generate``.

    Raises:
        UserError: a picture cannot be read, or the prompt does not fit the pictures or the model.
    """
    if max_new_tokens < 1:
        raise UserError(f"--max-new-tokens {max_new_tokens}: use 1 or more")
    how = None if fusion is None else Fusion(**fusion)
    if how is not None and not pictures:
        raise UserError("--fuse: without --image there is nothing to fuse")
    model, collator = open_model(source, template)
    encoded = []
    for path in pictures:
        try:
            with Image.open(path) as image:
                buffer = io.BytesIO()
                image.convert("RGB").save(buffer, "PNG")
        except (OSError, UnidentifiedImageError) as error:
            raise UserError(
                f"--image {path}: {getattr(error, 'strerror', None) or 'no picture that can be read'}"
            ) from error
        encoded.append(buffer.getvalue())
    sample = {
        "id": "prompt",
        "conversations": [
            {"from": "human", "value": f"{IMAGE_MARK}\n" * len(encoded) + prompt},
            {"from": "gpt", "value": ""},
        ],
        "images": pack_images(encoded),
        "meta": {},
    }
    adapter = VLMAdapter(model, collator, max_new_tokens=max_new_tokens, fusion=how)
    try:
        return adapter.generate([sample], **options)[0][0]
    except (Rejected, BadConversation) as error:
        raise UserError(f"prompt: {getattr(error, 'detail', error)}") from error


def open_model(
    source: str, template: str | None, system_prompt: str | None = None
) -> tuple[VisionLanguageModel, VLMCollator]:
    """A model from a run folder, a model folder or a hub name, with the collator it was trained with.

    Args:
        source: where it lies.
        template: chat template; None: that of the run or noted in the folder, else ``vicuna_v1``.
        system_prompt: None: likewise, else the template's.
    """
    if (Path(source) / "config.yaml").is_file():
        _, stage, folder = open_run(Path(source))
        system = stage.config.system_prompt if system_prompt is None else system_prompt
        return open_folder(str(folder.model), template or stage.config.chat_template, system)
    return open_folder(source, template, system_prompt)


def export_run(path: Path, out: Path, console: Console) -> None:
    """Copy a run's model as a Hugging Face folder and compare plain transformers with ours on three samples."""
    from transformers import AutoModelForImageTextToText

    from .stage_data import build_collator, build_dataset, first_samples
    from .stage_run import copy_model

    loaded, stage, folder = open_run(path)
    if out.exists() and not out.is_dir():
        raise UserError(f"{out}: is a file; choose a new folder")
    try:
        if out.exists() and any(out.iterdir()):
            raise UserError(f"{out}: not empty; choose a new folder")
        copy_model(folder.model, out)
    except OSError as error:
        shutil.rmtree(out.with_name(out.name + ".partial"), ignore_errors=True)
        raise UserError(f"{out}: cannot be written ({error.strerror or type(error).__name__})") from error
    ours = load_model(out)
    plain = AutoModelForImageTextToText.from_pretrained(out)
    collator = build_collator(ours, stage, stage.config.train_loader)
    config = loaded.run.evaluation.dataset if loaded.run.evaluation else stage.config.train_loader.dataset
    samples = first_samples(build_dataset(config, 1, loaded.run.seed, whole=False), 3)
    difference = largest_difference(ours, plain, collator, samples)
    if ours.net.foreign_attention:
        console.print(
            f"{out}: images of this model see themselves bidirectionally, which plain from_pretrained does not know: its "
            f"logits differ by up to {difference:.2g} on {len(samples)} samples. Load it with opsin.models.export.load_model."
        )
    elif difference > 1e-4:
        raise UserError(
            f"{out}: plain transformers gives other logits (by {difference:.2g}); the export is not usable"
        )
    else:
        console.print(
            f"{out}: plain transformers gives the same logits on {len(samples)} samples (largest difference {difference:.1g})"
        )
    needs = ", ".join(own_classes(ours.hf.config))
    if needs:
        console.print(f"{out}: has classes of Opsin's: `import {needs}` before plain transformers loads it.")
    write_card(out, loaded, difference if ours.net.foreign_attention else None, needs)


@torch.no_grad()
def largest_difference(
    ours: VisionLanguageModel, plain: Any, collator: VLMCollator, samples: Sequence[dict[str, Any]]
) -> float:
    """Largest difference of logits between our forward pass and the stock model's, one sample at a time.

    In units of the largest logit where that is above 1: what is left of rounding grows with it (trained models' are near 20).
    """
    from ..data.prompts import prompts_of
    from ..models.geometry import PER_IMAGE_KEYS, PIXEL_KEY

    worst = 0.0
    for model in (ours.net, plain):
        model.eval()
    for sample in samples:
        prompt = prompts_of(collator.encoder, sample)[0]
        batch = VLMCollator(collator.encoder, pad_to_multiple_of=1).layout([prompt.document])
        pixels = {k: batch[k] for k in (PIXEL_KEY, *PER_IMAGE_KEYS) if k in batch}
        pixels.update(ours.anatomy.types(batch))
        theirs = plain(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], **pixels).logits
        mine = ours.logits(batch)
        worst = max(worst, float((theirs - mine).abs().max() / theirs.abs().max().clamp(min=1)))
    return worst


def write_card(out: Path, loaded: Loaded, difference: float | None, needs: str = "") -> None:
    """A model card: what it is, how it was trained, how to load it; ``needs``: what to import before."""
    from .. import __version__
    from .builders import enabled_algorithms

    methods = ", ".join(enabled_algorithms(loaded)) or "none"
    loader = "`AutoModelForImageTextToText.from_pretrained(folder)`"
    lines = [
        "---",
        "library_name: transformers",
        "pipeline_tag: image-text-to-text",
        "---",
        f"# {loaded.run.run_name}",
        "",
        f"Trained with Opsin {__version__}; methods: {methods}; seed {loaded.run.seed}.",
        "",
    ]
    if difference is None:
        lines += [f"Load it with {loader}: same logits as in training."]
    else:
        lines += [
            "Visual tokens of this model see all tokens of their own image. Plain transformers does not know that: with "
            f"{loader} logits differ by up to {difference:.2g} on three samples. Load it with "
            "`opsin.models.export.load_model(folder)`."
        ]
    if needs:
        lines += ["", f"It has classes of Opsin's: `import {needs}` first."]
    (out / "README.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
