"""Parts of studies: trained once, kept under the hash of what makes them, ordinary folders to whoever reads them."""

from __future__ import annotations

import io
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from opsin.data.scenes import COLOURS, SceneConfig, sample, scene
from opsin.models.components import load_language_model, load_tokenizer, load_tower
from opsin.models.errors import UserError
from opsin.training.models import llava_from_parts
from opsin.training.study import part_kinds, parts
from opsin.training.study.spec import load_study

PARTS: dict[str, Any] = {
    "language_model": {"kind": "language_model", "steps": 4, "batch_size": 4},
    "tower": {"kind": "context_tower", "steps": 2, "batch_size": 4},
    "teacher": {"kind": "dense_tower", "steps": 2, "batch_size": 4, "width": 32, "layers": 2},
}
QUIET = Console(file=io.StringIO())


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """All parts, hardly trained, in a cache of their own."""
    cache = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OPSIN_CACHE", str(cache))
        assert parts.missing_parts(PARTS) == list(PARTS)
        parts.make_parts(PARTS, QUIET)
        assert parts.missing_parts(PARTS) == []
        return {name: parts.part_folder(given) for name, given in PARTS.items()}


def test_they_make_a_llava(made: dict[str, Path]) -> None:
    model = llava_from_parts(str(made["language_model"]), str(made["tower"]))
    assert model.hf.config.image_seq_length == 64
    assert model.hf.config.vision_config.model_type == "opsin_token_tower"
    two = llava_from_parts(
        str(made["language_model"]), vision_towers=[str(made["tower"]), str(made["teacher"])]
    )
    widths = [load_tower(str(made[n]), str).model.config.hidden_size for n in ("tower", "teacher")]
    assert two.hf.config.vision_config.hidden_size == sum(widths) and widths[1] == 32


def test_the_language_model_has_no_image_slots_and_speaks_of_scenes(made: dict[str, Path]) -> None:
    tokenizer = load_tokenizer(str(made["language_model"]))
    text = load_language_model(str(made["language_model"]))
    assert text.config.model_type == "llama" and not hasattr(text, "multi_modal_projector")
    told = sample(SceneConfig(), 3, "uniform", 0, "text")["conversations"][0]["value"]
    assert tokenizer.unk_token_id not in tokenizer(told)["input_ids"]


def test_towers_are_read_as_they_were_trained(made: dict[str, Path]) -> None:
    scenes = [scene(SceneConfig(sign=0, charts=0), 3, "uniform", i) for i in range(4)]
    pixels = part_kinds.pixels(scenes)
    for name in ("tower", "teacher"):
        tower = load_tower(str(made[name]), str)
        mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (tower.image_mean, tower.image_std))
        again = torch.stack([torch.from_numpy(np.asarray(s.picture)) for s in scenes])
        torch.testing.assert_close((again.permute(0, 3, 1, 2) / 255 - mean) / std, pixels)
    tower = load_tower(str(made["tower"]), str).model
    with torch.no_grad():
        tokens = tower(pixel_values=pixels).last_hidden_state
    assert tokens.shape[:2] == (4, 64) and tokens.abs().mean() < 10  # standardised


def test_a_finished_part_is_never_made_again_and_an_unfinished_one_never_taken(
    made: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPSIN_CACHE", str(made["tower"].parent.parent))
    trained: list[str] = []
    for kind, make in list(part_kinds.KINDS.items()):

        def counted(out: Path, console: Console, kind: str = kind, make: Any = make, **options: Any) -> None:
            trained.append(kind)
            make(out, console, **options)

        monkeypatch.setitem(part_kinds.KINDS, kind, counted)
    monkeypatch.setattr(parts, "check_parts", lambda _: None)
    parts.make_parts(PARTS, QUIET)
    assert trained == []
    before = load_file(made["teacher"] / "model.safetensors")
    (made["teacher"] / parts.RECORD).unlink()  # as if it had been stopped
    parts.make_parts(PARTS, QUIET)
    assert trained == ["dense_tower"] and parts.missing_parts(PARTS) == []
    after = load_file(made["teacher"] / "model.safetensors")
    assert all(torch.equal(before[k], after[k]) for k in before)  # the same settings give the same part


def test_a_run_knows_a_part_by_what_is_in_it(made: dict[str, Path], tmp_path: Path) -> None:
    from opsin.training.stages import _content

    for folder in made.values():
        again = tmp_path / folder.name
        shutil.copytree(folder, again, copy_function=shutil.copyfile)  # with other times
        assert _content(str(again))[1] == _content(str(folder))[1]
        weights = again / "model.safetensors"
        body = bytearray(weights.read_bytes())
        body[-1] ^= 1
        weights.write_bytes(body)
        assert _content(str(again))[1] != _content(str(folder))[1]


def test_what_makes_a_part_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = parts.part_folder(PARTS["language_model"]), parts.part_folder(PARTS["tower"])
    weights = tmp_path / "scenes_language_model.safetensors"
    weights.write_bytes(b"others")
    monkeypatch.setattr(parts, "shipped_file", lambda part: weights)
    assert parts.part_folder(PARTS["language_model"]) != before[0]
    assert parts.part_folder(PARTS["tower"]) == before[1]
    given = {
        "language_model": "chat",
        "tower": "timm_maps",
        "teacher": "fit",
    }  # one module of those that each rests on
    for name, module in given.items():
        assert module in {m.__name__.rpartition(".")[2] for m in parts.modules_of(PARTS[name]["kind"])}
    monkeypatch.setattr(parts, "version", lambda name: "0")
    assert parts.part_folder(PARTS["tower"]) != before[1]


def test_other_settings_are_another_part() -> None:
    one = parts.part_folder(PARTS["tower"])
    assert one == parts.part_folder(dict(reversed(PARTS["tower"].items())))
    assert one != parts.part_folder({**PARTS["tower"], "seed": 5})
    assert one.name.startswith("context_tower-")


def test_every_run_is_told_where_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPSIN_CACHE", str(tmp_path))
    file = tmp_path / "s.yaml"
    file.write_text(
        "base: [b.yaml]\nparts: {tower: {kind: context_tower}}\ncells: {x: {methods: [ross]}}\nalong: {ross: [r.yaml, a=1]}\n"
    )
    from opsin.training.study.spec import grid

    for cell in grid(load_study([str(file)])):
        assert f"variables.tower={parts.part_folder({'kind': 'context_tower'})}" in cell.arguments
        along = cell.methods == ("ross",)
        assert (cell.files == ("b.yaml", "r.yaml")) == along and ("a=1" in cell.arguments) == along


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ({"tower": {}}, r"parts\.tower: needs a kind: language_model"),
        ({"tower": {"kind": "contxt_tower"}}, r"parts\.tower\.kind: 'contxt_tower': unknown; did you mean 'context_tower'"),
        ({"tower": {"kind": "dense_tower", "widht": 3}}, r"parts\.tower\.widht: unknown key; did you mean 'width'"),
    ],
)  # fmt: skip
def test_mistakes(given: dict[str, Any], line: str) -> None:
    with pytest.raises(UserError, match=line):
        parts.check_parts(given)


def test_a_cache_that_cannot_be_written_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv("OPSIN_CACHE", str(blocked))
    with pytest.raises(UserError, match=r"cannot write to the cache folder .* \(set OPSIN_CACHE\)"):
        parts.make_parts({"tower": PARTS["tower"]}, QUIET)


def test_words_of_captions_are_what_the_context_tower_learns() -> None:
    scenes, texts = next(part_kinds._batches(0, 8))
    for one, text in zip(scenes, texts, strict=True):
        shown = {o.colour for o in one.objects}
        assert (
            shown == {c for c in COLOURS if c in text.split() or f"{c}," in text.split()} or "chart" in text
        )
