"""The adapter: batches are one by one, fusion steers all it says, nothing is left changed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from opsin.algorithms.vift import Fusion
from opsin.data.collate import VLMCollator
from opsin.data.encode import Rejected
from opsin.data.loader import build_encoder
from opsin.data.prompts import prompts_of
from opsin.data.schema import Role
from opsin.evaluation.adapter import VLMAdapter
from opsin.evaluation.forward import look
from opsin.models.errors import UserError
from opsin.models.export import export_model, load_model
from opsin.models.geometry import PER_IMAGE_KEYS, PIXEL_KEY
from opsin.models.step import FINAL
from opsin.models.vlm import VisionLanguageModel

import zoo
from adapters import (
    CHOICES,
    FAMILIES,
    LONG,
    STRONG,
    adapter,
    broken_sample,
    close,
    collator,
    model,
    several,
)


@FAMILIES
def test_answers_of_a_left_padded_batch_are_those_of_one_by_one(family: str) -> None:
    together = adapter(family, max_new_tokens=8, batch_size=16).generate(several(), **LONG)
    alone = adapter(family, max_new_tokens=8, batch_size=1).generate(several(), **LONG)
    assert together == alone and [len(a) for a in together] == [3, 1, 1, 3, 1]
    assert len({text for answers in together for text in answers}) > 5


@FAMILIES
def test_fusion_steers_answers_and_their_log_likelihoods_alike(family: str) -> None:
    samples = [
        zoo.sample(1),
        zoo.sample(2, images=2, turns=2),
        zoo.sample(3, images=0),
        zoo.sample(4, turns=2, independent=True),
    ]
    plain, off = adapter(family), adapter(family, fusion=Fusion(strength=0.0))
    assert off.generate(samples, **LONG) == plain.generate(samples, **LONG)
    fused = adapter(family, fusion=STRONG, max_new_tokens=4)
    said = fused.generate(samples, **LONG)
    given = [[[text, "red", "no"] for text in answers] for answers in said]
    close(off.answer_logprobs(samples, given), plain.answer_logprobs(samples, given))
    found = fused.answer_logprobs(samples, given)
    close(
        found,
        adapter(family, fusion=STRONG, share="nothing", batch_size=1).answer_logprobs(samples, given),
        1e-4,
    )
    without = plain.answer_logprobs(samples, given)
    for number, (a, b) in enumerate(zip(found, without, strict=True)):
        changed = max(
            abs(x.sum - y.sum) for e, f in zip(a, b, strict=True) for x, y in zip(e, f, strict=True)
        )
        assert changed < 1e-4 if number == 2 else changed > 1e-2  # without a picture there is nothing to fuse


@FAMILIES
def test_hidden_states_know_which_of_them_are_patches(family: str) -> None:
    samples, net = several(), model(family).net
    probes = adapter(family, batch_size=4).forward_probe(samples, [0, 2, FINAL])
    assert [(p.sample, p.turn) for p in probes] == [
        (0, 0), (0, 1), (0, 2), (1, 0), (2, 0), (3, 0), (3, 1), (3, 2), (4, 0)
    ]  # fmt: skip
    prompts = [p for i, s in enumerate(samples) for p in prompts_of(collator(family).encoder, s, i)]
    for probe, prompt in zip(probes, prompts, strict=True):
        document = prompt.document
        assert all(h.shape == (len(document), 32) and h.dtype == torch.float32 for h in probe.hidden.values())
        assert probe.roles.tolist() == document.roles.tolist()
        images = len({v.image for v in probe.views})
        assert images == len(document.images) == int(probe.image_ids.max()) + 1
        for view in probe.views:
            assert len(view.positions) == view.grid[0] * view.grid[1]
            assert (probe.roles[view.positions] == Role.IMAGE).all()
            assert (probe.image_ids[view.positions] == view.image).all()
    # One picture, by hand: what the projector made of it enters the first layer at the patches' places.
    (part,) = adapter(family).prompt_batches([zoo.sample(3)])
    (probe,) = adapter(family).forward_probe([zoo.sample(3)], [0, 4, FINAL])
    pixels = {k: part.batch[k] for k in (PIXEL_KEY, *PER_IMAGE_KEYS) if k in part.batch}
    with torch.no_grad():
        features = net.anatomy.image_features(net.hf.eval(), pixels)
    seen = probe.hidden[0][probe.roles == Role.IMAGE]
    assert torch.allclose(seen, features, atol=1e-5)
    normed = net.anatomy.decoder(net.hf).norm(probe.hidden[4])
    assert torch.allclose(normed, probe.hidden[FINAL], atol=1e-4)
    stock = net.hf.model(
        input_ids=part.batch["input_ids"][:, : len(part.prompts[0].document)],
        attention_mask=part.batch["attention_mask"][:, : len(part.prompts[0].document)],
        **pixels,
    ).last_hidden_state[0]
    assert torch.allclose(stock, probe.hidden[FINAL], atol=1e-4)
    with pytest.raises(UserError, match="layer 5: the language model has layers 1 to 4"):
        look(model(family), part.batch, [5])


@FAMILIES
def test_mode_gradients_random_states_and_padding_side_are_as_before(family: str) -> None:
    asked, net, tokenizer = [zoo.sample(1), zoo.sample(2, images=0)], model(family), zoo.tokenizer()
    net.train()
    net.anatomy.decoder_layers(net.hf)[1].eval()  # somebody's own choice
    modes = [m.training for m in net.modules()]
    tokenizer.padding_side = "right"
    torch.manual_seed(7)
    np.random.seed(7)
    before, other = torch.get_rng_state(), np.random.get_state()[1].copy()  # type: ignore[index]
    for one in (adapter(family, max_new_tokens=3), adapter(family, max_new_tokens=3, fusion=STRONG)):
        one.generate(asked, **LONG)
        one.generate(asked, do_sample=True, **LONG)
        one.answer_logprobs(asked)
        one.rank(asked, [CHOICES] * 2)
        one.forward_probe(asked, [1])
        for call in (one.generate, one.answer_logprobs):
            with pytest.raises(Rejected):
                call([broken_sample()])
    assert torch.equal(torch.get_rng_state(), before)
    assert (np.random.get_state()[1] == other).all()  # type: ignore[index]
    assert [m.training for m in net.modules()] == modes and tokenizer.padding_side == "right"
    assert all(p.grad is None for p in net.parameters()) and torch.is_grad_enabled()
    net.eval()


def test_sampling_is_drawn_by_its_own_seed() -> None:
    one = adapter("llava", max_new_tokens=8)
    asked = [zoo.sample(i) for i in range(3)]
    drawn = [one.generate(asked, seed=s, do_sample=True, temperature=3.0, **LONG) for s in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert one.generate(asked, **LONG) == one.generate(asked, seed=5, **LONG)


def test_the_templates_end_stops_an_answer() -> None:
    """A base model's tokenizer may have another end of text than the chat template's turns."""
    one, end = (
        adapter("llava", "chatml", max_new_tokens=6),
        zoo.tokenizer().convert_tokens_to_ids("<|im_end|>"),
    )
    head = model("llava").hf.get_submodule(model("llava").anatomy.lm_head)
    said = iter([40, 41, end, 42, 43, 44])

    def write(module: Any, args: Any, logits: torch.Tensor) -> torch.Tensor:
        forced = torch.full_like(logits, -1e4)
        forced[..., next(said)] = 0.0
        return forced

    handle = head.register_forward_hook(write)
    try:
        assert one.generate([zoo.sample(1)]) == [[zoo.tokenizer().decode([40, 41]).strip()]]
    finally:
        handle.remove()
    assert next(said) == 42


def test_a_model_of_plain_transformers_is_asked_as_well(tmp_path: Path) -> None:
    """Loaded from a folder that has never heard of a training here."""
    built = zoo.build("llava")
    built.hf.save_pretrained(tmp_path)
    built.processor.save_pretrained(tmp_path)
    loaded = load_model(tmp_path)
    encoder = build_encoder(loaded.processor, loaded.hf.config, max_seq_len=400)
    stock, ours = (
        VLMAdapter(m, VLMCollator(encoder), max_new_tokens=4) for m in (loaded, VisionLanguageModel(built.hf))
    )
    assert stock.generate(several(), **LONG) == ours.generate(several(), **LONG)
    close(stock.answer_logprobs(several()), ours.answer_logprobs(several()))
    exported = export_model(loaded, tmp_path / "out")
    again = VLMAdapter(load_model(exported), VLMCollator(encoder), max_new_tokens=4)
    close(again.answer_logprobs(several()), ours.answer_logprobs(several()))
