"""A trained model behind one small interface: answers in words, for the command line, reports and harnesses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..data.collate import VLMCollator
from ..data.prompts import Prompt, prompt_batch, prompts_of
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
    """

    def __init__(
        self,
        model: VisionLanguageModel,
        collator: VLMCollator,
        *,
        max_new_tokens: int = 32,
        batch_size: int = 16,
    ):
        self.model = model
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
        texts: list[list[str]] = [[] for _ in samples]
        for start in range(0, len(prompts), self.batch_size):
            chunk = prompts[start : start + self.batch_size]
            for prompt, text in zip(chunk, self._generate(chunk, options), strict=True):
                texts[prompt.sample].append(text)
        return texts

    @torch.no_grad()
    def _generate(self, prompts: Sequence[Prompt], options: dict[str, Any]) -> list[str]:
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
        try:
            with model.net.prompt(see), model.net.autocast():
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
