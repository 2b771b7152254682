"""JARVIS: its loss by hand, where gradients go, what is trained, the coin, off, and the control without masks."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from opsin.algorithms.jarvis import JARVIS
from opsin.algorithms.jarvis.cut import CODE, WEIGHT
from opsin.algorithms.jarvis.functional import on_tokens, prediction_losses, target_weights, weighted_sum
from opsin.algorithms.jarvis.sampler import BLOCKS, CONTEXT
from opsin.models.errors import UserError
from opsin.models.geometry import PER_IMAGE_KEYS, PIXEL_KEY
from opsin.models.parts import parameter_groups

import jobs
import zoo
from methods import Bench, teacher

HERE = "opsin.algorithms.jarvis:JARVIS"
SMALL: dict[str, Any] = {"target": teacher(), "ntp_probability": 0.0}
MODES = ("masked", "unmasked")
TRAINS = {"vision_tower": True, "mm_projector": True, "language_model": True}


def bench(family: str = "llava", **arguments: Any) -> Bench:
    return Bench(JARVIS(**{**SMALL, **arguments}), family, size=32, bidirectional=True, max_seq_len=3000)


def samples(count: int = 4) -> list[dict]:
    return [zoo.sample(i, images=(1, 0, 2)[i % 3], size=[(40, 34), (64, 30)][i % 2]) for i in range(count)]


def small_run(spec: dict[str, Any] | None = None, **options: Any) -> dict[str, Any]:
    algorithms = [] if spec is None else [(HERE, {**SMALL, **spec})]
    return jobs.train(algorithms=algorithms, size=32, bidirectional=True, **{"global_batch": 4, **options})


# Loss ----------------------------------------------------------------------------------------------------------


def test_losses_by_hand() -> None:
    predicted = torch.tensor([[3.0, 4.0], [1.0, 0.0], [0.5, -2.0]])
    target = torch.tensor([[4.0, 3.0], [-7.0, 0.0], [3.0, 1.0]])
    cosine = prediction_losses(predicted, target, "cosine")
    assert cosine.tolist() == pytest.approx(
        [-24 / 25, 1.0, 0.5 / (math.sqrt(4.25) * math.sqrt(10))], abs=1e-6
    )
    # Layer-normalised, two unequal channels are 1 and -1; beta 1: squares / 2 below 1, less a half above.
    smooth = prediction_losses(predicted, target, "smooth_l1")
    assert smooth.tolist() == pytest.approx([(1.5 + 4.5) / 2, (1.5 + 0.5) / 2, (0.125 + 0.5) / 2], abs=1e-4)
    assert prediction_losses(predicted.bfloat16(), target.bfloat16(), "cosine").dtype == torch.float32
    nan = torch.tensor([torch.nan, 2.0, 3.0], requires_grad=True)
    total = weighted_sum(nan, torch.tensor([0.0, 2.0, 1.0]))
    total.backward()
    assert float(total.detach()) == 7 and nan.grad is not None and nan.grad.tolist() == [0, 2, 1]


def test_weights_count_blocks_or_make_blocks_equal() -> None:
    code = torch.tensor([0b01, 0b11, 0b01, CONTEXT, 0b10, 0, 0b01, 0b01], dtype=torch.int16)
    view = torch.tensor([0, 0, 0, 0, 0, 0, 1, 1])
    assert target_weights(code, view, 2).tolist() == [1, 2, 1, 0, 1, 0, 1, 1]
    by_block = target_weights(code, view, 2, "block").tolist()
    third = 1 / 3
    assert by_block == pytest.approx([third, third + 0.5, third, 0, 0.5, 0, 0.5, 0.5])


@pytest.mark.parametrize("loss", ["cosine", "smooth_l1"])
@pytest.mark.parametrize("weighting", ["position", "block"])
@pytest.mark.parametrize("text_loss", MODES)
def test_the_loss_is_the_references_mean_by_a_loop_over_blocks(
    loss: str, weighting: str, text_loss: str
) -> None:
    masks = "parity" if weighting == "position" else "default"
    drill = bench(loss=loss, weighting=weighting, text_loss=text_loss, masks=masks, weight=0.5)
    method: Any = drill.method
    batch = drill.batch([zoo.sample(i, images=1 + i % 2) for i in range(4)])
    (part,) = drill.parts(batch)
    drill.state.batch = part
    drill._tell("before_forward")
    drill.model(part)
    predicted, target = method.predictions(drill.model, part), method.targets(drill.model, part)
    each = prediction_losses(predicted, target, loss)
    code = part[CODE][part["jarvis/targets"]]
    view = part["patch_view"][part["jarvis/targets"]]
    blocks = []
    for v in view.unique():
        for j in range(4):
            blocks.append(each[(view == v) & ((code >> j) & 1 == 1)])
    if masks == "parity":
        assert len({len(b) for b in blocks}) == 1  # one size a batch
    by_hand = float(torch.stack([b.mean() for b in blocks]).mean())
    assert drill.step(batch)[0] == pytest.approx(0.5 * by_hand, abs=1e-6)
    assert len(blocks) == 24 and abs(by_hand) > 1e-3
    # Targets are those of the teacher at these very patches, moved to the model's grid.
    whole = method.target.moments(drill.model.pictures(part), part["grids"])
    assert torch.allclose(whole[part["jarvis/targets"]], target, atol=1e-5)


# Gradients -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text_loss", MODES)
@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_gradients_reach_z_once_a_hidden_position_and_embeddings_at_the_context_alone(
    family: str, text_loss: str
) -> None:
    drill = bench(family, layer=2, text_loss=text_loss)
    (part,) = drill.parts(drill.batch(samples()))
    decoder = drill.model.anatomy.decoder(drill.model.hf)
    seen: list[torch.Tensor] = []

    def keep(module: Any, args: tuple, kwargs: dict) -> None:
        kwargs["inputs_embeds"].retain_grad()
        seen.append(kwargs["inputs_embeds"])

    hooks = [decoder.register_forward_pre_hook(keep, with_kwargs=True, prepend=p) for p in (True, False)]
    drill.state.batch, drill.state.loss = part, {}
    drill._tell("before_forward")
    drill.model(part)
    drill._tell("after_loss")
    drill.state.loss["jarvis"].backward()
    for hook in hooks:
        hook.remove()
    before, after = seen[0], seen[-1]  # of the sequence before JARVIS; what the pass with z took
    code = on_tokens(part[CODE], part["patch_position"], part["input_ids"].shape, 0)
    hidden = (part["jarvis/branch_code"] if text_loss == "unmasked" else code) & BLOCKS != 0
    latent: Any = drill.model.net.auxiliary["jarvis"].latent
    assert int(hidden.sum()) == len(part["jarvis/targets"])
    assert torch.allclose(latent.z.grad, after.grad[hidden].sum(0), atol=1e-6)
    assert bool(latent.z.grad.any())
    moved = before.grad.abs().amax(-1) > 0
    assert torch.equal(moved, (code & CONTEXT) != 0)


@pytest.mark.parametrize("text_loss", MODES)
@pytest.mark.parametrize("family", zoo.FAMILIES)
@pytest.mark.parametrize("train", ["proj", "proj+early", "all"])
def test_what_is_trained(family: str, train: str, text_loss: str) -> None:
    drill = bench(family, train=train, layer=2, text_loss=text_loss)
    model = drill.model
    frozen = ("vision_tower", "visual.blocks", "visual.patch_embed")
    del model.net.auxiliary["jarvis"]
    for name, p in model.named_parameters():
        p.requires_grad_(not any(part in name for part in frozen))
    drill.state.optimizers = [torch.optim.AdamW(parameter_groups(model, 1e-3, {}, 0.0))]
    drill._tell("init")
    groups = drill.state.optimizers[0].param_groups
    chosen = {id(p) for g in groups for p in g["params"]}
    assert len(chosen) == sum(len(g["params"]) for g in groups)
    words = {id(p) for p in model.parameters_of(["language_model"])}
    early = {id(p) for layer in model.anatomy.decoder_layers(model.hf)[:2] for p in layer.parameters()}  # type: ignore[union-attr]
    expected = {id(p) for p in model.parameters_of(["mm_projector"])}
    expected |= {id(p) for p in model.net.auxiliary["jarvis"].parameters()}
    expected |= {"proj": set(), "proj+early": early, "all": words}[train]
    assert chosen == expected == {id(p) for p in model.parameters() if p.requires_grad}
    (part,) = drill.parts(drill.batch(samples()))
    drill.state.batch, drill.state.loss = part, {}
    drill._tell("before_forward")
    outputs = model(part)
    drill.state.loss.update(model.loss(outputs, part))
    drill._tell("after_loss")
    sum(drill.state.loss.values()).backward()
    assert {id(p) for p in model.parameters() if p.grad is not None} == expected
    by_jarvis = drill.step(drill.batch(samples()))[1]
    allowed = expected & ({id(p) for p in model.parameters()} - words | early)
    assert {id(p) for n, p in model.named_parameters() if n in by_jarvis} <= allowed
    assert any("latent.z" in n for n in by_jarvis) and any("predict" in n for n in by_jarvis)


def test_early_layers_of_a_frozen_language_model_are_refused() -> None:
    with pytest.raises(UserError, match=r"algorithms.jarvis.train: proj\+early trains early layers"):
        small_run({"train": "proj+early"}, steps=1, trainable={**TRAINS, "language_model": False})


@pytest.mark.parametrize("train", ["proj", "proj+early", "all"])
def test_a_resumed_run_goes_on_exactly(train: str, tmp_path: Path) -> None:
    spec = {"train": train, "ntp_probability": 0.3, "text_loss": "unmasked" if train == "all" else "masked"}
    saving = {"save_folder": str(tmp_path), "save_filename": "ba{batch}.pt", "save_interval": "1ba"}
    whole = small_run(spec, steps=3, trainer=saving)
    found = jobs.mixed_samples(12)
    rest = small_run(spec, steps=3, samples=found, trainer={"load_path": str(tmp_path / "ba1.pt")})
    assert rest["losses"] == whole["losses"][1:]
    assert all(torch.equal(v, rest["weights"][k]) for k, v in whole["weights"].items())


# Tap -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_the_tap_is_hidden_states_counted_from_one(family: str) -> None:
    for layer in (None, 2, 3):
        drill = Bench(JARVIS(**SMALL, masks="none", layer=layer), family, size=32, max_seq_len=3000)
        (part,) = drill.parts(drill.batch([zoo.sample(1, size=(40, 34))]))
        drill.state.batch = part
        with torch.no_grad():
            drill._tell("before_forward")
            drill.model(part)
            pixels = {k: part[k] for k in (PIXEL_KEY, *PER_IMAGE_KEYS) if k in part}
            states = drill.model.hf.model(
                input_ids=part["input_ids"], attention_mask=part["attention_mask"], position_ids=part["position_ids"],
                output_hidden_states=True, **pixels,
            ).hidden_states  # fmt: skip
        (tap,) = drill.model.step(part).tapped.items()
        assert tap[0] == (layer or 4 // 4) and torch.equal(tap[1], states[tap[0]])


# The coin ------------------------------------------------------------------------------------------------------


def many(count: int, seed: int = 0) -> dict[str, Any]:
    """Views of as many documents, without pictures."""
    uid = torch.randint(0, 2**62, (count, 1), generator=torch.Generator().manual_seed(seed))
    zero = torch.zeros(count, dtype=torch.int64)
    return {
        "view_grid": torch.full((count, 2), 8), "view_row": torch.arange(count), "view_document": zero, "view_image": zero,
        "refused": torch.zeros(count, 1, dtype=torch.bool), "document_uid": uid, "document_visit": zero[:, None],
    }  # fmt: skip


@pytest.mark.parametrize("masks", ["default", "none"])
def test_the_share_of_documents_without_masks(masks: str) -> None:
    for p in (0.0, 0.2, 0.7):
        method, batch = JARVIS(target=teacher(), ntp_probability=p, masks=masks), many(2000)
        method.enter(batch)
        without = 1 - float((batch[CODE].view(2000, 64)[:, 0] != 0).float().mean())
        assert abs(without - p) <= 4 * math.sqrt(p * (1 - p) / 2000)
        again = many(2000)
        again["document_visit"] = again["document_visit"] + 1
        method.enter(again)
        assert (batch[WEIGHT].view(2000, 64).sum(1) > 0).equal(again[WEIGHT].view(2000, 64).sum(1) > 0) == (p == 0)  # fmt: skip


def test_a_step_is_masked_or_not_on_all_ranks_alike() -> None:
    method = JARVIS(target=teacher(), ntp_probability=0.4, ntp_scope="step", masks="none")
    told = []
    for step in range(400):
        masked = []
        for rank in (0, 1):
            batch = many(3 + rank, seed=2 * step + rank)
            method.enter(batch, step)
            masked.append((batch[CODE] != 0).unique().tolist())
        assert masked[0] == masked[1] and len(masked[0]) == 1
        told += masked[0]
    assert abs(sum(told) / 400 - 0.6) < 4 * math.sqrt(0.24 / 400)
    empty = many(0)
    method.enter(empty, 1)
    assert len(empty[CODE]) == 0


def test_pictures_of_a_document_share_its_coin_whatever_the_batch_is() -> None:
    drill = bench("llava_next", ntp_probability=0.5)
    found = [zoo.sample(i, images=2) for i in range(8)]

    def masked(size: int | None = None, **options: Any) -> dict[int, set[bool]]:
        told: dict[int, set[bool]] = {}
        for part in drill.parts(drill.batch(found, **options), size):
            uid = part["document_uid"][part["view_row"], part["view_document"]][part["patch_view"]]
            for one in uid.unique().tolist():
                told.setdefault(one, set()).update((part[CODE][uid == one] != 0).tolist())
        return told

    whole = masked()
    assert all(len(one) == 1 for one in whole.values()) and len({min(one) for one in whole.values()}) == 2
    assert whole == masked(1) == masked(3, packing=True) == masked(2, padding_side="left")


# Off and the control -------------------------------------------------------------------------------------------


def test_off_is_the_run_without_jarvis_bit_for_bit() -> None:
    plain = small_run(steps=2)
    for spec in ({"weight": 0.0, "train": "proj"}, {"ntp_probability": 1.0}):
        off = small_run(spec, steps=2)
        assert off["losses"] == plain["losses"] and off["weights"].keys() == plain["weights"].keys()
        assert all(torch.equal(v, off["weights"][k]) for k, v in plain["weights"].items())
    assert small_run({}, steps=1)["losses"][0] != plain["losses"][0]


@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_without_masks_all_patches_are_predicted_and_nothing_is_replaced(family: str) -> None:
    drill = bench(family, masks="none", layer=2)
    method: Any = drill.method
    batch = drill.batch(samples())
    (part,) = drill.parts(batch)
    drill.state.batch = part
    drill._tell("before_forward")
    step = drill.model.step(part)
    assert not step.edits and not step.visibility and not step.branches and step.hidden is None
    outputs = drill.model(part)
    drill.model.end_step()
    assert torch.equal(outputs["nll"], drill.model(part)["nll"])
    head: Any = drill.model.net.auxiliary["jarvis"]
    assert head.latent is None and all(n.startswith("predict.") for n, _ in head.named_parameters())
    states = outputs["tap2"].flatten(0, 1)[part["patch_position"]]
    target = method.target.moments(drill.model.pictures(part), part["grids"])
    by_hand = -F.cosine_similarity(head.predict(states), target, dim=-1).mean()
    loss, gradients = drill.step(batch)
    assert loss == pytest.approx(float(by_hand), abs=1e-6)
    assert {n for n in gradients if "language_model.layers.1." in n}
    assert not {n for n in gradients if "language_model.layers.2." in n}


# Arguments -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"weight": -1}, "weight: -1: use 0"), ({"weight": float("nan")}, "weight: nan"), ({"ntp_probability": 1.2}, "ntp_probability: 1.2: use 0 to 1"),
     ({"ntp_probability": float("nan")}, "ntp_probability: nan"), ({"lr": 0.0}, "lr: 0.0: use a rate above 0"), ({"layer": 0}, "layer: 0: use 1 .. N"),
     ({"layer": 5}, "layer: 5: the language model has layers 1 to 4"), ({"log_interval": 0}, "log_interval: 0"), ({"head": "mpl"}, "head 'mpl': unknown; did you mean 'mlp'"),
     ({"loss": "cosin"}, "loss 'cosin': unknown; did you mean 'cosine'"), ({"weighting": "blok"}, "weighting 'blok'"), ({"text_loss": "mask"}, "text_loss 'mask'"),
     ({"train": "project"}, "train 'project': unknown"), ({"ntp_scope": "batch"}, "ntp_scope 'batch'"), ({"stored": "requird"}, "stored 'requird'"),
     ({"masks": "none", "see_pretext": True}, "see_pretext: there is nothing to hide"), ({"masks": "none", "hide_unused": True}, "hide_unused: there is nothing"),
     ({"target": "feature"}, "target: unknown target 'feature'; did you mean 'features'"), ({"target": {"name": "towr"}}, "target.name: unknown target 'towr'"),
     ({"target": {"name": "tower", "path": "scenes", "lyer": 2}}, "target.lyer: unknown key; did you mean 'layer'"), ({"stored": "required"}, "stored: the dataset brings no targets"),
     ({"masks": None}, "masks: None")],
)  # fmt: skip
def test_wrong_arguments_are_one_line(arguments: dict, message: str) -> None:
    with pytest.raises(UserError) as error:
        bench(**arguments)
    assert str(error.value).startswith(f"algorithms.jarvis.{message}") and "\n" not in str(error.value)
