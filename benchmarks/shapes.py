"""Models of a known shape with random weights, and batches of a known length and share of labels.

Weights do not matter to speed, so nothing is downloaded. Three shapes:

* ``smollm2-135m``: the language model of SmolLM2-135M (30 layers, width 576, 49,152 words, tied head) behind
  a small CLIP tower, so that the text side dominates as it does in real VLMs.
* ``toy``: ``opsin.models.tiny.tiny_llava`` as it is, with the words of the scenes.
* ``toy-49k``: the same with a vocabulary of 49,152, where nearly all work is in the head.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import torch
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM

from opsin.data.collate import VLMCollator
from opsin.data.loader import build_encoder
from opsin.data.scenes import SceneConfig, sample, vocabulary
from opsin.data.schema import IMAGE_MARK
from opsin.models.assemble import llava_from_parts
from opsin.models.tiny import llava_processor, tiny_llava, word_tokenizer

SHAPES = ("smollm2-135m", "toy", "toy-49k")
VOCABULARY = 49_152
IMAGE_SIZE, PATCH_SIZE = 64, 8
SCENES = SceneConfig(size=IMAGE_SIZE, questions=4)


@dataclass
class Built:
    """A model and what encodes text for it.

    Attributes:
        name: one of ``SHAPES``.
        hf: stock ``LlavaForConditionalGeneration``, everything trainable, in training mode.
        processor: its processor.
        burst: steps that are timed in one go; more where a step is short.
    """

    name: str
    hf: Any
    processor: Any
    burst: int

    @property
    def vocabulary(self) -> int:
        return self.hf.config.text_config.vocab_size

    def collator(self, max_seq_len: int = 2048, **options: Any) -> VLMCollator:
        """Collator without system prompt; ``options`` as those of ``VLMCollator``."""
        encoder = build_encoder(
            self.processor, self.hf.config, system_prompt="", max_seq_len=max_seq_len, turns="meta"
        )
        return VLMCollator(encoder, **options)


def build(name: str, device: str = "cpu", image_size: int = IMAGE_SIZE) -> Built:
    """One of ``SHAPES``; the same weights every time. ``image_size``: of ``smollm2-135m``, in pixels."""
    words = vocabulary(SCENES)
    if name == "smollm2-135m":
        hf, processor = _smollm2(words, image_size)
    elif name == "toy":
        hf, processor = tiny_llava(words)
    elif name == "toy-49k":
        # Each word has two forms, with and without a space before it.
        words = [*words, *(f"word{i}" for i in range(VOCABULARY // 2 - 6 - len(words)))]
        hf, processor = tiny_llava(words)
    else:
        raise SystemExit(f"shape '{name}': use one of {', '.join(SHAPES)}")
    return Built(name, hf.to(device).train(), processor, burst=1 if name == "smollm2-135m" else 4)


def _smollm2(words: list[str], image_size: int) -> tuple[Any, Any]:
    tokenizer: Any = word_tokenizer(words)
    text = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    vision = CLIPVisionConfig(
        hidden_size=96,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=3,
        image_size=image_size,
        patch_size=PATCH_SIZE,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        hf = llava_from_parts(
            CLIPVisionModel(vision),
            LlamaForCausalLM(text),
            image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        )
    return hf, llava_processor(tokenizer, image_size, PATCH_SIZE)


def text_batch(
    built: Built, *, rows: int = 4, length: int = 256, labelled: float = 0.15, instruction: float = 0.3
) -> dict[str, torch.Tensor]:
    """A device batch of ``rows`` full rows: a picture each, and exact shares of the tokens.

    Args:
        built: the model.
        rows: samples.
        length: tokens of each.
        labelled: share of the tokens that the response has, its end included.
        instruction: share of the tokens that the user says; what is left is picture and system text.
    """
    collate = built.collator()
    words = vocabulary(SCENES)
    plain = [w for w in words if w.isalpha()]
    answer, question = round(length * labelled) - 1, round(length * instruction)

    def conversation(index: int, system: int) -> dict[str, Any]:
        draw = random.Random(index)
        said = [" ".join(draw.choices(plain, k=n)) for n in (system, question, answer)]
        record = sample(SCENES, 0, "train", index)
        turns = [("system", said[0]), ("human", f"{IMAGE_MARK}\n{said[1]}"), ("gpt", said[2])]
        record["conversations"] = [{"from": who, "value": text} for who, text in turns]
        return record

    around = len(collate.encoder(conversation(0, 1))) - 1
    if around >= length:
        raise SystemExit(f"shares leave no room: {around} tokens without system text, length {length}")
    batch = collate([conversation(i, length - around) for i in range(rows)])
    shares = [float((batch["labels"] != -100).float().mean()), float(batch["attention_mask"].float().mean())]
    assert batch["input_ids"].shape == (rows, length), batch["input_ids"].shape
    assert shares[1] == 1.0, shares
    assert abs(shares[0] - labelled) < 0.01, shares
    return batch


def questions(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """``count`` pictures with exactly four independent questions each."""
    found: list[dict[str, Any]] = []
    index = 0
    while len(found) < count:
        record = sample(SCENES, seed, "train", index)
        if len(record["conversations"]) == 2 * SCENES.questions:
            found.append(record)
        index += 1
    return found
