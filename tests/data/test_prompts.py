"""Prompts for generation: what is asked, and what of the stored answers may be seen."""

from __future__ import annotations

from functools import lru_cache

import pytest
import torch

from opsin.data.collate import VLMCollator
from opsin.data.encode import ConversationEncoder
from opsin.data.prompts import Prompt, prompt_batch, prompts_of
from opsin.data.schema import Role

import jobs
import zoo


@lru_cache
def collator(family: str = "llava", turns: str = "meta") -> VLMCollator:
    made = jobs.collator(zoo.build(family), "vicuna_v1")
    made.encoder.turns = turns
    return made


def text(prompt: Prompt, encoder: ConversationEncoder) -> str:
    ids = prompt.document.input_ids[prompt.document.roles != Role.IMAGE]
    return encoder.tokenizer.decode(ids.tolist())


def test_chained_turns_are_asked_after_the_gold_ones() -> None:
    encoder, sample = collator().encoder, zoo.sample(7, turns=3)
    prompts = prompts_of(encoder, sample, index=5)
    assert [(p.sample, p.turn) for p in prompts] == [(5, 0), (5, 1), (5, 2)]
    whole = encoder(sample)
    for prompt in prompts:
        n = len(prompt.document)
        # The very tokens of training, up to its own answer.
        assert whole.input_ids[:n].tolist() == prompt.document.input_ids.tolist()
        assert whole.roles[n] == Role.RESPONSE and whole.turn_ids[n] == prompt.turn
        assert text(prompt, encoder).endswith("ASSISTANT:")
        assert text(prompt, encoder).count("</s>") == prompt.turn


def test_independent_turns_are_asked_alone_with_the_pictures() -> None:
    encoder, sample = collator().encoder, zoo.sample(7, images=2, turns=3, independent=True)
    whole = encoder(sample)
    for prompt in prompts_of(encoder, sample):
        mine = (whole.branch_ids == 0) | (whole.branch_ids == prompt.turn + 1)
        n = len(prompt.document)
        assert whole.input_ids[mine][:n].tolist() == prompt.document.input_ids.tolist()
        assert len(prompt.document.images) == 2
        assert "</s>" not in text(prompt, encoder)


@pytest.mark.parametrize(("turns", "seen"), [("chained", [0, 1]), ("independent", [0, 0]), ("meta", [0, 0])])
def test_prompts_follow_the_encoders_setting(turns: str, seen: list[int]) -> None:
    # As it trains, so it is asked.
    encoder = collator(turns=turns).encoder
    prompts = prompts_of(encoder, zoo.sample(7, turns=2, independent=True))
    assert [text(p, encoder).count("</s>") for p in prompts] == seen


def test_answers_do_not_leak_into_their_prompts() -> None:
    encoder = collator().encoder
    sample, other = zoo.sample(7, turns=2), zoo.sample(7, turns=2)
    other["conversations"][-1]["value"] = "Something quite different"
    first, second = (prompts_of(encoder, s)[1].document.input_ids for s in (sample, other))
    assert first.tolist() == second.tolist()


@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_a_batch_of_prompts_is_padded_on_the_left(family: str) -> None:
    made = collator(family)
    samples = [zoo.sample(1), zoo.sample(2, images=0, turns=2), zoo.sample(3, images=2)]
    prompts = [p for i, s in enumerate(samples) for p in prompts_of(made.encoder, s, i)]
    batch = prompt_batch(made, prompts)
    assert batch["input_ids"].shape == (len(prompts), max(len(p.document) for p in prompts))
    assert bool(batch["attention_mask"][:, -1].all())
    for row, prompt in enumerate(prompts):
        n = len(prompt.document)
        assert batch["input_ids"][row, -n:].tolist() == prompt.document.input_ids.tolist()
        assert int(batch["attention_mask"][row].sum()) == n
    assert not (batch["labels"][:, -1] != -100).any()
    assert batch["images_per_row"].tolist() == [1, 0, 0, 2]
    assert torch.equal(batch["views_per_row"], torch.bincount(batch["view_row"], minlength=4))
