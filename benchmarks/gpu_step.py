"""A training step on a GPU with each method and with all of them, beside the same step without.

``composer.Trainer`` at bf16 autocast, one model and one optimizer for all variants, whose learning rate is 0: weights stay
as they are, so that every round does the same work. Variants take turns. FLOPs are counted (``FlopCounterMode``), peak
memory is what a step needs beyond what is held before it. The tower is frozen, everything else is trained, as in LLaVA's
instruction tuning. JARVIS is measured with bidirectional images, as in its paper, and the baseline with both.

    python benchmarks/gpu_step.py --device cuda                  # 135M and 0.5B
    python benchmarks/gpu_step.py --device cuda --shape 7b       # needs 80 GB; AdamW from 120 GB on, else SGD
    python benchmarks/gpu_step.py --quick                        # a rehearsal on the CPU
"""

from __future__ import annotations

import gc
import json
import time
from itertools import pairwise
from typing import Any

import report

report.quiet()

import torch  # noqa: E402
from composer import Trainer  # noqa: E402
from gpu_shapes import SHAPES, build_shape, prompt_batch  # noqa: E402
from measure import MIB, Timed, Variant, interleave, ratio  # noqa: E402
from shapes import Built  # noqa: E402
from steps import Clock, Repeated  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402

from opsin.algorithms.jarvis import JARVIS  # noqa: E402
from opsin.algorithms.l2t import L2T  # noqa: E402
from opsin.algorithms.ross import ROSS  # noqa: E402
from opsin.algorithms.vift import ViFT  # noqa: E402
from opsin.data.batch import vlm_data_spec  # noqa: E402
from opsin.models.parts import set_trainable  # noqa: E402
from opsin.models.vlm import VisionLanguageModel  # noqa: E402
from opsin.training import compat  # noqa: E402

NAME = "gpu_step"
PEAK = {"H200": 989e12, "H100": 989e12, "A100": 312e12}
"""bf16 FLOP/s of dense matrix products, by the vendor's data sheet."""
TEACHER = {"name": "features", "timm": "vit_large_patch14_dinov2", "weights": None, "image_size": 336}
"""DINOv2-L with random weights, computed in the step."""
AMPLE = 120 * 2**30


class Online(JARVIS):
    """Beside JARVIS with another target: one model holds the heads of all variants, by name."""

    name = "jarvis_online"


def methods(prompt: str) -> dict[str, tuple[list[Any], bool]]:
    """Variant -> its methods, made anew, and whether images are bidirectional."""
    ross = lambda: ROSS(target="pixels")  # noqa: E731
    l2t = lambda: L2T(template_source="none")  # noqa: E731
    jarvis = lambda: JARVIS(target={"name": "tower", "path": "scenes"})  # noqa: E731
    vift = lambda: ViFT(caption_prompts=[prompt], max_refused=None)  # noqa: E731
    return {
        "baseline": ([], False),
        "baseline, bidirectional": ([], True),
        "l2t": ([l2t()], False),
        "ross": ([ross()], False),
        "vift": ([vift()], False),
        "jarvis": ([jarvis()], True),
        "all four": ([ross(), l2t(), jarvis(), vift()], True),
        "jarvis, DINOv2-L computed": ([Online(target=TEACHER)], True),
    }


class Bench:
    """A model, its optimizer and its batch, which all variants of a shape share."""

    def __init__(self, name: str, device: str, attention: str):
        self.device, self.shape = device, SHAPES[name]
        self.built: Built = build_shape(name, device)
        self.model = VisionLanguageModel(self.built.hf, self.built.processor)
        set_trainable(self.model, {"vision_tower": False, "mm_projector": True, "language_model": True})
        decoder: Any = self.model.anatomy.decoder(self.built.hf)
        decoder.set_attn_implementation(attention)
        self.batch, self.prompt = prompt_batch(self.built, self.shape.rows, self.shape.length)
        ample = device == "cpu" or torch.cuda.get_device_properties(0).total_memory > AMPLE
        self.spared = name == "7b" and not ample
        if self.spared:
            decoder.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        kind = torch.optim.SGD if self.spared else torch.optim.AdamW
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = kind(self.parameters, lr=0.0, weight_decay=0.0, fused=True)
        self.memory: dict[str, float] = {}
        self.losses: dict[str, float] = {}

    def facts(self) -> dict[str, Any]:
        """What the numbers were measured on."""
        return {
            "note": self.shape.note, "rows": self.shape.rows, "length": self.shape.length, "weights": str(self.shape.dtype),
            "parameters": sum(p.numel() for p in self.built.hf.parameters()),
            "trained": sum(p.numel() for p in self.parameters), "optimizer": type(self.optimizer).__name__,
            "activation_checkpointing": self.spared, "precision": self.precision,
            "labelled": round(float((self.batch["labels"] != -100).float().mean()), 4),
        }  # fmt: skip

    @property
    def precision(self) -> str:
        return "amp_bf16" if self.device == "cuda" else "fp32"

    def variant(self, name: str, algorithms: list[Any], bidirectional: bool, burst: int) -> Variant:
        """Runs an epoch of ``burst`` steps; notes the peak of memory."""
        clock = Clock(self.device)
        trainer = Trainer(
            model=self.model,
            train_dataloader=vlm_data_spec(Repeated(self.batch, burst)),
            optimizers=self.optimizer,
            algorithms=algorithms,
            callbacks=[clock],
            max_duration="1ep",
            device="gpu" if self.device == "cuda" else "cpu",
            precision=self.precision,
            progress_bar=False,
            seed=0,
        )

        def run() -> Timed:
            self.model.net.bidirectional_images = bidirectional
            self.optimizer.zero_grad(set_to_none=True)
            if self.device == "cuda":
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
            trainer.fit(duration="1ep")
            if self.device == "cuda":
                self.memory[name] = (torch.cuda.max_memory_allocated() - before) / MIB
            self.losses[name] = clock.loss
            return Timed([b - a for a, b in pairwise(clock.marks)], clock.loss)

        return run


def _attention_flops(matmuls: int, before: int) -> Any:
    """Counts matrix products of attention whose key heads may be fewer than its query heads, which torch 2.11 refuses to count.

    Args:
        matmuls: how many of the size of the scores.
        before: operands that stand before the query.
    """

    def count(*shapes: Any, out_shape: Any = None, **more: Any) -> int:
        (batch, heads, queries, width), (_, _, keys, _) = shapes[before], shapes[before + 1]
        return 2 * matmuls * batch * heads * queries * keys * width

    return count


def _kernels() -> dict[Any, Any]:
    """What scaled_dot_product_attention may run: two products forward; four backward, and the scores once more."""
    found = {}
    for kind in ("efficient", "flash", "cudnn"):
        forward = getattr(torch.ops.aten, f"_scaled_dot_product_{kind}_attention", None)
        backward = getattr(torch.ops.aten, f"_scaled_dot_product_{kind}_attention_backward", None)
        found |= {op: _attention_flops(2, 0) for op in (forward,) if op is not None}
        found |= {op: _attention_flops(5, 1) for op in (backward,) if op is not None}
    return found


def counted(run: Variant, burst: int) -> float:
    """FLOPs of one step, backward included; those of FlexAttention are not seen."""
    with FlopCounterMode(display=False, custom_mapping=_kernels()) as counter:
        run()
    return counter.get_total_flops() / burst


def measured(name: str, device: str, attention: str, rounds: int, seconds: float) -> dict[str, Any]:
    """All variants of a shape."""
    begun = time.perf_counter()
    bench = Bench(name, device, attention)
    burst = bench.shape.burst
    variants = {
        n: bench.variant(n, algorithms, both, burst)
        for n, (algorithms, both) in methods(bench.prompt).items()
    }
    made = time.perf_counter() - begun
    flops = {n: counted(run, burst) for n, run in variants.items()}  # the warm-up, too
    series = interleave(variants, rounds=rounds, seconds=seconds, warmup=1, least=2)
    gpu = torch.cuda.get_device_name() if device == "cuda" else None
    peak = next((p for key, p in PEAK.items() if gpu and key in gpu), None)
    tokens = bench.shape.rows * bench.shape.length
    found: dict[str, Any] = {}
    for n, times in series.items():
        other = "baseline, bidirectional" if methods(bench.prompt)[n][1] else "baseline"
        found[n] = {
            **times.as_dict(),
            "against_baseline": ratio(times, series["baseline"]),
            "against_its_own_attention": ratio(times, series[other]),
            "tokens_per_s": tokens / times.median,
            "flops": flops[n],
            "flops_ratio": flops[n] / flops["baseline"],
            "mfu": None if peak is None else flops[n] / times.median / peak,
            "step_MiB": bench.memory.get(n),
            "lm_loss": bench.losses[n],
        }
    for n, same in (("ross", "baseline"), ("vift", "baseline"), ("jarvis", "baseline, bidirectional")):
        if abs(bench.losses[n] - bench.losses[same]) > 1e-2 * abs(bench.losses[same]):
            report.console().print(
                f"{n}: loss of words {bench.losses[n]:.4f}, {same} {bench.losses[same]:.4f}: not the same work"
            )
    facts = bench.facts()
    del bench, variants
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
    return {
        **facts, "attention": attention, "gpu": gpu, "peak_flops": peak, "seconds_to_build": made,
        "seconds": time.perf_counter() - begun, "variants": found,
    }  # fmt: skip


def show(name: str, body: dict[str, Any]) -> None:
    """The table of a shape."""
    rows = [
        [
            n,
            f"{1000 * v['median_s']:.1f}",
            report.spread(v["against_baseline"]),
            f"{v['flops_ratio']:.3f}",
            f"{v['tokens_per_s']:,.0f}",
            "" if v["mfu"] is None else f"{v['mfu']:.1%}",
            "" if v["step_MiB"] is None else f"{v['step_MiB']:,.0f}",
        ]
        for n, v in body["variants"].items()
    ]
    report.table(
        f"{name}: {body['note']}; {body['rows']} x {body['length']} tokens, {body['optimizer']}, {body['precision']}, "
        f"{body['attention']}{', activation checkpointing' if body['activation_checkpointing'] else ''}; "
        f"{body['gpu'] or 'CPU'}; {body['seconds']:.0f} s",
        ["variant", "ms a step", "against baseline", "FLOPs", "tokens/s", "MFU", "step MiB"],
        rows,
    )


def main() -> None:
    """Measure, print, write."""
    parser = report.parser(__doc__, tuple(SHAPES), rounds=8, seconds=45.0)
    parser.add_argument("--attention", default="sdpa", choices=("sdpa", "flex_attention"))
    options = parser.parse_args()
    compat.apply()
    shapes = options.shape or (["toy"] if options.quick else ["smollm2-135m", "0.5b"])
    path = report.path_of(NAME, options.quick)
    body: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {"shapes": {}}
    for shape in shapes:
        rounds, seconds = (1, 5.0) if options.quick else (options.rounds, options.seconds)
        found = measured(shape, options.device, options.attention, rounds, seconds)
        key = shape if options.attention == "sdpa" else f"{shape}, {options.attention}"
        body["shapes"][key] = {"environment": report.environment(options.device), **found}
        show(key, found)
        report.save(NAME, options.quick, body)  # what is measured is kept, whatever comes next


if __name__ == "__main__":
    main()
