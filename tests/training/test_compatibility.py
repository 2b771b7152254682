"""The table of what goes with what: its page, that every refused cell is refused, and that the others train."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
from rich.console import Console

from opsin.algorithms.jarvis import JARVIS
from opsin.algorithms.l2t import L2T
from opsin.models.anatomy import CAPABILITIES, families
from opsin.models.attention import TAKE_MASKS
from opsin.models.errors import UserError
from opsin.training import compatibility, compatibility_page
from opsin.training.check import check, refuse_mistakes
from opsin.training.compatibility import DEFAULTS, NEEDS, OK, REFUSED, SETTINGS, WARNING, of_method, of_run
from opsin.training.compatibility_page import COLUMNS, STAGES, cell, lacks_of, page, status
from opsin.training.composer_rules import RULES
from opsin.training.registry import METHODS
from opsin.training.registry import algorithms as registry
from opsin.training.train import train

import jobs
import methods
import runs
import zoo

DOCS = Path(__file__).parents[2] / "docs" / "compatibility.md"
CLASSES = {name: registry.get(name, name) for name in METHODS}
SMALLEST: dict[str, tuple[str, dict[str, Any]]] = {
    "l2t": ("opsin.algorithms.l2t:L2T", {"template_source": "none", "lambda_instruction": 0.3}),
    "ross": ("methods:LoudROSS", {"target": {"name": "pixels", "cell": 4}, "width": 64}),
    "jarvis": ("opsin.algorithms.jarvis:JARVIS", {"target": methods.teacher(), "ntp_probability": 0.0, "layer": 2}),
    "vift": ("opsin.algorithms.vift:ViFT", {"max_refused": None}),
}  # fmt: skip
"""Each method with arguments with which it acts on the tests' models."""


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> str:
    return runs.write_scenes(tmp_path_factory.mktemp("scenes") / "data")


# The page, and what it is made of -----------------------------------------------------------------------------


def test_the_page_is_the_table() -> None:
    assert DOCS.read_text() == page(), "python -m opsin.training.compatibility_page > docs/compatibility.md"


@pytest.mark.parametrize("name", METHODS)
def test_methods_declare_what_somebody_knows(name: str) -> None:
    """A name that is neither a setting nor a keyword would never hold, and the rule never act."""
    kind = CLASSES[name]
    made = kind()
    assert set(kind.needs) <= set(NEEDS) and set(made.needs) <= set(NEEDS)
    facts = {**DEFAULTS, **STAGES["instruct"], "family": "llava"}

    def keyword(key: str) -> Any:
        assert hasattr(made, key), key
        return getattr(made, key)

    for verdict in of_method(made, facts, {}, None, keyword):
        assert verdict.status == WARNING and verdict.setting.startswith("stage"), verdict


def test_a_settings_rule_names_settings() -> None:
    for conditions, (state, why) in SETTINGS.items():
        assert all(name in DEFAULTS for name, _, _ in compatibility.parsed(conditions))
        assert state in (WARNING, REFUSED) and why


def test_every_family_tells_what_it_lacks() -> None:
    for family in families():
        assert set(lacks_of(family)) <= set(CAPABILITIES)


class Picky(methods.MeanColour):
    """Refuses and warns of whatever can be said."""

    name: ClassVar[str] = "picky"
    needs: ClassVar[frozenset[str]] = frozenset({"images"})
    refuses: ClassVar[dict[str, str]] = {
        "packing=true": "rows are pictures",
        "layer=1, lora=true": "the first layer stays",
        "train_loader.padding_side=left": "it counts from the left",
    }
    warns: ClassVar[dict[str, str]] = {"weight!=1.0": "nobody tried another weight", "family=gemma3": "slow"}


def said(method: Any, lacks: dict[str, str] | None = None, **facts: Any) -> list[tuple[str, str, str]]:
    def keyword(key: str) -> Any:
        if not hasattr(method, key):
            raise LookupError(key)
        return getattr(method, key)

    def setting(key: str) -> Any:
        if key != "train_loader.padding_side":
            raise LookupError(key)
        return facts.get("side", "right")

    found = of_method(method, {**DEFAULTS, **facts}, lacks or {}, setting, keyword)
    return [(v.status, v.setting, v.only) for v in found]


def test_conditions_are_about_settings_keys_and_keywords() -> None:
    assert said(Picky()) == []
    assert said(Picky(), packing=True) == [(REFUSED, "train_loader.packing: true", "")]
    assert said(Picky(), lora=True) == []
    assert said(Picky(layer=1), lora=True) == [(REFUSED, "peft_config: true", "layer: 1")]
    assert said(Picky(), side="left") == [(REFUSED, "train_loader.padding_side: left", "")]
    assert said(Picky(weight=0.5)) == [(WARNING, "", "weight other than 1.0")]
    assert said(Picky(), family="gemma3") == [(WARNING, "model family: gemma3", "")]
    # Of the class alone a keyword is not known: the page says with which it holds.
    alone = of_method(Picky, {**DEFAULTS, "lora": True}, {})
    assert [(v.status, v.setting, v.only) for v in alone] == [
        (REFUSED, "peft_config: true", "layer: 1"),
        (REFUSED, "", "train_loader.padding_side: left"),
        (WARNING, "", "weight other than 1.0"),
    ]
    assert status(alone) == OK


def test_what_nobody_knows_is_an_error_of_the_method() -> None:
    class Wrong(methods.MeanColour):
        refuses: ClassVar[dict[str, str]] = {"pakcing=true": "?"}

    class Needy(methods.MeanColour):
        needs: ClassVar[frozenset[str]] = frozenset({"sounds"})

    class Vague(methods.MeanColour):
        refuses: ClassVar[dict[str, str]] = {"packing": "?"}

    with pytest.raises(ValueError, match="'packing': a condition is name=value or name!=value"):
        said(Vague())
    with pytest.raises(ValueError, match="'pakcing=true' names 'pakcing', no setting and no keyword"):
        said(Wrong())
    with pytest.raises(ValueError, match="needs 'sounds', which is unknown"):
        said(Needy())


def test_what_families_and_attention_lack_is_refused_where_it_is_needed() -> None:
    jarvis = JARVIS(target=methods.teacher())
    assert said(jarvis, {"masks": "its mask is built inside"}, family="odd") == [
        (REFUSED, "model family: odd", "")
    ]
    assert said(JARVIS(target=methods.teacher(), masks="none"), {"masks": "?"}, family="odd") == []
    words = {"attn_implementation": "flash_attention_2", "chat_template": "vicuna_v1"}
    assert said(L2T(), {"masks": "?"}, **words) == []
    facts = {**DEFAULTS, "family": "odd", "packing": True, "turns": "independent"}
    verdicts = of_run(facts, {"packing": "rows are one document"})
    assert [(v.status, v.setting) for v in verdicts] == [
        (REFUSED, "train_loader.packing: true and model family: odd")
    ]
    flash = of_run({**facts, "attn_implementation": "flash_attention_3"}, {})
    assert [v.status for v in flash] == [REFUSED, REFUSED]
    meta = of_run(
        {**facts, "packing": False, "turns": "meta", "attn_implementation": "flash_attention_2"}, {}
    )
    assert [v.status for v in meta] == [WARNING]


# Refused cells are refused ------------------------------------------------------------------------------------

YAML: dict[str, dict[str, Any]] = {
    "attn_implementation": {"model": "attn_implementation"}, "packing": {"train_loader": "packing"},
    "turns": {"train_loader": "turns"}, "chat_template": {"chat_template": None}, "stage": {"stage": None},
    "bidirectional_images": {"model": "bidirectional_images"},
}  # fmt: skip


def configured(folder: Path, data: str, changes: dict[str, Any], **more: Any) -> Any:
    """A small run with some settings of the table."""
    arguments = []
    for key, value in changes.items():
        ((section, inner),) = YAML[key].items()
        arguments.append(f"{section}{f'.{inner}' if inner else ''}={value}")
    return runs.loaded(folder, data, *arguments, **more)


REFUSED_CELLS = [
    (name, label)
    for name, kind in CLASSES.items()
    for label, changes in {**COLUMNS, **STAGES}.items()
    if status(cell(kind, changes, {})) == REFUSED
]


def test_there_are_refused_cells() -> None:
    assert ("jarvis", "flash_attention_2") in REFUSED_CELLS and ("l2t", "align") in REFUSED_CELLS


@pytest.mark.parametrize(("name", "label"), REFUSED_CELLS)
def test_a_refused_cell_is_refused_before_anything_is_built(
    name: str, label: str, tmp_path: Path, scenes: str
) -> None:
    changes = {**COLUMNS, **STAGES}[label]
    stage = changes.get("stage", CLASSES[name].stages[0])
    arguments = {**SMALLEST[name][1], "stages": [stage]}
    loaded = configured(tmp_path, scenes, {**changes, "stage": stage}, algorithms={name: arguments})
    why = next(v.why for v in cell(CLASSES[name], changes, {}) if v.status == REFUSED)
    for look in (refuse_mistakes, train, lambda x: check(x, Console(quiet=True))):
        with pytest.raises(UserError) as error:
            look(loaded)
        assert f"algorithms.{name}" in str(error.value) and why in str(error.value)
        assert "\n" not in str(error.value)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("beside", compatibility_page.BESIDE)
def test_settings_that_do_not_go_together_are_refused(beside: str, tmp_path: Path, scenes: str) -> None:
    changes = {"attn_implementation": "flash_attention_2", **compatibility_page.BESIDE[beside]}
    assert status(cell(None, changes, {})) == REFUSED
    with pytest.raises(UserError, match="do not go together") as error:
        refuse_mistakes(configured(tmp_path, scenes, changes))
    assert "use sdpa, eager or flex_attention" in str(error.value)


def test_what_a_model_lacks_is_refused_when_it_is_built(
    tmp_path: Path, scenes: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from opsin.models import net

    stock = net.anatomy_of
    monkeypatch.setattr(
        net, "anatomy_of", lambda hf: replace(stock(hf), refuses={"packing": "rows are whole"})
    )
    loaded = configured(tmp_path, scenes, {"packing": True}, max_duration="1ba")
    refuse_mistakes(loaded)
    for look in (train, lambda x: check(x, Console(quiet=True))):
        with pytest.raises(UserError, match=r"packing: true and model family: llava do not .*rows are whole"):
            look(loaded)


def test_a_method_that_is_off_refuses_nothing(tmp_path: Path, scenes: str) -> None:
    off = {"l2t": {"lambda_instruction": 0.0}}
    refuse_mistakes(configured(tmp_path, scenes, {"chat_template": "plain"}, algorithms=off))


def test_flex_attention_is_refused_on_a_cpu_and_may_be_looked_at(tmp_path: Path, scenes: str) -> None:
    flex = {"attn_implementation": "flex_attention"}
    frozen = {"vision_tower": False, "mm_projector": True, "language_model": True}
    check(configured(tmp_path, scenes, flex, trainable=frozen), Console(quiet=True))
    with pytest.raises(UserError, match="FlexAttention does not train on a CPU"):
        train(configured(tmp_path, scenes, flex, trainable=frozen, device="cpu"))


# Warnings are printed -----------------------------------------------------------------------------------------


def test_warnings_stand_in_the_check_and_at_the_start_of_training(tmp_path: Path, scenes: str) -> None:
    if "picky" not in registry.names():
        registry.register("picky", Picky)
    loaded = runs.loaded(tmp_path, scenes, stage="instruct", max_duration="1ba", algorithms={
        "picky": {"weight": 0.5}, "jarvis": {"target": methods.teacher()}})  # fmt: skip
    lines = []
    for look in (check, train):
        out = io.StringIO()
        look(loaded, Console(file=out, width=400))
        lines.append(
            [line.partition("warning: ")[2] for line in out.getvalue().splitlines() if "warning: " in line]
        )
    assert lines[0] == lines[1] and len(lines[0]) == 2
    nowhere, picky = lines[0]
    assert (
        "algorithms.jarvis: is used in no stage of this run (instruct): its paper uses it in align" in nowhere
    )
    assert picky.endswith("picky with weight other than 1.0: nobody tried another weight"), picky
    out = io.StringIO()
    align = {"l2t": {**SMALLEST["l2t"][1], "stages": ["align"]}, "vift": {"stages": "align"}}
    check(runs.loaded(tmp_path, scenes, stage="align", algorithms=align), Console(file=out, width=400))
    assert out.getvalue().count("beside stage: align (its paper uses it in instruct)") == 2


# The others train ---------------------------------------------------------------------------------------------

WAYS: dict[str, dict[str, Any]] = {
    "sdpa": {},
    "eager": {"prepared": {"attention": "eager"}},
    "packing": {"packing": True},
    "LoRA": {"prepared": {"lora": {"r": 4, "init_lora_weights": False}}},
    "compile": {"prepared": {"compiled": {"backend": "eager"}}},
    "checkpointing": {"prepared": {"checkpointing": True}},
}
"""Columns of the table as jobs take them; FSDP2 has ranks, flex and flash attention a GPU."""
GPU_OR_RANKS = {"FSDP2", "flex_attention", "flash_attention_2"}


def together(*ways: str) -> dict[str, Any]:
    """Several columns at once."""
    merged: dict[str, Any] = {"prepared": {}}
    for way in ways:
        options = dict(WAYS[way])
        merged["prepared"] |= options.pop("prepared", {})
        merged |= options
    return merged


def trains(name: str, family: str, options: dict[str, Any]) -> None:
    """One step in which the method acts: its loss, finite; gradients that reach the model, and adapters if there are some."""
    samples = [zoo.sample(i, images=(1, 0, 2, 1)[i], turns=1 + i % 2, size=(40, 34)) for i in range(4)]
    result = jobs.train(
        family, samples, steps=1, size=32, bidirectional=family == "llava", max_seq_len=3000,
        algorithms=[SMALLEST[name]], global_batch=4, **options,
    )  # fmt: skip
    losses = result["losses"][0]
    assert all(value == value and abs(value) != float("inf") for value in losses.values())
    assert all(losses[f"loss/train/{key}"] != 0 for key in CLASSES[name].loss_keys)
    moved = [n for n, g in result["gradients"][0].items() if bool(g.any()) and "auxiliary" not in n]
    # ViFT leaves out the samples with a picture and a question: words alone are learnt from.
    assert moved and (name == "vift" or [n for n in moved if ".lora_" not in n])
    assert bool([n for n in moved if ".lora_" in n]) == ("lora" in options["prepared"])
    if CLASSES[name].loss_keys:
        heads = [g for n, g in result["gradients"][0].items() if "auxiliary" in n]
        assert heads and any(bool(g.any()) for g in heads)


def test_every_column_is_tried_somewhere() -> None:
    assert set(WAYS) | GPU_OR_RANKS == set(COLUMNS) and set(TAKE_MASKS) < set(COLUMNS)


@pytest.mark.parametrize(
    ("name", "family", "ways"),
    [
        ("l2t", "llava", ("eager", "packing")),
        ("l2t", "llava_next", ("LoRA", "checkpointing")),
        pytest.param("l2t", "qwen2_5_vl", ("compile",), marks=pytest.mark.slow),  # test_compile.py has it
        ("ross", "qwen2_5_vl", ("eager", "packing")),
        ("ross", "llava", ("LoRA", "checkpointing")),
        ("ross", "llava_next", ("compile",)),
        ("jarvis", "llava_next", ("eager", "packing")),
        ("jarvis", "qwen2_5_vl", ("LoRA", "checkpointing")),
        ("jarvis", "llava", ("compile", "LoRA")),
        ("vift", "qwen2_5_vl", ("eager", "packing")),
        ("vift", "llava_next", ("LoRA", "checkpointing")),
        ("vift", "llava", ("compile",)),
    ],
)
def test_a_pairwise_cover_of_the_other_cells_trains(name: str, family: str, ways: tuple[str, ...]) -> None:
    for way in ways:
        assert status(cell(CLASSES[name], COLUMNS[way], {})) != REFUSED
    trains(name, family, together(*ways))


@pytest.mark.slow
@pytest.mark.parametrize("family", zoo.EVERY_FAMILY)
@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("way", WAYS)
def test_the_product_of_the_other_cells_trains(name: str, family: str, way: str) -> None:
    lacks = lacks_of(family)
    needed = {**COLUMNS[way], "family": family}
    if REFUSED in (status(cell(CLASSES[name], needed, lacks)), status(cell(None, needed, lacks))):
        pytest.skip("refused, which the tests above hold")
    trains(name, family, together(way))


# Composer's own -----------------------------------------------------------------------------------------------


def test_composers_algorithms_for_other_batches_are_refused_and_idle_ones_named(
    tmp_path: Path, scenes: str
) -> None:
    assert set(RULES) <= set(registry.names())
    always = [name for name, rules in RULES.items() if "" in rules]
    assert "mix_up" in always and "seq_length_warmup" in always
    for name in always:
        with pytest.raises(
            UserError, match=rf"algorithms\.{name}: does not work with a vision-language model"
        ):
            refuse_mistakes(runs.loaded(tmp_path, scenes, algorithms={name: {}}))
    out = io.StringIO()
    low = {"low_precision_layer_norm": {}}
    check(runs.loaded(tmp_path, scenes, algorithms=low, device="cpu"), Console(file=out, width=300))
    lines = [line for line in out.getvalue().splitlines() if line.startswith("warning: ")]
    assert len(lines) == 2 and "beside precision: fp32: it acts under amp_bf16 and amp_fp16 alone" in lines[0]
    assert "beside device: cpu: it has no effect on a CPU" in lines[1]
