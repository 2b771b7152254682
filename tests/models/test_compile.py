"""Compiled layers: the same numbers, taps that still fire, copies with weights of their own, one graph a layer."""

from __future__ import annotations

import copy
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from opsin.data.batch import split_batch
from opsin.models.compile import CompiledForward, CompileSettings, compile_head, compile_model
from opsin.models.errors import UserError
from opsin.models.step import FINAL, Step
from opsin.models.vlm import VisionLanguageModel
from opsin.training.check import check
from opsin.training.config import load
from opsin.training.train import train

import jobs
import methods
import runs
import zoo

ROSS = ("methods:LoudROSS", {"target": {"name": "pixels", "cell": 4}, "width": 64, "layer": 2})
JARVIS = ("opsin.algorithms.jarvis:JARVIS", {"target": methods.teacher(), "ntp_probability": 0.0, "layer": 2})
L2T = ("opsin.algorithms.l2t:L2T", {"template_source": "none", "lambda_instruction": 0.3})
VIFT = ("opsin.algorithms.vift:ViFT", {"max_refused": None})
ALL = [ROSS, JARVIS, L2T, VIFT]
HIDING: dict[str, Any] = {"size": 32, "bidirectional": True}
EAGER = {"backend": "eager", "fullgraph": True}
"""The tracer alone, without a code generator: what is traced and when, in a second or two."""


@pytest.fixture(autouse=True)
def _forget() -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()


def model_of(family: str = "llava", settings: CompileSettings | None = None) -> VisionLanguageModel:
    built = zoo.build(family, seed=1)
    model = VisionLanguageModel(built.hf, built.processor)
    compile_model(model, settings)
    return model


def part_of(samples: list[dict], family: str = "llava") -> dict[str, Any]:
    (part,) = split_batch(jobs.collator(zoo.build(family))(samples), None)
    return part


def alike(a: dict[str, Any], b: dict[str, Any], tolerance: float) -> None:
    for x, y in zip(a["losses"], b["losses"], strict=True):
        assert x == pytest.approx(y, abs=tolerance)
    for x, y in zip(a["gradients"], b["gradients"], strict=True):
        assert x.keys() == y.keys()
        scale = max(float(v.abs().max()) for v in x.values())
        for name in x:
            assert float((x[name] - y[name]).abs().max()) <= tolerance * max(1.0, scale), name


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("fast", "compile: expected true, false or a mapping, got 'fast'"),
        ({"backnd": "inductor"}, "compile.backnd: unknown key; did you mean 'backend'?"),
        ({"backend": "inductr"}, "compile.backend: 'inductr': unknown; did you mean 'inductor'?"),
        ({"mode": "defalt"}, "compile.mode: 'defalt': unknown; did you mean 'default'?"),
        (
            {"mode": "reduce-overhead"},
            "compile.mode: 'reduce-overhead': its CUDA graphs write over outputs that methods keep; "
            "use default, max-autotune-no-cudagraphs",
        ),
        (
            {"backend": "cudagraphs"},
            "compile.backend: 'cudagraphs': its CUDA graphs write over outputs that methods keep; use inductor",
        ),
        ({"mode": "default", "backend": "eager"}, "compile.mode: 'default': unknown; modes are inductor's"),
        ({"dynamic": "yes"}, "compile.dynamic: expected true or false, got 'yes'"),
    ],
)
def test_what_cannot_be_is_one_line(given: Any, said: str) -> None:
    with pytest.raises(UserError) as error:
        CompileSettings.of(given)
    assert str(error.value) == said


def test_off_is_off() -> None:
    assert CompileSettings.of(False) is None and CompileSettings.of(None) is None
    assert CompileSettings.of(True) == CompileSettings("inductor")
    model = model_of()
    assert not any(isinstance(m.__dict__.get("forward"), CompiledForward) for m in model.modules())


def test_taps_that_come_later_fire_and_names_stay() -> None:
    """The first step asks for no layer's output: a compiled call with its hooks would give none in the second."""
    plain, compiled = model_of(), model_of(settings=CompileSettings.of(EAGER))
    assert plain.state_dict().keys() == compiled.state_dict().keys()
    for taps in (set(), {2, FINAL}, {1}, set()):
        part = part_of(jobs.mixed_samples(4))
        found = []
        for model in (plain, compiled):
            step = Step(part, taps=set(taps))
            out = model.net.train()(part, step)
            found.append((out["nll"], step.tapped))
        assert torch.equal(found[0][0], found[1][0])
        assert set(found[0][1]) == set(found[1][1]) == taps
        assert all(torch.equal(found[0][1][n], found[1][1][n]) for n in taps)


def test_a_copy_reads_its_own_weights() -> None:
    model = model_of(settings=CompileSettings.of(EAGER)).eval()
    part = part_of(jobs.mixed_samples(4))
    before = model.logits(part)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.anatomy.decoder_layers(model.hf).parameters():
            parameter.mul_(1.5)
    assert torch.equal(twin.logits(part), before) and not torch.equal(model.logits(part), before)
    layer = twin.anatomy.decoder_layers(twin.hf)[0]
    forward: Any = layer.forward
    assert isinstance(forward, CompiledForward) and forward.module is layer


def test_heads_without_blocks_are_left_as_they_are() -> None:
    model = model_of(settings=CompileSettings.of(EAGER))
    assert compile_head(model, methods.Read(4)) == 0
    assert compile_head(model_of(), torch.nn.Linear(2, 2)) == 0


@pytest.mark.parametrize("packing", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_all_methods_give_the_same_numbers_and_a_layer_is_one_graph(packing: bool) -> None:
    """``fullgraph`` makes an error of every break. Layers share their graphs, and sizes are variables of them."""
    options: dict[str, Any] = {"algorithms": ALL, "packing": packing, "steps": 3, "microbatch": 4, **HIDING}
    compiled = jobs.train(prepared={"compiled": EAGER}, **options)
    counters = torch._dynamo.utils.counters
    assert not counters["graph_break"]
    assert 2 <= counters["stats"]["unique_graphs"] <= 12, counters["stats"]
    alike(jobs.train(**options), compiled, 1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("family", zoo.EVERY_FAMILY)
def test_every_family_has_layers_of_one_graph(family: str) -> None:
    compiled = jobs.train(family, steps=2, algorithms=[L2T], prepared={"compiled": EAGER})
    alike(jobs.train(family, steps=2, algorithms=[L2T]), compiled, 1e-6)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_gradients_are_the_same(backend: str) -> None:
    """Where the backward is compiled, too; with adapters and checkpointed layers."""
    ways: dict[str, Any] = {"lora": {"r": 4, "init_lora_weights": False}, "checkpointing": True}
    options: dict[str, Any] = {"algorithms": [ROSS, L2T], "steps": 2, "lr": 1e-3, **HIDING}
    compiled = jobs.train(prepared={**ways, "compiled": {"backend": backend, "fullgraph": True}}, **options)
    alike(jobs.train(prepared=ways, **options), compiled, 1e-5)


@pytest.mark.world
def test_sharded_compiled_and_checkpointed_at_once_is_one_process(ranks) -> None:
    options: dict[str, Any] = {
        "samples": jobs.mixed_samples(8, "first_half"), "global_batch": 4, "steps": 2, "microbatch": 2,
        "algorithms": [ROSS, JARVIS, L2T], "lr": 1e-3, **HIDING,
    }  # fmt: skip
    one = jobs.train(**options)
    two = ranks.run(
        "jobs:train", parallel="fsdp2", prepared={"compiled": EAGER, "checkpointing": True}, **options
    )
    assert two[0]["fsdp"] and two[0]["plain_parameters"] == []
    alike(one, two[0], 1e-4)


def test_a_run_compiles_and_composers_own_key_is_refused(tmp_path: Path, tmp_path_factory: Any) -> None:
    scenes = runs.write_scenes(tmp_path_factory.mktemp("scenes") / "data", samples=16)
    compiled = {"compile": {"backend": "eager"}}
    whole = train(runs.loaded(tmp_path, scenes, "run_name=plain", max_duration="2ba"))
    same = train(runs.loaded(tmp_path, scenes, "run_name=compiled", max_duration="2ba", **compiled))
    assert runs.losses(whole.path) == pytest.approx(runs.losses(same.path), abs=1e-6)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"]
    file = runs.config_file(tmp_path, scenes, compile_config={"mode": "default"})
    with pytest.raises(UserError, match=r"compile_config: not here: Composer compiles .*; use compile: true"):
        load([file])
    with pytest.raises(UserError, match=r"run\.yaml:\d+: compile\.bakend: unknown key"):
        check(runs.loaded(tmp_path, scenes, compile={"bakend": 1}), Console(file=io.StringIO()))
