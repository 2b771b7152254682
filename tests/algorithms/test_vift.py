"""ViFT in a bare Trainer: the promise (V6), text-only steps (V7), and rules."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from opsin.algorithms.vift import ViFT
from opsin.algorithms.vift.functional import refused_documents
from opsin.algorithms.vift.prompts import caption_pool
from opsin.algorithms.vift.rules import make_rules
from opsin.algorithms.vift.text_steps import VisionAtRest
from opsin.data.collate import VLMCollator
from opsin.data.schema import pack_images
from opsin.models.errors import UserError
from opsin.models.vlm import VisionLanguageModel

import jobs
import zoo
from ranks import RankPool

VIFT = "opsin.algorithms.vift:ViFT"
PROMPTS = ("Describe the picture.", "What is there?")
PARALLEL = pytest.mark.parametrize("parallel", ["ddp", "fsdp2"])


@lru_cache
def collator(packing: bool = False) -> VLMCollator:
    return jobs.collator(zoo.build("llava"), packing=packing, max_seq_len=400)


def told(number: int, images: int, words: list[str]) -> dict[str, Any]:
    """A sample whose exchanges have these words; pictures stand in the first one."""
    turns = []
    for i, said in enumerate(words):
        mark = "<image>\n" * images if i == 0 else ""
        turns += [{"from": "human", "value": mark + said}, {"from": "gpt", "value": f"a cube {number}"}]
    pictures = pack_images([zoo.picture(number + i) for i in range(images)])
    return {"id": f"zoo/{number}", "conversations": turns, "images": pictures, "meta": {}}


WORDS = st.sampled_from(
    ["", "Describe the picture.", "describe  the picture", "What is there? Describe the picture.",
     "What colour is the cube?", "Describe the picture. What colour is the cube?", "Describe the picture of a cube."]
)  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(
    documents=st.lists(
        st.tuples(st.integers(0, 2), st.lists(WORDS, min_size=1, max_size=3)), min_size=1, max_size=5
    ),
    packing=st.booleans(),
)
def test_v6_a_picture_with_a_specific_question_is_refused_and_nothing_else(
    documents: list[tuple[int, list[str]]], packing: bool
) -> None:
    """Whatever stands in later turns, several pictures, packed rows, and words that only begin like a prompt."""
    documents = [(images, [w or "." for w in words] if not images else words) for images, words in documents]
    samples = [told(i + 1, images, words) for i, (images, words) in enumerate(documents)]
    batch = collator(packing)(samples)
    refused = refused_documents(
        roles=batch["roles"], document_ids=batch["document_ids"], image_ids=batch["image_ids"],
        sentence_ids=batch["sentence_ids"], pool=caption_pool(PROMPTS, ""), documents=batch["document_uid"].shape[1],
    )  # fmt: skip
    found = {
        int(i): bool(r) for i, r in zip(batch["document_sample"].flatten(), refused.flatten(), strict=True)
    }
    for i, (images, words) in enumerate(documents):
        if batch["sample_status"][i]:
            continue
        asks = any("cube" in said for said in words)
        assert found[i] == (images > 0 and asks)
    # Without a pool, words of any kind are too many.
    none = refused_documents(
        roles=batch["roles"], document_ids=batch["document_ids"], image_ids=batch["image_ids"],
        sentence_ids=batch["sentence_ids"], pool=caption_pool((), ""), documents=batch["document_uid"].shape[1],
    )  # fmt: skip
    found = {int(i): bool(r) for i, r in zip(batch["document_sample"].flatten(), none.flatten(), strict=True)}
    for i, (images, words) in enumerate(documents):
        if not batch["sample_status"][i]:
            assert found[i] == (images > 0 and any(words))


def caption(number: int) -> dict[str, Any]:
    return told(number, 1, [""])


def words(number: int) -> dict[str, Any]:
    return told(number, 0, [f"What colour is cube {number}?"])


def asked(number: int) -> dict[str, Any]:
    return told(number, 1, ["What colour is the cube?"])


def test_v6_a_run_stops_at_the_first_such_sample_and_names_it() -> None:
    samples = [caption(1), words(2), asked(3), caption(4)] * 2
    with pytest.raises(UserError) as error:
        jobs.train(samples=samples, global_batch=4, steps=2, algorithms=[(VIFT, {})])
    said = str(error.value)
    assert "1 samples have a picture and words" in said and "'zoo/3' of all" in said and "split-vift" in said
    assert "\n" not in said


def test_v6_what_is_refused_is_not_learnt_from() -> None:
    """Losses are those of a run in which these samples cannot be used at all."""
    useless = {**asked(3), "conversations": [*asked(3)["conversations"][:1], {"from": "gpt", "value": " "}]}
    with_it = jobs.train(
        samples=[caption(1), words(2), asked(3), caption(4)] * 2, global_batch=4, steps=2,
        algorithms=[(VIFT, {"max_refused": None, "log_interval": 1})],
    )  # fmt: skip
    without = jobs.train(samples=[caption(1), words(2), useless, caption(4)] * 2, global_batch=4, steps=2)
    assert [s["loss/train/lm"] for s in with_it["logged"]] == pytest.approx(
        [s["loss/train/lm"] for s in without["logged"]], rel=1e-5
    )
    assert [s["vift/refused"] for s in with_it["logged"]] == [1, 2]


def test_v6_named_prompts_may_stand_beside_a_picture(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("\ufeffwhat colour is the cube\n\n", encoding="utf-8")
    for prompts in (["What colour is the cube?"], str(file)):
        run = jobs.train(
            samples=[asked(1), words(2)] * 2, global_batch=2, steps=2,
            algorithms=[(VIFT, {"caption_prompts": prompts, "log_interval": 1})],
        )  # fmt: skip
        assert [s["vift/refused"] for s in run["logged"]] == [0, 0]


@PARALLEL
def test_v6_all_ranks_stop_together(ranks: RankPool, parallel: str) -> None:
    """Only one of two ranks has the sample; both say the same line."""
    samples = [caption(1), words(2), asked(3), caption(4)] * 4
    with pytest.raises(Exception, match="'zoo/3' of all"):
        ranks.run(
            "jobs:train", samples=samples, global_batch=4, steps=2, parallel=parallel, algorithms=[(VIFT, {})]
        )


def vision(found: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {k: v for k, v in found.items() if "projector" in k or "vision_tower" in k}


PICTURES, TEXT = [caption(i) for i in range(1, 5)], [words(i) for i in range(5, 9)]
TRAINED = {"vision_tower": True, "mm_projector": True, "language_model": True}


@PARALLEL
@pytest.mark.parametrize("where", ["nowhere", "on one rank"])
def test_v7_text_only_steps_give_vision_no_gradient_and_nobody_waits(
    ranks: RankPool, parallel: str, where: str
) -> None:
    """Also where pictures are on one rank only; two processes do what one does."""
    samples = TEXT + (TEXT if where == "nowhere" else [PICTURES[0], PICTURES[1], *TEXT[:2]])
    options = {"samples": samples, "global_batch": 4, "steps": 2, "algorithms": [(VIFT, {})]}
    one = jobs.train(**options)
    both = ranks.run("jobs:train", parallel=parallel, **options)
    for rank in both:
        assert rank["fsdp"] == (parallel == "fsdp2")
        for step, gradients in enumerate(rank["gradients"]):
            found = vision(gradients)
            assert found and all(torch.equal(g, torch.zeros_like(g)) for g in found.values()) == (
                step == 0 or where == "nowhere"
            )
        for name, weight in one["weights"].items():
            assert torch.allclose(weight, rank["weights"][name], atol=2e-4), name


@pytest.mark.parametrize("parallel", ["one", "ddp", "fsdp2"])
def test_v7_text_only_steps_leave_vision_to_the_bit(ranks: RankPool, parallel: str) -> None:
    """A gradient of 0 would not: momentum of the step before moves tower and projector on."""

    def weights(samples: list[dict], **options: Any) -> dict[str, torch.Tensor]:
        arguments: dict[str, Any] = {
            "samples": samples, "global_batch": 4, "steps": len(samples) // 4, "algorithms": [(VIFT, options)],
        }  # fmt: skip
        if parallel == "one":
            return jobs.train(**arguments)["weights"]
        return ranks.run("jobs:train", parallel=parallel, **arguments)[0]["weights"]

    after_pictures = weights(PICTURES)
    rested = weights(PICTURES + TEXT)
    moved = weights(PICTURES + TEXT, freeze_vision_on_text_steps=False)
    assert all(torch.equal(v, rested[k]) for k, v in vision(after_pictures).items())
    assert any(not torch.equal(v, moved[k]) for k, v in vision(after_pictures).items())
    head = "net.hf.lm_head.weight"
    assert torch.allclose(rested[head], moved[head], atol=1e-6) and not torch.equal(
        rested[head], after_pictures[head]
    )
    again = weights(PICTURES + TEXT + PICTURES)
    assert any(not torch.equal(v, rested[k]) for k, v in vision(again).items())


def test_v7_a_plain_optimizer_gets_groups_of_its_own() -> None:
    built = zoo.build("llava")
    model = VisionLanguageModel(built.hf, built.processor)
    decayed = [p for p in model.parameters() if p.ndim > 1]
    rest = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW([{"params": decayed, "weight_decay": 0.5}, {"params": rest}], lr=0.1)
    VisionAtRest.set_apart(optimizer, model)
    assert sum(len(g["params"]) for g in optimizer.param_groups) == len(list(model.parameters()))
    at_rest = VisionAtRest(optimizer)
    assert len(at_rest.groups) == 2 and {g["weight_decay"] for g in at_rest.groups} == {0.5, 0.01}
    chosen = {id(p) for g in at_rest.groups for p in g["params"]}
    names = {n.split(".")[3] for n, p in model.named_parameters() if id(p) in chosen}
    assert names == {"vision_tower", "multi_modal_projector"}
    before = [p.detach().clone() for p in model.parameters()]
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    at_rest.resting = True
    optimizer.step(lambda: at_rest.begin())  # as Composer: begun inside the closure
    moved = [not torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True)]
    assert moved == [id(p) not in chosen for p in model.parameters()]
    assert at_rest.rested == 1 and {g["lr"] for g in optimizer.param_groups} == {0.1}
    optimizer.step(lambda: at_rest.begin())
    assert all(not torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
    at_rest.remove()
    assert not optimizer._optimizer_step_post_hooks


def test_nll_of_each_stream_is_that_of_its_samples() -> None:
    """Beside the loss of the whole: the log of a run with one stream is its loss."""
    run = jobs.train(
        samples=[caption(i) for i in range(8)], global_batch=4, steps=2,
        algorithms=[(VIFT, {"log_interval": 1})], microbatch=1,
    )  # fmt: skip
    for step in run["logged"]:
        assert step["vift/nll/all"] == pytest.approx(step["loss/train/lm"], rel=1e-5)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"mixture": "natural"}, "algorithms.vift.mixture: 'natural'"),
        ({"batches": "singel"}, "did you mean 'single'"),
        ({"max_refused": -1}, "algorithms.vift.max_refused: -1"),
        ({"max_refused": True}, "max_refused"),
        ({"log_interval": 0}, "log_interval: 0"),
        ({"decision_interval": "2ep"}, "decision_interval: '2ep': use batches"),
        ({"decision_interval": "soon"}, "decision_interval: 'soon'"),
        ({"caption_prompts": ["..."]}, "'...': no words"),
        ({"caption_prompts": "nowhere.txt"}, "nowhere.txt: No such file"),
        ({"caption_prompts": 5}, "caption_prompts: 5: give a list"),
        ({"rules": {"metric": "x"}}, "give a list"),
        ({"rules": [{"metric": "vift/nll/a", "belo": 1, "weights": {}}]}, "did you mean 'below'"),
        ({"rules": [{"metric": "vift/nll/a", "below": 1, "above": 2, "weights": {}}]}, "below or above"),
        ({"rules": [{"metric": "loss", "below": 1, "weights": {"a": 1}}]}, "use vift/nll/STREAM or"),
        (
            {"rules": [{"metric": "vift/nll/a", "below": "low", "weights": {"a": 1}}]},
            "below: low: use a number",
        ),
    ],
)
def test_values_that_make_no_sense_are_refused(arguments: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError) as error:
        ViFT(**arguments)
    assert says in str(error.value) and "\n" not in str(error.value)


def test_a_mixture_needs_data_that_can_be_mixed() -> None:
    with pytest.raises(UserError, match="StreamingVLMDataset, not Samples"):
        jobs.train(
            samples=TEXT, global_batch=4, steps=1, algorithms=[(VIFT, {"mixture": {"weights": {"a": 1}}})]
        )


def test_a_rule_looks_at_nats_or_at_an_evaluator_and_never_at_a_nan() -> None:
    own, evaluated = make_rules(
        [
            {"metric": "vift/nll/text", "below": 0.5, "weights": {"captions": 1}},
            {"metric": "metrics/held-out/exact_match", "above": 0.9, "weights": {"text": 1}},
        ],
        "rules",
    )
    assert own.value({"text": 0.4}, {}) == 0.4 and own.holds(0.4) and not own.holds(0.5)
    assert own.value({"text": None}, {}) is None
    assert not own.holds(float("nan")) and not evaluated.holds(float("nan"))
    metric: Any = SimpleNamespace(update_called=True, compute=lambda: torch.tensor(0.95))
    assert evaluated.holds(evaluated.value({}, {"held-out": {"exact_match": metric}}) or 0)
    idle: Any = SimpleNamespace(update_called=False)
    assert evaluated.value({}, {"held-out": {"exact_match": idle}}) is None
    known = {"held-out": {"exact_match": metric}}
    for name, says in (
        ("metrics/held-out/exact_mach", "did you mean 'metrics/held-out/exact_match'"),
        ("metrics/heldout/x", "no evaluator 'heldout'; did you mean 'held-out'"),
    ):
        with pytest.raises(UserError, match=says):
            make_rules([{"metric": name, "above": 1, "weights": {}}], "r")[0].check_evaluators(
                known, "algorithms.vift"
            )
    evaluated.check_evaluators(known, "algorithms.vift")


def test_an_update_that_never_comes_leaves_no_trace() -> None:
    """A gradient scaler skips one: the scheduler steps, a checkpoint is made, and training goes on."""
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.AdamW([{"params": [weight], "part": "vision_tower"}], lr=1.0, weight_decay=0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: 1.0 / (n + 1))
    at_rest, group = VisionAtRest(optimizer), optimizer.param_groups[0]
    for scheduled in (True, False):
        before = group["lr"]
        at_rest.resting = True
        at_rest.begin()
        assert group["lr"] == group["weight_decay"] == 0
        if scheduled:
            scheduler.step()
        at_rest.give_back()  # where a batch ends
        assert group["weight_decay"] == 0.1 and group["lr"] == (0.5 if scheduled else before)
    assert at_rest.rested == 0


def test_refused_samples_are_named_in_a_file(tmp_path: Path) -> None:
    log = tmp_path / "skipped.jsonl"
    options = {"max_refused": None, "refused_log": str(log)}
    jobs.train(
        samples=[caption(1), asked(2), asked(3), words(4)],
        global_batch=4,
        steps=1,
        algorithms=[(VIFT, options)],
    )
    assert [json.loads(line) for line in log.read_text().splitlines()] == [
        {"id": f"zoo/{i}", "reason": "visual_instruction", "stream": "all"} for i in (2, 3)
    ]
