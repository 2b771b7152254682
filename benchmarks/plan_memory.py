"""What ``opsin plan`` says of memory, beside what real steps of a real Trainer allocate.

    python benchmarks/plan_memory.py                                  # small shapes on the CPU, a minute
    python benchmarks/plan_memory.py --device cuda                    # up to 7B on one GPU, two minutes

Weights are random and nothing is downloaded. Measured is the third step: on a CPU by PyTorch's profiler, which sees every
allocation, on a GPU by ``torch.cuda.max_memory_allocated``. Writes ``results/plan_memory.<device>.json``.
"""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from composer import Callback, Trainer
from shapes import Built, text_batch
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from opsin.algorithms.ross import ROSS
from opsin.data.batch import vlm_data_spec
from opsin.data.scenes import SceneConfig, vocabulary
from opsin.models.assemble import llava_from_parts
from opsin.models.parts import parameter_groups, set_trainable
from opsin.models.tiny import llava_processor, word_tokenizer
from opsin.models.vlm import VisionLanguageModel
from opsin.training import compat
from opsin.training.plan.memory import Memory, MemoryModel, Way
from opsin.training.plan.methods import workloads
from opsin.training.plan.plan import seen
from opsin.training.plan.rehearsal import Shape

RESULTS = Path(__file__).parent / "results"
CLIP = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16, "image_size": 336, "patch_size": 14}  # fmt: skip
SMALL_CLIP = {"hidden_size": 96, "intermediate_size": 192, "num_hidden_layers": 3, "num_attention_heads": 3, "image_size": 64, "patch_size": 8}  # fmt: skip
TEXT: dict[str, dict[str, Any]] = {
    "toy": {"vocab_size": 4096, "hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 6, "num_attention_heads": 4, "num_key_value_heads": 4},
    "135M": {"vocab_size": 49_152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True},
    "0.5B": {"vocab_size": 151_936, "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2, "tie_word_embeddings": True},
    "7B": {"vocab_size": 152_064, "hidden_size": 3584, "intermediate_size": 18_944, "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4, "tie_word_embeddings": False},
}  # fmt: skip


@dataclass(frozen=True)
class Cell:
    """One measurement; ``rows`` of ``length`` tokens in micro-batches of ``micro``."""

    text: str
    vision: str = "small"
    rows: int = 4
    length: int = 256
    micro: int | None = None
    language_model: bool = True
    checkpointing: bool = False
    precision: str = "fp32"
    ross: bool = False
    optimizer: dict[str, Any] = field(default_factory=dict)


ON_CPU = [
    Cell("toy"),
    Cell("toy", checkpointing=True),
    Cell("toy", precision="amp_bf16"),
    Cell("toy", rows=8, micro=2),
    Cell("toy", language_model=False),
    Cell("toy", ross=True),
    Cell("135M", rows=2),
    Cell("135M", rows=2, checkpointing=True),
]
ON_CUDA = [
    Cell("toy", precision="amp_bf16"),
    *(
        Cell("135M", "clip", rows=8, length=1024, precision="amp_bf16", checkpointing=c)
        for c in (False, True)
    ),
    *(Cell("0.5B", "clip", rows=4, length=1024, precision=p, checkpointing=c) for p in ("fp32", "amp_bf16") for c in (False, True)),
    Cell("0.5B", "clip", rows=8, micro=2, length=1024, precision="amp_bf16", optimizer={"fused": True}),
    Cell("0.5B", "clip", rows=4, length=1024, precision="amp_bf16", checkpointing=True, ross=True),
    *(
        Cell("7B", "clip", rows=4, length=1024, precision="amp_bf16", language_model=False, checkpointing=c)
        for c in (False, True)
    ),
]  # fmt: skip


def build(cell: Cell, device: str) -> Built:
    """The cell's model with random weights on its device, and what encodes text for it."""
    tokenizer: Any = word_tokenizer(vocabulary(SceneConfig(size=64, questions=4)))
    vision = CLIP if cell.vision == "clip" else SMALL_CLIP
    sizes = {
        **TEXT[cell.text],
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "max_position_embeddings": 4096,
    }
    qwen = cell.text in ("0.5B", "7B")
    with torch.device(device):
        text = Qwen2ForCausalLM(Qwen2Config(**sizes)) if qwen else LlamaForCausalLM(LlamaConfig(**sizes))
        tower = CLIPVisionModel(CLIPVisionConfig(**vision))
    hf = llava_from_parts(tower, text, image_token_id=tokenizer.convert_tokens_to_ids("<image>"))
    return Built(cell.text, hf, llava_processor(tokenizer, vision["image_size"], vision["patch_size"]), 1)


class Steps(list):
    """The same device batch, some times."""

    def __init__(self, batch: Any, rows: int, times: int = 3):
        super().__init__([batch] * times)
        self.batch_size = rows


class Peak(Callback):
    """Most bytes allocated in the third step."""

    def __init__(self, device: str, model: VisionLanguageModel):
        self.device, self.model = device, model
        self.bytes = 0.0
        self._profile: Any = None

    def batch_start(self, state: Any, logger: Any) -> None:
        if int(state.timestamp.batch) != 2:
            return
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            return
        kept = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in self._kept(state)}
        self.bytes = float(sum(kept.values()))
        self._profile = torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
        )
        self._profile.__enter__()

    def _kept(self, state: Any) -> list[torch.Tensor]:
        """Parameters and what the optimizer keeps. (The last step's gradients go before the forward pass.)"""
        states = [
            t for s in state.optimizers[0].state.values() for t in s.values() if isinstance(t, torch.Tensor)
        ]
        return [*self.model.parameters(), *states]

    def batch_end(self, state: Any, logger: Any) -> None:
        if int(state.timestamp.batch) != 3:
            return
        if self.device == "cuda":
            self.bytes = float(torch.cuda.max_memory_allocated())
            return
        self._profile.__exit__(None, None, None)
        events = [e for e in self._profile.profiler.kineto_results.events() if e.name() == "[memory]"]
        live = most = 0
        for event in sorted(events, key=lambda e: e.start_ns()):
            live += event.nbytes()
            most = max(most, live)
        self.bytes += most


def measure(cell: Cell, device: str) -> tuple[float, Memory]:
    """Measured bytes, and the plan's."""
    compat.apply()
    built = build(cell, device)
    model = VisionLanguageModel(built.hf, built.processor)
    set_trainable(model, {"vision_tower": False, "mm_projector": True, "language_model": cell.language_model})
    if cell.checkpointing:
        decoder: Any = model.anatomy.decoder(model.hf)
        decoder.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    batch = text_batch(built, rows=cell.rows, length=cell.length, labelled=0.2, instruction=0.1)
    algorithms = [ROSS(target={"name": "pixels", "cell": 8}, draws=2)] if cell.ross else []
    optimizer = torch.optim.AdamW(parameter_groups(model, 1e-4, {}, 0.0), **cell.optimizer)
    precision = cell.precision
    if device == "cpu" and precision == "amp_bf16":
        model.net.autocast_dtype, precision = torch.bfloat16, "fp32"
    peak = Peak(device, model)
    micro = cell.micro or cell.rows
    trainer = Trainer(
        model=model,
        train_dataloader=vlm_data_spec(Steps(batch, cell.rows)),
        optimizers=optimizer,
        algorithms=algorithms,
        callbacks=[peak],
        max_duration="3ba",
        device="gpu" if device == "cuda" else "cpu",
        precision=precision,
        device_train_microbatch_size=micro,
        progress_bar=False,
    )
    picture, grid, visual = seen(model)
    labelled = int((batch["labels"] != -100).sum()) * micro // cell.rows
    shape = Shape(micro, cell.length, labelled, micro, picture, visual, grid, masked=False)
    way = Way(
        False,
        cell.checkpointing,
        1,
        cell.precision == "amp_bf16",
        micro < cell.rows,
        cell.optimizer,
        device == "cpu",
    )
    predicted = MemoryModel(model, workloads({a.name: a for a in algorithms}, model))(shape, way)
    trainer.fit()
    trainer.close()
    found = peak.bytes
    del trainer, model, built, optimizer, peak
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
    return found, predicted


def describe(cell: Cell) -> str:
    said = [cell.text, f"{cell.rows} x {cell.length}", cell.precision]
    said += [f"micro-batches of {cell.micro}"] if cell.micro else []
    said += ["language model frozen"] if not cell.language_model else []
    said += ["checkpointing"] if cell.checkpointing else []
    said += ["ROSS"] if cell.ross else []
    said += [f"{k}={v}" for k, v in cell.optimizer.items()]
    return ", ".join(said)


def apart(cell: Cell, device: str) -> tuple[float, Memory]:
    """:func:`measure`, on a GPU in a process of its own: Composer holds a trainer until its process ends."""
    if device == "cpu":  # there, only what is allocated within the step is seen
        return measure(cell, device)
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(measure, cell, device).result()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--only", help="cells whose description has this in it")
    parser.add_argument("--out", type=Path, help="default: results/plan_memory.DEVICE.json")
    given = parser.parse_args()
    rows = []
    for cell in ON_CPU if given.device == "cpu" else ON_CUDA:
        if given.only and given.only not in describe(cell):
            continue
        found, predicted = apart(cell, given.device)
        error = predicted.total / found - 1
        rows.append({"cell": describe(cell), "predicted_MiB": predicted.total / 2**20, "measured_MiB": found / 2**20, "error": error, "of": predicted.as_dict()})  # fmt: skip
        print(f"{describe(cell):70} predicted {predicted.total / 2**20:9.1f} MiB  measured {found / 2**20:9.1f} MiB  error {error:+.1%}", flush=True)  # fmt: skip
    name = torch.cuda.get_device_name() if given.device == "cuda" else "cpu"
    out = given.out or RESULTS / f"plan_memory.{given.device}.json"
    out.write_text(json.dumps({"device": name, "torch": torch.__version__, "cells": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
