"""Layers, toggles, and one readable line for every mistake."""

from __future__ import annotations

from pathlib import Path

import pytest

from opsin.models.errors import UserError
from opsin.training.config import load
from opsin.training.eval_config import load_suites
from opsin.training.stages import resolve, resolved_yaml


def _write(folder: Path, text: str, name: str = "a.yaml") -> str:
    path = folder / name
    path.write_text(text)
    return str(path)


BASE = """\
run_name: base
algorithms:
  l2t:
    lambda_instruction: 0.3
    turns: first
optimizer: {name: adamw, lr: 1.0e-3}
variables: {rate: 5}
"""


def test_files_merge_left_to_right_then_arguments(tmp_path: Path) -> None:
    a = _write(tmp_path, BASE)
    b = _write(
        tmp_path,
        "run_name: b\noptimizer: {lr: 2.0e-3}\nglobal_train_batch_size: ${variables.rate}\n",
        "b.yaml",
    )
    run = load([a, b], ["optimizer.lr=3e-3", "train_loader.packing=true"]).run
    assert (run.run_name, run.optimizer, run.global_train_batch_size) == (
        "b",
        {"name": "adamw", "lr": 3e-3},
        5,
    )
    assert run.train_loader.packing is True


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        ("algorithms.l2t=false", {"lambda_instruction": 0.3, "turns": "first", "enabled": False}),
        ("algorithms.l2t=true", {"lambda_instruction": 0.3, "turns": "first", "enabled": True}),
        ("algorithms.l2t={}", {"enabled": True}),
        ("algorithms.l2t.turns=all", {"lambda_instruction": 0.3, "turns": "all"}),
    ],
)
def test_a_toggle_keeps_the_keywords_and_only_braces_mean_defaults(
    tmp_path: Path, argument: str, expected: dict
) -> None:
    assert load([_write(tmp_path, BASE)], [argument]).run.algorithms["l2t"] == expected


def test_a_toggle_in_a_later_file_keeps_the_keywords(tmp_path: Path) -> None:
    later = _write(tmp_path, "algorithms: {l2t: false}\n", "b.yaml")
    assert load([_write(tmp_path, BASE), later]).run.algorithms["l2t"]["lambda_instruction"] == 0.3


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        (
            "max_duraton=1ep",
            "command line (max_duraton=1ep): max_duraton: unknown key; did you mean 'max_duration'?",
        ),
        ("seed=abc", "command line (seed=abc): seed: expected a whole number, got text 'abc'"),
        ("train_loader.packing=3", "train_loader.packing: expected true or false, got int 3"),
        ("train_loader.dataset.remot=x", "train_loader.dataset.remot: unknown key; did you mean 'remote'?"),
        ("trainable.vision_tower=maybe", "trainable.vision_tower: expected true or false, got text 'maybe'"),
        ("eval_loaders=3", "eval_loaders: expected a list, got int 3"),
        ("model=llava", "model: expected a mapping, got text 'llava'"),
        ("nonsense", "command line: 'nonsense' is no key=value"),
        ("run_name=${variables.nothing}", "nothing"),
    ],
)
def test_wrong_arguments_are_one_line(tmp_path: Path, argument: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        load([_write(tmp_path, BASE)], [argument])
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_message_points_at_file_and_line(tmp_path: Path) -> None:
    path = _write(tmp_path, "run_name: x\nstages:\n  instruct:\n    max_duraton: 1ep\n")
    with pytest.raises(
        UserError, match=r"a\.yaml:4: stages\.instruct\.max_duraton: unknown key; did you mean 'max_duration'"
    ):
        load([path])
    broken = _write(tmp_path, "run_name: x\n  bad: [\n", "broken.yaml")
    with pytest.raises(UserError, match=r"broken\.yaml:2: not valid YAML"):
        load([broken])
    with pytest.raises(UserError, match=r"no such file; did you mean 'quickstart.yaml'"):
        load(["quickstrt.yaml"])


STAGED = (
    "max_seq_len: 512\nchat_template: chatml\nscheduler: {name: linear_with_warmup, t_warmup: 1ba}\ninit_from: elsewhere\n"
    "stages:\n  align: {chat_template: plain, optimizer: {name: decoupled_adamw}}\n  instruct: {max_duration: 3ba, scheduler: {name: constant}}\n"
)


@pytest.mark.parametrize("more", ["", STAGED])
def test_a_resolved_configuration_is_the_same_run(tmp_path: Path, more: str) -> None:
    first = load([_write(tmp_path, BASE + more)], ["algorithms.l2t=false"])
    again = load([_write(tmp_path, resolved_yaml(first), "again.yaml")])
    assert resolve(again) == resolve(first)
    if not more:
        assert again.run == first.run


def test_a_stages_key_on_the_command_line_goes_to_every_stage(tmp_path: Path) -> None:
    path = _write(tmp_path, BASE + STAGED)
    stages = resolve(load([path], ["max_duration=7ba", "train_loader.dataset.remote=elsewhere"]))
    assert [s.config.max_duration for s in stages] == ["7ba", "7ba"]
    assert [s.config.train_loader.dataset.remote for s in stages] == ["elsewhere"] * 2
    assert [s.config.scheduler["name"] for s in stages] == ["linear_with_warmup", "constant"]
    own = resolve(load([path], ["max_duration=7ba", "stages.align.max_duration=5ba"]))
    assert [s.config.max_duration for s in own] == ["5ba", "7ba"]
    with pytest.raises(UserError, match=r"command line \(max_seq_len=x\)"):
        load([path], ["max_seq_len=x"])


def test_from_at_the_top_starts_the_first_stage_only(tmp_path: Path) -> None:
    (only,) = resolve(load([_write(tmp_path, BASE)], ["from=runs/t"]))
    assert only.start is not None and only.start.path == "runs/t"
    align, instruct = resolve(load([_write(tmp_path, BASE + STAGED)]))
    assert align.start is not None and align.start.path == "elsewhere"
    assert instruct.start is not None and instruct.start.path == "align"
    with pytest.raises(UserError, match="load_path: goes with one stage"):
        resolve(load([_write(tmp_path, BASE + STAGED)], ["load_path=x.pt"]))
    with pytest.raises(UserError, match="from and init_from mean the same"):
        load([_write(tmp_path, BASE)], ["from=a", "init_from=b"])


def test_a_stages_identity_follows_the_files_it_names(tmp_path: Path) -> None:
    templates, start = tmp_path / "templates.txt", tmp_path / "start"
    templates.write_text("Answer briefly.\n")
    start.mkdir()
    (start / "config.json").write_text("{}")
    (start / "model.safetensors").write_bytes(b"1234")
    shards = tmp_path / "data" / "train"
    shards.mkdir(parents=True)
    (shards / "index.json").write_text("{}")
    path = _write(tmp_path, BASE)
    arguments = [
        f"algorithms.l2t.templates={templates}",
        f"init_from={start}",
        f"train_loader.dataset={{streams: {{a: {{remote: {shards.parent}, split: train}}}}}}",
    ]
    identity = lambda *more: resolve(load([path], [*arguments, *more]))[0].identity  # noqa: E731
    seen = {identity()}
    for change in (
        lambda: templates.write_text("Answer in a word.\n"),
        lambda: (start / "model.safetensors").write_bytes(b"12345"),
        lambda: (shards / "index.json").write_text("{ }"),
        lambda: (shards / "sentences.json").write_text("{}"),
    ):
        change()
        assert identity() not in seen
        seen.add(identity())
    assert identity("callbacks={early_stopper: {monitor: nll}}") not in seen


def test_every_shipped_yaml_is_valid() -> None:
    folder = Path(__file__).parents[2] / "yamls"
    others = (
        "models",
        "cluster",
        "studies",
    )  # no configurations of runs; test_study_yamls.py looks at studies
    found = [
        p
        for p in folder.rglob("*.yaml")
        if "overlay" not in p.read_text()[:200] and p.parent.name not in others
    ]
    assert found
    for path in found:
        if path.parent.name == "evaluation":
            wanted = load_suites([str(path)])
            assert wanted.suites and set(wanted.suites) == set(wanted.config.suites)
            continue
        # A method's fragment is added to a run.
        run = [str(folder / "quickstart.yaml")] if path.parent.name == "algorithms" else []
        resolve(load([*run, str(path)]))


def test_stages_take_the_runs_defaults_and_chain(tmp_path: Path) -> None:
    text = BASE + (
        "max_seq_len: 99\nmodel: {name: scenes_llava}\nstages:\n"
        "  align: {chat_template: plain, trainable: {language_model: false}}\n"
        "  instruct: {max_seq_len: 77}\n  polish: {from: align}\n"
    )
    stages = resolve(load([_write(tmp_path, text)]))
    align, instruct, polish = stages
    assert [s.name for s in stages] == ["align", "instruct", "polish"]
    assert (align.config.chat_template, align.config.max_seq_len, instruct.config.max_seq_len) == (
        "plain",
        99,
        77,
    )
    assert (align.config.trainable.language_model, align.config.trainable.mm_projector) == (False, True)
    assert align.start is None and instruct.start.path == "align" and polish.start.path == "align"
    flat = resolve(load([_write(tmp_path, BASE)]))
    assert [s.name for s in flat] == ["instruct"]


def test_a_stages_identity_is_what_it_learns_from(tmp_path: Path) -> None:
    text = BASE + "model: {name: scenes_llava}\nstages:\n  align: {}\n  instruct: {}\n"
    path = _write(tmp_path, text)
    identities = lambda *arguments: [s.identity for s in resolve(load([path], arguments))]  # noqa: E731
    base = identities()
    assert base == identities(
        "run_name=other", "train_loader.num_workers=7", "save_interval=9ba", "eval_interval=3ba"
    )
    seeded, method, late = (
        identities("seed=18"),
        identities("algorithms.l2t.turns=all"),
        identities("stages.instruct.max_duration=9ba"),
    )
    assert seeded[0] != base[0] and seeded[1] != base[1]
    assert method[0] == base[0] and method[1] != base[1]  # L2T belongs to instruct
    assert late[0] == base[0] and late[1] != base[1]
