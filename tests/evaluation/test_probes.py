"""Linear read-outs: the probe on labels that are and are not there, and what it is given in each family."""

from __future__ import annotations

import io
import json
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from opsin.data.batch import split_batch
from opsin.data.collate import VLMCollator
from opsin.data.scenes import SceneConfig, sample
from opsin.data.schema import pack_images, unpack_images
from opsin.evaluation.linear_probe import read
from opsin.evaluation.probe_features import (
    LAST,
    OBJECT,
    PICTURE,
    PROJECTOR,
    TOWER,
    features,
    projector_input,
    tapped,
)
from opsin.evaluation.probes import Probes, picture_side, probe_scenes, probes
from opsin.models.errors import UserError
from opsin.models.geometry import PER_IMAGE_KEYS, PIXEL_KEY
from opsin.models.vlm import VisionLanguageModel

import jobs
import zoo


@lru_cache
def model(family: str = "llava") -> VisionLanguageModel:
    built = zoo.build(family, size=32)
    return VisionLanguageModel(built.hf, built.processor).eval()


def collator(family: str = "llava") -> VLMCollator:
    return jobs.collator(zoo.build(family, size=32), max_seq_len=1500)


def micro_batch(family: str, samples: list[dict]) -> dict:
    return split_batch(collator(family)(samples), None, training=False)[0]


@lru_cache
def scenes(count: int = 40) -> tuple[dict, ...]:
    return tuple(probe_scenes(model(), count))


def test_a_label_that_is_there_is_read_and_a_shuffled_one_is_not() -> None:
    torch.manual_seed(3)
    y = torch.randint(4, (800,))
    x = 1e3 + 50 * (torch.randn(800, 24) + 4 * torch.nn.functional.one_hot(y, 24))
    fit = torch.arange(800) < 600
    state = torch.get_rng_state()
    with torch.no_grad():
        found = read(x, y, fit, 4)
    assert torch.equal(state, torch.get_rng_state())
    assert found.accuracy.value is not None and found.accuracy.value > 0.97 and found.accuracy.n == 200
    exact = read(torch.nn.functional.one_hot(y, 4).float(), y, fit, 4)
    assert exact.accuracy.value == 1.0 and exact.accuracy.standard_error == 0.0
    assert abs(found.shuffled - 0.25) < 0.08
    counts = y[fit].bincount()
    assert found.majority == pytest.approx(float((y[~fit] == counts.argmax()).float().mean()))
    assert read(x, y, fit, 4) == found != read(x, y, fit, 4, seed=1)
    noise = read(torch.randn(800, 24), y, fit, 4)
    assert noise.accuracy.value is not None and abs(noise.accuracy.value - 0.25) < 0.1


def test_a_class_that_was_never_fitted_is_never_read() -> None:
    y = torch.tensor([0, 1] * 50 + [-1, 0, -1, 1])
    x = torch.nn.functional.one_hot(y.clamp(min=0), 2).float()
    assert read(x, y, torch.arange(104) < 100, 2).accuracy.value == 0.5


@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_tokens_of_every_site_are_those_of_their_patches(family: str) -> None:
    """Tiles, mosaics and windows: the projector makes each visual token of the tower's token that is said to be its."""
    of = model(family)
    samples = [zoo.sample(0, size=(64, 32)), zoo.sample(1, images=2, size=(32, 48)), zoo.sample(2, images=0)]
    micro = micro_batch(family, samples)
    tokens, hidden = tapped(of, micro, [1, 3])
    count = sum(rows * columns for rows, columns in micro["grids"])
    assert set(tokens) == {TOWER, PROJECTOR, "1", "3"} and all(len(x) == count for x in tokens.values())
    assert len(torch.unique(tokens[PROJECTOR], dim=0)) > count / 2  # else any order would do
    with torch.no_grad():
        if family == "qwen2_5_vl":
            made = of.hf.model.visual.merger(tokens[TOWER].unflatten(1, (4, -1)).flatten(0, 1))
        else:
            made = of.hf.model.multi_modal_projector(tokens[TOWER])
        keys = ("input_ids", "attention_mask", "position_ids", PIXEL_KEY, *PER_IMAGE_KEYS)
        out = of.hf(**{k: micro[k] for k in keys if k in micro}, output_hidden_states=True, use_cache=False)
    assert torch.allclose(made, tokens[PROJECTOR], atol=1e-5)
    for layer in (0, 1, 3):
        site = PROJECTOR if layer == 0 else str(layer)
        expected = out.hidden_states[layer].flatten(0, 1)[micro["patch_position"]]
        assert torch.allclose(tokens[site], expected, atol=1e-5)
    real = micro["attention_mask"].bool()
    assert torch.allclose(hidden[3][real], out.hidden_states[3][real], atol=1e-5)
    assert not any(m._forward_hooks for m in of.hf.model.modules())


def test_llava_towers_tokens_are_its_chosen_layer() -> None:
    micro = micro_batch("llava", [zoo.sample(0), zoo.sample(1)])
    tokens, _ = tapped(model(), micro, [])
    with torch.no_grad():
        seen = model().hf.model.vision_tower(micro[PIXEL_KEY], output_hidden_states=True).hidden_states[-2]
    assert torch.equal(tokens[TOWER], seen[:, 1:].flatten(0, 1))


def test_a_projector_whose_outputs_are_changed_is_refused() -> None:
    given = torch.randn(6, 8)
    read_, order = torch.arange(24.0).reshape(12, 2), torch.tensor([5, 0, 3])
    assert torch.equal(projector_input(read_, given, given[order]), read_.reshape(6, 4)[order])
    half = given.bfloat16()
    assert torch.equal(projector_input(read_, half, half[order].float()), read_.reshape(6, 4)[order])
    with pytest.raises(UserError, match="changes its projector's outputs"):
        projector_input(read_, given, 2 * given[order])
    with pytest.raises(UserError, match="changes its projector's outputs"):
        projector_input(read_[:11], given, given[order])


def test_an_objects_tokens_are_weighted_by_what_they_show() -> None:
    part = list(enumerate(scenes()[:4]))
    found = features(model(), collator(), part, [2])
    assert found is not None
    micro = micro_batch("llava", [s for _, s in part])
    tokens, hidden = tapped(model(), micro, [2])
    assert micro["grids"] == ((8, 8),) * 4
    grid = tokens["2"].reshape(4, 8, 8, -1)
    row = 0
    for number, one in part:
        assert torch.allclose(found[PICTURE].features["2"][number], grid[number].mean((0, 1)), atol=1e-5)
        assert found[PICTURE].labels["count"][number] == str(len(one["meta"]["objects"]))
        for thing in one["meta"]["objects"]:
            if thing["visible"] < 0.75 * thing["pixels"]:
                continue
            left, top, right, bottom = thing["box"]
            weight = torch.zeros(48, 48)
            weight[top:bottom, left:right] = 1
            weight = weight.reshape(8, 6, 8, 6).mean((1, 3))
            expected = (grid[number] * weight[..., None]).sum((0, 1)) / weight.sum()
            assert torch.allclose(found[OBJECT].features["2"][row], expected, atol=1e-5)
            assert (
                int(found[OBJECT].owner[row]) == number
                and found[OBJECT].labels["colour"][row] == thing["colour"]
            )
            third = found[OBJECT].labels["position"][row]
            assert (
                third is None
                or third == ("left", "middle", "right")[int(thing["x"] > 0.4) + int(thing["x"] > 0.6)]
            )
            row += 1
    assert row == len(found[OBJECT].owner)
    # The last prompt token: the one before the answer's first, with the answer as its label.
    assert set(found[LAST].features) == {"2"} and len(found[LAST].owner) == micro["answers"]
    first = micro["label_rows"][torch.cat([torch.ones(1).bool(), micro["label_answer"].diff() > 0])]
    assert torch.allclose(found[LAST].features["2"], hidden[2].flatten(0, 1)[first], atol=1e-5)
    kinds = [k for _, s in part for k in s["meta"]["kinds"]]
    answers = [t["value"] for _, s in part for t in s["conversations"][1::2]]
    for i, (kind, answer) in enumerate(zip(kinds, answers, strict=True)):
        assert {name: labels[i] for name, labels in found[LAST].labels.items() if labels[i]} == {kind: answer}


def test_what_a_processor_cuts_off_is_not_read() -> None:
    """A wide picture whose left and right ends the centre crop never shows."""
    scene = scenes()[0]
    with Image.open(io.BytesIO(unpack_images(scene["images"])[0])) as opened:
        wide = Image.new("RGB", (144, 48))
        wide.paste(opened.convert("RGB"), (48, 0))
    buffer = io.BytesIO()
    wide.save(buffer, "PNG")
    here = scene["meta"]["objects"]
    moved = [{**t, "box": [t["box"][0] + 48, t["box"][1], t["box"][2] + 48, t["box"][3]]} for t in here]
    beyond = {**here[0], "box": [2, 10, 20, 30]}
    cut = {
        **scene,
        "images": pack_images([buffer.getvalue()]),
        "meta": {**scene["meta"], "objects": [beyond, *moved]},
    }
    one = features(model(), collator(), [(0, scene)], [])
    other = features(model(), collator(), [(0, cut)], [])
    assert one is not None and other is not None
    assert len(one[OBJECT].owner) == len(other[OBJECT].owner) > 0
    pairs = (
        one[OBJECT].features[TOWER],
        other[OBJECT].features[TOWER],
    )  # resized with other neighbours at the edges
    assert float(torch.nn.functional.cosine_similarity(*pairs).min()) > 0.98


@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_features_do_not_depend_on_the_batch(family: str) -> None:
    part = [*enumerate(scenes()[:3]), (3, zoo.sample(3)), (4, sample(SceneConfig(), 1, "uniform", 0, "text"))]
    together = features(model(family), collator(family), part, [4])
    assert together is not None
    alone = [features(model(family), collator(family), [one], [4]) for one in part]
    assert [one is None for one in alone] == [False, False, False, True, True]
    for name, population in together.items():
        own = [one[name] for one in alone if one is not None]
        assert population.owner.tolist() == [i for one in own for i in one.owner.tolist()]
        for site, x in population.features.items():
            assert torch.allclose(x, torch.cat([one.features[site] for one in own]), atol=1e-4)


@pytest.fixture(scope="module")
def found() -> Probes:
    return probes(model(), collator(), scenes(), layers=[4], held_out=0.5, batch_size=16)


def test_probes_read_every_site_and_change_nothing(found: Probes) -> None:
    of = model()
    of.train()
    state, weights = torch.get_rng_state(), {k: v.clone() for k, v in of.state_dict().items()}
    again = probes(of, collator(), [zoo.sample(0), *scenes()], layers=[], held_out=0.5, batch_size=3)
    assert of.training and torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(v, weights[k]) for k, v in of.state_dict().items())
    of.eval()
    assert (found.fitted_on, found.held_out, found.skipped, again.skipped) == (20, 20, 0, 1)
    assert [(r.tokens, r.attribute, r.site) for r in found.read_outs] == [
        *((OBJECT, a, s) for a in ("colour", "shape", "size", "position") for s in (TOWER, PROJECTOR, "4")),
        *((PICTURE, "count", s) for s in (TOWER, PROJECTOR, "4")),
        *((LAST, a, "4") for a in ("colour", "shape", "size", "count")),
    ]
    before_layers = [r for r in found.read_outs if r.site in (TOWER, PROJECTOR)]
    for one, other in zip(before_layers, again.read_outs, strict=True):
        assert (one.tokens, one.attribute, one.site) == (other.tokens, other.attribute, other.site)
        assert one.reading.accuracy.n == other.reading.accuracy.n
        assert one.reading.accuracy.value == pytest.approx(other.reading.accuracy.value, abs=0.1)
        assert one.reading.majority == other.reading.majority
    # A random tower shows colours as they are, which even 20 scenes tell.
    colour = found.rows(OBJECT, "colour")[TOWER]
    assert colour.accuracy.value is not None and colour.accuracy.value > 0.5
    assert colour.shuffled < 0.3 and colour.majority < 0.3 and colour.classes == 8


def test_the_table_and_the_picture(found: Probes, tmp_path: Path) -> None:
    table = json.loads(json.dumps(found.as_dict()))
    assert len(table["read_outs"]) == 19
    assert set(table["read_outs"][0]) >= {"value", "n", "standard_error", "shuffled", "majority", "site"}
    drawn = Image.open(found.picture(tmp_path / "new" / "probes.png"))
    assert drawn.format == "PNG" and drawn.width == 3 * 480
    assert len(np.unique(np.asarray(drawn).reshape(-1, 3), axis=0)) > 100


def test_mistakes_are_one_line() -> None:
    for options, message in (
        ({"layers": [1, 7]}, "layers: 7: this model has layers 1 to 4"),
        ({"held_out": 1.0}, "held_out: 1.0: a share between 0 and 1"),
        ({"samples": [zoo.sample(0), zoo.sample(1)]}, "0 of 2 samples are scenes with objects"),
        ({"samples": scenes()[:4]}, "3 to fit on and 1 to score are too few"),
    ):
        with pytest.raises(UserError) as error:
            probes(model(), collator(), **{"samples": scenes()[:4], **options})
        assert message in str(error.value) and "\n" not in str(error.value)


def test_scenes_are_as_large_as_the_models_own_pictures() -> None:
    assert picture_side(model("llava")) == 48  # 32 pixels are fewer than a scene can have
    assert picture_side(model("qwen2_5_vl")) == 336
    one = scenes()[0]
    with Image.open(io.BytesIO(unpack_images(one["images"])[0])) as opened:
        assert opened.size == (48, 48)
    assert set(one["meta"]["kinds"]) <= {"colour", "shape", "size", "count"}
