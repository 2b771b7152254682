"""A LLaVA from names of its parts: every kind of tower, two kinds of language model, all of it from folders."""

from __future__ import annotations

import io
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import (
    AutoModelForCausalLM,
    AutoProcessor,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlavaForConditionalGeneration,
)

from opsin.models.errors import UserError
from opsin.models.export import export_model, load_model, own_classes
from opsin.models.from_parts import from_parts, multimodal_template
from opsin.models.own_llava import OwnLlava
from opsin.models.towers import TokenTower
from opsin.training.models import llava_from_parts

import zoo
from part_folders import MEAN, STD, VIT, text_tokenizer, write_text, write_tower


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("parts")
    for kind in ("clip", "siglip", "dinov2", "timm"):
        write_tower(root / kind, kind)
    write_text(root / "llama", "llama")
    write_text(root / "qwen2", "qwen2", spare=40, tied=True)
    write_text(root / "phi", "phi")
    return root


@lru_cache
def picture() -> Image.Image:
    return Image.open(io.BytesIO(zoo.picture(7, (40, 24)))).convert("RGB")


@pytest.mark.parametrize(
    ("vision", "text", "tokens", "strategy", "layer"),
    [
        ("clip", "llama", 16, "default", -2),
        ("siglip", "qwen2", 16, "full", -2),
        ("dinov2", "llama", 16, "default", -2),
        ("timm", "qwen2", 100, "full", -1),
    ],
)
@torch.no_grad()
def test_parts_become_an_ordinary_llava(
    parts: Path, tmp_path: Path, vision: str, text: str, tokens: int, strategy: str, layer: int
) -> None:
    state = torch.random.get_rng_state()
    model, processor = from_parts(str(parts / vision), str(parts / text))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert (model.config.vision_feature_select_strategy, model.config.vision_feature_layer) == (
        strategy,
        layer,
    )
    inputs = processor(images=[picture()], text=["<image>\nIs it red?"], return_tensors="pt")
    assert int((inputs["input_ids"] == model.config.image_token_id).sum()) == tokens
    mean = torch.tensor(processor.image_processor.image_mean)
    assert torch.allclose(mean, torch.tensor(MEAN))
    logits = model(**inputs).logits
    # The language model is the one in the folder: text alone gives its logits, row by row.
    plain = AutoModelForCausalLM.from_pretrained(parts / text)
    words = processor.tokenizer("What colour is the cube?", return_tensors="pt")
    mine = model(**words).logits[..., : plain.config.vocab_size]
    assert torch.allclose(mine, plain(**words).logits, atol=1e-5)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again = LlavaForConditionalGeneration.from_pretrained(tmp_path)
    assert torch.equal(again(**inputs).logits, logits)
    twice = AutoProcessor.from_pretrained(tmp_path)(
        images=[picture()], text=["<image>\nIs it red?"], return_tensors="pt"
    )
    assert torch.equal(twice["input_ids"], inputs["input_ids"])
    assert torch.equal(twice["pixel_values"], inputs["pixel_values"])


def test_timm_vit_is_read_before_its_last_block(parts: Path) -> None:
    tower: Any = from_parts(str(parts / "timm"), str(parts / "llama"))[0].model.vision_tower
    assert isinstance(tower, TokenTower)
    assert tower.config.stages == [-2]
    named: Any = from_parts(
        {"name": f"timm:{VIT}", "weights": str(parts / "timm" / "model.safetensors")},
        str(parts / "llama"),
        layer=-1,
    )[0].model.vision_tower
    assert named.config.stages == [-1]
    theirs = tower.state_dict()
    assert all(torch.equal(v, theirs[k]) for k, v in named.state_dict().items())
    small = from_parts({"name": str(parts / "timm"), "image_size": 64}, str(parts / "llama"))[0]
    assert small.config.image_seq_length == 16


def test_image_token_grows_the_vocabulary_only_where_it_must(parts: Path) -> None:
    model, processor = from_parts(str(parts / "clip"), str(parts / "llama"))
    old = AutoModelForCausalLM.from_pretrained(parts / "llama")
    rows = old.config.vocab_size
    assert processor.tokenizer.convert_tokens_to_ids("<image>") == rows == model.config.image_token_id
    new = model.get_input_embeddings().weight
    assert len(new) == model.config.text_config.vocab_size == -(-(rows + 1) // 64) * 64
    before = old.get_input_embeddings().weight
    assert torch.equal(new[:rows], before)
    assert torch.allclose(new[rows:], before.mean(0).expand(len(new) - rows, -1), atol=1e-6)
    head, old_head = model.lm_head.weight, old.lm_head.weight
    assert torch.allclose(head[rows], old_head.mean(0), atol=1e-6)
    roomy = from_parts(str(parts / "clip"), str(parts / "qwen2"))[0]
    assert len(roomy.get_input_embeddings().weight) == roomy.config.text_config.vocab_size == rows + 40
    assert roomy.lm_head.weight is roomy.get_input_embeddings().weight
    there = from_parts(str(parts / "clip"), str(parts / "llama"), image_token="<|image_pad|>")[0]
    assert len(there.get_input_embeddings().weight) == rows


def test_chat_template_is_kept_and_shows_pictures(parts: Path, tmp_path: Path) -> None:
    processor = from_parts(str(parts / "clip"), str(parts / "llama"))[1]
    plain = AutoTokenizer.from_pretrained(parts / "llama")
    talk = [{"role": "user", "content": "Is it red?"}, {"role": "assistant", "content": "Yes."}]
    assert processor.tokenizer.apply_chat_template(talk, tokenize=False) == plain.apply_chat_template(
        talk, tokenize=False
    )
    shown = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Is it red?"}]},
        talk[1],
    ]
    expected = plain.apply_chat_template(
        [{"role": "user", "content": "<image>\nIs it red?"}, talk[1]], tokenize=False
    )
    processor.save_pretrained(tmp_path)
    for one in (processor, AutoProcessor.from_pretrained(tmp_path)):
        assert one.apply_chat_template(shown, tokenize=False) == expected
    aware = "{% for part in message['content'] %}{% if part['type'] == 'image' %}{% endif %}{% endfor %}"
    assert multimodal_template(aware, "<image>") == aware
    assert multimodal_template(None, "<image>") is None


def test_pad_keeps_the_aspect(parts: Path) -> None:
    stretched = from_parts(str(parts / "clip"), str(parts / "llama"))[1]
    padded = from_parts(str(parts / "clip"), str(parts / "llama"), image_aspect_ratio="pad")[1]
    wide = Image.new("RGB", (64, 32), (255, 0, 0))
    first, second = (
        p.image_processor(images=[wide], return_tensors="pt")["pixel_values"][0] for p in (stretched, padded)
    )
    assert first.shape == second.shape == (3, 32, 32)
    assert (first[0] > 1).all()
    assert (second[0, 12:20] > 1).all()
    assert (second[0, :7].abs() < 0.05).all()  # the mean colour, normalised


def test_projector_from_a_file(parts: Path, tmp_path: Path) -> None:
    fresh = from_parts(str(parts / "clip"), str(parts / "llama"), seed=1)[0].model.multi_modal_projector
    names = {"linear_1": "0", "linear_2": "2"}
    stored = {
        f"model.mm_projector.{names[k.split('.')[0]]}.{k.split('.')[1]}": v
        for k, v in fresh.state_dict().items()
    }
    torch.save(stored, tmp_path / "mm_projector.bin")
    spec = {"type": "mlp2x_gelu", "weights": str(tmp_path / "mm_projector.bin")}
    read = from_parts(str(parts / "clip"), str(parts / "llama"), spec)[0].model.multi_modal_projector
    assert all(torch.equal(v, fresh.state_dict()[k]) for k, v in read.state_dict().items())
    with pytest.raises(UserError, match=r"model.mm_projector.weights: .*does not fit"):
        from_parts(str(parts / "timm"), str(parts / "llama"), spec)

    class Trap:
        def __reduce__(self) -> Any:
            return (Path(tmp_path / "ran").touch, ())

    torch.save({"x": Trap()}, tmp_path / "bad.bin")
    with pytest.raises(UserError, match=r"model.mm_projector.weights: cannot read"):
        from_parts(str(parts / "clip"), str(parts / "llama"), {"weights": str(tmp_path / "bad.bin")})
    assert not (tmp_path / "ran").exists()


def test_without_weights_on_the_meta_device(parts: Path, tmp_path: Path) -> None:
    for part in ("clip", "llama"):
        (tmp_path / part).mkdir()
        for file in (parts / part).iterdir():
            if file.suffix != ".safetensors":
                (tmp_path / part / file.name).write_bytes(file.read_bytes())
    model = llava_from_parts(str(tmp_path / "llama"), str(tmp_path / "clip"), meta=True)
    real = llava_from_parts(str(parts / "llama"), str(parts / "clip"))
    assert all(p.is_meta for p in model.parameters())
    shapes = lambda m: {n: p.shape for n, p in m.named_parameters()}  # noqa: E731
    assert shapes(model) == shapes(real)
    with pytest.raises(UserError, match=r"model.language_model: cannot load a language model from .*llama"):
        llava_from_parts(str(tmp_path / "llama"), str(tmp_path / "clip"))
    with pytest.raises(UserError, match=r"model.vision_tower: cannot load a vision tower from .*clip"):
        llava_from_parts(str(parts / "llama"), str(tmp_path / "clip"))


def test_what_cannot_be_joined(parts: Path, tmp_path: Path) -> None:
    llama, clip = str(parts / "llama"), str(parts / "clip")
    cases: list[tuple[dict[str, Any], str]] = [
        (
            {"mm_projector": "mlp2x_gelo"},
            r"model.mm_projector 'mlp2x_gelo': no type of projector; did you mean 'mlp2x_gelu'",
        ),
        ({"mm_projector": {"kind": "x"}}, r"model.mm_projector.kind: unknown key; did you mean|known: type"),
        (
            {"vision_tower": {"name": clip, "layr": -2}},
            r"model.vision_tower.layr: unknown key; did you mean 'layer'",
        ),
        ({"vision_tower": {"name": clip, "stages": [1]}}, r"model.vision_tower.stages: .*towers of timm"),
        (
            {"vision_tower": "timm:test_vitt"},
            r"model.vision_tower: timm knows no network 'test_vitt'; did you mean",
        ),
        ({"image_aspect_ratio": "padd"}, r"model.image_aspect_ratio 'padd': unknown; did you mean 'pad'"),
        ({"language_model": str(tmp_path)}, r"model.language_model: cannot load a tokenizer from"),
        ({"vision_tower": llama}, r"model.vision_tower: .* is no LLaVA vision tower"),
        ({"dtype": "float33"}, "dtype 'float33'"),
    ]
    for given, message in cases:
        with pytest.raises(UserError, match=message):
            llava_from_parts(**{"language_model": llama, "vision_tower": clip, **given})
    bare = tmp_path / "bare"
    bare.mkdir()
    for file in (parts / "clip").iterdir():
        if file.name != "preprocessor_config.json":
            (bare / file.name).write_bytes(file.read_bytes())
    with pytest.raises(UserError, match=r"bare' does not say how pictures are normalised .*image_mean"):
        llava_from_parts(llama, str(bare))
    told = llava_from_parts(llama, {"name": str(bare), "image_mean": MEAN, "image_std": STD})
    assert list(told.processor.image_processor.image_std) == STD
    GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=1, n_embd=8, vocab_size=300)).save_pretrained(
        tmp_path / "gpt2"
    )
    text_tokenizer().save_pretrained(tmp_path / "gpt2")
    with pytest.raises(UserError, match=r"model.language_model: GPT2LMHeadModel does not keep its decoder"):
        llava_from_parts(str(tmp_path / "gpt2"), clip)


@pytest.mark.parametrize(
    ("text", "kind", "layers"), [("llama", "linear", 1), ("llama", "mlp3x_gelu", 3), ("phi", "mlp2x_gelu", 2)]
)
@torch.no_grad()
def test_other_projectors_and_heads_have_a_class_of_ours(
    parts: Path, tmp_path: Path, text: str, kind: str, layers: int
) -> None:
    model = llava_from_parts(str(parts / text), str(parts / "clip"), mm_projector=kind)
    hf, projector = model.hf, model.hf.model.multi_modal_projector
    assert isinstance(hf, OwnLlava) and own_classes(hf.config) == ["opsin.models.own_llava"]
    assert len([m for m in projector.modules() if isinstance(m, torch.nn.Linear)]) == layers
    features = torch.rand(3, 32)
    expected = features
    for i in range(1, layers + 1):
        expected = getattr(projector, f"linear_{i}")(
            torch.nn.functional.gelu(expected) if i > 1 else expected
        )
    assert torch.allclose(projector(features), expected, atol=1e-6)
    plain = AutoModelForCausalLM.from_pretrained(parts / text)
    words = model.processor.tokenizer("What colour is the cube?", return_tensors="pt")
    logits = hf(**words).logits
    assert torch.allclose(logits[..., : plain.config.vocab_size], plain(**words).logits, atol=1e-5)
    inputs = model.processor(images=[picture()], text=["<image>\nIs it red?"], return_tensors="pt")
    export_model(model, tmp_path / "out")
    again = load_model(tmp_path / "out")
    assert isinstance(again.hf, OwnLlava)
    assert torch.equal(again.hf(**inputs).logits, hf(**inputs).logits)
