"""Log-likelihoods of answers are those of a plain forward pass, however candidates are laid out."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from opsin.algorithms.vift import Fusion
from opsin.data.batch import split_batch
from opsin.data.candidates import ASKED, candidate_rows
from opsin.data.collate import VLMCollator
from opsin.data.encode import Rejected
from opsin.data.prompts import prompts_of
from opsin.data.schema import Role
from opsin.evaluation.adapter import VLMAdapter
from opsin.models.errors import UserError
from opsin.models.geometry import PER_IMAGE_KEYS, PIXEL_KEY
from opsin.models.step import Step
from opsin.models.vlm import VisionLanguageModel

import jobs
import zoo
from adapters import (
    CHOICES,
    FAMILIES,
    adapter,
    broken_sample,
    candidates,
    close,
    collator,
    flat,
    model,
    several,
)


def by_hand(
    family: str, template: str, sample: dict[str, Any], turn: int, answer: str
) -> tuple[float, float, int]:
    """Plain transformers on the one conversation that ends with the answer: nats, nats of the end, tokens."""
    encoder, stock = collator(family, template).encoder, model(family).hf.eval()
    turns = [dict(t) for t in sample["conversations"]]
    alone = sample["meta"].get("turns") == "independent"
    if alone and turn:
        marks = "<image>\n" * turns[0]["value"].count("<image>")
        kept = [{"from": "human", "value": marks + turns[2 * turn]["value"]}, turns[2 * turn + 1]]
    else:
        kept = turns[: 2 * turn + 2]
    kept[-1] = {"from": "gpt", "value": answer}
    document = encoder({**sample, "conversations": kept, "meta": {}})
    batch = collator(family).layout([document])
    inputs = {k: batch[k] for k in (PIXEL_KEY, *PER_IMAGE_KEYS) if k in batch}
    ids = torch.from_numpy(document.input_ids)[None]
    with torch.no_grad():
        logits = stock(input_ids=ids, attention_mask=torch.ones_like(ids), **inputs).logits[0].float()
    own = logits.log_softmax(-1)[:-1].gather(1, ids[0, 1:, None])[:, 0]
    said = (document.roles[1:] == Role.RESPONSE) & (document.turn_ids[1:] == document.turn_ids.max())
    nats = own[torch.from_numpy(said)]
    return (
        float(nats[:-1].double().sum()),
        float(nats[-1]),
        len(nats) - 1,
    )  # the end is one token in both templates


@FAMILIES
@pytest.mark.parametrize("template", ["vicuna_v1", "chatml"])
def test_log_likelihoods_are_those_of_a_plain_forward_pass(family: str, template: str) -> None:
    samples, given = several(), candidates()
    found = adapter(family, template).answer_logprobs(samples, given)
    assert [[len(e) for e in s] for s in found] == [[len(e) for e in s] for s in given]
    for sample, exchanges, answers in zip(samples, found, given, strict=True):
        for turn, (scored, texts) in enumerate(zip(exchanges, answers, strict=True)):
            for one, text in zip(scored, texts, strict=True):
                nats, end, tokens = by_hand(family, template, sample, turn, text)
                assert (
                    one.tokens
                    == tokens
                    == len(zoo.tokenizer()(" " * (template == "vicuna_v1") + text)["input_ids"])
                )
                assert one.sum == pytest.approx(nats, rel=0, abs=1e-4) and one.mean == one.sum / tokens
                assert one.end == pytest.approx(end, rel=0, abs=1e-4)


@FAMILIES
@pytest.mark.parametrize("bidirectional", [False, True])
def test_branches_rows_and_one_by_one_say_the_same(family: str, bidirectional: bool) -> None:
    samples, given = several(), candidates()
    ways = [
        adapter(family, bidirectional=bidirectional, share=share, batch_size=size).answer_logprobs(
            samples, given
        )
        for share, size in ((None, 16), ("prompt", 3), ("nothing", 16), ("nothing", 1))
    ]
    for other in ways[1:]:
        close(ways[0], other)
    values = [one.sum for one in flat(ways[0])]
    assert len({round(v, 4) for v in values}) == len(values), "the test would not notice a mix-up"


def test_the_stored_answers_are_scored_in_one_row_a_sample() -> None:
    samples, encoder = several(), collator("llava").encoder
    rows = [candidate_rows(encoder, s) for s in samples]
    assert [len(r) for r in rows] == [1] * 5 and [len(r[0].slots) for r in rows] == [3, 1, 1, 3, 1]
    gold = [[[t["value"]] for t in s["conversations"] if t["from"] == "gpt"] for s in samples]
    one = adapter("llava").answer_logprobs(samples)
    close(one, adapter("llava", share="nothing").answer_logprobs(samples, gold))
    assert rows[0][0].document.branch_ids.max() == 0 and rows[3][0].document.branch_ids.max() == 3


def test_candidates_of_one_question_run_the_prompt_once() -> None:
    encoder, sample = collator("qwen2_5_vl").encoder, zoo.sample(3)
    (prompt,) = prompts_of(encoder, sample)
    (row,) = candidate_rows(encoder, sample, [CHOICES])
    answers = [len(encoder({**sample, "conversations": [sample["conversations"][0], {"from": "gpt", "value": c}]}))
               for c in CHOICES]  # fmt: skip
    assert row.prompt == len(prompt.document) and row.slots == tuple((0, i) for i in range(4))
    assert len(row) == row.prompt + sum(n - row.prompt for n in answers)
    assert row.document.input_ids[: row.prompt].tolist() == prompt.document.input_ids.tolist()
    assert (
        0 < row.last < row.prompt
        and (row.document.turn_ids[row.prompt - row.last : row.prompt] == ASKED).all()
    )
    # Too many for one row: several rows, each as long as a sample may be at most.
    short = jobs.collator(zoo.build("qwen2_5_vl"), max_seq_len=max(answers) + 8).encoder
    rows = candidate_rows(short, sample, [CHOICES])
    assert len(rows) > 1 and all(len(r) <= short.max_seq_len for r in rows)
    assert [slot for r in rows for slot in r.slots] == list(row.slots)
    narrow = VLMAdapter(model("qwen2_5_vl"), VLMCollator(short))
    close(
        narrow.answer_logprobs([sample], [[CHOICES]]),
        adapter("qwen2_5_vl").answer_logprobs([sample], [[CHOICES]]),
    )


def test_independent_questions_with_many_choices_take_the_cheaper_rows() -> None:
    encoder, sample = collator("llava").encoder, zoo.sample(5, turns=3, independent=True)
    few = candidate_rows(encoder, sample, [["red"]] * 3)
    many = candidate_rows(encoder, sample, [CHOICES * 8] * 3)
    assert len(few) == 1 and len(many) == 3
    assert all({turn for turn, _ in row.slots} == {i} for i, row in enumerate(many))


def test_what_greedy_decoding_says_is_exact_and_nothing_else() -> None:
    samples, built = [zoo.sample(i, turns=1 + i % 2) for i in range(4)], zoo.build("llava")
    taught = VisionLanguageModel(built.hf, built.processor).train()
    (micro,) = split_batch(collator("llava")(samples[:2]), None)
    optimizer = torch.optim.AdamW(taught.parameters(), lr=5e-3)
    for _ in range(70):
        optimizer.zero_grad()
        taught.loss(taught.net(micro, Step(micro)), micro)["lm"].backward()
        optimizer.step()
    one = VLMAdapter(taught, collator("llava"), max_new_tokens=16)
    said, found = one.generate(samples), one.answer_logprobs(samples)
    gold = [[t["value"] for t in s["conversations"] if t["from"] == "gpt"] for s in samples]
    exact = [[exchange[0].exact for exchange in exchanges] for exchanges in found]
    assert exact == [[a == b for a, b in zip(x, y, strict=True)] for x, y in zip(said, gold, strict=True)]
    assert {flag for flags in exact for flag in flags} == {True, False}
    # The beginning of what it says is greedy, but not where it would stop.
    known = next(i for i, flags in enumerate(exact) if flags[0])
    (short,) = one.answer_logprobs([samples[known]], [[["It is"]] * len(gold[known])])
    assert short[0][0].greedy and not short[0][0].exact and short[0][0].end < -1  # type: ignore[operator]
    assert all(x.exact <= x.greedy for x in flat(found))


def test_choices_are_ranked_by_sum_and_by_mean() -> None:
    samples = [zoo.sample(i) for i in range(4)]
    ranked = adapter("llava").rank(samples, [CHOICES] * 4)
    single = adapter("llava", share="nothing", batch_size=1).answer_logprobs(samples, [[CHOICES]] * 4)
    for one, exchanges in zip(ranked, single, strict=True):
        sums, means = [a.sum for a in exchanges[0]], [a.mean for a in exchanges[0]]
        assert (
            one.best == CHOICES[int(np.argmax(sums))] and one.best_by_mean == CHOICES[int(np.argmax(means))]
        )
        assert one.choices == tuple(CHOICES)
    (same,) = adapter("llava").rank(samples[:1], [["red", "red"]])
    assert same.best == "red" and same.logprobs[0].sum == pytest.approx(same.logprobs[1].sum)


@FAMILIES
def test_fused_log_likelihoods_are_those_of_fused_decoding(family: str) -> None:
    sample, text = zoo.sample(2, images=2), "green number 7"
    fused = adapter(family, fusion=Fusion(strength=6.0, layers=(1, 4)))
    ids = [*zoo.tokenizer()(" " + text)["input_ids"], zoo.tokenizer().eos_token_id]
    (prompt,) = prompts_of(collator(family).encoder, sample)
    logits: list[torch.Tensor] = []
    head = model(family).hf.get_submodule(model(family).anatomy.lm_head)
    handle = head.register_forward_hook(lambda module, args, output: logits.append(output[0, -1].float()))
    try:
        said = fused.generate(
            [sample], prefix_allowed_tokens_fn=lambda _, seen: [ids[len(seen) - len(prompt.document)]]
        )
    finally:
        handle.remove()
    assert said == [[text]]
    assert len(logits) == 2 + len(ids)  # two passes over the prompts come first, as they are
    nats = torch.stack(logits[2:]).log_softmax(-1).gather(1, torch.tensor(ids)[:, None])[:, 0]
    one = fused.answer_logprobs([sample], [[[text]]])[0][0][0]
    assert one.sum == pytest.approx(float(nats[:-1].sum()), rel=0, abs=1e-4)
    assert one.end == pytest.approx(float(nats[-1]), rel=0, abs=1e-4)
    plain = adapter(family).answer_logprobs([sample], [[[text]]])[0][0][0]
    assert abs(plain.sum - one.sum) > 1e-2


def test_an_attention_that_takes_no_mask_gets_a_row_a_candidate() -> None:
    one = adapter("llava")
    decoder: Any = one.model.anatomy.decoder(one.model.hf)
    chosen = decoder.config._attn_implementation
    decoder.config._attn_implementation = "flash_attention_2"
    try:
        rows, _ = one._candidates(zoo.sample(1), [CHOICES])
    finally:
        decoder.config._attn_implementation = chosen
    assert len(rows) == 4 and all(row.document.branch_ids.max() == 0 for row in rows)


def test_what_cannot_be_scored_is_said() -> None:
    one, sample = adapter("llava"), zoo.sample(1)
    for answers, message in (
        ([[CHOICES], [CHOICES]], "candidate answers for 2 samples, there are 1"),
        ([[CHOICES, CHOICES]], "zoo/1: candidate answers for 2 exchanges, the sample has 1"),
        ([[[]]], "zoo/1: exchange 0 has no list of candidate answers"),
        ([["red"]], "zoo/1: exchange 0 has no list of candidate answers"),
        ([[["red", " "]]], "zoo/1: exchange 0 has an empty candidate answer"),
    ):
        with pytest.raises(UserError) as error:
            one.answer_logprobs([sample], answers)  # type: ignore[arg-type]
        assert str(error.value) == message
    with pytest.raises(UserError, match="zoo/2: candidate answers for 1 exchanges, the sample has 2"):
        one.rank([zoo.sample(2, turns=2)], [CHOICES])
    with pytest.raises(UserError, match="share 'all': use picture, prompt, nothing"):
        adapter("llava", share="all").answer_logprobs([sample])
    with pytest.raises(Rejected, match="too_long: prompt and answer have"):
        one.answer_logprobs([sample], [[["red " * 500]]])
    skipped: dict[int, str] = {}
    found = one.answer_logprobs([broken_sample(), sample], skipped=skipped)
    assert found[0] == [] and found[1] == one.answer_logprobs([sample])[0]
    assert list(skipped) == [0] and skipped[0].startswith("unreadable_image: picture 0")
    assert one.answer_logprobs([]) == [] == one.generate([]) == one.forward_probe([], [1])
