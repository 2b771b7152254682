"""A trained model behind one small interface: answers in words, for the command line, reports and harnesses."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch

from ..algorithms.vift.fusion import Fusion
from ..algorithms.vift.steering import AbilityFusion
from ..data.collate import VLMCollator
from ..data.prompts import Prompt, last_turn, prompt_batch, prompts_of, without_pictures
from ..models.attention import Visibility
from ..models.geometry import PER_IMAGE_KEYS, PIXEL_KEY
from ..models.vlm import VisionLanguageModel


class VLMAdapter:
    """Greedy answers, batched with left padding; the same as one by one.

    Args:
        model: trained model.
        collator: of its training (encoder and chat template).
        max_new_tokens: longest answer.
        batch_size: prompts a call of ``generate``.
        fusion: ability-fused inference (``algorithms.vift.steering``); None: none.
    """

    def __init__(
        self,
        model: VisionLanguageModel,
        collator: VLMCollator,
        *,
        max_new_tokens: int = 32,
        batch_size: int = 16,
        fusion: Fusion | None = None,
    ):
        self.model = model
        self.fusion = None if fusion is None or fusion.off else AbilityFusion(model.hf, fusion)
        self.collator = collator
        self.max_new_tokens = max_new_tokens
        self.batch_size = batch_size

    def answers(self, samples: Sequence[dict[str, Any]], **options: Any) -> list[list[str]]:
        """The model's answer to each exchange of each stored sample.

        Args:
            samples: stored samples.
            options: further arguments of ``generate`` of transformers.
        """
        encoder = self.collator.encoder
        prompts = [p for i, s in enumerate(samples) for p in prompts_of(encoder, s, i)]
        words: list[Prompt] = []
        if self.fusion is not None:
            words = [p for i, s in enumerate(samples) for p in prompts_of(encoder, without_pictures(s), i)]
        texts: list[list[str]] = [[] for _ in samples]
        for start in range(0, len(prompts), self.batch_size):
            part = slice(start, start + self.batch_size)
            for prompt, text in zip(
                prompts[part], self._generate(prompts[part], words[part], options), strict=True
            ):
                texts[prompt.sample].append(text)
        return texts

    @torch.no_grad()
    def _generate(
        self, prompts: Sequence[Prompt], words: Sequence[Prompt], options: dict[str, Any]
    ) -> list[str]:
        model, tokenizer = self.model, self.collator.encoder.tokenizer
        batch = prompt_batch(self.collator, prompts)
        device = next(model.parameters()).device
        arguments: dict[str, Any] = {
            k: batch[k].to(device)
            for k in ("input_ids", "attention_mask", PIXEL_KEY, *PER_IMAGE_KEYS)
            if k in batch
        }
        if model.anatomy.token_types:
            arguments["mm_token_type_ids"] = (batch["image_ids"] >= 0).int().to(device)
        see = None
        if model.net.bidirectional_images:
            image = batch["image_ids"].to(device)
            see = Visibility(
                valid=arguments["attention_mask"].bool(),
                document=batch["document_ids"].to(device),
                branch=batch["branch_ids"].to(device),
                image=image,
                bidirectional=image >= 0,
            )
        mode = model.training
        model.eval()
        fused: contextlib.AbstractContextManager = contextlib.nullcontext()
        if self.fusion is not None:
            text = prompt_batch(self.collator, words)
            most = torch.tensor([last_turn(p.document) for p in prompts])
            names = ("input_ids", "attention_mask")
            fused = self.fusion.on(
                arguments, {k: text[k] for k in names}, most=most, around=lambda: model.net.prompt(see)
            )
        try:
            with model.net.autocast(), fused, model.net.prompt(see):
                out = model.hf.generate(
                    **arguments,
                    **{
                        "do_sample": False,
                        "max_new_tokens": self.max_new_tokens,
                        # An untrained model can write image tokens, which the next step would look for pictures for.
                        "suppress_tokens": [self.collator.encoder.images.image_token_id],
                        "eos_token_id": tokenizer.eos_token_id,
                        "pad_token_id": self.collator.pad_token_id,
                        **options,
                    },
                )
        finally:
            model.train(mode)
        new = out[:, arguments["input_ids"].shape[1] :]
        return [t.strip() for t in tokenizer.batch_decode(new, skip_special_tokens=True)]
