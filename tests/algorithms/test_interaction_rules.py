"""Where two methods meet: a test for each rule in the cards ("Together with other methods").

Rules that are held elsewhere:

* what JARVIS hides ROSS neither reconstructs nor reads, and with ``text_loss: unmasked`` nothing is hidden from it:
  ``test_jarvis_interplay.py`` (on the pair), ``test_ross_interplay.py`` (whoever hides);
* refused documents add nothing to ROSS and JARVIS: these two files, and ``test_matrix_edges.py`` for every subset;
* JARVIS leaves L2T's labels as they are: ``test_jarvis_interplay.py``;
* a head leaves base weights, random state and data order as they are: ``test_matrix_alone.py``;
* Composer's clipping has one norm for all, so a detached head still shrinks the language model's step: ``test_ross.py``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from itertools import permutations
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar
from unittest.mock import MagicMock

import pytest
import torch
from composer.core import Algorithm, Event
from rich.console import Console

from opsin.algorithms.base import unwrap
from opsin.algorithms.clipping import GradientClippingByPart
from opsin.algorithms.compose import identical_by_construction
from opsin.algorithms.l2t import L2T
from opsin.algorithms.l2t.functional import NORMALISATIONS
from opsin.algorithms.vift import ViFT
from opsin.data.scenes import SceneConfig, write
from opsin.data.streaming import StreamingVLMDataset
from opsin.models.errors import UserError
from opsin.training.check import check
from opsin.training.metrics_file import read_metrics
from opsin.training.train import train

import jobs
import runs
import settings
from compare import same_bits
from methods import MeanColour
from settings import METHODS, make

L2T_HERE, VIFT_HERE = METHODS["l2t"].where, METHODS["vift"].where
LM = "loss/train/lm"


def terms(result: dict[str, Any], step: int = 0) -> dict[str, float]:
    """Losses of a step but the total, which is summed in the order of the methods."""
    return {k: v for k, v in result["losses"][step].items() if k != "loss/train/total"}


def step(algorithms: list[tuple[str, dict]], samples: list[dict[str, Any]], **options: Any) -> dict[str, Any]:
    return jobs.train(
        samples=samples,
        global_batch=len(samples),
        steps=1,
        algorithms=algorithms,
        **settings.MODEL,
        **options,
    )


# Order ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", ["masked", pytest.param("unmasked", marks=pytest.mark.slow)])
def test_the_order_of_methods_changes_no_term(words: str) -> None:
    """All 24 orders of the four, to the bit; what they add up to, and its gradient, but for rounding of the sum."""
    found = []
    for order in permutations(METHODS):
        specs = settings.algorithms(order, jarvis={"text_loss": words})
        found.append(step(specs, settings.mixed(), microbatch=2))
    first = found[0]
    assert set(terms(first)) == {LM, "loss/train/ross", "loss/train/jarvis"} and all(terms(first).values())
    for other in found[1:]:
        assert terms(other) == terms(first)
        for name, gradient in first["gradients"][0].items():
            assert torch.allclose(gradient, other["gradients"][0][name], rtol=1e-5, atol=1e-6), name


# L2T and ViFT --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [("l2t", "vift"), ("vift", "l2t")], ids=settings.name_of)
@pytest.mark.parametrize("packing", [False, True])
def test_l2t_never_labels_what_vift_refuses(order: tuple[str, str], packing: bool) -> None:
    """Words, weights and Z are those of a run in which the refused samples cannot be used at all."""
    good = [settings.caption(1, 2), settings.words(2, 2), settings.caption(3)]
    refused = settings.question(9, 2, turns=3)
    lost = {**refused, "conversations": settings.unusable(9)["conversations"]}
    specs = settings.algorithms(order)
    with_it, without = (step(specs, [good[0], odd, *good[1:]], packing=packing) for odd in (refused, lost))
    assert with_it["losses"][0][LM] == pytest.approx(without["losses"][0][LM], rel=1e-5)
    for name, gradient in without["gradients"][0].items():
        assert torch.allclose(gradient, with_it["gradients"][0][name], atol=1e-5), name
    for key in ("l2t/n_I", "l2t/n_A"):
        assert with_it["logged"][0][key] == without["logged"][0][key] > 0
    assert with_it["logged"][0]["vift/refused"] == 1 > without["logged"][0]["vift/refused"] == 0


def promised() -> list[dict[str, Any]]:
    """Captions, some with punctuation beside the picture, text, and a question about a picture."""
    odd = [settings.told(40 + i, 1, [said]) for i, said in enumerate((".", "?!"))]
    return [
        settings.told(1, 2, [""]),
        settings.words(2, 3),
        *odd,
        settings.words(3),
        settings.question(4, turns=2),
    ]


@pytest.mark.parametrize("normalisation", NORMALISATIONS)
def test_vift_with_l2t_under_defaults_is_vift(normalisation: str) -> None:
    vift = (VIFT_HERE, {"max_refused": None})
    l2t = {"template_source": "none", "lambda_instruction": 0.5, "normalisation": normalisation}
    results = {
        name: jobs.train(samples=promised() * 2, global_batch=6, steps=2, algorithms=specs, **settings.MODEL)
        for name, specs in {
            "vift": [vift],
            "both": [(L2T_HERE, l2t), vift],
            "turned": [vift, (L2T_HERE, l2t)],
            "on text": [vift, (L2T_HERE, {**l2t, "on_text_only": True})],
            "l2t": [(L2T_HERE, l2t)],
        }.items()
    }
    assert same_bits(results["vift"], results["both"]) and same_bits(results["vift"], results["turned"])
    assert not same_bits(results["vift"], results["on text"]) and not same_bits(
        results["vift"], results["l2t"]
    )
    said = identical_by_construction({"l2t": L2T(**l2t), "vift": ViFT(max_refused=None)})
    assert said is not None and said.to == ("vift",) and list(said.idle) == ["l2t"]


def test_what_is_identical_by_construction_is_said_by_the_methods_themselves() -> None:
    class LooksAtQuestions(MeanColour):
        """Somebody's method, which knows neither of ours."""

        name: ClassVar[str] = "looks"
        lives_on: Mapping[str, str] = {"visual_instructions": "it looks at questions about pictures alone"}

    l2t, vift = make("l2t"), ViFT()
    reason = (
        "l2t does nothing beside vift: without caption_prompts no picture keeps words beside it, and without "
        "on_text_only it learns instructions about pictures alone"
    )
    for methods in ({"l2t": l2t, "vift": vift}, {"vift": vift, "l2t": l2t}):
        said = identical_by_construction(methods)
        assert said is not None and said.reason == reason and said.to == ("vift",)
    everything = {
        "ross": make("ross"),
        "l2t": l2t,
        "looks": LooksAtQuestions(),
        "vift": vift,
        "clip": MagicMock(),
    }
    said = identical_by_construction(everything)
    assert said is not None and said.to == ("ross", "vift", "clip") and set(said.idle) == {"l2t", "looks"}
    for methods in (
        {"l2t": make("l2t", on_text_only=True), "vift": vift},
        {"l2t": l2t, "vift": ViFT(caption_prompts=["Describe the picture."])},
        {"l2t": make("l2t", lambda_response=0.5), "vift": vift},  # answers weigh less, so it does something
        {"l2t": make("l2t", lambda_instruction=0), "vift": vift},  # off: nothing to say
        {"l2t": l2t, "ross": make("ross"), "jarvis": make("jarvis")},
        {},
    ):
        assert identical_by_construction(methods) is None
    # The subsets of the matrix are none of them.
    for subset in settings.SUBSETS:
        specs = settings.algorithms(subset)[:-1]
        assert (
            identical_by_construction({n: make(n, **kw) for n, (_, kw) in zip(subset, specs, strict=True)})
            is None
        )


def stream_config(tmp_path: Path, algorithms: dict[str, Any], **changes: Any) -> dict[str, Any]:
    streams = {
        name: {"remote": runs.write_scenes(tmp_path / name, 24, stream=kind), "kind": name.removesuffix("s")}
        for name, kind in (("captions", "caption"), ("text", "text"))
    }
    return {
        "algorithms": algorithms, "max_duration": "4ba", "save_interval": "4ba", **changes,
        "train_loader": {"num_workers": 0, "dataset": {"remote": None, "streams": streams}},
    }  # fmt: skip


def test_check_says_so(tmp_path: Path) -> None:
    body = stream_config(tmp_path, {"l2t": {"template_source": "none"}, "vift": {}})
    for arguments, said in (((), True), (("algorithms.l2t.on_text_only=true",), False), (("algorithms.l2t=false",), False)):  # fmt: skip
        console = Console(record=True, width=300)
        check(runs.loaded(tmp_path, "", *arguments, **body), console)
        text = " ".join(console.export_text().split())
        assert (
            "identical by construction to the run with vift: l2t does nothing beside vift" in text
        ) == said


# Templates and mixtures ----------------------------------------------------------------------------------------


FREQUENT: dict[str, Any] = {
    "min_count": 1, "min_share": 0.0, "min_words": 0, "top_k": 100_000, "max_removed": 1.0,
}  # fmt: skip
"""So rare that every sentence is a template: the table is the counts."""


def templates(dataset: Any) -> list[tuple[str, int]]:
    """What L2T takes for templates of some data, by frequency."""
    l2t = L2T(template_source="frequency", **FREQUENT)
    state: Any = SimpleNamespace(dataloader=SimpleNamespace(dataset=dataset))
    l2t.fit_start(MagicMock(), state, MagicMock())
    assert l2t.table is not None
    return [(t.sentence, t.count) for t in l2t.table]


def asked(root: Path) -> dict[str, dict[str, str]]:
    """Two streams whose questions have other words."""
    for kind in ("colour", "size"):
        config = SceneConfig(objects=(1, 2), charts=0, sign=0, questions=2, kinds=(kind,))
        write(root / kind, config=config, seed=5, split="uniform", stream="vqa", samples=24)
    return {kind: {"remote": str(root / kind)} for kind in ("colour", "size")}


PHASES = [{"start": "0ba", "weights": {"colour": 1}}, {"start": "2ba", "weights": {"size": 1}}]


def test_templates_are_counted_in_all_streams_whatever_the_mixture_is_now(tmp_path: Path) -> None:
    streams = asked(tmp_path)

    def opened(**options: Any) -> StreamingVLMDataset:
        return StreamingVLMDataset(batch_size=4, shuffle=True, **options)

    whole = templates(opened(streams=streams))
    scheduled = opened(streams=streams, mixture={"phases": PHASES})
    assert whole and templates(scheduled) == whole
    scheduled.set_mixture({"size": 1})
    assert templates(scheduled) == whole
    # Every sentence of every stream counts, as often as all of them together have it.
    alone, counts = [dict(templates(opened(**stream))) for stream in streams.values()], dict(whole)
    assert counts == {s: sum(table.get(s, 0) for table in alone) for table in alone for s in table}
    assert all(table and table != counts for table in alone)


def test_a_switch_of_the_mixture_changes_no_template_in_a_run(tmp_path: Path) -> None:
    """They are frozen when fitting starts, while one stream alone is on; the run sees both."""
    streams = asked(tmp_path)
    dataset = {"remote": None, "streams": streams, "mixture": {"phases": PHASES, "ramp": "step"}}
    l2t = {"template_source": "frequency", **FREQUENT}
    body = {"algorithms": {"l2t": l2t}, "max_duration": "4ba", "save_interval": "4ba"}
    loader = {"num_workers": 0, "dataset": dataset}
    run = train(runs.loaded(tmp_path, "", **body, train_loader=loader))
    report = json.loads((run.stage("instruct") / "l2t_templates.json").read_text())
    expected = templates(StreamingVLMDataset(streams=streams, batch_size=8))
    assert [(t["sentence"], t["count"]) for t in report["templates"]] == expected
    assert any("colour" in s for s, _ in expected) and any("colour" not in s for s, _ in expected)
    last = read_metrics(run.metrics)[-1]
    assert last["mixture/samples/colour"] == last["mixture/samples/size"] == 16


# Steps that learn words alone ----------------------------------------------------------------------------------


@pytest.mark.parametrize("scope", ["step", "sample"])
@pytest.mark.parametrize("words", ["masked", "unmasked"])
def test_where_jarvis_masks_nothing_the_others_are_as_without_it(scope: str, words: str) -> None:
    """A step, or a batch of samples, for words alone (``ntp_probability``): labels, ROSS's views and noise are untouched."""
    never = {"ntp_scope": scope, "ntp_probability": 1 - 1e-9, "text_loss": words}
    names = ("ross", "l2t", "jarvis")
    beside = step(settings.algorithms(names, jarvis=never), settings.mixed(), microbatch=2)
    without = step(settings.algorithms(("ross", "l2t")), settings.mixed(), microbatch=2)
    assert terms(beside) == {**terms(without), "loss/train/jarvis": 0.0}
    for name, gradient in beside["gradients"][0].items():
        if name.startswith("net.auxiliary.jarvis."):
            assert not gradient.any()
        else:
            assert torch.equal(gradient, without["gradients"][0][name]), name
    masked = step(
        settings.algorithms(names, jarvis={**never, "ntp_probability": 0.0}), settings.mixed(), microbatch=2
    )
    hides = words == "masked"
    assert (terms(masked)["loss/train/ross"] != terms(without)["loss/train/ross"]) == hides
    assert (terms(masked)[LM] != terms(without)[LM]) == hides


# Clipping ------------------------------------------------------------------------------------------------------


class Blow(Algorithm):
    """Makes the gradient of every head a thousand times as large. Named last, it acts first where something has ended."""

    def match(self, event: Event, state: Any) -> bool:
        return event == Event.AFTER_TRAIN_BATCH

    def apply(self, event: Event, state: Any, logger: Any) -> None:
        for parameter in unwrap(state.model).net.auxiliary.parameters():
            parameter.grad *= 1000


def test_with_clipping_by_part_no_head_changes_the_step_of_the_language_model(monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    monkeypatch.setattr(jobs, "Blow", Blow, raising=False)
    ours = ("opsin.algorithms.clipping:GradientClippingByPart", {"clipping_threshold": 0.5})
    stock = ("composer.algorithms:GradientClipping", {"clipping_type": "norm", "clipping_threshold": 0.5})
    specs, samples = settings.algorithms(tuple(METHODS)), settings.mixed()
    for clip, same in ((ours, True), (stock, False)):
        quiet, blown = (step([*specs, clip, *more], samples) for more in ((), (("jobs:Blow", {}),)))
        assert quiet["losses"] == blown["losses"]
        base = [n for n in quiet["weights"] if not n.startswith("net.auxiliary.")]
        assert all(torch.equal(quiet["gradients"][0][n], blown["gradients"][0][n]) for n in base if n in quiet["gradients"][0]) == same  # fmt: skip
        assert all(torch.equal(quiet["weights"][n], blown["weights"][n]) for n in base) == same
        if same:  # each head by itself, too: one does not shrink another
            for part in ("hf", "auxiliary.ross", "auxiliary.jarvis"):
                of = [g for n, g in blown["gradients"][0].items() if n.startswith(f"net.{part}.")]
                assert float(torch.stack([g.norm() for g in of]).norm()) == pytest.approx(0.5, rel=1e-4)


@pytest.mark.parametrize("threshold", [0.0, -1.0, float("nan")])
def test_a_threshold_that_is_none_is_refused(threshold: float) -> None:
    with pytest.raises(UserError, match=r"clipping_threshold: \S+ is not positive"):
        GradientClippingByPart(threshold)
