"""Ability-fused inference: acceptance tests V1 to V5 of the method, on three families, and that it leaves no trace."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
)

from opsin.algorithms.vift import AbilityFusion, Fusion
from opsin.algorithms.vift.functional import common_suffix, fused_states, last_tokens, prompt_ends
from opsin.data.collate import VLMCollator
from opsin.data.prompts import last_turn, prompt_batch, prompts_of, without_pictures
from opsin.evaluation.adapter import VLMAdapter
from opsin.models.errors import UserError
from opsin.models.geometry import PER_IMAGE_KEYS, PIXEL_KEY
from opsin.models.vlm import VisionLanguageModel

import jobs
import zoo

SPECIALS = [zoo.tokenizer().convert_tokens_to_ids(token) for token in zoo.SPECIALS]
LONG = {"suppress_tokens": SPECIALS, "max_new_tokens": 6}
STRONG = Fusion(strength=4.0, ratio=0.5)
FAMILIES = pytest.mark.parametrize("family", zoo.FAMILIES)


@lru_cache
def collator(family: str) -> VLMCollator:
    return jobs.collator(zoo.build(family))


def loud(family: str, **options: Any) -> VisionLanguageModel:
    """A model whose answers depend on what it reads: random weights of the usual size hardly do."""
    built = zoo.build(family)
    with torch.no_grad():
        for name, parameter in built.hf.named_parameters():
            if ("language_model.layers" in name or "merger" in name) and parameter.ndim > 1:
                parameter *= 10
    return VisionLanguageModel(built.hf, copy.deepcopy(built.processor), **options).eval()


def inputs_of(family: str, samples: Sequence[dict], pictures: bool = True) -> dict[str, Any]:
    """What ``generate`` gets for the first question of each sample."""
    kept = samples if pictures else [without_pictures(s) for s in samples]
    prompts = [prompts_of(collator(family).encoder, s)[0] for s in kept]
    batch = prompt_batch(collator(family), prompts)
    keys = (
        ("input_ids", "attention_mask", PIXEL_KEY, *PER_IMAGE_KEYS)
        if pictures
        else ("input_ids", "attention_mask")
    )
    inputs = {k: batch[k] for k in keys if k in batch}
    return inputs | (
        {"mm_token_type_ids": (batch["image_ids"] >= 0).int()} if _typed(family) and pictures else {}
    )


@lru_cache
def _typed(family: str) -> bool:
    return VisionLanguageModel(zoo.build(family).hf).anatomy.token_types


def generate(model: VisionLanguageModel, inputs: dict[str, Any], **options: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.hf.generate(**inputs, do_sample=False, pad_token_id=0, **{**LONG, **options})


def entering(model: VisionLanguageModel, layer: int) -> tuple[list[torch.Tensor], Any]:
    """States that enter a layer, call by call; and the handle of the hook."""
    seen: list[torch.Tensor] = []

    def keep(module: Any, args: tuple, kwargs: dict) -> None:
        seen.append((args[0] if args else kwargs["hidden_states"]).clone())

    layers = model.anatomy.decoder_layers(model.hf)
    return seen, layers[layer].register_forward_pre_hook(keep, with_kwargs=True)


def steered_states(
    family: str, coefficients: dict[int, tuple[float, float]], layer: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int]:
    """Plain (M), text-only (T) and steered states that enter a layer in the prompt; and the suffix's length."""
    model, sample = loud(family), [zoo.sample(3)]
    inputs, text = inputs_of(family, sample), inputs_of(family, sample, pictures=False)
    fusion = AbilityFusion(model.hf, coefficients)
    with fusion.on(inputs, text):
        seen, handle = entering(model, layer)  # after the steering hook: sees what it made
        generate(model, inputs, max_new_tokens=1)
        handle.remove()
    plain, handle = entering(model, layer)
    generate(model, inputs, max_new_tokens=1)
    generate(model, text, max_new_tokens=1)
    handle.remove()
    a, b = inputs, text
    count = common_suffix(
        a["input_ids"], a["attention_mask"], prompt_ends(a["attention_mask"]),
        b["input_ids"], b["attention_mask"], prompt_ends(b["attention_mask"]),
    )  # fmt: skip
    return plain[0], plain[1], seen[0], int(count[0])


@FAMILIES
def test_v1_no_strength_gives_the_plain_answers_to_the_token(family: str) -> None:
    model, samples = loud(family), [zoo.sample(s, turns=2) for s in (1, 2)]
    plain = VLMAdapter(model, collator(family), max_new_tokens=6).generate(samples, **LONG)
    for off in (Fusion(strength=0.0), Fusion(strength=0.0, ratio=3.0, mode="replace")):
        adapter = VLMAdapter(model, collator(family), max_new_tokens=6, fusion=off)
        assert adapter.generate(samples, **LONG) == plain
    fused = VLMAdapter(model, collator(family), max_new_tokens=6, fusion=STRONG)
    assert fused.generate(samples, **LONG) != plain, "the test would not notice fusion"


@FAMILIES
def test_v2_one_layer_takes_the_picture_away_or_puts_the_words_in(family: str) -> None:
    image, text, zeroed, k = steered_states(family, {2: (0.0, 1.0)}, 2)
    assert k > 3 and torch.equal(zeroed[:, -k:], torch.zeros_like(zeroed[:, -k:]))
    assert torch.equal(zeroed[:, :-k], image[:, :-k])
    _, _, replaced, k = steered_states(family, {2: (1.0, 1.0)}, 2)
    assert torch.allclose(replaced[:, -k:], text[:, -k:], atol=1e-5)
    assert not torch.allclose(image[:, -k:], text[:, -k:], atol=1e-2), (
        "T and M must differ for this to say anything"
    )
    _, _, later, _ = steered_states(family, {1: (0.0, 1.0)}, 3)
    assert not torch.allclose(later[:, -k:], image[:, -k:], atol=1e-3)


@FAMILIES
@pytest.mark.parametrize("pictures", [False, True])
def test_v3_without_a_picture_equal_weights_change_nothing(family: str, pictures: bool) -> None:
    """Also beside others that have one, though left padding gives their text-only pass another length."""
    model = loud(family)
    samples = [zoo.sample(1, images=0), zoo.sample(2, images=int(pictures)), zoo.sample(4, images=0)]
    inputs, text = inputs_of(family, samples), inputs_of(family, samples, pictures=False)
    plain_seen, handle = entering(model, 3)
    plain = generate(model, inputs)
    handle.remove()
    with AbilityFusion(model.hf, Fusion(strength=3.0)).on(inputs, text):
        seen, handle = entering(model, 3)
        fused = generate(model, inputs)
        handle.remove()
    for row in (0, 2):
        assert torch.equal(fused[row], plain[row])
        assert torch.equal(seen[0][row], plain_seen[0][row])
    assert torch.equal(seen[0][1], plain_seen[0][1]) is not pictures


@FAMILIES
def test_v4_decoding_from_the_cache_equals_computing_everything_anew(family: str) -> None:
    """The prompt's suffix alone is changed: fed again with the answer so far, it gives the same next tokens."""
    model, samples = loud(family), [zoo.sample(5), zoo.sample(6)]
    inputs, text = inputs_of(family, samples), inputs_of(family, samples, pictures=False)
    fusion = AbilityFusion(model.hf, STRONG)
    with fusion.on(inputs, text):
        cached = generate(model, inputs, return_dict_in_generate=True, output_logits=True)
    with fusion.on(inputs, text):
        anew = generate(model, inputs, return_dict_in_generate=True, output_logits=True, use_cache=False)
    plain = generate(model, inputs)
    assert torch.equal(cached.sequences, anew.sequences)
    assert not torch.equal(cached.sequences, plain)
    for one, other in zip(cached.logits, anew.logits, strict=True):
        assert torch.allclose(one, other, atol=2e-4)


@FAMILIES
@pytest.mark.parametrize(
    "fusion", [STRONG, Fusion(4.0, 0.0, align="paper_code"), Fusion(0.8, mode="replace")]
)
def test_v5_a_batch_of_unequal_lengths_equals_one_by_one(family: str, fusion: Fusion) -> None:
    model = loud(family)
    samples = [zoo.sample(s, images=i, turns=t) for s, i, t in ((1, 1, 1), (2, 1, 3), (3, 0, 1), (8, 1, 1))]
    together = VLMAdapter(model, collator(family), batch_size=6, fusion=fusion).generate(samples, **LONG)
    alone = VLMAdapter(model, collator(family), batch_size=1, fusion=fusion).generate(samples, **LONG)
    plain = VLMAdapter(model, collator(family), batch_size=6).generate(samples, **LONG)
    assert together == alone
    assert together != plain


@FAMILIES
def test_several_beams_and_a_prompt_in_chunks_are_fused_alike(family: str) -> None:
    model, samples = loud(family), [zoo.sample(5), zoo.sample(6)]
    inputs, text = inputs_of(family, samples), inputs_of(family, samples, pictures=False)
    fusion = AbilityFusion(model.hf, STRONG)
    beams = []
    for i in range(2):
        one = inputs_of(family, samples[i : i + 1])
        with fusion.on(one, inputs_of(family, samples[i : i + 1], pictures=False)):
            beams.append(generate(model, one, num_beams=3)[0, one["input_ids"].shape[1] :])
    with fusion.on(inputs, text):
        both = generate(model, inputs, num_beams=3)[:, inputs["input_ids"].shape[1] :]
    assert all(torch.equal(both[i], beams[i]) for i in range(2))


def test_a_prompt_in_chunks_is_fused_as_a_whole_one() -> None:
    """Fed to the decoder piece by piece, as servers do: what is changed goes by position, not by call."""
    model, samples = loud("llava"), [zoo.sample(5), zoo.sample(6)]
    inputs, text = inputs_of("llava", samples), inputs_of("llava", samples, pictures=False)
    decoder = model.anatomy.decoder(model.hf)
    embeddings = torch.randn(2, inputs["input_ids"].shape[1], 32)

    def last(sizes: Sequence[int]) -> torch.Tensor:
        from transformers import DynamicCache

        cache, at, out = DynamicCache(), 0, []
        for size in sizes:
            part = embeddings[:, at : at + size]
            out.append(decoder(inputs_embeds=part, past_key_values=cache, use_cache=True).last_hidden_state)
            at += size
        return torch.cat(out, 1)

    length = embeddings.shape[1]
    with torch.no_grad():
        plain = last([length])
        with AbilityFusion(model.hf, STRONG).on(inputs, text):
            whole = last([length])
            assert not torch.allclose(plain, whole, atol=1e-3)
            for sizes in ([length - 3, 3], [5] * (length // 5) + [length % 5 or 5][: bool(length % 5)]):
                assert torch.allclose(last(sizes), whole, atol=1e-4)


@FAMILIES
def test_nothing_is_left_behind_even_after_a_failure(family: str) -> None:
    model, samples = loud(family), [zoo.sample(1), zoo.sample(2)]
    inputs, text = inputs_of(family, samples), inputs_of(family, samples, pictures=False)
    hooks = lambda: sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules())  # noqa: E731
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    before, count = generate(model, inputs), hooks()
    fusion = AbilityFusion(model.hf, STRONG)
    with pytest.raises(ZeroDivisionError), fusion.on(inputs, text):
        generate(model, inputs)
        raise ZeroDivisionError
    broken = {**inputs, "input_ids": inputs["input_ids"][:, :-2]}  # fails inside the pass over the pictures
    with pytest.raises(Exception), fusion.on(broken, text):  # noqa: B017
        raise AssertionError("it should not come so far")
    assert hooks() == count
    assert torch.equal(generate(model, inputs), before)
    after = model.state_dict()
    assert list(after) == list(weights) and all(torch.equal(after[k], v) for k, v in weights.items())


def test_images_that_see_themselves_do_so_in_the_pass_over_the_pictures() -> None:
    """Else what is taken away (b = 1 at one layer) would not be what is there, and nothing would be exactly 0."""
    model, left = loud("llava", bidirectional_images=True), []
    adapter = VLMAdapter(model, collator("llava"), max_new_tokens=1)
    adapter.fusion = AbilityFusion(model.hf, {2: (0.0, 1.0)})
    layer: Any = model.anatomy.decoder_layers(model.hf)[2]
    handle = layer.input_layernorm.register_forward_pre_hook(
        lambda module, args: left.append(args[0].clone())
    )
    adapter.generate([zoo.sample(3)], suppress_tokens=SPECIALS)
    handle.remove()
    text, image, steered = left  # the two passes as they are, and the prompt of the generation
    assert text.shape[1] < image.shape[1] == steered.shape[1]
    gone = (steered == 0).all(-1)[0]
    assert int(gone.sum()) > 5 and bool(gone[-5:].all()) and not bool(gone[:16].any())


def test_only_the_last_user_turn_is_fused() -> None:
    sample, model, changed = zoo.sample(2, turns=3), loud("llava"), []
    prompt = prompts_of(collator("llava").encoder, sample)[2].document
    words = zoo.tokenizer().decode(prompt.input_ids[-last_turn(prompt) :])
    turns = [turn["value"] for turn in sample["conversations"]]
    assert turns[4] in words and turns[2] not in words
    adapter = VLMAdapter(model, collator("llava"), max_new_tokens=1, batch_size=1)
    adapter.fusion = AbilityFusion(model.hf, {2: (0.0, 1.0)})
    layer: Any = model.anatomy.decoder_layers(model.hf)[2]
    handle = layer.input_layernorm.register_forward_pre_hook(
        lambda module, args: changed.append(args[0].clone())
    )
    adapter.generate([sample], suppress_tokens=SPECIALS)
    handle.remove()
    gone = (changed[-1] == 0).all(-1)[
        0
    ]  # the prompt of the third question: what both prompts share begins much earlier
    assert 3 < int(gone.sum()) <= last_turn(prompt) and bool(gone[-int(gone.sum()) :].all())


def test_strength_is_shared_by_the_layers_of_the_window() -> None:
    assert Fusion(0.35).coefficients(28) == {i: pytest.approx((0.025, 0.025)) for i in range(14, 28)}
    assert Fusion(0.3, ratio=0.5, layers=(1, 3)).coefficients(4) == {
        1: pytest.approx((0.15, 0.075)),
        2: pytest.approx((0.15, 0.075)),
    }
    weighted = Fusion(0.4, layers=(0, 2), weights=(1, 3)).coefficients(2)
    assert weighted == {0: pytest.approx((0.1, 0.1)), 1: pytest.approx((0.3, 0.3))}


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"align": "sufix"}, "did you mean 'suffix'"),
        ({"mode": "ad"}, "fusion.mode 'ad'"),
        ({"strength": "much"}, "fusion.strength: much"),
        ({"strength": float("nan")}, "fusion.strength"),
        ({"layers": (3, 3)}, "fusion.layers: [3, 3]"),
        ({"weights": (1, -1)}, "their sum is 0"),
        ({"weights": (1, float("nan"))}, "a number for each layer"),
        ({"layers": 14}, "fusion.layers: 14"),
        ({"layers": [0.5, 2]}, "fusion.layers"),
        ({"preserve_norm": "no"}, "use true or false"),
    ],
)
def test_values_that_make_no_sense_are_refused(arguments: dict, says: str) -> None:
    with pytest.raises(UserError) as error:
        Fusion(**arguments)
    assert says in str(error.value)


def test_a_window_that_is_not_there_and_prompts_that_end_differently_are_refused() -> None:
    model = loud("llava")
    with pytest.raises(UserError, match="has 4 layers"):
        AbilityFusion(model.hf, Fusion(layers=(2, 9)))
    inputs = inputs_of("llava", [zoo.sample(1)])
    text = {k: v[:, :-1] for k, v in inputs_of("llava", [zoo.sample(1)], pictures=False).items()}
    with pytest.raises(UserError, match="end differently"), AbilityFusion(model.hf).on(inputs, text):
        pass


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_the_common_suffix_is_that_of_the_lists(data: st.DataObject) -> None:
    """Whatever side is padded, and whatever stands behind the prompt."""
    rows = data.draw(st.integers(1, 4))
    token = st.integers(1, 3)
    found, wanted = [], []
    for _ in range(rows):
        tail = data.draw(st.lists(token, max_size=4))
        first = data.draw(st.lists(token, min_size=1, max_size=5)) + tail
        second = data.draw(st.lists(token, min_size=1, max_size=5)) + tail
        behind = data.draw(st.lists(token, max_size=2))
        found.append((first, second, behind))
        count = 0
        while count < min(len(first), len(second)) and first[-1 - count] == second[-1 - count]:
            count += 1
        wanted.append(count)
    left = data.draw(st.booleans())

    def padded(
        lists: list[list[int]], extra: list[list[int]]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        length = max(len(a) + len(b) for a, b in zip(lists, extra, strict=True)) + 1
        ids, mask, ends = torch.zeros(rows, length).long(), torch.zeros(rows, length).long(), []
        for i, (prompt, more) in enumerate(zip(lists, extra, strict=True)):
            start = length - len(prompt) - len(more) if left else 0
            span = slice(start, start + len(prompt) + len(more))
            ids[i, span], mask[i, span] = torch.tensor(prompt + more), 1
            ends.append(start + len(prompt))
        return ids, mask, torch.tensor(ends)

    none: list[list[int]] = [[]] * rows
    first = padded([f for f, _, _ in found], [b for _, _, b in found])
    second = padded([s for _, s, _ in found], none)
    counts = common_suffix(*first, *second)
    assert counts.tolist() == wanted
    suffix = last_tokens(counts, first[2])
    spans = [i for i, n in enumerate(wanted) for _ in range(n)]
    assert suffix.rows.tolist() == spans
    ids = first[0][suffix.rows, suffix.columns].tolist()
    assert ids == [t for (f, _, _), n in zip(found, wanted, strict=True) for t in f[len(f) - n :]]


def test_fused_states_are_the_formulas() -> None:
    x, t, m = torch.randn(3, 5, 8, dtype=torch.float64).float()
    assert torch.allclose(fused_states(x, t, m, a=0.3, b=0.2), x + 0.3 * t - 0.2 * m)
    assert torch.allclose(fused_states(x, t, None, a=0.3, b=0.2, mode="replace"), 0.8 * x + 0.3 * t)
    kept = fused_states(x, t, m, a=5.0, b=2.0, preserve_norm=True)
    assert torch.allclose(kept.norm(dim=1), x.norm(dim=1))
    assert fused_states(x.bfloat16(), t, m, a=0.3, b=0.2).dtype == torch.bfloat16


@FAMILIES
def test_a_static_cache_whose_first_row_is_padded(family: str) -> None:
    """Such a cache counts keys that are no zeros, and those of padding are; positions come from elsewhere."""
    model, samples = loud(family), [zoo.sample(4, images=0), zoo.sample(1)]
    inputs, text = inputs_of(family, samples), inputs_of(family, samples, pictures=False)
    assert not inputs["attention_mask"][0].all()
    fusion, logits = AbilityFusion(model.hf, STRONG), {"return_dict_in_generate": True, "output_logits": True}
    with fusion.on(inputs, text):
        growing = generate(model, inputs, **logits)
    with fusion.on(inputs, text):
        static = generate(model, inputs, cache_implementation="static", **logits)
    for one, other in zip(growing.logits, static.logits, strict=True):
        assert torch.allclose(one, other, atol=2e-4)


class Expanding(LlamaForCausalLM):
    """Puts a picture's states in by itself, as the paper's own model does: token 1 becomes six."""

    def forward(
        self, input_ids: Any = None, inputs_embeds: Any = None, picture: Any = None, **options: Any
    ) -> Any:
        if picture is not None and input_ids.shape[1] > 1:
            words, at = self.model.embed_tokens(input_ids), int((input_ids[0] == 1).nonzero()[0])
            inputs_embeds = torch.cat([words[:, :at], picture, words[:, at + 1 :]], 1)
            options = {k: v for k, v in options.items() if k == "past_key_values"}
            return super().forward(inputs_embeds=inputs_embeds, **options)
        return super().forward(input_ids=input_ids, inputs_embeds=inputs_embeds, **options)


@pytest.mark.parametrize("fusion", [Fusion(1.0, 1.0), Fusion(1.0, 0.0), Fusion(1.0, mode="replace")])
def test_a_model_that_puts_pictures_in_by_itself(fusion: Fusion) -> None:
    torch.manual_seed(0)
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4}
    model: Any = Expanding(LlamaConfig(vocab_size=50, **size)).eval()
    ids, words, picture = (
        torch.tensor([[5, 1, 6, 7, 8, 9]]),
        torch.tensor([[5, 6, 7, 8, 9]]),
        torch.randn(1, 6, 32),
    )
    seen: list[torch.Tensor] = []
    hook = model.model.layers[2].input_layernorm.register_forward_pre_hook(
        lambda m, args: seen.append(args[0].clone())
    )
    with torch.no_grad():
        model(ids, picture=picture)
        plain = seen[-1]
        with AbilityFusion(model, fusion, layers=model.model.layers).on(
            {"input_ids": ids, "picture": picture}, {"input_ids": words}
        ):
            model(ids, picture=picture)
    hook.remove()
    changed = (seen[-1] != plain).any(-1)[0].nonzero().flatten().tolist()
    assert plain.shape[1] == 11 and changed == [7, 8, 9, 10]  # the words; pictures stand at 1 to 6


@pytest.mark.parametrize("config", [GPT2Config, GPTNeoXConfig, OPTConfig])
def test_decoders_that_are_told_of_their_cache_in_other_ways(config: Any) -> None:
    """By position, under other names: decoding is never steered, which a prompt's first column would show."""
    torch.manual_seed(1)
    small = {
        GPT2Config: {"n_embd": 32, "n_layer": 4, "n_head": 4},
        GPTNeoXConfig: {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 64},
        OPTConfig: {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "ffn_dim": 64, "word_embed_proj_dim": 32},
    }[config]  # fmt: skip
    model: Any = AutoModelForCausalLM.from_config(
        config(vocab_size=60, max_position_embeddings=64, **small)
    ).eval()
    layers = next(m for n, m in model.named_modules() if n.split(".")[-1] in ("h", "layers"))
    ids = torch.randint(3, 60, (2, 9))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    fusion = AbilityFusion(model, Fusion(3.0, 0.0), layers=layers)
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "return_dict_in_generate": True, "output_logits": True}  # fmt: skip
    found = []
    for cache in (True, False):
        with fusion.on(inputs, inputs):
            found.append(model.generate(**inputs, **options, use_cache=cache, eos_token_id=None))
    plain = model.generate(**inputs, **options, eos_token_id=None)
    assert not torch.allclose(found[0].logits[0], plain.logits[0], atol=1e-3)
    for one, other in zip(found[0].logits, found[1].logits, strict=True):
        assert torch.allclose(one, other, atol=1e-4)


def test_one_fusion_at_a_time_and_for_its_own_prompts() -> None:
    model, samples = loud("llava"), [zoo.sample(5), zoo.sample(6)]
    inputs, text = inputs_of("llava", samples), inputs_of("llava", samples, pictures=False)
    fusion = AbilityFusion(model.hf, STRONG)
    with fusion.on(inputs, text):
        with (
            pytest.raises(UserError, match="on for this model already"),
            AbilityFusion(model.hf).on(inputs, text),
        ):
            pass
        generate(model, inputs, max_new_tokens=1)
    others = inputs_of("llava", [zoo.sample(7), zoo.sample(8)])
    with pytest.raises(UserError, match="other prompts"), fusion.on(inputs, text):
        generate(model, others, max_new_tokens=1)
    with fusion.on(inputs, text):  # and it can be used again
        generate(model, inputs, max_new_tokens=1)
    model.hf.generation_config.pad_token_id = int(inputs["input_ids"][0, 0])
    bare = {k: v for k, v in inputs.items() if k != "attention_mask"}
    with pytest.raises(UserError, match="need their attention_mask"), fusion.on(bare, text):
        pass
