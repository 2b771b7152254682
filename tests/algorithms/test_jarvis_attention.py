"""JARVIS: what predictions depend on and what they don't, bit for bit; the branch is the masked pass; words are left alone."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

from opsin.algorithms.jarvis import JARVIS
from opsin.algorithms.jarvis.cut import CODE, WEIGHT
from opsin.algorithms.jarvis.functional import on_tokens
from opsin.algorithms.jarvis.sampler import BLOCKS, CONTEXT, MASKED
from opsin.models.attention import dense

import zoo
from methods import Bench, teacher

MODES = ("masked", "unmasked")
Change = Callable[[torch.Tensor], torch.Tensor]


def bench(family: str = "llava", bidirectional: bool = True, template: str = "vicuna_v1", **arguments: Any) -> Bench:  # fmt: skip
    arguments = {"target": teacher(), "ntp_probability": 0.0, "layer": 2, **arguments}
    drill = Bench(
        JARVIS(**arguments),
        family,
        size=32,
        bidirectional=bidirectional,
        template=template,
        max_seq_len=3000,
    )
    latent: Any = drill.model.net.auxiliary["jarvis"].latent
    if latent is not None:  # as loud as a patch
        with torch.no_grad():
            latent.z.mul_(30)
    return drill


def samples() -> list[dict]:
    return [
        zoo.sample(1, images=2, size=(40, 34)),
        zoo.sample(2, images=0),
        zoo.sample(3, turns=2, size=(64, 30)),
    ]


def one_part(drill: Bench, found: list[dict] | None = None, **options: Any) -> dict[str, Any]:
    (part,) = drill.parts(drill.batch(found or samples(), pad_to_multiple_of=16, **options))
    return part


def kinds(part: dict[str, Any]) -> dict[str, torch.Tensor]:
    """(B, L) bool each: every token is of one kind."""
    code = on_tokens(part[CODE], part["patch_position"], part["input_ids"].shape, 0)
    view = on_tokens(part["patch_view"], part["patch_position"], part["input_ids"].shape, -1)
    valid, image = part["attention_mask"].bool(), part["image_ids"] >= 0
    place = torch.arange(code.shape[1]).expand_as(code)
    first = torch.where(view >= 0, place, 10**6).amin(1, keepdim=True)
    last = torch.where(view >= 0, place, -1).amax(1, keepdim=True)
    target, context, masked = (code & BLOCKS) != 0, (code & CONTEXT) != 0, (code & MASKED) != 0
    return {
        "target": target, "context": context, "unused": masked & ~target & ~context,
        "between": valid & image & (view < 0), "pre": valid & ~image & (place < first), "post": valid & ~image & (place > last),
        "amid": valid & ~image & (place > first) & (place < last), "padding": ~valid, "view": view, "code": code,
    }  # fmt: skip


def noise(where: torch.Tensor, seed: int = 0, scale: float = 3.0) -> Change:
    def change(x: torch.Tensor) -> torch.Tensor:
        drawn = scale * torch.randn(x.shape, generator=torch.Generator().manual_seed(seed))
        return torch.where(where[..., None], drawn.to(x), x)

    return change


def run(
    drill: Bench, part: dict[str, Any], before: Change | None = None, after: Change | None = None
) -> dict[str, torch.Tensor]:
    """One forward pass, with embeddings of the sequence changed before or after JARVIS's own edit."""
    method: Any = drill.method
    decoder = drill.model.anatomy.decoder(drill.model.hf)
    calls: list[str] = []

    def hook(change: Change, module: Any, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        calls.append("")
        if kwargs["inputs_embeds"].shape[:2] != part["input_ids"].shape:
            return None  # the branch
        return args, {**kwargs, "inputs_embeds": change(kwargs["inputs_embeds"])}

    hooks = [
        decoder.register_forward_pre_hook(partial(hook, change), with_kwargs=True, prepend=first)
        for change, first in ((before, True), (after, False))
        if change is not None
    ]
    drill.model.end_step()
    drill.state.batch = part
    try:
        drill._tell("before_forward")
        outputs = drill.model(part)
    finally:
        for handle in hooks:
            handle.remove()
    step = drill.model.step(part)
    return {
        "predicted": method.predictions(drill.model, part), "nll": outputs["nll"],
        "tapped": step.tapped.get(method.tap), "hidden": step.hidden,
    }  # fmt: skip


def of_view(part: dict[str, Any]) -> torch.Tensor:
    """View of each prediction."""
    return part["patch_view"][part["jarvis/targets"]]


# Closure -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text_loss", MODES)
@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_predictions_are_a_function_of_context_and_positions_alone(family: str, text_loss: str) -> None:
    drill = bench(family, text_loss=text_loss)
    part = one_part(drill)
    kind = kinds(part)
    with torch.no_grad():
        plain = run(drill, part)["predicted"]
        assert plain.shape == (len(part["jarvis/targets"]), 64) and float(plain.std(0).mean()) > 1e-4
        groups = ["unused", "pre", "post", "amid", "padding", "target"]
        for name in [*groups, *(["between"] if family == "llava_next" else [])]:
            assert bool(kind[name].any()), name
            assert torch.equal(run(drill, part, noise(kind[name]))["predicted"], plain), name
        everything = ~kind["context"]
        assert torch.equal(run(drill, part, noise(everything))["predicted"], plain)
        # One context token moves all predictions of its view, and those of no other.
        for v in part["jarvis/views"][1:4]:
            own = kind["context"] & (kind["view"] == v)
            at = own.flatten().nonzero()[0]
            moved = run(drill, part, noise(torch.zeros_like(own).flatten().index_fill(0, at, True).view_as(own)))["predicted"]  # fmt: skip
            changed = (moved != plain).any(1)
            assert torch.equal(changed, of_view(part) == v)


@pytest.mark.parametrize("text_loss", MODES)
@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_with_see_pretext_only_what_precedes_in_the_document_matters_too(family: str, text_loss: str) -> None:
    drill = bench(family, text_loss=text_loss, see_pretext=True)
    part = one_part(drill, [zoo.sample(3, turns=2, size=(64, 30)), zoo.sample(4)], packing=True)
    kind, document = kinds(part), part["document_ids"].clone()
    text = part["attention_mask"].bool() & (part["image_ids"] < 0)
    place = torch.arange(text.shape[1])
    with torch.no_grad():
        plain = run(drill, part)["predicted"]
        for name in ("unused", "target", "padding", "post"):
            assert torch.equal(run(drill, part, noise(kind[name]))["predicted"], plain), name
        for v in (part["jarvis/views"][0], part["jarvis/views"][-1]):
            row, start = int(part["view_row"][v]), int(part["view_start"][v])
            own = torch.zeros_like(text)
            own[row] = (document[row] == part["view_document"][v]) & (place < start) & text[row]
            assert bool(own.any())
            moved = run(drill, part, noise(own))["predicted"]
            assert bool((moved != plain).any(1)[of_view(part) == v].all())
            moved = run(drill, part, noise(text & ~own))["predicted"]
            assert not bool((moved != plain).any(1)[of_view(part) == v].any())


@pytest.mark.parametrize("text_loss", MODES)
def test_with_see_pretext_a_later_picture_hears_of_an_earlier_one_through_words(text_loss: str) -> None:
    drill = bench("llava", text_loss=text_loss, see_pretext=True)
    part = one_part(drill, [zoo.sample(1, images=2)])
    first, second = kinds(part)["view"] == 0, of_view(part) == 1
    hidden = kinds(part)["target"] & first
    with torch.no_grad():
        plain = run(drill, part)["predicted"]
        assert torch.equal(run(drill, part, noise(hidden))["predicted"], plain)
        assert bool((run(drill, part, noise(first))["predicted"] != plain).any(1)[second].all())


@pytest.mark.parametrize("layer", [1, 2, 3])
def test_blocks_speak_through_chains_of_overlaps_alone_and_the_context_hears_none(layer: int) -> None:
    drill = bench(
        "qwen2_5_vl", text_loss="masked", layer=layer, masks={"blocks": 7, "scale": [0.06, 0.09]}, head="linear"
    )  # fmt: skip
    part = one_part(drill, [zoo.sample(i, size=(76, 76)) for i in range(2)])
    kind = kinds(part)
    code, view = kind["code"], kind["view"]
    reached_far = 0
    with torch.no_grad():
        plain = run(drill, part)
        for v in part["jarvis/views"]:
            own = view == v
            for j in range(7):
                affected = own & ((code >> j) & 1 == 1)
                changed = run(drill, part, after=noise(affected, seed=j))
                assert torch.equal(changed["tapped"][kind["context"]], plain["tapped"][kind["context"]])
                for _ in range(layer):  # a token hears those it shares a block with
                    affected = own & ((code & _union(code[affected])) != 0)
                differs = (changed["predicted"] != plain["predicted"]).any(1)
                expected = affected.flatten()[part["patch_position"][part["jarvis/targets"]]]
                assert torch.equal(differs, expected), (v, j)
                reached_far += int(expected.sum() > ((code >> j) & 1 == 1)[own].sum())
    assert reached_far > 1


def _union(code: torch.Tensor) -> int:
    bits = 0
    for value in code.tolist():
        bits |= value & BLOCKS
    return bits


def test_pictures_of_nan_stay_in_their_own_row() -> None:
    """Row 0 is a refused document whose picture is NaN from its first token on."""
    for text_loss in MODES:
        for family in zoo.FAMILIES:
            drill = bench(family, template="plain", text_loss=text_loss)
            batch = drill.batch([zoo.sample(i, images=1 + i % 2, size=(40 + 12 * i, 34)) for i in range(3)])
            batch["refused"][0] = True
            (part,) = drill.parts(batch)
            with torch.no_grad():
                plain = run(drill, part)["predicted"]
                image = part["image_ids"] >= 0
                image[1:] = False
                broken = run(drill, part, lambda x, m=image: torch.where(m[..., None], torch.nan, x))
            assert len(plain) and torch.equal(broken["predicted"], plain), (family, text_loss)


# The mask ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("hide_unused", [False, True])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_the_mask_is_that_of_the_sheets_procedure(hide_unused: bool, bidirectional: bool) -> None:
    drill = bench("llava", bidirectional, text_loss="masked", hide_unused=hide_unused)
    part = one_part(drill, [zoo.sample(1), zoo.sample(2, turns=3), zoo.sample(3, images=0)])
    run(drill, part)
    see: Any = drill.model.step(part).sees(bidirectional)
    mask, kind = dense(see)[:, 0], kinds(part)
    for b in range(len(mask)):
        valid, code = part["attention_mask"][b].bool(), kind["code"][b]
        wanted = torch.ones_like(mask[b]).tril() & valid
        visual = (kind["view"][b] >= 0).nonzero().flatten()
        if len(visual):
            start, end = int(visual[0]), int(visual[-1]) + 1
            wanted[start:end, :] = False
            wanted[start:, kind["context"][b]] = True
            for j in range(4):
                block = (code >> j) & 1 == 1
                wanted |= block[:, None] & block
                wanted[end:, block] |= wanted[end:, block]
            if hide_unused:
                wanted[:, kind["unused"][b]] = False
        assert torch.equal(mask[b][valid], wanted[valid])
        assert bool(mask[b].any(1).all())  # no softmax over nothing


# The branch ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("see_pretext", [False, True])
@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_the_branch_predicts_what_the_masked_pass_predicts(family: str, see_pretext: bool) -> None:
    arguments = {"layer": 3, "see_pretext": see_pretext, "hide_unused": see_pretext}
    drills = [bench(family, text_loss=mode, **arguments) for mode in MODES]
    for options in ({}, {"packing": True}, {"padding_side": "left"}):
        parts = [one_part(d, **options) for d in drills]
        with torch.no_grad():
            masked, alone = (run(d, p)["predicted"] for d, p in zip(drills, parts, strict=True))
        assert torch.equal(parts[0]["jarvis/targets"], parts[1]["jarvis/targets"])
        assert masked.dtype == alone.dtype == torch.float32
        assert torch.allclose(masked, alone, atol=2e-6, rtol=1e-4), float((masked - alone).abs().max())
    for d in drills:
        d.model.net.autocast_dtype = torch.bfloat16
    with torch.no_grad():
        low = [run(d, p)["predicted"] for d, p in zip(drills, parts, strict=True)]
    assert low[0].dtype == low[1].dtype
    assert float(torch.cosine_similarity(low[0].float(), low[1].float()).min()) > 0.99


@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_unmasked_words_and_their_gradients_are_those_of_the_run_without_jarvis(family: str) -> None:
    drill = bench(family, text_loss="unmasked")
    part = one_part(drill)
    found = []
    for method in (True, False):
        drill.model.zero_grad()
        drill.model.end_step()
        drill.state.batch = part
        if method:
            drill._tell("before_forward")
        outputs = drill.model(part)
        drill.model.loss(outputs, part)["lm"].backward()
        found.append((outputs["nll"], {n: p.grad for n, p in drill.model.net.hf.named_parameters()}))
    assert torch.equal(found[0][0], found[1][0])
    assert found[0][1].keys() == found[1][1].keys()
    for name, gradient in found[0][1].items():
        other = found[1][1][name]
        assert (gradient is None and other is None) or torch.equal(gradient, other), name


@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_documents_without_masks_are_learnt_as_without_jarvis(family: str) -> None:
    drill = bench(family, ntp_probability=0.5, text_loss="masked")
    part = one_part(drill, [zoo.sample(i, images=i % 3, size=(40, 34)) for i in range(8)])
    rows = part["label_rows"] // part["input_ids"].shape[1]
    masked = torch.zeros(8, dtype=torch.bool)
    masked[part["view_row"][part["patch_view"][part[WEIGHT] > 0]]] = True
    assert 0 < int(masked.sum()) < 6
    with torch.no_grad():
        ours = run(drill, part)["nll"]
        drill.model.end_step()
        plain = drill.model(part)["nll"]
    assert torch.equal(ours[~masked[rows]], plain[~masked[rows]])
    for row in masked.nonzero().flatten().tolist():
        assert not torch.equal(ours[rows == row], plain[rows == row])


@pytest.mark.parametrize("text_loss", MODES)
@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_activation_checkpointing_changes_no_number(family: str, text_loss: str) -> None:
    drill = bench(family, text_loss=text_loss)
    drill.model.train()
    batch = drill.batch(samples())
    loss, gradients = drill.step(batch)
    decoder: Any = drill.model.anatomy.decoder(drill.model.hf)
    decoder.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    again, others = drill.step(batch)
    assert again == loss and gradients.keys() == others.keys()
    assert all(torch.allclose(g, others[n], atol=1e-7) for n, g in gradients.items())
