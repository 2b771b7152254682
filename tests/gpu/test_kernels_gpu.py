"""Attention masks, kernel launches and memory on the GPU."""

from __future__ import annotations

import importlib.util
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from opsin.algorithms.jarvis import JARVIS
from opsin.data.batch import split_batch, to_device
from opsin.models import attention
from opsin.models.errors import UserError
from opsin.models.vlm import VisionLanguageModel

import jobs
import settings
import zoo
from masks import Recorder
from methods import Bench, teacher

pytestmark = pytest.mark.gpu


class OnDevice(Bench):
    """A method's bench whose model is on a device."""

    def on(self, device: str, implementation: str = "sdpa") -> OnDevice:
        self.device = device
        self.model.to(device)
        decoder: Any = self.model.anatomy.decoder(self.model.hf)
        decoder.set_attn_implementation(implementation)
        return self

    def parts(self, batch: dict[str, Any], size: int | None = None) -> list[dict[str, Any]]:
        return [to_device(part, torch.device(self.device)) for part in super().parts(batch, size)]

    def both(self, batch: dict[str, Any]) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
        """The method's loss and that of the words in one step, and gradients of their sum by name of parameter."""
        self.model.train().zero_grad()
        (part,) = self.parts(batch)
        self.state.batch, self.state.loss = part, {}
        self._tell("before_forward")
        losses = self.model.loss(self.model(part), part)
        self._tell("after_loss")
        losses |= self.state.loss
        sum(losses.values()).backward()  # type: ignore[union-attr]
        self.model.end_step()
        found = {n: p.grad.clone() for n, p in self.model.named_parameters() if p.grad is not None}
        return {k: float(v) for k, v in losses.items()}, found


@pytest.fixture
def wide_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention heads of 16, which is what kernels of FlexAttention begin with."""
    stock = zoo._text
    monkeypatch.setattr(zoo, "_text", lambda **extra: stock(head_dim=16, **extra))


def _jarvis(text_loss: str) -> JARVIS:
    return JARVIS(target=teacher(), layer=2, ntp_probability=0.25, text_loss=text_loss, log_interval=100)


# Tokens are few; one shape only, since each one is compiled anew.
PACKED = [settings.caption(1, 2), settings.words(2, 3), settings.question(3, turns=2), settings.caption(4)]


@pytest.mark.parametrize("text_loss", ["masked", "unmasked"])
def test_flex_attention_is_sdpa_forward_and_backward(wide_heads: None, cuda: str, text_loss: str) -> None:
    """JARVIS's masks, bidirectional images and packed conversations, in the form of block masks."""
    results = {}
    for implementation in ("sdpa", "flex_attention"):
        bench = OnDevice(_jarvis(text_loss), size=32, bidirectional=True).on(cuda, implementation)
        batch = bench.batch(PACKED, packing=True)
        results[implementation] = bench.both(batch)
    (flex, moved), (dense, expected) = results["flex_attention"], results["sdpa"]
    assert set(flex) == {"lm", "jarvis"} and flex == pytest.approx(dense, rel=1e-3, abs=1e-4)
    assert set(moved) == set(expected)
    scale = max(float(g.abs().max()) for g in expected.values())
    assert max(float((moved[n] - expected[n]).abs().max()) for n in expected) < 2e-3 * scale


def test_flash_attention_is_refused_before_anything_is_built(device: str) -> None:
    with pytest.raises(UserError, match=r"flash_attention_2' takes no mask|flash_attention_2; use sdpa"):
        bench = OnDevice(_jarvis("masked"), size=32, bidirectional=True)
        decoder: Any = bench.model.anatomy.decoder(bench.model.hf)
        decoder.config._attn_implementation = "flash_attention_2"
        bench.method.prepare(bench.model, 0)  # type: ignore[attr-defined]


# Launches


@pytest.fixture(scope="module")
def launches() -> ModuleType:
    """The helpers of the CPU's test."""
    path = Path(__file__).parents[1] / "algorithms" / "test_jarvis_launches.py"
    spec = importlib.util.spec_from_file_location("jarvis_launches", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _kernels(work: Callable[[], Any]) -> Counter:
    """Kernels and copies that one call launches, by name."""
    work()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        work()
        torch.cuda.synchronize()
    return Counter(
        e.name.split("<")[0].split("(")[0]
        for e in profile.events()
        if e.device_type == torch.autograd.DeviceType.CUDA
    )


@pytest.mark.parametrize("text_loss", ["masked", "unmasked"])
def test_launches_of_masks_grow_with_nothing(cuda: str, launches: ModuleType, text_loss: str) -> None:
    """From the codes to each form of the mask: not with rows, pictures or blocks."""

    def counted(rows: int, images: int, blocks: int) -> dict[str, tuple[int, int]]:
        method = launches.method_of(blocks, text_loss)
        drawn = launches.sampled(method, launches.device_batch(rows, images))
        part = to_device(launches.cut(drawn), torch.device(cuda))
        step = launches.asked(method, part)

        def see() -> Any:
            return step.branches["jarvis"].visibility if text_loss == "unmasked" else step.sees(True)

        works: dict[str, Callable[[], Any]] = {
            "ask": lambda: launches.asked(method, part),
            "dense": lambda: attention.dense(see()),
            "additive": lambda: attention.additive(see(), torch.float32),
            "block mask": lambda: attention.block_mask(see()),
        }
        found = {}
        for name, work in works.items():
            with Recorder() as recorder:
                work()
            found[name] = (sum(_kernels(work).values()), len(recorder.operations))
        return found

    made = {size: counted(*size) for size in ((2, 1, 4), (16, 1, 4), (2, 3, 4), (2, 1, 8), (16, 3, 8))}
    print(f"\n{text_loss}: kernels and operations, {made[2, 1, 4]}")
    first = made[2, 1, 4]
    assert all(kernels > 0 for kernels, _ in first.values())
    for size, found in made.items():
        for name, (kernels, operations) in found.items():
            assert operations == first[name][1], (size, name)
            # A library may cut one large sort or scan into a few kernels.
            assert abs(kernels - first[name][0]) <= 6, (size, name, kernels, first[name][0])


# Memory


def _large(device: str, rows: int) -> tuple[VisionLanguageModel, dict[str, Any]]:
    """A small language model with 32,000 words, rows of unequal conversations."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        text = LlamaConfig(
            **zoo._text(vocab_size=32000, hidden_size=256, intermediate_size=512, num_hidden_layers=2)
        )
        hf = LlavaForConditionalGeneration(
            LlavaConfig(
                vision_config=zoo._clip(32),
                text_config=text,
                image_token_index=zoo._id("<image>"),
                vision_feature_layer=-2,
            )
        )
    built = zoo.Built(hf, zoo.llava(32).processor)
    model = VisionLanguageModel(hf, built.processor).train().to(device)
    batch = jobs.collator(built)([settings.question(i, turns=3) for i in range(rows)])
    return model, batch


def test_the_head_at_labelled_positions_needs_less_memory(device: str) -> None:
    """Against ``model(labels=...)``: same loss, and the peak of forward and backward."""
    model, batch = _large(device, 32 if device == "cuda" else 2)
    (part,) = split_batch(dict(batch), None)
    part = to_device(part, torch.device(device))
    keys = ("input_ids", "attention_mask", "labels", "pixel_values")
    stock = {k: batch[k].to(device) for k in keys}

    def ours() -> torch.Tensor:
        return model.loss(model(part), part)["lm"]

    def theirs() -> torch.Tensor:
        return model.hf(**stock, use_cache=False).loss

    peaks, losses = {}, {}
    for name, step in (("ours", ours), ("stock", theirs)) * 2:  # the second time around, everything is warm
        model.zero_grad(set_to_none=True)
        if device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        loss = step()
        loss.backward()
        losses[name] = float(loss)
        if device == "cuda":
            torch.cuda.synchronize()
            peaks[name] = (torch.cuda.max_memory_allocated() - before) / 2**20
        model.end_step()
    assert losses["ours"] == pytest.approx(losses["stock"], rel=1e-4)
    if device != "cuda":
        pytest.skip("memory is measured on a CUDA device")
    share = float((batch["labels"] != -100).float().mean())
    print(
        f"\npeak of a step: {peaks['ours']:.0f} MiB, stock {peaks['stock']:.0f} MiB, {peaks['stock'] / peaks['ours']:.2f} "
        f"times as much, {share:.0%} of tokens labelled"
    )
    assert peaks["ours"] < 0.7 * peaks["stock"]
