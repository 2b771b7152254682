"""L2T's control: instructions from a pass in which no text sees a picture, responses from the ordinary one."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from opsin.algorithms.l2t import L2T
from opsin.data.batch import split_batch
from opsin.data.schema import Role
from opsin.models.step import Apart, Step
from opsin.models.vlm import VisionLanguageModel
from opsin.training.compatibility import REFUSED, of_method

import jobs
import zoo
from methods import Bench, teacher

HERE = "opsin.algorithms.l2t:L2T"
PLAIN: dict[str, Any] = {"template_source": "none", "lambda_instruction": 0.3}
FREE = {**PLAIN, "image_free": True}
SAMPLES = [
    zoo.sample(1),
    zoo.sample(2, images=0, turns=2),
    zoo.sample(3, images=2, turns=3, size=(40, 18)),
    zoo.sample(4, turns=3, independent=True),
]


class Read(Bench):
    """L2T event by event: its loss is the model's own."""

    def __init__(self, family: str = "llava", **arguments: Any):
        super().__init__(L2T(**{**PLAIN, **arguments}), family)

    def part(self, samples: list[dict], **options: Any) -> dict[str, Any]:
        self.state.batch = self.batch(samples, **options)
        self._tell("after_dataloader")
        (part,) = self.parts(self.state.batch)
        return part

    def run(self, part: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        """The loss, and nats of each label."""
        self.model.end_step()
        self.state.batch = part
        self._tell("before_forward")
        outputs = self.model(part)
        return self.model.loss(outputs, part)["lm"], outputs["nll"]

    def pulls(self, part: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        """Gradients at the pixels, and at the embeddings of text and pictures that the language model is given."""
        pixels = part["pixel_values"].clone().requires_grad_()
        seen: list[torch.Tensor] = []
        decoder = self.model.anatomy.decoder(self.model.hf)
        hook = decoder.register_forward_pre_hook(
            lambda module, args, kwargs: seen.append(kwargs["inputs_embeds"]), with_kwargs=True, prepend=True
        )
        loss, _ = self.run({**part, "pixel_values": pixels})
        hook.remove()
        for embeddings in seen[1:]:  # the pass apart takes those of the ordinary one
            assert embeddings is seen[0]
        a, b = torch.autograd.grad(loss, [pixels, seen[0]])
        return a, b


def instructions(part: dict[str, Any]) -> torch.Tensor:
    return part["label_roles"] == Role.INSTRUCTION


@pytest.mark.parametrize("family", zoo.EVERY_FAMILY)
def test_each_role_is_predicted_by_its_own_pass(family: str) -> None:
    free = Read(family, image_free=True)
    part = free.part(SAMPLES)
    net, asked = free.model.net, instructions(part)
    assert bool(asked.any()) and not bool(asked.all())
    _, nll = free.run(part)
    hidden = part["image_ids"] >= 0
    ordinary, blind = (
        net(part, Step(part, visibility=v))["nll"] for v in ({}, {"hidden": hidden})  # whole passes, tower and all
    )  # fmt: skip
    assert torch.allclose(nll, torch.where(asked, blind, ordinary), atol=2e-6)
    assert float((blind - ordinary).abs()[asked].max()) > 1e-4  # it does see the picture otherwise
    # With nothing hidden the pass apart is the ordinary one: same tokens, places and masks.
    step = Step(part, apart=Apart(torch.ones_like(asked), {}))
    assert torch.allclose(net(part, step)["nll"], ordinary, atol=2e-6)


@pytest.mark.parametrize("family", ["llava", "llava_next", "qwen2_5_vl"])
def test_the_picture_learns_from_responses_alone(family: str) -> None:
    def pulls(normalisation: str = "response", **arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
        drill = Read(family, normalisation=normalisation, **arguments)
        part = drill.part(SAMPLES)
        a, b = drill.pulls(part)
        return a, b[part["image_ids"] >= 0]

    plain = pulls(
        lambda_instruction=0.0, lambda_response=1.0, image_free=True
    )  # Z = n_A: of the response alone
    for weight in (0.3, 50.0):
        free, seeing = (pulls(lambda_instruction=weight, image_free=f) for f in (True, False))
        for only, a, b in zip(plain, free, seeing, strict=True):
            assert torch.allclose(a, only, atol=1e-7, rtol=1e-5) and bool(only.any())
            assert not torch.allclose(b, only, atol=1e-4 * float(only.abs().max()))


def test_instructions_teach_the_words_before_them_whatever_the_picture_is() -> None:
    drill = Read(image_free=True)
    part = drill.part(SAMPLES)
    other = {**part, "pixel_values": torch.randn_like(part["pixel_values"])}
    (_, nll), (_, changed), asked = drill.run(part), drill.run(other), instructions(part)
    assert torch.equal(nll[asked], changed[asked]) and not torch.equal(nll[~asked], changed[~asked])
    _, pull = drill.pulls(part)
    only = Read(image_free=True, lambda_instruction=0.0)
    _, response = only.pulls(only.part(SAMPLES))
    assert not torch.allclose(pull, response, atol=1e-5)  # at the words: instructions do teach


@pytest.mark.parametrize("normalisation", ["pooled", "weighted", "separate", "response"])
def test_the_loss_by_hand(normalisation: str) -> None:
    """Two passes of the language model itself, with masks written out pair by pair."""
    drill = Read(image_free=True, normalisation=normalisation, lambda_response=1.5)
    part = drill.part([zoo.sample(1, turns=2), zoo.sample(5)])
    loss, _ = drill.run(part)
    hf, ids = drill.model.hf, part["input_ids"]
    embeddings = hf.get_input_embeddings()(ids)
    shown = torch.cat(list(hf.get_image_features(pixel_values=part["pixel_values"])))
    embeddings = embeddings.masked_scatter((part["image_ids"] >= 0)[..., None], shown)
    rows, length = ids.shape
    sums = {}
    for role, sees in ((Role.INSTRUCTION, False), (Role.RESPONSE, True)):
        mask = torch.zeros(rows, 1, length, length, dtype=torch.bool)
        for b in range(rows):
            for q in range(length):
                for k in range(q + 1):
                    real = bool(part["attention_mask"][b, k]) and (sees or int(part["image_ids"][b, k]) < 0)
                    mask[b, 0, q, k] = real or q == k
        out = hf.model.language_model(
            inputs_embeds=embeddings, attention_mask=mask, position_ids=part["position_ids"]
        )
        logp = hf.lm_head(out.last_hidden_state).log_softmax(-1)
        learnt = (part["roles"] == role) & (part["attention_mask"] > 0)
        nats = -logp[:, :-1].gather(-1, ids[:, 1:, None]).squeeze(-1)
        sums[role] = float(nats[learnt[:, 1:]].sum()), int(learnt.sum())
    (total_i, n_i), (total_a, n_a) = sums[Role.INSTRUCTION], sums[Role.RESPONSE]
    expected = {
        "pooled": (0.3 * total_i + 1.5 * total_a) / (n_i + n_a),
        "weighted": (0.3 * total_i + 1.5 * total_a) / (0.3 * n_i + 1.5 * n_a),
        "separate": 0.3 * total_i / n_i + 1.5 * total_a / n_a,
        "response": (0.3 * total_i + 1.5 * total_a) / n_a,
    }[normalisation]
    assert float(loss) == pytest.approx(expected, abs=1e-5)


# Runs ----------------------------------------------------------------------------------------------------------


def alike(a: dict[str, Any], b: dict[str, Any], tolerance: float = 1e-5) -> None:
    for one, other in zip(a["losses"], b["losses"], strict=True):
        assert one["loss/train/lm"] == pytest.approx(other["loss/train/lm"], abs=tolerance)
    for name, gradient in a["gradients"][0].items():
        assert torch.allclose(gradient, b["gradients"][0][name], atol=tolerance), name


@pytest.fixture(scope="module")
def reference() -> dict[str, Any]:
    return jobs.train(algorithms=[(HERE, FREE)])


@pytest.mark.parametrize(
    "options",
    [{"microbatch": 2}, {"packing": True, "microbatch": 1}, {"prepared": {"checkpointing": True}},
     {"prepared": {"attention": "eager"}}],
    ids=["micro", "packed", "checkpointed", "eager"],
)  # fmt: skip
def test_micro_batches_packing_and_kernels_change_nothing(
    reference: dict[str, Any], options: dict[str, Any]
) -> None:
    alike(reference, jobs.train(algorithms=[(HERE, FREE)], **options))


@pytest.mark.slow
def test_compiled_layers_give_the_same(reference: dict[str, Any]) -> None:
    alike(reference, jobs.train(algorithms=[(HERE, FREE)], prepared={"compiled": True}), 1e-4)


def test_off_is_off_and_on_is_something_else(reference: dict[str, Any]) -> None:
    plain, off = (jobs.train(algorithms=[(HERE, a)]) for a in (PLAIN, {**PLAIN, "image_free": False}))
    assert plain["losses"] == off["losses"]
    assert all(torch.equal(v, off["weights"][k]) for k, v in plain["weights"].items())
    seeing, blind = plain["logged"][0], reference["logged"][0]
    assert (seeing["l2t/n_I"], seeing["l2t/n_A"]) == (blind["l2t/n_I"], blind["l2t/n_A"])
    assert blind["l2t/loss_A"] == pytest.approx(seeing["l2t/loss_A"], abs=1e-6)
    assert blind["l2t/loss_I"] != seeing["l2t/loss_I"]
    never, zero = jobs.train(), jobs.train(algorithms=[(HERE, {**FREE, "lambda_instruction": 0.0})])
    assert never["losses"] == zero["losses"]


def test_beside_jarvis_and_ross_in_any_order() -> None:
    others = [
        ("opsin.algorithms.jarvis:JARVIS", {"target": teacher(), "ntp_probability": 0.3, "layer": 2}),
        ("methods:LoudROSS", {"target": {"name": "pixels", "cell": 4}, "width": 64, "min_visible": 1}),
    ]
    shape: dict[str, Any] = {"size": 32, "bidirectional": True, "global_batch": 4, "max_seq_len": 800}
    one, two = (jobs.train(algorithms=order, **shape) for order in ([(HERE, FREE), *others], [*others, (HERE, FREE)]))  # fmt: skip
    alike(one, two, 1e-6)
    alone = jobs.train(algorithms=[(HERE, FREE)], **shape)
    assert one["logged"][0]["l2t/loss_I"] == pytest.approx(alone["logged"][0]["l2t/loss_I"], abs=1e-5)


@pytest.mark.world
@pytest.mark.parametrize("parallel", ["ddp", "fsdp2"])
def test_two_ranks_give_the_numbers_of_one(ranks: Any, parallel: str) -> None:
    options = {
        "samples": jobs.mixed_samples(16, "first_half"), "global_batch": 4, "steps": 2, "microbatch": 1,
        "algorithms": [(HERE, FREE)],
    }  # fmt: skip
    one, two = jobs.train(**options), ranks.run("jobs:train", parallel=parallel, **options)
    alike(one, two[0])
    assert two[0]["fsdp"] == (parallel == "fsdp2")


def test_attention_without_masks_is_refused_before_training() -> None:
    facts = {"attn_implementation": "flash_attention_2", "chat_template": "vicuna_v1"}
    hiding = (L2T(**FREE), L2T(**PLAIN, token_weights="visual_relevance"), L2T(**FREE, on_text_only=True))
    for method in hiding:
        assert [v.status for v in of_method(method, facts, {})] == [REFUSED]
    assert of_method(L2T(**PLAIN), facts, {}) == []
    assert "image_free=True" in repr(hiding[0])


def test_evaluation_sees_the_picture() -> None:
    drill = Read(image_free=True)
    drill.model.eval()
    micro = split_batch(drill.batch(SAMPLES), None, training=False)[0]
    built = zoo.build("llava", seed=1, size=16)
    other: Any = VisionLanguageModel(built.hf, built.processor).eval()
    assert torch.equal(drill.model.eval_forward(micro)["nll"], other.eval_forward(micro)["nll"])
