"""One predicate: against a naive loop, in all its forms, and in real attention."""

from __future__ import annotations

from functools import lru_cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from torch.nn.attention.flex_attention import create_mask, flex_attention

from opsin.data.batch import split_batch
from opsin.models import attention
from opsin.models.attention import Visibility, additive, allow, dense, is_plain, mask_for, mask_mod
from opsin.models.errors import UserError
from opsin.models.step import Step
from opsin.models.vlm import VisionLanguageModel

import jobs
import zoo
from masks import layouts, materialised, naive, without_empty_rows


@settings(max_examples=40, deadline=None)
@given(layouts())
def test_every_form_is_the_naive_loop(see: Visibility) -> None:
    batch, length = see.valid.shape
    expected = torch.tensor(
        [[[naive(see, b, q, k) for k in range(length)] for q in range(length)] for b in range(batch)]
    )
    assert torch.equal(dense(see), expected.unsqueeze(1))
    for dtype in (torch.float32, torch.bfloat16):
        added = additive(see, dtype)
        assert added.dtype == dtype
        assert torch.equal(added == 0, expected.unsqueeze(1))
        assert bool((added[~expected.unsqueeze(1)] == torch.finfo(dtype).min).all())
    mod = mask_mod(see)
    assert torch.equal(create_mask(mod, batch, None, length, length, device="cpu"), expected.unsqueeze(1))
    one = allow(see, torch.tensor(0), torch.tensor(length - 1), torch.tensor(0))
    assert bool(one) == bool(expected[0, length - 1, 0])


@settings(max_examples=30, deadline=None)
@given(layouts(), st.sampled_from([1, 2, 4]))
def test_the_block_mask_leaves_out_no_block(see: Visibility, size: int) -> None:
    length = see.valid.shape[1]
    assert torch.equal(materialised(attention.block_mask(see, size), length), dense(see))


@settings(max_examples=10, deadline=None)
@given(layouts(), st.integers(0, 100))
def test_sdpa_eager_and_flex_compute_the_same(see: Visibility, seed: int) -> None:
    see = without_empty_rows(see)
    batch, length = see.valid.shape
    torch.manual_seed(seed)
    q, k, v = torch.randn(3, batch, 2, length, 8).unbind(0)
    flexible = flex_attention(q, k, v, block_mask=attention.block_mask(see))
    direct = F.scaled_dot_product_attention(q, k, v, attn_mask=dense(see))
    scores = q @ k.transpose(-1, -2) / 8**0.5 + additive(see, torch.float32)
    eager = scores.softmax(-1) @ v
    torch.testing.assert_close(direct, eager, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(flexible, direct, atol=1e-5, rtol=1e-4)


# In a model ------------------------------------------------------------------------------------------------

SAMPLES = [
    zoo.sample(0, turns=2),
    zoo.sample(1, images=2),
    zoo.sample(2, images=0),
    zoo.sample(3, turns=3, independent=True),
]


@lru_cache
def micro(family: str, packing: bool) -> dict:
    collate = jobs.collator(zoo.build(family), packing=packing)
    return split_batch(collate(SAMPLES), None, training=False)[0]


def nll(family: str, implementation: str, packing: bool, bidirectional: bool, device="cpu") -> torch.Tensor:
    built = zoo.build(family)
    built.hf.model.language_model.set_attn_implementation(implementation)
    for layer in built.hf.model.language_model.layers:  # random weights attend to all alike; these do not
        for name in "qkvo":
            getattr(layer.self_attn, f"{name}_proj").weight.data.mul_(8)
    model = (
        VisionLanguageModel(built.hf, built.processor, bidirectional_images=bidirectional).eval().to(device)
    )
    batch = {k: v.to(device) if torch.is_tensor(v) else v for k, v in micro(family, packing).items()}
    with torch.no_grad():
        return model.net(batch, Step(batch))["nll"]


@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_implementations_give_a_model_the_same_loss(family: str) -> None:
    for packing, bidirectional in ((True, False), (True, True), (False, True)):
        reference = nll(family, "sdpa", packing, bidirectional)
        other = nll(family, "eager", packing, bidirectional)
        torch.testing.assert_close(other, reference, atol=2e-5, rtol=1e-4)
    assert not torch.allclose(nll(family, "sdpa", True, True), nll(family, "sdpa", True, False), atol=1e-4)


@pytest.mark.gpu  # transformers compiles FlexAttention, which inductor does for GPUs only
@pytest.mark.parametrize("family", ["llava", "llava_next"])
def test_flex_attention_gives_a_model_the_same_loss(family: str) -> None:
    for packing, bidirectional in ((True, False), (True, True), (False, True)):
        reference = nll(family, "sdpa", packing, bidirectional, "cuda")
        other = nll(family, "flex_attention", packing, bidirectional, "cuda")
        torch.testing.assert_close(other, reference, atol=1e-3, rtol=1e-3)


def test_an_implementation_without_masks_is_refused() -> None:
    see = Visibility(*(torch.zeros(1, 2, dtype=torch.int64) for _ in range(4)))
    with pytest.raises(UserError, match=r"'flash_attention_2' takes no mask.*set model\.attn_implementation"):
        mask_for(see, "flash_attention_2", torch.float32)


def test_plain_batches_need_no_mask() -> None:
    made = jobs.collator(zoo.build("llava"))
    for samples, plain in (
        ([zoo.sample(1), zoo.sample(2, images=0)], True),
        ([zoo.sample(3, turns=2, independent=True)], False),
    ):
        batch = made(samples)
        assert is_plain(batch) == plain
        micro = split_batch(batch, None, training=False)[0]
        step = Step(micro)
        assert (step.sees(False) is None) == plain
        assert step.sees(True) is not None
        step.visibility["hidden"] = micro["image_ids"] >= 0
        assert step.sees(False) is not None
    packed = jobs.collator(zoo.build("llava"), packing=True)([zoo.sample(1), zoo.sample(2)])
    assert not is_plain(packed)


def test_visibility_moves_and_takes_terms() -> None:
    see = Visibility(*(torch.zeros(1, 2, dtype=torch.int64) for _ in range(4)))
    more = see.with_terms(hidden=torch.ones(1, 2, dtype=torch.bool))
    assert see.hidden is None
    moved = more.to(torch.device("meta"))
    assert moved.hidden is not None and moved.hidden.is_meta and moved.valid.is_meta and moved.closed is None
