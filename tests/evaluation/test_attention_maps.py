"""Attention by layer: against transformers' own, on pictures cut in every way; pointing by hand-made attention."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from opsin.data.batch import split_batch
from opsin.data.collate import VLMCollator
from opsin.data.prompts import prompt_batch, prompts_of
from opsin.data.scenes import SceneConfig, sample
from opsin.data.schema import Role
from opsin.evaluation.attention_maps import attention_maps
from opsin.evaluation.attention_reading import Rows, look, one_object, points, query_rows
from opsin.evaluation.attention_rows import attention_rows, watched
from opsin.evaluation.heat_maps import ViewMap, density
from opsin.evaluation.line_plot import ticks
from opsin.evaluation.patch_cover import covered, overlap, patch_boxes, patch_rows
from opsin.models.errors import UserError
from opsin.models.geometry import PER_IMAGE_KEYS, PIXEL_KEY
from opsin.models.step import Step
from opsin.models.vlm import VisionLanguageModel

import jobs
import zoo

CONFIG = SceneConfig(size=64, objects=(2, 3), charts=0)


@lru_cache
def model(family: str = "llava", bidirectional: bool = False) -> VisionLanguageModel:
    built = zoo.build(family, size=32)
    # Random weights look everywhere alike: larger ones make maps that differ.
    for layer in built.hf.model.language_model.layers:
        layer.self_attn.q_proj.weight.data *= 30
        layer.self_attn.k_proj.weight.data *= 30
    return VisionLanguageModel(built.hf, built.processor, bidirectional_images=bidirectional).eval()


def collator(family: str = "llava") -> VLMCollator:
    return jobs.collator(zoo.build(family, size=32), max_seq_len=1500)


@lru_cache
def scenes(count: int = 6) -> tuple[dict, ...]:
    return tuple(sample(CONFIG, 7, "uniform", i) for i in range(count))


def micro_batch(family: str, samples: list[dict]) -> dict:
    return split_batch(collator(family)(samples), None, training=False)[0]


def eager(of: VisionLanguageModel, batch: dict) -> torch.Tensor:
    """(layers, B, L, L): what transformers itself gives under ``eager``, mean over heads."""
    seen: list[torch.Tensor] = []
    hooks = [
        layer.self_attn.register_forward_hook(lambda module, args, out: seen.append(out[1].mean(1)))
        for layer in of.anatomy.decoder_layers(of.hf)
    ]
    of.hf.set_attn_implementation("eager")
    try:
        with torch.no_grad():
            of.net(batch, Step(batch))
    finally:
        of.hf.set_attn_implementation("sdpa")
        for hook in hooks:
            hook.remove()
    return torch.stack(seen)


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_rows_are_those_of_eager_attention(family: str, bidirectional: bool) -> None:
    """Chained turns (transformers' mask), independent ones (ours), several pictures, rows of unequal length."""
    of = model(family, bidirectional)
    for independent in (False, True):
        samples = [
            zoo.sample(i, turns=1 + i, independent=independent, images=1 + i % 2, size=(40 + 8 * i, 32))
            for i in range(3)
        ]
        batch = micro_batch(family, samples)
        assert batch["plain_attention"] is not independent
        asked = query_rows(batch, "answer")
        assert asked is not None
        at = asked.padded(3)
        rows = attention_rows(of, batch, at)
        expected = eager(of, batch).gather(
            2, at.clamp(min=0)[None, :, :, None].expand(len(rows), -1, -1, rows.shape[-1])
        )
        real = (at >= 0)[None, :, :, None]
        assert float(rows[:, at >= 0].max()) > 0.15  # maps that have a shape
        assert torch.allclose(rows * real, expected * real, atol=1e-5, rtol=0)
        assert not bool(rows[:, at < 0].any())
        assert torch.allclose(rows[:, at >= 0].sum(-1), torch.ones(()), atol=1e-5)


def test_rows_are_what_output_attentions_gives_for_the_bare_model() -> None:
    """No seam, no hook of ours: the Hugging Face model called as everybody calls it."""
    of = model("qwen2_5_vl")
    batch = micro_batch("qwen2_5_vl", [zoo.sample(1, size=(40, 32)), zoo.sample(2, size=(32, 48))])
    keys = ("input_ids", "attention_mask", "position_ids", PIXEL_KEY, *PER_IMAGE_KEYS)
    of.hf.set_attn_implementation("eager")
    try:
        with torch.no_grad():
            out = of.hf(**{k: batch[k] for k in keys if k in batch}, output_attentions=True, use_cache=False)
    finally:
        of.hf.set_attn_implementation("sdpa")
    last = batch["attention_mask"].sum(1) - 1
    rows = attention_rows(of, batch, last[:, None])
    for layer, weights in enumerate(out.attentions):
        expected = torch.stack([weights[b, :, last[b]].mean(0) for b in range(2)])
        assert torch.allclose(rows[layer][:, 0], expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("chosen", ["sdpa", "eager", "flex_attention"])
def test_nothing_is_left_behind_even_after_an_error(chosen: str) -> None:
    of = VisionLanguageModel(zoo.build("llava", size=32).hf).eval()
    decoder = of.anatomy.decoder(of.hf)
    decoder.config._attn_implementation = chosen
    tower = of.hf.model.vision_tower.config._attn_implementation
    kernel = ALL_ATTENTION_FUNCTIONS["sdpa"]
    hooks = [sum(map(len, (m._forward_hooks, m._forward_pre_hooks))) for m in of.modules()]
    batch = micro_batch("llava", list(scenes()[:2]))
    asked = query_rows(batch, "last_prompt")
    assert asked is not None
    rows = attention_rows(of, batch, asked.padded(2))
    with pytest.raises(ZeroDivisionError), watched(of, asked.padded(2)):
        assert ALL_ATTENTION_FUNCTIONS["sdpa"] is not kernel
        raise ZeroDivisionError
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is kernel and AttentionInterface._global_mapping["sdpa"] is kernel
    assert decoder.config._attn_implementation == chosen
    assert of.hf.model.vision_tower.config._attn_implementation == tower
    assert hooks == [sum(map(len, (m._forward_hooks, m._forward_pre_hooks))) for m in of.modules()]
    decoder.config._attn_implementation = "sdpa"
    assert torch.equal(rows, attention_rows(of, batch, asked.padded(2)))


def test_layers_that_attend_in_another_way_are_named() -> None:
    of = VisionLanguageModel(zoo.build("llava", size=32).hf).eval()
    layer = of.anatomy.decoder_layers(of.hf)[1]
    layer.self_attn.forward = lambda hidden_states, **_: (hidden_states, None)
    batch = micro_batch("llava", list(scenes()[:1]))
    with pytest.raises(UserError, match="nothing seen of layers 2 of 4 of this llava model"):
        attention_rows(of, batch, torch.zeros(1, 1, dtype=torch.int64))


@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_branches_look_as_questions_asked_alone(family: str) -> None:
    """One row with all questions of a picture gives what a left-padded prompt of each question gives."""
    of, pad = model(family), collator(family)
    (shared,) = look(of, pad, [(0, scenes()[0])], "last_prompt", set())
    alone = prompts_of(pad.encoder, scenes()[0])
    assert len(shared) == len(alone) > 1
    batch = prompt_batch(pad, alone)
    batch["sample_status"] = torch.zeros(len(alone), dtype=torch.int8)
    micro = split_batch(batch, None, training=False)[0]
    length = micro["input_ids"].shape[1]
    rows = attention_rows(of, micro, torch.full((len(alone), 1), length - 1))[:, :, 0]
    visual = (rows * (micro["roles"] == Role.IMAGE)).sum(-1)
    for number, looked in enumerate(shared):
        assert looked.mass[:, 0] == pytest.approx(visual[:, number].numpy(), abs=1e-5)
        mine = micro["attention_mask"][number].bool()
        assert looked.visible == pytest.approx(float((micro["image_ids"][number] >= 0)[mine].float().mean()))


def hand_made(family: str, samples: list[dict]) -> tuple[dict, Rows, list, list]:
    micro = micro_batch(family, samples)
    rows = query_rows(micro, "last_prompt")
    assert rows is not None
    return micro, rows, list(enumerate(samples)), [collator(family).encoder(s) for s in samples]


@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_pointing_of_hand_made_attention(family: str) -> None:
    """Even attention is chance in any number of views; on the object alone it is 1 / area; on another one, nothing."""
    micro, rows, part, documents = hand_made(family, list(scenes()))
    patch_row, column = patch_rows(micro)
    length, count = micro["input_ids"].shape[1], len(rows.row_of)
    even = torch.full((1, count, length), 1 / length)
    patches = patch_boxes(micro)
    only, other = torch.zeros(1, count, length), torch.zeros(1, count, length)
    boxes = {}
    for question, (row, turn) in enumerate(zip(rows.row_of.tolist(), rows.turn_of.tolist(), strict=True)):
        found = one_object(part[row][1], turn)
        if found is not None:
            boxes[question] = found
            own, rest = (
                torch.tensor(b, dtype=torch.float64).reshape(-1, 4) / 64 for b in ([found[0]], found[1])
            )
            mine = (patch_row == row).double()
            only[0, question].index_add_(0, column, ((covered(patches, own)[0] == 1) * mine).float())
            beside = (covered(patches, own)[0] == 0) & (covered(patches, rest) == 1).any(0)
            other[0, question].index_add_(0, column, (beside * mine).float())
    assert len(boxes) > 5
    if family == "llava_next":
        assert len(micro["grids"]) == 2 * len(part)
    told = points(micro, even, rows, part, documents)
    assert set(told) == set(boxes)
    for question, (own, others, area, box) in told.items():
        assert own == pytest.approx(1, abs=1e-6)
        assert others is None or others == pytest.approx(1, abs=1e-6)
        left, top, right, bottom = boxes[question][0]
        assert area == pytest.approx((right - left) * (bottom - top) / 64**2, rel=1e-6)
        assert box == pytest.approx([edge / 64 for edge in boxes[question][0]])
    inside = [q for q in told if bool(only[0, q].any())]
    assert inside
    told = points(micro, only, rows, part, documents)
    for question in inside:
        own, others, area, _ = told[question]
        assert own == pytest.approx(1 / area)
        assert others is None or others == pytest.approx(0, abs=1e-9)
    beside = [q for q in told if bool(other[0, q].any())]
    assert beside
    told = points(micro, other, rows, part, documents)
    for question in beside:
        own, others, _, _ = told[question]
        assert own == 0 and (others is None or others[0] > 1)


def test_a_patch_counts_by_its_area_in_the_box() -> None:
    """Against counting fine pixels, on a view that reaches beyond its picture."""
    batch = {
        "patch_view": torch.zeros(12, dtype=torch.int64),
        "patch_row": torch.arange(12) // 4,
        "patch_column": torch.arange(12) % 4,
        "view_box": torch.tensor([[-0.25, 0.0, 1.25, 0.9]]),
        "view_grid": torch.tensor([[3, 4]]),
    }
    patches = patch_boxes(batch)
    boxes = torch.tensor(
        [[0.1, 0.2, 0.5, 0.75], [0.3, 0.1, 0.9, 0.3], [0.95, 0.0, 1.0, 1.0]], dtype=torch.float64
    )
    y, x = torch.meshgrid(*(torch.arange(n) / n + 0.5 / n for n in (900, 1200)), indexing="ij")
    x, y = x * 1.5 - 0.25, y * 0.9
    cell = (torch.arange(900) // 300)[:, None] * 4 + (torch.arange(1200) // 300)[None]
    for box, share in zip(boxes, covered(patches, boxes), strict=True):
        inside = (x >= box[0]) & (x < box[2]) & (y >= box[1]) & (y < box[3])
        counted = torch.zeros(12).index_add_(0, cell.flatten(), inside.flatten().float()) / 300**2
        assert torch.allclose(counted.double(), share, atol=5e-3)
    both = overlap(boxes[:1], boxes[1:2])
    assert both.tolist() == [[0.3, 0.2, 0.5, 0.3]]
    assert not bool(covered(patches, overlap(boxes[:1], boxes[2:])).any())


@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_the_result_does_not_depend_on_batches_and_changes_nothing(family: str) -> None:
    of, samples = model(family), [*scenes(), sample(CONFIG, 7, "uniform", 50, "text"), zoo.sample(3, turns=2)]
    of.train()
    torch.manual_seed(5)
    before, weights = torch.get_rng_state(), {k: v.clone() for k, v in of.state_dict().items()}
    one = attention_maps(of, collator(family), samples, batch_size=1, queries="answer").as_dict()
    many = attention_maps(of, collator(family), samples, batch_size=8, queries="answer").as_dict()
    assert of.training and torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(v, weights[k]) for k, v in of.state_dict().items())
    of.eval()
    assert one["skipped"] == many["skipped"] == 1  # the one without a picture
    assert one["questions"] == sum(len(s["meta"]["kinds"]) for s in scenes()) + 2
    for name, row in one["by_layer"].items():
        for a, b in zip(row, many["by_layer"][name], strict=True):
            assert a["n"] == b["n"] and a["value"] == pytest.approx(b["value"], abs=1e-5)
    total = sum(one["by_layer"][f"mass/{g}"][0]["value"] for g in ("visual", "text"))
    assert total == pytest.approx(1)
    assert (
        one["by_layer"]["mass/response"][0]["value"] > 0
    )  # rows behind the first see the answer's beginning
    assert 0 < one["overall"]["pointing_gain"]["n"] <= one["overall"]["pointing"]["n"] < one["questions"]


def test_rows_of_the_answer_leave_out_the_token_that_ends_it() -> None:
    batch = micro_batch("llava", list(scenes()[:2]))
    first, answer = query_rows(batch, "last_prompt"), query_rows(batch, "answer")
    assert first is not None and answer is not None
    responses = int((batch["roles"] == Role.RESPONSE).sum())
    assert len(answer.row) == responses - len(first.row)
    before = batch["roles"][first.row, first.column]
    assert not bool((before == Role.RESPONSE).any())
    assert bool((batch["roles"][first.row, first.column + 1] == Role.RESPONSE).all())


def test_the_picture_and_what_cannot_be_drawn(tmp_path: Path) -> None:
    found = attention_maps(model(), collator(), scenes(), shown=2)
    json.dumps(found.as_dict())
    assert found.layers == 4 and len(found.examples) == 2
    assert all(e.box is not None and e.pointing is not None for e in found.examples)
    drawn = Image.open(found.picture(tmp_path / "new" / "attention.png", layers=[1, 4]))
    plain = Image.open(found.picture(tmp_path / "all.png"))
    assert drawn.format == "PNG" and drawn.width > 600 and plain.height == drawn.height
    assert len(np.unique(np.asarray(drawn).reshape(-1, 3), axis=0)) > 200
    with pytest.raises(UserError, match="layers: 5: this model has layers 1 to 4"):
        found.picture(tmp_path / "no.png", layers=[5])
    with pytest.raises(UserError, match=r"queries: unknown 'anser'.*answer"):
        attention_maps(model(), collator(), scenes(), queries="anser")
    with pytest.raises(UserError, match="none of 1 samples has a picture"):
        attention_maps(model(), collator(), [sample(CONFIG, 7, "uniform", 0, "text")])


def test_captions_tell_their_mass_alone(tmp_path: Path) -> None:
    captions = [sample(CONFIG, 7, "uniform", i, "caption") for i in range(2)]
    found = attention_maps(model(), collator(), captions)
    assert (
        found.questions == 2 and found.overall["pointing"].n == 0 and found.overall["pointing"].value is None
    )
    assert found.overall["visual"].n == 2
    assert Image.open(found.picture(tmp_path / "a.png")).height > 260


def test_density_keeps_all_attention_that_falls_on_the_picture() -> None:
    rng = np.random.default_rng(0)
    whole = ViewMap(rng.random((2, 4, 4)), (0.0, 0.0, 1.0, 1.0))
    tiles = ViewMap(rng.random((2, 8, 6)), (0.0, 0.0, 1.0, 1.0))
    outside = ViewMap(np.ones((2, 2, 2)), (-0.5, 0.0, 0.5, 1.0))  # its left half is padding
    one = density([whole], 1, (48, 48))
    assert one.mean() == pytest.approx(whole.attention[1].sum())
    assert np.allclose(density([whole, tiles], 1, (48, 48)) - one, density([tiles], 1, (48, 48)))
    half = density([outside], 0, (48, 48))
    assert half.mean() == pytest.approx(2) and not half[:, 24:].any()
    assert np.allclose(one[:12, 12:24], whole.attention[1, 0, 1] * 16)


def test_ticks_are_round_and_lie_within() -> None:
    for low, high in ((0.0, 1.0), (0.3, 0.34), (0, 117), (-2.2, 3.1)):
        found = ticks(low, high)
        assert 2 <= len(found) <= 6 and low - 1e-9 <= found[0] and found[-1] <= high + 1e-9
    assert ticks(0, 1) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1.0])
