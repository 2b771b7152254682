"""Adapters of tiny models of each family, and what is asked of them."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import pytest
import torch

from opsin.algorithms.vift import Fusion
from opsin.data.collate import VLMCollator
from opsin.data.schema import pack_images
from opsin.evaluation.adapter import VLMAdapter
from opsin.evaluation.logprobs import AnswerLogprob
from opsin.models.vlm import VisionLanguageModel

import jobs
import zoo

SPECIALS = [zoo.tokenizer().convert_tokens_to_ids(token) for token in zoo.SPECIALS]
LONG = {"suppress_tokens": SPECIALS}  # a random model may end at once, or write tokens that have no text
CHOICES = ["red", "green number 7", "It is large", "no"]
FAMILIES = pytest.mark.parametrize("family", zoo.FAMILIES)
STRONG = Fusion(strength=1.5, layers=(1, 4))


@lru_cache
def _collator(family: str, template: str) -> VLMCollator:
    return jobs.collator(zoo.build(family), template)


def collator(family: str, template: str = "vicuna_v1") -> VLMCollator:
    return _collator(family, template)


def model(family: str, bidirectional: bool = False) -> VisionLanguageModel:
    """A model whose answers depend on what it reads: random weights of the usual size hardly do."""
    return _model(family, bidirectional)


@lru_cache
def _model(family: str, bidirectional: bool) -> VisionLanguageModel:
    built = zoo.build(family)
    with torch.no_grad():
        for name, parameter in built.hf.named_parameters():
            if ("language_model.layers" in name or "merger" in name) and parameter.ndim > 1:
                parameter *= 10
    return VisionLanguageModel(built.hf, built.processor, bidirectional_images=bidirectional)


def adapter(family: str, template: str = "vicuna_v1", **options: Any) -> VLMAdapter:
    bidirectional = options.pop("bidirectional", False)
    return VLMAdapter(model(family, bidirectional), collator(family, template), **options)


def several() -> list[dict[str, Any]]:
    """No, one and two pictures; one and several exchanges, chained and independent; words between pictures."""
    between = zoo.sample(9, images=2, size=(18, 33))
    between["conversations"][0]["value"] = "First <image> and then <image>\nwhich is large?"
    between["meta"] = {"turns": "independent"}
    return [
        zoo.sample(0, turns=3),
        zoo.sample(1, images=0),
        zoo.sample(2, images=2, size=(40, 18)),
        zoo.sample(5, turns=3, independent=True, size=(18, 33)),
        between,
    ]


def candidates() -> list[list[list[str]]]:
    return [
        [CHOICES[: 1 + (i + t) % 4] for t in range(len(s["conversations"]) // 2)]
        for i, s in enumerate(several())
    ]


def flat(found: list[list[list[AnswerLogprob]]]) -> list[AnswerLogprob]:
    return [one for sample in found for exchange in sample for one in exchange]


def close(first: list, second: list, tolerance: float = 2e-5) -> None:
    one, other = flat(first), flat(second)
    assert [(a.tokens, a.greedy, a.exact) for a in one] == [(b.tokens, b.greedy, b.exact) for b in other]
    assert np.allclose([a.sum for a in one], [b.sum for b in other], rtol=0, atol=tolerance)
    assert np.allclose([a.end for a in one], [b.end for b in other], rtol=0, atol=tolerance)  # type: ignore[arg-type]


def broken_sample() -> dict[str, Any]:
    return {**zoo.sample(8), "images": pack_images([b"no picture"])}
