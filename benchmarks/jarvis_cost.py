"""What JARVIS costs: a step with it against a step without, beside the ratio of floating-point operations.

Four ways: features of the target network stored beside the data or computed in the step (online), words that see the
masked image or the whole one (then masked views run a second time through the first quarter of the layers). Images are
bidirectional with and without JARVIS, and every view is masked. No machine of ours runs a 7B model, so proportions are
scaled: the language model of SmolLM2-135M with 256 patches among 320 tokens, and networks of timm whose share of the
operations is that of DINOv2-L beside a 7B and a 0.5B language model (``jarvis_flops.py``).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import report

report.quiet()

import torch  # noqa: E402
from jarvis_flops import counted, head, table  # noqa: E402
from measure import Series, Timed, Variant, interleave, ratio, synchronise  # noqa: E402
from shapes import Built, build, text_batch  # noqa: E402
from steps import adamw, composer_trainer, moved  # noqa: E402

from opsin.algorithms.jarvis import JARVIS  # noqa: E402
from opsin.algorithms.jarvis.functional import prediction_losses, weighted_sum  # noqa: E402
from opsin.data.batch import split_batch  # noqa: E402
from opsin.models import attention  # noqa: E402
from opsin.models.vlm import VisionLanguageModel  # noqa: E402

NAME = "jarvis_cost"
SHAPES = ("7B-like", "0.5B-like")
TEACHERS = {"7B-like": ("vit_tiny_patch16_224", 240), "0.5B-like": ("vit_base_patch16_224", 240)}
"""Network of timm, and the side in pixels of what it reads: together they give the share of operations."""
WAYS = tuple((text, stored) for text in ("masked", "unmasked") for stored in (True, False))
IMAGE_SIZE, ROWS, LENGTH, SAID = 128, 1, 320, 0.07


class Clocked(JARVIS):
    """JARVIS that takes what the batch brings along without asking the dataset what it is."""

    brings = False

    def fit_start(self, model: Any, state: Any, logger: Any) -> None:
        super().fit_start(model, state, logger)
        self._take_stored = self.brings


def method_of(shape: str, text_loss: str, stored: bool) -> Clocked:
    """JARVIS with a teacher of the proportions that were asked for."""
    network, size = TEACHERS[shape]
    made = Clocked(
        target={"name": "features", "timm": network, "weights": None, "image_size": size},
        text_loss=text_loss,
        ntp_probability=0.0,
    )
    made.brings = stored
    return made


def name_of(text_loss: str, stored: bool) -> str:
    """Of one of the four ways."""
    return f"{text_loss}, {'stored' if stored else 'online'}"


class Pieces:
    """What JARVIS adds to a step, piece by piece: a ratio of two whole steps is noisier than what is asked about."""

    def __init__(self, shape: str, built: Built, plain: dict, device: str):
        self.plain, self.device = plain, device
        self.model = VisionLanguageModel(built.hf, built.processor, bidirectional_images=True).train()
        self.methods = {text: method_of(shape, text, False) for text in ("masked", "unmasked")}
        self.parts: dict[str, Any] = {}
        for text, method in self.methods.items():
            make = method.prepare(self.model, 0)
            if "jarvis" not in self.model.net.auxiliary:
                self.model.net.auxiliary["jarvis"] = make().to(device)
            self.parts[text] = self.drawn(text)
        method, part = self.methods["masked"], self.parts["masked"]
        width = built.hf.config.text_config.hidden_size
        self.head: Any = self.model.net.auxiliary["jarvis"]
        self.optimizer = torch.optim.AdamW(self.head.parameters(), lr=0.0, fused=True)
        self.states = torch.randn(len(part["jarvis/targets"]), width, device=device, requires_grad=True)
        self.features = torch.randn(len(self.states), method.built_target.dim, device=device)
        self.embeddings = torch.randn(
            *part["input_ids"].shape, width, device=device, requires_grad=True
        )  # of one micro-batch

    def drawn(self, text: str) -> dict[str, Any]:
        """A micro-batch with masks."""
        batch = dict(self.plain)
        self.methods[text].enter(batch)
        (part,) = split_batch(batch, None, training=False)
        return moved(part, self.device)

    def own_masks(self, text: str) -> None:
        """Drawing and cutting."""
        batch = dict(self.plain)
        self.methods[text].enter(batch)
        part = {**self.parts[text]}
        part.update(batch["cut/jarvis"]({k: moved(v, "cpu") for k, v in part.items()}))

    def mask(self, masked: bool) -> None:
        """The attention mask of a step."""
        part = self.parts["masked"]
        self.model.end_step()
        if masked:
            self.methods["masked"].ask(self.model, part)
        see = self.model.step(part).sees(bidirectional_images=True)
        assert see is not None
        attention.dense(see)

    def predict(self) -> None:
        """Head, loss, their backward pass into the hidden states, their optimizer."""
        self.states.grad = None
        predicted = self.head.predict(self.states)
        each = prediction_losses(predicted, self.features, "cosine")
        weighted_sum(each, self.parts["masked"]["jarvis/weights"]).backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def teach(self) -> None:
        """The target network."""
        self.methods["masked"].features(self.model, self.parts["masked"])

    def second_pass(self) -> None:
        """Masked views through the early layers, forward and backward."""
        method, part = self.methods["unmasked"], self.parts["unmasked"]
        self.model.end_step()
        method.ask(self.model, part)
        step = self.model.step(part)
        step.embeddings = self.embeddings
        self.model.net._branch(part, step, step.branches["jarvis"]).sum().backward()
        self.model.zero_grad(set_to_none=True)
        self.embeddings.grad = None
        self.model.end_step()

    def all(self) -> dict[str, Callable[[], None]]:
        """Name -> piece."""
        return {
            "draw, masked": lambda: self.own_masks("masked"),
            "draw, unmasked": lambda: self.own_masks("unmasked"),
            "mask": lambda: self.mask(True),
            "mask without": lambda: self.mask(False),
            "head": self.predict,
            "teacher": self.teach,
            "second pass": self.second_pass,
        }

    @staticmethod
    def of_way(seconds: dict[str, float], text: str, stored: bool) -> float:
        """Sum of the pieces of one of the four ways."""
        if text == "masked":
            own = seconds["draw, masked"] + max(0.0, seconds["mask"] - seconds["mask without"])
        else:
            own = seconds["draw, unmasked"] + seconds["second pass"]
        return own + seconds["head"] + (0.0 if stored else seconds["teacher"])


def timed(work: Callable[[], None], device: str) -> Variant:
    """A variant that does a piece of work a few times."""

    def run() -> Timed:
        seconds = []
        for _ in range(3):
            synchronise(device)
            begun = time.perf_counter()
            work()
            synchronise(device)
            seconds.append(time.perf_counter() - begun)
        return Timed(seconds)

    return run


def operations(pieces: Pieces, built: Built) -> dict[str, float]:
    """Counted on real passes: the step without JARVIS, and what the large pieces add."""
    model, plain = pieces.model, pieces.plain
    (micro,) = split_batch(dict(plain), None)
    micro = moved(micro, pieces.device)
    base = counted(lambda: model.loss(model(micro), micro)["lm"].backward())
    model.zero_grad(set_to_none=True)
    model.end_step()
    width = built.hf.config.text_config.hidden_size
    return {
        "baseline": base,
        "teacher": counted(pieces.teach),
        "head": head(width, len(pieces.states), pieces.features.shape[1]),
        "second pass": counted(pieces.second_pass),
    }


def step(shape: str, built: Built, optimizer: torch.optim.Optimizer, options: Any) -> dict[str, Any]:
    """A step with and without JARVIS in ``composer.Trainer``, four ways."""
    device = options.device
    plain = text_batch(built, rows=ROWS, length=LENGTH, labelled=SAID, instruction=SAID)
    pieces = Pieces(shape, built, plain, device)

    def run(batch: dict, algorithms: list[Any]) -> Variant:
        model = VisionLanguageModel(built.hf, built.processor, bidirectional_images=True).train()
        return composer_trainer(model, optimizer, batch, 1, device, algorithms)

    patches = int(plain["view_grid"].prod(1).sum())
    brought = {**plain, "patch_targets": torch.randn(patches, pieces.features.shape[1]).bfloat16()}
    runs = {"baseline": run(plain, [])}
    for text, stored in WAYS:
        runs[name_of(text, stored)] = run(brought if stored else plain, [method_of(shape, text, stored)])
    runs.update({f"piece: {name}": timed(work, device) for name, work in pieces.all().items()})
    losses = {name: runs[name]().loss for name in ("baseline", *(name_of(*way) for way in WAYS))}
    for stored in (True, False):  # the learning rate is 0: where words see the whole image, lm stays the same
        assert abs(losses["baseline"] - losses[name_of("unmasked", stored)]) < 1e-4, losses
    series: dict[str, Series] = interleave(
        runs,
        rounds=options.rounds or (2 if options.quick else 20),
        seconds=options.seconds or 45.0,
        warmup=0,
        least=2 if options.quick else 3,
    )
    counts = operations(pieces, built)
    seconds = {name: series[f"piece: {name}"].median for name in pieces.all()}
    ways = {}
    for text, stored in WAYS:
        added = counts["head"] + (0 if stored else counts["teacher"])
        added += counts["second pass"] if text == "unmasked" else 0
        own = Pieces.of_way(seconds, text, stored)
        ways[name_of(text, stored)] = {
            "operations_ratio": 1 + added / counts["baseline"],
            "own_work_s": own,
            "own_work_ratio": 1 + own / series["baseline"].median,
            "ratio": ratio(series[name_of(text, stored)], series["baseline"]),
        }
    return {
        "shape": shape,
        "teacher": TEACHERS[shape],
        "teacher_share_of_operations": counts["teacher"] / counts["baseline"],
        "operations": counts,
        "pieces_s": seconds,
        "loss": losses,
        "variants": {name: one.as_dict() for name, one in series.items()},
        "ways": ways,
    }


def show_operations(found: list[dict[str, Any]]) -> None:
    """The counted ratios."""
    columns = ("masked_stored", "masked_online", "unmasked_stored", "unmasked_online")
    report.table(
        "operations of a step with JARVIS / without, DINOv2-L at 24x24 patches, 640 tokens",
        ("language model, trained", "teacher's share", *(c.replace("_", ", ") for c in columns)),
        [
            (
                f"{o['language_model']}, {o['train']}",
                f"{o['teacher_share']:.3f}",
                *(f"{o[c]:.3f}" for c in columns),
            )
            for o in found
        ],
    )


def main() -> None:
    """Count, measure, print, save."""
    options = report.parser(__doc__, SHAPES).parse_args()
    counts = table()
    show_operations(counts)
    built = build("smollm2-135m", options.device, IMAGE_SIZE)
    optimizer = adamw(built.hf)
    steps = [step(shape, built, optimizer, options) for shape in options.shape or SHAPES]
    report.table(
        "a step with JARVIS / without (SmolLM2-135M shape, 256 of 320 tokens a picture; quartiles of rounds)",
        ("proportions, text loss, features", "teacher's share", "operations", "own work", "whole steps"),
        [
            (
                f"{s['shape']}, {name}",
                f"{s['teacher_share_of_operations']:.3f}",
                f"{way['operations_ratio']:.3f}",
                f"{way['own_work_ratio']:.3f}",
                report.spread(way["ratio"]),
            )
            for s in steps
            for name, way in s["ways"].items()
        ],
    )
    for s in steps:
        shown = ", ".join(f"{name} {1e3 * value:.1f}" for name, value in s["pieces_s"].items())
        report.console().print(f"{s['shape']}, pieces in ms: {shown}")
    report.save(
        NAME,
        options.quick,
        {"environment": report.environment(options.device), "operations": counts, "steps": steps},
    )


if __name__ == "__main__":
    main()
