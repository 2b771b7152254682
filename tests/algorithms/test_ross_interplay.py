"""ROSS beside what others do to a batch: hidden patches, refused documents, letterboxes; and its noise by key."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import LlavaImageProcessor, LlavaImageProcessorFast

from opsin.algorithms.ross.functional import draw_noise, mean_of_views, posterior_noise
from opsin.algorithms.ross.views import Views
from opsin.data.schema import pack_images, stable_hash
from opsin.models.families.llava import LlavaImages
from opsin.models.geometry import resize_and_crop_box
from opsin.models.randomness import view_keys

import jobs
import zoo
from methods import Bench, Hide, LoudROSS

SMALL: dict[str, Any] = {"target": {"name": "pixels", "cell": 4}, "width": 64}
VARIANTS = [{}, {"head": "vit"}, {"objective": "cosine"}, {"objective": "decoded_mse"}]


def bench(family: str = "llava", also: tuple = (), **arguments: Any) -> Bench:
    return Bench(LoudROSS(**{**SMALL, **arguments}), family, also=also)


def hiding(drill: Bench, part: dict[str, Any], every: int = 3) -> torch.Tensor:
    """Have a method hide patches of a micro-batch; which ones, (P,) bool."""
    drill.model.end_step()
    drill.state.batch = part
    Hide(every).before_forward(drill.model, drill.state, drill.logger)
    hidden = drill.model.step(part).hidden
    assert hidden is not None
    return hidden.flatten()[part["patch_position"]]


# Hidden patches ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", zoo.FAMILIES)
@pytest.mark.parametrize("arguments", VARIANTS, ids=["dit", "vit", "cosine", "decoded"])
def test_what_another_method_hides_is_neither_learnt_nor_read(family: str, arguments: dict) -> None:
    drill = bench(family, min_visible=1, **arguments)
    method: Any = drill.method
    (part,) = drill.parts(drill.batch([zoo.sample(1, images=2, size=(40, 30)), zoo.sample(2, size=(33, 40))]))
    hidden = hiding(drill, part)
    assert bool(hidden.any()) and not bool(hidden.all())
    place = part["patch_position"][hidden]
    results = []
    for seed in (None, 1, 2):
        state = torch.randn(*part["input_ids"].shape, 32, generator=torch.Generator().manual_seed(0))
        if seed is not None:  # another condition there
            state.flatten(0, 1)[place] = 100 * torch.randn(len(place), 32, generator=torch.Generator().manual_seed(seed))  # fmt: skip
        state.requires_grad_()
        loss = method.local_loss(drill.model, part, state)
        results.append((loss, *torch.autograd.grad(loss, [state, *drill.model.net.auxiliary.parameters()], allow_unused=True)))  # fmt: skip
    first, pull = results[0][0], results[0][1].flatten(0, 1)
    assert bool((pull[place] == 0).all()) and bool(pull[part["patch_position"][~hidden]].any())
    for other in results[1:]:
        assert torch.equal(first, other[0])
        for a, b in zip(results[0][1:], other[1:], strict=True):
            assert (a is None and b is None) or torch.allclose(a, b, atol=1e-6)


def test_the_noisy_target_of_hidden_patches_is_not_read_either(monkeypatch: pytest.MonkeyPatch) -> None:
    drill = bench(min_visible=1)
    method: Any = drill.method
    (part,) = drill.parts(drill.batch([zoo.sample(1, images=2)]))
    hidden = hiding(drill, part)
    state = torch.randn(*part["input_ids"].shape, 32)
    before, stock = method.local_loss(drill.model, part, state), method.targets
    monkeypatch.setattr(method, "targets", lambda *a: stock(*a) + 50 * hidden[:, None])
    assert torch.equal(before, method.local_loss(drill.model, part, state))
    monkeypatch.setattr(method, "targets", lambda *a: stock(*a) + 1 * ~hidden[:, None])
    assert not torch.equal(before, method.local_loss(drill.model, part, state))


def test_a_view_with_too_few_visible_patches_adds_nothing_and_a_small_whole_one_does() -> None:
    """LLaVA's 16 patches: a third hidden along diagonals leaves 10 of them, a half leaves 8."""
    (part,) = (drill := bench()).parts(drill.batch([zoo.sample(1), zoo.sample(2)]))
    state = torch.randn(*part["input_ids"].shape, 32)
    for every, least, used in [(3, 10, True), (3, 11, False), (2, 8, True), (2, 9, False), (1, 1, False), (1, 10, False)]:  # fmt: skip
        drill = bench(min_visible=least)
        method: Any = drill.method
        hidden = hiding(drill, part, every)
        assert int((~hidden).sum()) == {3: 20, 2: 16, 1: 0}[every]
        x = state.clone().requires_grad_()
        loss = method.local_loss(drill.model, part, x)
        (pull,) = torch.autograd.grad(loss, x)
        assert (float(loss) > 0) == used == bool(pull.any()) and bool(pull.isfinite().all())
    drill.model.end_step()
    assert float(bench(min_visible=99).method.local_loss(drill.model, part, state)) > 0  # type: ignore[attr-defined]


def test_the_order_of_methods_does_not_matter_and_hiding_matters() -> None:
    ross, hide = ("methods:LoudROSS", {**SMALL, "min_visible": 1}), ("methods:Hide", {"shift": 0.5})
    a, b, alone = (jobs.train(steps=2, algorithms=order) for order in ([ross, hide], [hide, ross], [ross]))
    assert a["losses"] == b["losses"] != alone["losses"]
    assert all(torch.equal(a["weights"][k], b["weights"][k]) for k in a["weights"])
    parts = jobs.train(steps=2, algorithms=[hide, ross], microbatch=1)
    assert parts["losses"][0] == pytest.approx(a["losses"][0], abs=1e-5)


def test_nothing_visible_anywhere_gives_finite_zeros() -> None:
    drill = bench(also=(Hide(every=1),))
    assert drill.step(drill.batch([zoo.sample(1, images=2)])) == (0.0, {})


# Refused documents ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packing", [False, True])
def test_refused_documents_add_nothing(packing: bool) -> None:
    drill = bench("llava_next")
    kept, refused = [zoo.sample(1), zoo.sample(2, images=2)], zoo.sample(3, images=2)
    alone = drill.step(drill.batch(kept, packing=packing))
    batch = drill.batch([kept[0], refused, kept[1]], packing=packing)
    of_refused = stable_hash(refused["id"])
    assert of_refused in batch["document_uid"].flatten().tolist()
    batch["refused"] = batch["document_uid"] == of_refused
    for size in (None, 1):
        loss, gradients = drill.step(batch, size)
        assert loss == pytest.approx(alone[0], abs=1e-5)
        assert all(torch.allclose(g, alone[1][n], atol=1e-5) for n, g in gradients.items())


# Letterbox -----------------------------------------------------------------------------------------------------


def padded(side: int = 32, fast: bool = False) -> Any:
    kind = LlavaImageProcessorFast if fast else LlavaImageProcessor
    return kind(do_pad=True, size={"shortest_edge": side}, crop_size={"height": side, "width": side})


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("size", [(64, 32), (32, 64), (64, 64), (61, 24), (24, 61), (90, 30)])
def test_the_box_of_a_picture_padded_to_a_square_says_what_is_padding(
    size: tuple[int, int], fast: bool
) -> None:
    processor = padded(fast=fast)
    width, height = size
    # Colours rise within 1 .. 2 thirds, so that padding in the mean colour differs.
    x, y = np.meshgrid((np.arange(width) + 0.5) / width, (np.arange(height) + 0.5) / height)
    picture = Image.fromarray((np.stack([x, y, np.ones_like(x)], -1) * 255).astype(np.uint8))
    pixels = torch.as_tensor(np.asarray(processor(images=[picture], return_tensors="pt")["pixel_values"][0]))
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (processor.image_mean, processor.image_std))
    red, green, blue = pixels * std + mean
    left, top, right, bottom, h, w = resize_and_crop_box(processor, width, height)
    assert (h, w) == (32, 32)
    at_x = left + (right - left) * (torch.arange(32) + 0.5) / 32
    at_y = top + (bottom - top) * (torch.arange(32) + 0.5) / 32
    edge_x, edge_y = 2 * (right - left) / 32, 2 * (bottom - top) / 32
    inside = ((at_x > edge_x) & (at_x < 1 - edge_x)) & ((at_y > edge_y) & (at_y < 1 - edge_y))[:, None]
    outside = ((at_x < -edge_x) | (at_x > 1 + edge_x)) | ((at_y < -edge_y) | (at_y > 1 + edge_y))[:, None]
    assert bool(inside.any()) and bool(outside.any()) == (width != height)
    assert float((red - at_x).abs()[inside].max()) < 0.02 and float((green - at_y[:, None]).abs()[inside].max()) < 0.02  # fmt: skip
    assert float((blue - 1).abs()[inside].max()) < 0.02
    if bool(outside.any()):
        assert float((blue - mean[2, 0, 0]).abs()[outside].max()) < 0.02


def letterboxed(size: tuple[int, int], **arguments: Any) -> tuple[Bench, dict[str, Any]]:
    drill = bench(**arguments)
    images: Any = drill.collator.encoder.images
    assert isinstance(images, LlavaImages)
    drill.model.processor.image_processor = images.processor.image_processor = padded(16)
    sample = {**zoo.sample(1), "images": pack_images([zoo.picture(5, size)])}
    return drill, drill.batch([sample])


@pytest.mark.parametrize("size", [(32, 16), (16, 32), (16, 16), (32, 8)])
def test_patches_whose_centre_lies_outside_the_picture_are_not_in_the_loss(size: tuple[int, int]) -> None:
    inside = {(32, 16): [4, 5, 6, 7, 8, 9, 10, 11], (16, 32): [1, 2, 5, 6, 9, 10, 13, 14],
              (16, 16): [*range(16)], (32, 8): []}[size]  # fmt: skip
    pulls = {}
    for letterbox in ("mask", "reconstruct"):
        drill, batch = letterboxed(size, letterbox=letterbox, objective="mse")
        method: Any = drill.method
        (part,) = drill.parts(batch)
        state = torch.randn(*part["input_ids"].shape, 32, requires_grad=True)
        drill.model.step(part)
        (pull,) = torch.autograd.grad(method.local_loss(drill.model, part, state), state)
        pulls[letterbox] = pull.flatten(0, 1)[part["patch_position"]].abs().amax(1) > 0
    assert bool(pulls["reconstruct"].all())
    if size == (32, 8):  # four patches high, the picture one: its centre lies on the border of two rows
        assert 0 < int(pulls["mask"].sum()) <= 8
    else:
        assert pulls["mask"].nonzero().flatten().tolist() == inside


def test_the_mean_of_views_is_a_loop() -> None:
    views, loss = Views.of([(2, 3), (1, 1), (4, 2), (2, 2)]), torch.rand(19)
    counted, used = torch.rand(19) < 0.6, torch.tensor([True, True, False, True])
    counted[6] = False  # a view without any counted patch
    loss[~counted] = torch.inf
    wanted = sum(float(loss[(views.view == v) & counted].mean()) for v in (0, 3))
    assert float(mean_of_views(loss, views, 4, counted, used)) == pytest.approx(wanted)


# Noise ---------------------------------------------------------------------------------------------------------


def test_noise_is_a_function_of_the_sample_its_visit_the_image_and_the_view_alone() -> None:
    drill = bench("llava_next")
    method: Any = drill.method
    noise: dict[tuple, torch.Tensor] = {}

    def told(batch: dict[str, Any], size: int | None = None) -> dict[tuple, torch.Tensor]:
        found: dict[tuple, torch.Tensor] = {}
        for part in drill.parts(batch, size):
            if not part["grids"]:
                continue
            views, key = Views.of(part["grids"]), method.keys(part)
            draws = draw_noise(key, views, 4, 8, 1000)
            ordinal: dict[tuple, int] = {}
            for v, (row, document, image) in enumerate(zip(part["view_row"].tolist(), part["view_document"].tolist(), part["view_image"].tolist(), strict=True)):  # fmt: skip
                who = (
                    int(part["document_uid"][row, document]),
                    int(part["document_visit"][row, document]),
                    image,
                )
                ordinal[who] = ordinal.get(who, -1) + 1
                own = draws.noise[:, views.view == v]
                assert (*who, ordinal[who]) not in found
                found[(*who, ordinal[who])] = torch.cat([own.flatten(), draws.time[:, v].float()])
        return found

    samples = [zoo.sample(i, images=i % 3, size=[(20, 16), (40, 18)][i % 2]) for i in range(6)]
    noise = told(drill.batch(samples))
    assert len(noise) == 2 * sum(i % 3 for i in range(6))
    for other in (told(drill.batch(samples[::-1], packing=True)), told(drill.batch(samples, padding_side="left"), 1)):  # fmt: skip
        assert other.keys() == noise.keys() and all(torch.equal(v, other[k]) for k, v in noise.items())
    flat = [
        v[:128] for v in noise.values()
    ]  # no two views share noise, though sample, image or grid be the same
    for i, a in enumerate(flat):
        assert abs(float((a * a).mean()) - 1) < 0.5
        assert all(abs(float((a * b).mean())) < 0.45 for b in flat[:i])
    again = told(drill.batch([{**s, "visit": 1} for s in samples]))
    assert not any(torch.equal(v[:128], w[:128]) for v in noise.values() for w in again.values())


def test_the_same_sample_twice_in_a_batch_draws_the_same_noise() -> None:
    """A sample that is served twice without a change of visit is the same sample: the loss does not change."""
    drill = bench("llava_next")
    method: Any = drill.method
    twice, once = drill.batch([zoo.sample(1)] * 2), drill.batch([zoo.sample(1)])
    assert method.keys(drill.parts(twice)[0]).tolist() == method.keys(drill.parts(once)[0]).tolist() * 2
    assert drill.step(twice)[0] == pytest.approx(drill.step(once)[0], abs=1e-6)
    packed = drill.batch([zoo.sample(1)] * 2, packing=True)
    assert drill.step(packed)[0] == pytest.approx(drill.step(once)[0], abs=1e-5)


def test_streams_of_one_view_and_draws_are_unrelated_and_times_are_uniform() -> None:
    count, views = 400, Views.of([(4, 4)] * 400)
    zero = torch.zeros(count, dtype=torch.int64)
    key = view_keys(3, torch.arange(count), zero, zero, zero)
    draws, posterior = draw_noise(key, views, 4, 16, 1000), posterior_noise(key, views, 16)
    streams = [*draws.noise, posterior]
    for i, a in enumerate(streams):
        assert abs(float(a.mean())) < 0.015 and abs(float(a.var()) - 1) < 0.02
        assert all(abs(float((a * b).mean())) < 0.015 for b in streams[:i])
    time = draws.time.flatten()
    assert int(time.min()) >= 0 and int(time.max()) <= 999 and abs(float(time.float().mean()) - 499.5) < 30
    assert float((time // 100).bincount(minlength=10).float().std()) < 35
    # The times of a view's draws, and a time and its noise, have nothing to do with each other.
    t = (draws.time.float() - 499.5) / 288.7
    assert abs(float((t[0] * t[1]).mean())) < 0.2
    assert abs(float((t * draws.noise.unflatten(1, (count, 16))[:, :, 0, 0]).mean())) < 0.1
    few = draw_noise(key, views, 2, 16, 7)
    assert torch.equal(few.noise, draws.noise[:2]) and few.time.unique().tolist() == list(range(7))
