"""Adapters: on the language model's linear layers and nowhere else, trained with every method, merged away again."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors import safe_open
from transformers import AutoModelForImageTextToText

from opsin.data.batch import split_batch
from opsin.models.adapters import LoraSettings, add_adapters, count_adapters, merged, targets
from opsin.models.errors import UserError
from opsin.models.export import export_model
from opsin.models.parts import count_parameters, parameter_groups, set_trainable
from opsin.models.vlm import VisionLanguageModel
from opsin.training.check import check
from opsin.training.config import load
from opsin.training.guards import SkippedSamples
from opsin.training.init_weights import load_weights
from opsin.training.metrics_file import read_metrics
from opsin.training.stages import resolve
from opsin.training.train import train

import jobs
import methods
import runs
import zoo

LOUD = {"r": 4, "init_lora_weights": False}
ROSS = ("methods:LoudROSS", {"target": {"name": "pixels", "cell": 4}, "width": 64})
JARVIS = ("opsin.algorithms.jarvis:JARVIS", {"target": methods.teacher(), "ntp_probability": 0.0, "layer": 2})
L2T = ("opsin.algorithms.l2t:L2T", {"template_source": "none", "lambda_instruction": 0.3})
PROMPT = "Describe the picture."
VIFT = ("opsin.algorithms.vift:ViFT", {"caption_prompts": [PROMPT]})
EARLY = (JARVIS[0], {**JARVIS[1], "train": "proj+early"})
HIDING: dict[str, Any] = {"size": 32, "bidirectional": True}
FAMILIES = ["llava", "llava_next", "qwen2_5_vl"]


def model_of(family: str = "llava", **trainable: bool) -> VisionLanguageModel:
    built = zoo.build(family, seed=1)
    model = VisionLanguageModel(built.hf, built.processor)
    set_trainable(model, {"vision_tower": False, "mm_projector": True, "language_model": True, **trainable})
    return model


# What is asked ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"peft_type": "IA3"}, "peft_config.peft_type: 'IA3': LORA is what there is"),
        ({"task_type": "SEQ_CLS"}, "peft_config.task_type: 'SEQ_CLS': CAUSAL_LM is what there is"),
        ({"rank": 8}, "peft_config.rank: unknown key"),
        ({"lora_alhpa": 8}, "peft_config.lora_alhpa: unknown key; did you mean 'lora_alpha'?"),
        ({"r": 0}, "peft_config.r: expected a whole number, 1 or more, got 0"),
        ({"r": True}, "peft_config.r: expected a whole number, 1 or more, got True"),
        ({"lora_dropout": 1.0}, "peft_config.lora_dropout: expected a number, 0 or more and below 1, got 1.0"),
        ({"lora_alpha": float("nan")}, "peft_config.lora_alpha: expected a number above 0, got nan"),
        ({"target_modules": []}, "peft_config.target_modules: expected all-linear"),
        ({"layers_to_transform": [-1]}, "peft_config.layers_to_transform: expected numbers of layers"),
        ({"rank_pattern": {"q_proj": 0}}, "peft_config.rank_pattern: expected a mapping"),
        ({"rank_pattern": {"q_proj": 2.5}}, "peft_config.rank_pattern: expected a mapping"),
        ({"alpha_pattern": {"q_proj": 0}}, "peft_config.alpha_pattern: expected a mapping"),
        ({"lora_alpha": float("inf")}, "peft_config.lora_alpha: expected a number above 0, got inf"),
        ({"init_lora_weights": 1}, "peft_config.init_lora_weights: expected true, false or gaussian, got 1"),
        ({"bias": "all"}, "peft_config.bias: not here: biases stay frozen"),
        ({"use_dora": True}, "peft_config.use_dora: not here: DoRA is not supported"),
        ({"modules_to_save": ["lm_head"]}, "peft_config.modules_to_save: not here: trainable says"),
        ({"init_lora_weights": "pissa"}, "peft_config.init_lora_weights: expected true, false or gaussian"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_one_line(given: dict, said: str) -> None:
    with pytest.raises(UserError) as error:
        LoraSettings.of(given)
    assert str(error.value).startswith(said) and "\n" not in str(error.value)


def test_llm_foundrys_keys_are_taken_as_they_are() -> None:
    given = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 16, "lora_alpha": 32, "lora_dropout": 0.05,
             "target_modules": ["q_proj", "v_proj"], "bias": "none"}  # fmt: skip
    made = LoraSettings.of(given)
    assert (made.r, made.lora_alpha, made.lora_dropout) == (16, 32, 0.05)
    assert len(targets(model_of(), made)) == 8


@pytest.mark.parametrize("family", FAMILIES)
def test_all_linear_layers_of_the_language_model_and_none_else(family: str) -> None:
    model = model_of(family)
    add_adapters(model, LoraSettings(), seed=1)
    adapted = {n.partition(".lora_")[0] for n, _ in model.named_parameters() if ".lora_" in n}
    prefix = f"net.hf.{model.anatomy.language_model}.layers."
    assert len(adapted) == 4 * 7 and all(name.startswith(prefix) for name in adapted)
    counts = {c.part: c for c in count_parameters(model)}
    count = count_adapters(model)
    assert count is not None and counts["language_model"].trainable == count.parameters
    assert count.base == counts["language_model"].frozen and count.layers == 28
    assert counts["vision_tower"].trainable == 0 and counts["mm_projector"].frozen == 0
    groups = parameter_groups(model, 1e-3, {"language_model": 5e-3}, 0.1)
    rates = {g["part"]: g["lr"] for g in groups}
    assert rates == {"mm_projector": 1e-3, "language_model": 5e-3}


@pytest.mark.parametrize(
    ("given", "count"),
    [
        ({"target_modules": ["q_proj"]}, 4),  # the tower has layers of this name, too
        ({"target_modules": r".*language_model.*\.(up|down)_proj"}, 8),
        ({"target_modules": ["layers.1.self_attn.q_proj"]}, 1),
        ({"exclude_modules": ["down_proj", "up_proj", "gate_proj"]}, 16),
        ({"layers_to_transform": [0, 3]}, 14),
        ({"layers_to_transform": 2, "target_modules": ["o_proj"]}, 1),
    ],
)
def test_layers_are_chosen_by_name_expression_and_number(given: dict, count: int) -> None:
    assert len(targets(model_of(), LoraSettings.of(given))) == count


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"target_modules": ["qproj"]}, "has no layer 'qproj'; did you mean 'q_proj'?"),
        ({"target_modules": ["lm_head"]}, "'lm_head' is lm_head, and adapters go to the language model's layers alone"),
        ({"target_modules": ["linear_1"]}, "is model.multi_modal_projector.linear_1, and adapters go to"),
        ({"target_modules": "(("}, "is no regular expression"),
        ({"layers_to_transform": [4]}, "4: the language model has layers 0 to 3"),
        ({"target_modules": ["q_proj"], "exclude_modules": ["q_proj"]}, "no layer is left to adapt"),
        ({"rank_pattern": {"qproj": 4}}, "rank_pattern: no adapted layer is 'qproj'; did you mean 'q_proj'?"),
        ({"alpha_pattern": {"v_proj": 4}, "target_modules": ["q_proj"]}, "alpha_pattern: no adapted layer is 'v_proj'"),
        ({"rank_pattern": {"((": 4}}, "rank_pattern: '((' is no regular expression"),
    ],
)  # fmt: skip
def test_layers_that_are_not_there_are_one_line(given: dict, said: str) -> None:
    with pytest.raises(UserError) as error:
        targets(model_of(), LoraSettings.of(given))
    assert said in str(error.value) and "\n" not in str(error.value)


def test_a_frozen_language_model_has_nothing_to_adapt() -> None:
    with pytest.raises(UserError, match=r"which trainable\.language_model: false freezes"):
        add_adapters(model_of(language_model=False), LoraSettings(), seed=1)


# What is put in -----------------------------------------------------------------------------------------------


def logits(model: VisionLanguageModel, family: str = "llava") -> torch.Tensor:
    (part,) = split_batch(jobs.collator(zoo.build(family))(jobs.mixed_samples(4)), None)
    return model.eval().logits(part)


def test_new_adapters_change_nothing_and_are_a_function_of_the_seed() -> None:
    plain, adapted, same, other = (model_of() for _ in range(4))
    before = torch.get_rng_state()
    for model, seed in ((adapted, 5), (same, 5), (other, 6)):
        add_adapters(model, LoraSettings(lora_dropout=0.5), seed)
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(logits(plain), logits(adapted))
    a, b, c = (m.state_dict() for m in (adapted, same, other))
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert any(not torch.equal(a[k], c[k]) for k in a)


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"use_rslora": True},
        {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3}, "lora_alpha": 7},
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merging_a_state_is_what_peft_merges(given: dict, dtype: torch.dtype) -> None:
    from peft.tuners.lora import LoraLayer

    model = model_of().to(dtype)
    add_adapters(model, LoraSettings.of({**LOUD, **given}), seed=5)
    state = merged(model.state_dict())
    names = set(model_of().state_dict())
    assert set(state) == names and all(v.dtype == dtype for v in state.values())
    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.merge()
    found = {k.replace(".base_layer.", "."): v for k, v in model.state_dict().items() if ".lora_" not in k}
    assert set(found) == names
    for name, value in state.items():
        assert torch.allclose(
            value.float(), found[name].float(), atol=1e-6 if dtype == torch.float32 else 1e-2
        )
    assert merged(state).keys() == state.keys()


# Trained ------------------------------------------------------------------------------------------------------


def parted(result: dict[str, Any]) -> dict[str, dict[str, torch.Tensor]]:
    """First gradients by kind of parameter."""
    found: dict[str, dict[str, torch.Tensor]] = {"adapter": {}, "projector": {}, "head": {}, "else": {}}
    for name, gradient in result["gradients"][0].items():
        kind = "adapter" if ".lora_" in name else "projector" if "projector" in name else "head" if "auxiliary" in name else "else"  # fmt: skip
        found[kind][name] = gradient
    return found


def captioned(count: int) -> list[dict]:
    """Pictures with a caption, and words: what ViFT leaves in."""
    samples = [zoo.sample(i, images=(1, 0, 2, 1)[i % 4]) for i in range(count)]
    for sample in samples:
        turn = sample["conversations"][0]
        turn["value"] = "<image>\n" * turn["value"].count("<image>") + PROMPT
    return samples


@pytest.mark.parametrize("methods_on", [[], [ROSS, JARVIS, L2T, VIFT], [EARLY]], ids=["none", "all", "early"])
def test_adapters_projector_and_heads_are_trained_and_the_base_keeps_its_bits(methods_on: list) -> None:
    result = jobs.train(
        samples=captioned(16), steps=2, algorithms=methods_on, prepared={"lora": LOUD}, **HIDING
    )
    found, start = parted(result), zoo.build("llava", seed=1, size=32).hf.state_dict()
    assert found["adapter"] and found["projector"] and not found["else"]
    assert bool(found["head"]) == bool(methods_on)
    early = {f"layers.{n}." for n in range(2 if methods_on == [EARLY] else 4)}
    assert {n for n in found["adapter"] if any(e in n for e in early)} == set(found["adapter"])
    idle = [n for kind in ("adapter", "projector", "head") for n, g in found[kind].items() if not g.any()]
    assert not idle
    for name, value in result["weights"].items():
        own = name.removeprefix("net.hf.").replace(".base_layer.", ".")
        if ".lora_" not in name and "projector" not in name and "auxiliary" not in name:
            assert torch.equal(value, start[own]), name


def test_adapters_with_dropout_are_checkpointed_to_the_same_numbers() -> None:
    lora = {**LOUD, "lora_dropout": 0.4}
    options: dict[str, Any] = {"steps": 2, "algorithms": [ROSS, JARVIS, L2T], "microbatch": 4, **HIDING}
    plain = jobs.train(prepared={"lora": lora}, **options)
    saved = jobs.train(prepared={"lora": lora, "checkpointing": True}, **options)
    still = jobs.train(prepared={"lora": LOUD}, **options)
    assert plain["losses"] == saved["losses"] != still["losses"]
    for a, b in zip(plain["gradients"], saved["gradients"], strict=True):
        assert a.keys() == b.keys() and all(torch.allclose(a[k], b[k], atol=1e-6) for k in a)


@pytest.mark.world
@pytest.mark.parametrize("parallel", ["ddp", "fsdp2"])
def test_two_ranks_give_the_numbers_and_the_export_of_one(ranks, tmp_path: Path, parallel: str) -> None:
    options: dict[str, Any] = {
        "samples": jobs.mixed_samples(16, "first_half"), "global_batch": 8, "steps": 2, "lr": 1e-3,
        "prepared": {"lora": LOUD, "checkpointing": parallel == "fsdp2"}, **HIDING,
    }  # fmt: skip

    def on(name: str) -> list:
        return [ROSS, EARLY, ("prepared:Export", {"folder": str(tmp_path / name), "sharded": True})]

    one = jobs.train(algorithms=on("one"), **options)
    two = ranks.run("jobs:train", parallel=parallel, algorithms=on("two"), **options)
    assert two[0]["fsdp"] == (parallel == "fsdp2") and not (two[0]["fsdp"] and two[0]["plain_parameters"])
    for a, b in zip(one["losses"], two[0]["losses"], strict=True):
        assert a == pytest.approx(b, abs=1e-4)
    assert one["gradients"][0].keys() == two[0]["gradients"][0].keys()
    for name, gradient in one["gradients"][0].items():
        assert torch.allclose(gradient, two[0]["gradients"][0][name], atol=1e-5), name
    files = [safe_open(tmp_path / n / "model.safetensors", "pt") for n in ("one", "two")]  # type: ignore[no-untyped-call]
    assert files[0].keys() == files[1].keys()
    for name in files[0].keys():  # noqa: SIM118  (no mapping)
        assert torch.allclose(files[0].get_tensor(name), files[1].get_tensor(name), atol=1e-3), name


# Merged -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_plain_transformers_loads_the_export_and_says_the_same(family: str, tmp_path: Path) -> None:
    model, folder = model_of(family), tmp_path / "model"
    add_adapters(model, LoraSettings.of({**LOUD, "lora_alpha": 4, "lora_dropout": 0.1}), seed=5)
    said, base = logits(model, family), logits(model_of(family), family)
    model.processor = None  # the tests' Qwen processor cannot be saved
    export_model(model, folder)
    reloaded, info = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values())
    assert not any("lora" in path.read_text() for path in folder.glob("*.json"))
    again = logits(VisionLanguageModel(reloaded), family)
    assert (said - again).abs().max() < 1e-5 and (base - again).abs().max() > 1e-3
    assert torch.equal(logits(model, family), said)  # the model itself goes on with its adapters


def test_a_checkpoint_with_adapters_is_a_start_merged(tmp_path: Path) -> None:
    jobs.train(
        steps=2, prepared={"lora": LOUD}, trainer={"save_folder": str(tmp_path), "save_filename": "saved.pt"},
        algorithms=[("prepared:Export", {"folder": str(tmp_path / "model")})],
    )  # fmt: skip
    model, said = model_of(), io.StringIO()
    load_weights(model, tmp_path / "saved.pt", "keep", Console(file=said, width=300))
    exported = AutoModelForImageTextToText.from_pretrained(tmp_path / "model").state_dict()
    state = model.hf.state_dict()
    assert state.keys() == exported.keys()
    assert all(torch.allclose(state[k], v, atol=1e-6) for k, v in exported.items())
    assert " 0 dropped" in said.getvalue()
    trained = torch.load(tmp_path / "model.pt")  # by the model with its adapters, on the last batch
    (part,) = split_batch(jobs.collator(zoo.build("llava"))(jobs.mixed_samples(16)[8:]), None)
    assert (model.eval().logits(part) - trained).abs().max() < 1e-5


# From a YAML --------------------------------------------------------------------------------------------------

PEFT = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "lora_dropout": 0.2, "target_modules": "all-linear"}


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> str:
    return runs.write_scenes(tmp_path_factory.mktemp("scenes") / "data")


def test_check_prints_what_is_trained_and_a_run_resumes_to_the_bit_and_is_a_start(
    tmp_path: Path, scenes: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes: dict[str, Any] = {"peft_config": PEFT, "max_duration": "6ba", "save_interval": "2ba"}
    said = io.StringIO()
    check(runs.loaded(tmp_path, scenes, **changes), Console(file=said, width=200))
    assert "adapters: 4,736 parameters on 14 linear layers" in said.getvalue(), said.getvalue()
    whole = train(runs.loaded(tmp_path, scenes, "run_name=whole", **changes))
    stock = SkippedSamples.batch_end

    def stop(self: Any, state: Any, logger: Any) -> None:
        stock(self, state, logger)
        if int(state.timestamp.batch) == 3:  # in mid-epoch, a step after a checkpoint
            raise RuntimeError("stopped")

    monkeypatch.setattr(SkippedSamples, "batch_end", stop)
    with pytest.raises(RuntimeError, match="stopped"):
        train(runs.loaded(tmp_path, scenes, "run_name=cut", **changes))
    monkeypatch.undo()
    resumed = train(runs.loaded(tmp_path, scenes, "run_name=cut", **changes))
    assert [line["step"] for line in read_metrics(resumed.metrics)] == [1, 2, 3, 4, 5, 6]
    assert runs.losses(resumed.path) == runs.losses(whole.path)
    with (
        safe_open(whole.model / "model.safetensors", "pt") as a,  # type: ignore[no-untyped-call]
        safe_open(resumed.model / "model.safetensors", "pt") as b,  # type: ignore[no-untyped-call]
    ):
        assert not any("lora" in name for name in a.keys())  # noqa: SIM118
        assert all(torch.equal(a.get_tensor(n), b.get_tensor(n)) for n in a.keys())  # noqa: SIM118
    # The run is a start for one with adapters of its own: merged weights, new adapters.
    again = train(
        runs.loaded(tmp_path, scenes, "run_name=again", "init_from=whole", "optimizer.lr=0", **changes)
    )
    plain = train(
        runs.loaded(
            tmp_path, scenes, "run_name=plain", "init_from=whole", "optimizer.lr=0", max_duration="1ba"
        )
    )
    assert runs.losses(again.path)[0] == pytest.approx(runs.losses(plain.path)[0], abs=1e-6)
    assert json.loads((again.model / "config.json").read_text())["opsin"]["image_attention"] == "causal"


def test_mistakes_of_a_stage_have_their_place(tmp_path: Path, scenes: str) -> None:
    for changes, said in (
        ({"peft_config": {"rr": 4}}, r"run\.yaml:\d+: peft_config\.rr: unknown key; did you mean 'r'\?"),
        (
            {"peft_config": {}, "trainable": {"language_model": False}},
            r"peft_config: adapters are the language",
        ),
        ({"peft_config": 4}, r"peft_config: expected a mapping, got"),
    ):
        with pytest.raises(UserError, match=said):
            check(runs.loaded(tmp_path, scenes, **changes), Console(quiet=True))


def test_the_shipped_overlay_adapts_the_stage_that_trains_the_language_model() -> None:
    align, instruct = resolve(load(["quickstart.yaml", "adapters/lora.yaml"]))
    assert align.config.peft_config is None and instruct.config.peft_config is not None
    assert LoraSettings.of(instruct.config.peft_config).r == 128
