from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaForConditionalGeneration,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from opsin.models.assemble import llava_from_parts, llava_processor, load_vision_tower
from opsin.models.errors import UserError
from opsin.models.towers import TokenTower

from zoo import picture, tokenizer

VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
}


def towers(name: str) -> Any:
    torch.manual_seed(0)
    if name == "clip":
        return CLIPVisionModel(CLIPVisionConfig(**VISION))
    if name == "siglip":
        return SiglipVisionModel(SiglipVisionConfig(**VISION, vision_use_head=False))
    return TokenTower.from_timm("test_vit", weights=None, image_size=32)


def language_model(tied: bool = True) -> LlamaForCausalLM:
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=tied,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config)


def image_token() -> int:
    return tokenizer().convert_tokens_to_ids("<image>")


def join(name: str, **kwargs: Any) -> LlavaForConditionalGeneration:
    return llava_from_parts(towers(name), language_model(), image_token_id=image_token(), **kwargs)


@pytest.mark.parametrize(
    ("name", "strategy", "layer"), [("clip", "default", -2), ("siglip", "full", -2), ("timm", "full", -1)]
)
@torch.no_grad()
def test_model_and_processor_fit(name: str, strategy: str, layer: int, tmp_path: Path):
    model = join(name)
    config = model.config
    assert (config.vision_feature_select_strategy, config.vision_feature_layer) == (strategy, layer)
    assert not any(t.is_meta for t in (*model.parameters(), *model.buffers()))
    assert model.lm_head.weight is model.get_input_embeddings().weight
    processor = llava_processor(
        model, tokenizer(), image_mean=[0.5] * 3, image_std=[0.5] * 3, chat_template="{{ messages }}"
    )
    image = Image.open(io.BytesIO(picture(0)))
    inputs = processor(
        images=[image, image], text=["<image> Is it red?", "No: <image>"], padding=True, return_tensors="pt"
    )
    assert (inputs["input_ids"] == image_token()).sum(1).tolist() == [config.image_seq_length] * 2
    logits = model(**inputs).logits
    model.save_pretrained(tmp_path)
    again = LlavaForConditionalGeneration.from_pretrained(tmp_path)
    assert torch.equal(again(**inputs).logits, logits)


def test_parts_are_used_as_they_are():
    vision, text = towers("clip"), language_model(tied=False)
    model = llava_from_parts(vision, text, image_token_id=3)
    assert model.model.vision_tower is vision
    assert model.model.language_model is text.model
    assert model.lm_head is text.lm_head
    assert model.lm_head.weight is not model.get_input_embeddings().weight


def test_projector_depends_on_its_seed_only():
    def weights(seed: int) -> torch.Tensor:
        return join("timm", seed=seed).model.multi_modal_projector.linear_1.weight

    torch.manual_seed(5)
    vision, text = towers("timm"), language_model()
    state = torch.random.get_rng_state()
    first = llava_from_parts(
        vision, text, image_token_id=3, seed=0
    ).model.multi_modal_projector.linear_1.weight
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(first, weights(0))
    assert not torch.equal(first, weights(1))


def test_tower_takes_the_language_models_dtype():
    model = llava_from_parts(towers("timm"), language_model().to(torch.bfloat16), image_token_id=3)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_towers_by_folder(tmp_path: Path):
    torch.manual_seed(0)
    vision = towers("clip")
    vision.save_pretrained(tmp_path / "vision")
    text = {
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "vocab_size": 9,
    }
    whole = CLIPModel(CLIPConfig(text_config=text, vision_config=VISION, projection_dim=4)).eval()
    whole.save_pretrained(tmp_path / "clip")
    towers("timm").save_pretrained(tmp_path / "timm")
    pixels = torch.rand(1, 3, 32, 32)
    with torch.no_grad():
        for name, expected in (
            ("vision", vision.eval()),
            ("clip", whole.vision_model),
            ("timm", towers("timm")),
        ):
            found = load_vision_tower(str(tmp_path / name))
            assert isinstance(found, TokenTower if name == "timm" else CLIPVisionModel)
            assert torch.equal(found(pixels).last_hidden_state, expected(pixels).last_hidden_state)


def test_no_vision_tower(tmp_path: Path):
    language_model().save_pretrained(tmp_path)
    with pytest.raises(UserError, match="no LLaVA vision tower: its config needs image_size"):
        load_vision_tower(str(tmp_path))
    with pytest.raises(UserError, match="cannot load a vision tower from"):
        load_vision_tower(str(tmp_path / "nothing"))


def test_registers_are_refused():
    vision = Dinov2WithRegistersModel(
        Dinov2WithRegistersConfig(
            hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=32, patch_size=8
        )
    )
    with pytest.raises(UserError, match="Dinov2WithRegistersModel gives 21 tokens for 16 patches"):
        llava_from_parts(vision, language_model(), image_token_id=3)


def test_image_token_outside_the_vocabulary():
    with pytest.raises(UserError, match="image token 512 is outside the vocabulary of 512"):
        llava_from_parts(towers("timm"), language_model(), image_token_id=512)
