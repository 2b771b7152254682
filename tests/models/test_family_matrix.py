"""Every family with every method: two steps of training, an export, and the export read by plain transformers."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText

from opsin.data.batch import split_batch
from opsin.models.anatomy import anatomy_of
from opsin.models.errors import UserError
from opsin.models.export import describe, export_model, load_model
from opsin.models.vlm import VisionLanguageModel
from opsin.training.finished import largest_difference

import jobs
import zoo
from methods import teacher

MASKS: dict[str, Any] = {"target": teacher(), "ntp_probability": 0.0, "layer": 2}
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "ross": ("methods:LoudROSS", {"target": {"name": "pixels", "cell": 4}, "width": 64, "min_visible": 1}),
    "l2t": ("opsin.algorithms.l2t:L2T", {"template_source": "none", "lambda_instruction": 0.3, "log_interval": 1}),
    "jarvis": ("opsin.algorithms.jarvis:JARVIS", {**MASKS, "text_loss": "masked"}),
    "vift": ("opsin.algorithms.vift:ViFT", {"max_refused": None, "log_interval": 1}),
}  # fmt: skip
OWN = {"ross": "loss/train/ross", "jarvis": "loss/train/jarvis", "l2t": "l2t/loss_I"}
"""What a method of which something is learnt logs; ViFT learns nothing of its own, it refuses questions."""

ONE_EACH = {(f, list(METHODS)[i % 4]) for i, f in enumerate(zoo.EVERY_FAMILY)} | {("gemma3", "jarvis")}
"""Every family and every method in the tests of each commit; all pairs in the slow ones."""
PAIRS = [
    pytest.param(family, method, marks=() if (family, method) in ONE_EACH else pytest.mark.slow)
    for family in zoo.EVERY_FAMILY
    for method in METHODS
]


def _caption(number: int) -> dict[str, Any]:
    sample = zoo.sample(number, size=(40, 34))
    sample["conversations"][0]["value"] = "<image>\n"
    return sample


def _samples(method: str) -> list[dict[str, Any]]:
    """Two batches of four, words and pictures in each."""
    if method == "vift":
        return [_caption(1), zoo.sample(2, images=0), zoo.sample(3), _caption(4)] * 2
    return [zoo.sample(i, images=i % 4 != 3, turns=1 + i % 2, size=(40 + 8 * i, 34)) for i in range(8)]


@pytest.mark.parametrize(("family", "method"), PAIRS)
def test_it_trains_and_its_export_is_plain_transformers(family: str, method: str, tmp_path: Path) -> None:
    # JARVIS as its paper has it: visual tokens see all of their image, which most families have to be told.
    bidirectional = method == "jarvis"
    options: dict[str, Any] = {"size": 32, "bidirectional": bidirectional, "max_seq_len": 1200}
    if method == "l2t":
        options["trainable"] = {"vision_tower": True, "mm_projector": True, "language_model": True}
    run = jobs.train(
        family, _samples(method), global_batch=4, steps=2, algorithms=[METHODS[method]], keep=True, **options
    )
    # JARVIS's is a cosine, which may be below 0.
    assert all(math.isfinite(value) and value for loss in run["losses"] for value in loss.values())
    if method == "vift":
        assert [s["vift/refused"] for s in run["logged"]] == [1, 2]
    else:
        assert all(math.isfinite(s[OWN[method]]) and s[OWN[method]] for s in run["logged"])
    heads = [name for name in run["weights"] if "auxiliary" in name]
    assert bool(heads) == (method in ("ross", "jarvis"))
    model: VisionLanguageModel = run["model"]
    before = zoo.build(family, seed=1, size=32).hf.state_dict()
    moved = {
        model.anatomy.part_of(name)
        for name, value in model.hf.state_dict().items()
        if not torch.equal(value, before[name])
    }
    towers = {"vision_tower"} if method == "l2t" else set()
    assert moved == {"mm_projector", "language_model"} | towers

    collator = jobs.collator(zoo.build(family, size=32), max_seq_len=1200)
    processor = model.processor
    if isinstance(processor, zoo.Parts):
        model.processor = None
    folder = export_model(model, tmp_path / "out")
    plain, report = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    model.processor = processor
    told = zoo.sample(5, images=2, size=(70, 34)), zoo.sample(6, images=0), zoo.sample(7, turns=2)
    plainly = largest_difference(model, plain, collator, told)
    if model.net.foreign_attention:
        assert describe(folder)["image_attention"] == "bidirectional" and plainly > 1e-3
    else:
        assert plainly < 1e-4
    if isinstance(processor, zoo.Parts):
        again = VisionLanguageModel(plain, processor, bidirectional_images=model.net.foreign_attention)
    else:
        again = load_model(folder)
    batch = collator(list(told))
    assert again.net.bidirectional_images == model.net.bidirectional_images
    assert torch.allclose(again.eval().logits(batch), model.eval().logits(batch), atol=1e-5)


def test_what_a_family_is_by_its_own_rule_cannot_be_switched_off(tmp_path: Path) -> None:
    built = zoo.build("gemma3")
    folder = export_model(VisionLanguageModel(built.hf, built.processor), tmp_path / "out")
    assert describe(folder)["image_attention"] == "the family's"
    assert load_model(folder).net.bidirectional_images and not load_model(folder).net.foreign_attention
    with pytest.raises(
        UserError, match="bidirectional_images: false: visual tokens of a gemma3 model see all"
    ):
        load_model(folder, bidirectional_images=False)


def test_what_a_family_refuses_is_one_line_wherever_it_is_wanted() -> None:
    anatomy = replace(anatomy_of(zoo.build("llava").hf), refuses={"masks": "its decoder makes its own"})
    anatomy.require("packing", "train_loader.packing")
    with pytest.raises(UserError) as error:
        anatomy.require("masks", "algorithms.jarvis")
    assert str(error.value) == "algorithms.jarvis: not with a llava model: its decoder makes its own"
    built = zoo.build("llava")
    model = VisionLanguageModel(built.hf, built.processor)
    collator = jobs.collator(built, packing=True)
    (plain,) = split_batch(jobs.collator(built)([zoo.sample(1)]), None)
    (packed,) = split_batch(collator([zoo.sample(1), zoo.sample(2)]), None)
    model.net.anatomy = anatomy
    assert torch.isfinite(model(plain)["nll"]).all()
    with pytest.raises(UserError, match="not with a llava model: its decoder makes its own"):
        model(packed)
