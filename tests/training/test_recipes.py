"""The recipes: published values where they say so, and a check of each that needs neither network nor weights."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from opsin.models.presets import preset_of, presets, stand_ins
from opsin.training.check import check
from opsin.training.config import load
from opsin.training.stages import resolve

FOLDER = Path(__file__).resolve().parents[2] / "yamls" / "recipes"
BASES = sorted(p.stem for p in FOLDER.glob("*.yaml"))
METHODS = {
    "ross": ["ross"],
    "ross-clip": ["ross", "ross-clip"],
    "jarvis": ["jarvis"],
    "l2t": ["l2t"],
    "vift": ["vift"],
}
SCALES = sorted(p.stem for p in (FOLDER / "scale").glob("*.yaml"))

COVER = [
    ("llava-1.5-7b", "jarvis", "8xh100"),
    ("llava-1.5-13b", None, "64xh100"),
    ("tinyllava-0.5b", "l2t", "1x24gb"),
    ("tinyllava-3b", None, "8xh100"),
    ("qwen2-7b-clip", "ross-clip", "8xa100-80gb"),
    ("qwen2-7b-siglip", "vift", None),
]
"""Every file at least once; every method and every scale with every base is slow."""


def files(base: str, method: str | None, scale: str | None) -> list[str]:
    named = [f"recipes/{base}.yaml"]
    named += [f"recipes/methods/{m}.yaml" for m in METHODS.get(method or "", [])]
    return named + ([f"recipes/scale/{scale}.yaml"] if scale else [])


def checked(base: str, method: str | None, scale: str | None) -> str:
    """What ``opsin train FILES --check`` prints."""
    said = io.StringIO()
    check(load(files(base, method, scale)), Console(file=said, width=200))
    return said.getvalue()


def test_the_cover_names_every_file() -> None:
    named = {name for combination in COVER for name in files(*combination)}
    assert named == {f"recipes/{p.relative_to(FOLDER)}" for p in FOLDER.rglob("*.yaml")}


@pytest.mark.parametrize("combination", COVER, ids=lambda c: "+".join(str(part) for part in c if part))
def test_recipes_pass_the_check_without_the_hub(
    combination: tuple[str, str | None, str | None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_PROFILE", "S3_ENDPOINT_URL"):
        monkeypatch.delenv(name, raising=False)
    base, method, _ = combination
    said = checked(*combination)
    spec = load(files(*combination)).run.model
    for name in (spec["language_model"], spec["vision_tower"]):
        assert re.search(
            rf"{re.escape(name)}: configuration from yamls/models/\S+\.yaml, not from the hub", said
        )
    assert "stage align" in said and "stage instruct" in said and "data: not reachable from here" in said
    if method is not None:
        assert re.search(rf"methods: .*{method.partition('-')[0]}", said)
    if base == "llava-1.5-7b":
        assert all(count in said for count in ("303,507,456", "20,979,712", "6,738,939,904"))
    if method == "ross-clip":
        assert "black-forest-labs/FLUX.1-dev, by its configuration alone (yamls/models/flux-vae.yaml)" in said
    if method == "jarvis":
        assert "facebook/dinov2-large, by its configuration alone" in said and "images bidirectional" in said
    assert not list(tmp_path.iterdir())  # nothing was downloaded or written


@pytest.mark.slow
@pytest.mark.parametrize("base", BASES)
def test_every_method_and_every_scale_goes_with_every_base(base: str) -> None:
    for method, scale in [(None, None), *((m, None) for m in METHODS), *((None, s) for s in SCALES)]:
        assert "stage instruct" in checked(base, method, scale)


PUBLISHED: dict[str, dict[str, Any]] = {
    "align": {"global_train_batch_size": 256, "lr": 1.0e-3, "chat_template": "plain", "max_seq_len": 2048, "max_duration": "1ep"},
    "instruct": {"global_train_batch_size": 128, "lr": 2.0e-5, "max_seq_len": 2048, "max_duration": "1ep"},
}  # fmt: skip
"""LLaVA-1.5's and TinyLLaVA's; ROSS's, JARVIS's and L2T's are the same but for what stands below."""


def values(names: list[str]) -> dict[str, dict[str, Any]]:
    found = {}
    for stage in resolve(load(names)):
        config = stage.config
        found[stage.name] = {
            "global_train_batch_size": config.global_train_batch_size,
            "lr": config.optimizer["lr"],
            "chat_template": config.chat_template,
            "max_seq_len": config.max_seq_len,
            "max_duration": config.max_duration,
            "lr_by_part": config.lr_by_part,
            "trainable": config.trainable,
        }
        assert config.optimizer["name"] == "adamw" and config.optimizer["weight_decay"] == 0.0
        assert config.scheduler["name"] == "cosine_with_warmup" and config.scheduler["t_warmup"] == "0.03dur"
        assert not config.trainable.vision_tower and config.trainable.mm_projector
    assert not found["align"]["trainable"].language_model and found["instruct"]["trainable"].language_model
    return found


@pytest.mark.parametrize("base", BASES)
def test_bases_have_the_published_values(base: str) -> None:
    found = values(files(base, None, None))
    for stage, published in PUBLISHED.items():
        assert {key: found[stage][key] for key in published} == published


def test_overlays_have_their_papers_values() -> None:
    ross = values(files("qwen2-7b-siglip", "ross", None))
    assert ross["align"]["lr_by_part"] == {"auxiliary": 1.0e-4} and ross["instruct"]["lr_by_part"] == {}
    assert (ross["align"]["max_seq_len"], ross["instruct"]["max_seq_len"]) == (8192, 32768)
    assert values(files("qwen2-7b-clip", "ross-clip", None))["align"]["lr_by_part"] == {"auxiliary": 1.0e-3}
    method = load(files("qwen2-7b-siglip", "ross", None)).run.algorithms["ross"]
    assert (method["weight"], method["draws"], method["depth"], method["width"], method["head"]) == (
        1.0,
        4,
        3,
        1024,
        "dit",
    )
    jarvis = load(files("llava-1.5-7b", "jarvis", None)).run
    assert jarvis.model["bidirectional_images"] is True
    assert (jarvis.algorithms["jarvis"]["ntp_probability"], jarvis.algorithms["jarvis"]["train"]) == (
        0.2,
        "proj",
    )
    assert values(files("llava-1.5-7b", "l2t", None)) == values(files("llava-1.5-7b", None, None))
    vift = values(files("qwen2-7b-siglip", "vift", None))
    assert (vift["align"]["lr"], vift["instruct"]["lr"]) == (5.0e-4, 1.0e-5)
    assert vift["instruct"]["lr_by_part"] == {"mm_projector": 2.0e-6}
    assert (vift["instruct"]["chat_template"], vift["instruct"]["max_seq_len"]) == ("chatml", 4096)
    assert (
        load(files("qwen2-7b-siglip", "vift", None)).run.model["language_model"] == "Qwen/Qwen2.5-7B-Instruct"
    )


def test_scales_change_nothing_that_is_learnt() -> None:
    for scale in SCALES:
        scaled = values(files("llava-1.5-7b", None, scale))
        assert scaled == values(files("llava-1.5-7b", None, None))


def test_presets_stand_in_for_hub_names_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    name = "openai/clip-vit-large-patch14-336"
    spec, used = stand_ins(
        {"name": "llava_from_parts", "vision_tower": {"name": name, "layer": -2}, "language_model": "mine"}
    )
    assert used == {name: "yamls/models/clip-vit-large-patch14-336.yaml"}
    assert spec["language_model"] == "mine" and spec["vision_tower"]["layer"] == -2
    assert (Path(spec["vision_tower"]["name"]) / "config.json").is_file()
    assert not list(Path(spec["vision_tower"]["name"]).glob("*.safetensors"))
    (tmp_path / name).mkdir(parents=True)  # a folder of that name is the user's model
    assert preset_of(name) is None and name in presets()
