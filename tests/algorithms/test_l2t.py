"""L2T: the acceptance tests T1 to T6 of its sheet, templates, weights and normalisations."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from opsin.algorithms.l2t import L2T
from opsin.algorithms.l2t.functional import (
    NORMALISATIONS,
    Template,
    counted,
    frequent_sentences,
    instruction_mask,
    l2t_labels,
    normaliser,
    removed_share,
    template_ids,
    visual_relevance,
)
from opsin.data.chat import TEMPLATES
from opsin.data.schema import IGNORE_INDEX, Role
from opsin.data.sentences import SentenceCounts, sentence_id, sentence_key, split_sentences
from opsin.models.errors import UserError

import jobs
import zoo

KEYS = ("roles", "turn_ids", "branch_ids", "document_ids", "image_ids", "sentence_ids")
FORMAT = "answer briefly"


def _mask(batch: dict, templates: tuple[str, ...] = (), **options) -> torch.Tensor:
    ids = template_ids([Template(t, 0) for t in templates])
    return instruction_mask(**{k: batch[k] for k in KEYS}, templates=ids, **options)


def _batch(
    samples: list[dict], template: str = "vicuna_v1", family: str = "llava", **options
) -> tuple[dict, object]:
    built = zoo.build(family)
    return jobs.collator(built, template=template, **options)(samples), built.processor.tokenizer


MIX = [
    zoo.sample(1),
    zoo.sample(2, images=0, turns=2),
    zoo.sample(3, images=2, turns=3),
    zoo.sample(4, turns=3, independent=True),
]


# T1 and T2 -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packing", [False, True])
def test_t1_everything_a_template_gives_the_labels_of_ordinary_tuning(packing: bool) -> None:
    batch, _ = _batch(MIX, packing=packing)
    everything = tuple(
        s.key
        for m in MIX
        for t in m["conversations"][::2]
        for s in split_sentences(t["value"].replace("<image>", ""))
    )
    learnt = _mask(batch, everything)
    assert not learnt.any()
    assert torch.equal(l2t_labels(batch["labels"], batch["input_ids"], learnt), batch["labels"])


def test_t1_the_loss_is_bit_equal() -> None:
    sentences = sorted(
        {
            s.key
            for m in jobs.mixed_samples(16)
            for t in m["conversations"][::2]
            for s in split_sentences(t["value"].replace("<image>", ""))
        }
    )
    plain = jobs.train(steps=2)
    covered = jobs.train(
        steps=2,
        algorithms=[
            (
                "opsin.algorithms.l2t:L2T",
                {"templates": sentences, "template_source": "list", "max_removed": 1.0},
            )
        ],
    )
    assert [x["loss/train/lm"] for x in plain["losses"]] == [x["loss/train/lm"] for x in covered["losses"]]


@pytest.mark.parametrize("template", ["vicuna_v1", "chatml"])
@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_t2_without_templates_all_user_text_and_nothing_else_is_added(template: str, family: str) -> None:
    batch, tokenizer = _batch(MIX, template=template, family=family)
    learnt = _mask(batch, on_text_only=True)
    roles = batch["roles"]
    assert torch.equal(learnt, roles == Role.INSTRUCTION)
    labels = l2t_labels(batch["labels"], batch["input_ids"], learnt)
    labelled = labels != IGNORE_INDEX
    assert set(roles[labelled].tolist()) == {int(Role.INSTRUCTION), int(Role.RESPONSE)}
    special = {tokenizer.convert_tokens_to_ids(t) for t in zoo.SPECIALS} - {
        tokenizer.convert_tokens_to_ids(t) for t in ("</s>", "<|im_end|>")
    }
    assert not special & set(labels[labelled].tolist())


# T3 --------------------------------------------------------------------------------------------------------

CONVERSATIONS = {
    "one turn": (1, [("Is it a cube? Answer briefly.", "yes")]),
    "two turns": (
        1,
        [("What is left? Answer briefly.", "a cone"), ("Why? Because it is. Answer briefly.", "so")],
    ),
    "no picture": (0, [("What is 3.5 times 2? Answer briefly.", "7")]),
    "two pictures": (2, [("Which one is red?\nAnswer briefly.", "the first")]),
}


@pytest.mark.parametrize("name", CONVERSATIONS)
@pytest.mark.parametrize("independent", [False, True])
@pytest.mark.parametrize("template", [t for t in TEMPLATES if t != "plain"])
def test_t3_labels_decode_to_the_untemplated_user_text_and_the_answers(
    template: str, name: str, independent: bool
) -> None:
    images, turns = CONVERSATIONS[name]
    conversation = []
    for i, (q, a) in enumerate(turns):
        conversation += [
            {"from": "human", "value": ("<image>\n" * images if i == 0 else "") + q},
            {"from": "gpt", "value": a},
        ]
    sample = {**zoo.sample(0, images=images), "conversations": conversation}
    sample["meta"] = {"turns": "independent"} if independent else {}
    batch, tokenizer = _batch([sample], template=template)
    learnt = _mask(batch, (FORMAT,), on_text_only=True)
    ids = batch["input_ids"][0]
    said = tokenizer.decode(ids[learnt[0]], clean_up_tokenization_spaces=False)
    wanted = [q.replace("Answer briefly.", "") for q, _ in turns]
    assert "".join(said.split()) == "".join("".join(wanted).split())
    end = TEMPLATES[template].assistant_end.replace("{eos}", "</s>")
    answers = tokenizer.decode(ids[batch["labels"][0] != IGNORE_INDEX], clean_up_tokenization_spaces=False)
    assert "".join(answers.split()) == "".join((a + end).replace(" ", "") for _, a in turns)


# T4 --------------------------------------------------------------------------------------------------------


def test_t4_weight_zero_with_response_normalisation_gives_the_gradients_of_ordinary_tuning() -> None:
    arguments = {"lambda_instruction": 0.0, "normalisation": "response", "template_source": "none"}
    plain = jobs.train(steps=2)
    zero = jobs.train(steps=2, algorithms=[("methods:NeverOffL2T", arguments)])
    assert plain["losses"][0]["loss/train/lm"] == zero["losses"][0]["loss/train/lm"]
    for before, after in zip(plain["gradients"], zero["gradients"], strict=True):
        assert all(torch.equal(before[k], after[k]) for k in before)


def test_off_means_off_bit_for_bit() -> None:
    plain = jobs.train(steps=3)
    off = jobs.train(steps=3, algorithms=[("opsin.algorithms.l2t:L2T", {"lambda_instruction": 0.0})])
    assert plain["losses"] == off["losses"]
    assert all(torch.equal(plain["weights"][k], off["weights"][k]) for k in plain["weights"])


# T5 --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_t5_packed_and_unpacked_nll_agree(family: str) -> None:
    arguments = {"template_source": "list", "templates": [FORMAT], "lambda_instruction": 0.5}
    runs = [
        jobs.train(family, steps=1, packing=packing, algorithms=[("opsin.algorithms.l2t:L2T", arguments)])
        for packing in (False, True)
    ]
    a, b = (r["losses"][0]["loss/train/lm"] for r in runs)
    assert abs(a - b) < 1e-4
    for name, gradient in runs[0]["gradients"][0].items():
        assert torch.allclose(gradient, runs[1]["gradients"][0][name], atol=1e-5)


# T6 --------------------------------------------------------------------------------------------------------


def _told_by_picture(seed: int) -> dict:
    """A picture of one colour, and a question that names it: who sees it can predict the question."""
    import io

    from PIL import Image

    from opsin.data.schema import pack_images

    colour, rgb = [
        ("red", (220, 30, 30)),
        ("green", (30, 180, 60)),
        ("blue", (40, 60, 220)),
        ("yellow", (230, 210, 40)),
    ][seed % 4]
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16), rgb).save(buffer, "PNG")
    question = f"Is the {colour} object small?"
    return {
        "id": str(seed),
        "conversations": [
            {"from": "human", "value": f"<image>\n{question}"},
            {"from": "gpt", "value": "yes"},
        ],
        "images": pack_images([buffer.getvalue()]),
        "meta": {},
    }


def _instruction_loss(weights: dict, samples: list[dict]) -> float:
    from opsin.data.batch import split_batch
    from opsin.models.step import Step
    from opsin.models.vlm import VisionLanguageModel

    built = zoo.build("llava", seed=1)
    model = VisionLanguageModel(built.hf, built.processor)
    model.load_state_dict(weights)
    model.eval()
    batch = jobs.collator(built)(samples)
    batch["labels"] = torch.where(batch["roles"] == Role.INSTRUCTION, batch["input_ids"], IGNORE_INDEX)
    micro = split_batch(batch, None, training=False)[0]
    with torch.no_grad():
        return float(model.net(micro, Step(micro))["nll"].mean())


def test_t6_instruction_loss_falls_below_the_blind_one_under_l2t_only() -> None:
    samples = [_told_by_picture(int(i)) for i in np.random.default_rng(0).permutation(1600)]
    held_out = [_told_by_picture(i) for i in range(16)]
    rolled = [{**s, "images": held_out[(i + 1) % 16]["images"]} for i, s in enumerate(held_out)]
    everything = {"vision_tower": True, "mm_projector": True, "language_model": True}
    options = {"samples": samples, "global_batch": 16, "steps": 100, "lr": 1e-2, "trainable": everything}
    l2t = jobs.train(algorithms=[("opsin.algorithms.l2t:L2T", {"template_source": "none"})], **options)
    plain = jobs.train(**options)
    seen, blind = _instruction_loss(l2t["weights"], held_out), _instruction_loss(l2t["weights"], rolled)
    # The colour is one of about 14 tokens; a model that ignores the picture has at least ln(4) / 14 = 0.10 nats
    # a token on it with either picture, so seen = blind for it.
    assert seen < blind - 0.1
    plain_seen, plain_blind = (
        _instruction_loss(plain["weights"], held_out),
        _instruction_loss(plain["weights"], rolled),
    )
    assert plain_seen > plain_blind - 0.1
    assert seen < plain_seen


# Templates -------------------------------------------------------------------------------------------------


def _counts(turns: int = 1000, **sentences: int) -> SentenceCounts:
    counts = SentenceCounts(turns=turns, words=10 * turns)
    counts.counts.update({k.replace("_", " "): n for k, n in sentences.items()})
    return counts


def test_frequent_sentences_follow_the_threshold_length_and_cap() -> None:
    counts = _counts(
        100_000, answer_with_one_word=5000, why=9000, rare_but_long_sentence=99, just_at_the_line=100
    )
    found = [t.sentence for t in frequent_sentences(counts)]
    assert found == [
        "answer with one word",
        "just at the line",
    ]  # max(50, 1e-3 * 100,000) = 100; "why" is too short
    assert "why" in [t.sentence for t in frequent_sentences(counts, allow=("why",))]
    assert len(frequent_sentences(counts, top_k=1)) == 1
    assert frequent_sentences(_counts(10, three_words_here=49)) == []


def test_removed_share_and_counted() -> None:
    counts = _counts(100, answer_with_one_word=100)
    table = counted(["answer with one word", "never said here"], counts.counts)
    assert table == [Template("answer with one word", 100), Template("never said here", 0)]
    assert removed_share(table, counts.words) == pytest.approx(0.4)


class Data:
    def __init__(self, counts: SentenceCounts | None):
        self.counts = counts

    def sentence_counts(self, sample: int = 0) -> SentenceCounts | None:
        return self.counts


def test_sources_in_order_hand_list_then_the_data_then_frequency(tmp_path) -> None:
    counts = _counts(1000, answer_with_one_word=200, describe_the_picture_now=150)
    own = SentenceCounts(counts.turns, counts.words, counts.counts, "", ("describe the picture now",))

    def chosen(method, data):
        return (
            [t.sentence for t in method.choice.choose(Data(data))[0]],
            method.choice.choose(Data(data))[1],
        )

    assert chosen(L2T(templates=["Say: It!"]), own) == (["say: it"], "list")
    assert chosen(L2T(), own) == (["describe the picture now"], "dataset")
    assert chosen(L2T(), counts) == (["answer with one word", "describe the picture now"], "frequency")
    assert chosen(L2T(template_source="frequency"), own)[1] == "frequency"
    assert chosen(L2T(template_source="none"), None) == ([], "none")
    file = tmp_path / "templates.txt"
    file.write_text("Answer briefly.\n\nDescribe it.\n")
    assert chosen(L2T(templates=str(file)), counts) == (["answer briefly", "describe it"], "list")


def test_no_counts_or_too_much_removed_is_one_clear_line(tmp_path) -> None:
    with pytest.raises(UserError, match="opsin data templates"):
        L2T().choice.choose(Data(None))
    with pytest.raises(UserError, match="declares no templates"):
        L2T(template_source="dataset").choice.choose(Data(_counts()))
    report = tmp_path / "report.json"
    thin = _counts(100, what_colour_is_the_cube=90)
    with pytest.raises(UserError, match=r"hold 45% .* hand list") as error:
        L2T(max_removed=0.4, report=str(report)).choice.choose(Data(thin))
    assert "\n" not in str(error.value)
    body = json.loads(report.read_text())
    assert body["templates"] == [{"sentence": "what colour is the cube", "count": 90}]
    assert body["share_of_instruction_words_removed"] == pytest.approx(0.45)


def test_templates_travel_in_the_checkpoint() -> None:
    method = L2T()
    method.table, method.source_used = [Template("answer briefly", 7)], "dataset"
    other = L2T()
    other.load_state_dict(json.loads(json.dumps(method.state_dict())))
    assert other.table == method.table and other.source_used == "dataset"


@pytest.mark.parametrize(
    "arguments",
    [{"normalisation": "pooledd"}, {"turns": "firsts"}, {"template_source": "lst"}, {"lambda_instruction": -1.0},
     {"template_source": "list"}, {"token_weights": "visual_relevance", "normalisation": "weighted"}],
)  # fmt: skip
def test_wrong_arguments_are_one_line(arguments: dict) -> None:
    with pytest.raises(UserError) as error:
        L2T(**arguments)
    assert str(error.value).startswith("algorithms.l2t") and "\n" not in str(error.value)


# Masks -----------------------------------------------------------------------------------------------------


def test_turns_text_only_and_words_before_the_picture() -> None:
    batch, _ = _batch(MIX)
    everything = _mask(batch, on_text_only=True)
    first, later = (
        _mask(batch, turns="first", on_text_only=True),
        _mask(batch, turns="later", on_text_only=True),
    )
    assert torch.equal(first | later, everything) and not (first & later).any()
    assert not later[3].any()  # independent questions: each is a first turn
    assert not _mask(batch)[1].any() and _mask(batch, on_text_only=True)[1].any()
    interleaved = {**zoo.sample(5, images=2)}
    interleaved["conversations"] = [
        {"from": "human", "value": "left <image> right <image> Which is red?"}, {"from": "gpt", "value": "left"}
    ]  # fmt: skip
    batch, tokenizer = _batch([interleaved])
    assert tokenizer.decode(batch["input_ids"][0][_mask(batch)[0]]).strip() == "Which is red?"


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_mask_equals_a_loop_over_tokens(data) -> None:
    """Property: the vectorised mask is what one would write token by token."""
    length = data.draw(st.integers(4, 24))
    draw = lambda low, high, dtype: torch.tensor(  # noqa: E731
        [data.draw(st.lists(st.integers(low, high), min_size=length, max_size=length))], dtype=dtype
    )
    document = draw(-1, 1, torch.int16).sort(descending=False).values
    fields = {
        "roles": draw(0, 5, torch.int8),
        "turn_ids": draw(-1, 2, torch.int16),
        "branch_ids": draw(0, 2, torch.int16),
        "document_ids": document,
        "image_ids": draw(-1, 1, torch.int16),
        "sentence_ids": draw(0, 3, torch.int64),
    }
    templates = torch.tensor(data.draw(st.sampled_from([[], [1], [1, 2]])), dtype=torch.int64)
    turns = data.draw(st.sampled_from(["all", "first", "later"]))
    text_only = data.draw(st.booleans())
    got = instruction_mask(**fields, templates=templates, turns=turns, on_text_only=text_only)[0]
    f = {k: v[0].tolist() for k, v in fields.items()}
    for i in range(length):
        d = max(f["document_ids"][i], 0)
        mine = [j for j in range(length) if max(f["document_ids"][j], 0) == d]
        visual = [j for j in mine if f["image_ids"][j] >= 0]
        want = f["roles"][i] == Role.INSTRUCTION
        if len(templates):
            want = want and f["sentence_ids"][i] != 0 and f["sentence_ids"][i] not in templates.tolist()
        is_first = f["turn_ids"][i] <= 0 or f["branch_ids"][i] > 0
        want = want and (turns == "all" or (turns == "first") == is_first)
        want = want and (text_only or any(f["document_ids"][j] >= 0 for j in visual))
        asked = [j for j in mine if f["roles"][j] == Role.INSTRUCTION and f["sentence_ids"][j] != 0]
        want = want and any(f["document_ids"][j] >= 0 for j in asked)  # punctuation alone asks nothing
        want = want and all(j < i for j in visual if f["turn_ids"][j] == f["turn_ids"][i])
        assert bool(got[i]) == bool(want), i


# Normalisation and weights -----------------------------------------------------------------------------------


def test_normalisers_golden() -> None:
    n_a, n_i = torch.tensor(10.0), torch.tensor(40.0)
    options = {"lambda_instruction": 0.25, "lambda_response": 2.0}
    z = {n: tuple(float(x) for x in normaliser(n_a, n_i, normalisation=n, **options)) for n in NORMALISATIONS}
    assert z == {
        "pooled": (50.0, 1.0),
        "weighted": (30.0, 1.0),
        "separate": (10.0, 0.25),
        "response": (10.0, 1.0),
    }


@pytest.mark.parametrize("normalisation", NORMALISATIONS)
def test_loss_is_the_formula_and_free_of_micro_batches(normalisation: str) -> None:
    arguments = {
        "lambda_instruction": 0.25, "lambda_response": 1.5, "normalisation": normalisation,
        "template_source": "list", "templates": [FORMAT], "on_text_only": True,
    }  # fmt: skip
    spec = [("opsin.algorithms.l2t:L2T", arguments)]
    whole = jobs.train(steps=1, algorithms=spec)
    parts = jobs.train(steps=1, algorithms=spec, microbatch=2)
    assert whole["losses"][0]["loss/train/lm"] == pytest.approx(parts["losses"][0]["loss/train/lm"], abs=1e-5)
    logged = parts["logged"][0]
    n_i, n_a, mean_i, mean_a = (logged[f"l2t/{k}"] for k in ("n_I", "n_A", "loss_I", "loss_A"))
    assert n_i > 0 and n_a > 0
    total_i, total_a = 0.25 * n_i * mean_i, 1.5 * n_a * mean_a
    formula = {
        "pooled": (total_i + total_a) / (n_i + n_a),
        "weighted": (total_i + total_a) / (0.25 * n_i + 1.5 * n_a),
        "separate": 0.25 * mean_i + 1.5 * mean_a,
        "response": (total_i + total_a) / n_a,
    }[normalisation]
    assert parts["losses"][0]["loss/train/lm"] == pytest.approx(formula, abs=1e-4)


@pytest.mark.world
@pytest.mark.parametrize("normalisation", ["pooled", "separate"])
@pytest.mark.parametrize("parallel", ["ddp", "fsdp2"])
def test_two_ranks_give_the_numbers_of_one(ranks, normalisation: str, parallel: str) -> None:
    arguments = {"lambda_instruction": 0.3, "normalisation": normalisation, "template_source": "none"}
    spec = [("opsin.algorithms.l2t:L2T", arguments)]
    options = {
        "samples": jobs.mixed_samples(16, "first_half"),
        "global_batch": 4,
        "steps": 2,
        "microbatch": 1,
    }
    one = jobs.train(algorithms=spec, **options)
    two = ranks.run("jobs:train", algorithms=spec, parallel=parallel, **options)
    for a, b in zip(one["losses"], two[0]["losses"], strict=True):
        assert a["loss/train/lm"] == pytest.approx(b["loss/train/lm"], abs=1e-5)
    for name, gradient in one["gradients"][0].items():
        assert torch.allclose(gradient, two[0]["gradients"][0][name], atol=1e-5)
    assert [x["l2t/loss_I"] for x in one["logged"]] == pytest.approx(
        [x["l2t/loss_I"] for x in two[0]["logged"]], abs=1e-5
    )


def test_visual_relevance_weighs_by_what_the_picture_tells() -> None:
    weight = visual_relevance(torch.tensor([1.0, 0.2, 3.0]), torch.tensor([1.5, 3.2, 1.0]), clip=(0.0, 2.0))
    assert weight.tolist() == pytest.approx([0.5, 2.0, 0.0])
    plain = {"template_source": "none", "lambda_instruction": 1.0}
    full = jobs.train(steps=1, algorithms=[("opsin.algorithms.l2t:L2T", plain)])
    open_clip = {**plain, "token_weights": "visual_relevance", "relevance_clip": (1.0, 1.0)}
    same = jobs.train(steps=1, algorithms=[("opsin.algorithms.l2t:L2T", open_clip)])
    assert same["losses"][0]["loss/train/lm"] == pytest.approx(full["losses"][0]["loss/train/lm"], abs=1e-6)
    shut = {**plain, "token_weights": "visual_relevance", "relevance_clip": (0.0, 0.0)}
    none = jobs.train(steps=1, algorithms=[("opsin.algorithms.l2t:L2T", shut)])
    logged = none["logged"][0]
    response = logged["l2t/n_A"] * logged["l2t/loss_A"] / (full["logged"][0]["l2t/n_I"] + logged["l2t/n_A"])
    assert none["losses"][0]["loss/train/lm"] == pytest.approx(response, abs=1e-4)


def test_refused_documents_are_never_labelled() -> None:
    from opsin.data.batch import split_batch
    from opsin.models.normalise import declared

    batch, _ = _batch(MIX)
    batch["labels"] = l2t_labels(batch["labels"], batch["input_ids"], _mask(batch))
    batch["refused"][0] = True
    micro = split_batch(batch, None)[0]
    assert not (micro["label_rows"] // micro["input_ids"].shape[1] == 0).any()
    assert float(declared(batch)["lm"]) == len(micro["label_rows"])


def test_the_functional_form_needs_no_composer() -> None:
    code = (
        "import sys, opsin.algorithms.l2t.functional as f; "
        "assert f.instruction_mask; assert not {'composer', 'streaming'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_sentence_ids_of_a_batch_are_those_of_the_functions() -> None:
    batch, _ = _batch([zoo.sample(1)])
    assert sentence_id(sentence_key("Answer briefly.")) in batch["sentence_ids"][0].tolist()
