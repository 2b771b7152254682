"""What ROSS costs: a step with it against a step without, beside the ratio of floating-point operations.

No machine of ours runs a 7B model, so proportions are scaled: the language model of SmolLM2-135M with 256 patches a
picture, and denoisers whose share of the operations is that of the paper's denoiser beside a 7B and a 0.5B language
model. Targets are stored beside the data, as ``opsin data latents`` makes them. Then the loss itself, vectorised,
against a loop over pictures that does the same.
"""

from __future__ import annotations

import time
from typing import Any

import report

report.quiet()

import torch  # noqa: E402
from measure import Timed, Variant, interleave, quartiles, ratio, synchronise  # noqa: E402
from ross_flops import counted, table  # noqa: E402
from ross_flops import ross as ross_flops  # noqa: E402
from shapes import Built, build, text_batch  # noqa: E402
from steps import adamw, composer_trainer, moved  # noqa: E402

from opsin.algorithms.ross import ROSS  # noqa: E402
from opsin.algorithms.ross.diffusion import objective_named  # noqa: E402
from opsin.algorithms.ross.functional import draw_noise, reconstruction_loss  # noqa: E402
from opsin.algorithms.ross.heads import make_head  # noqa: E402
from opsin.algorithms.ross.views import Views  # noqa: E402
from opsin.data.batch import split_batch  # noqa: E402
from opsin.models.randomness import view_keys  # noqa: E402
from opsin.models.vlm import VisionLanguageModel  # noqa: E402

NAME = "ross_cost"
SHAPES = ("7B-like", "0.5B-like")
WIDTHS = {"7B-like": 160, "0.5B-like": 576}
"""Denoiser widths that give the operations' ratio of the paper's denoiser beside 7B and 0.5B, at SmolLM2-135M."""
IMAGE_SIZE, ROWS, LENGTH, CELL = 128, 1, 512, 8
TARGET_AT_7B, TARGET_POINTS = 1.05, 0.05


class Storing(ROSS):
    """ROSS that takes what the batch brings along without asking the dataset what it is."""

    def fit_start(self, model: Any, state: Any, logger: Any) -> None:
        super().fit_start(model, state, logger)
        self._take_stored = True


def baseline_operations(model: VisionLanguageModel, batch: dict, device: str) -> float:
    """Counted on one real step."""
    (micro,) = split_batch(dict(batch), None)
    micro = moved(micro, device)
    found = counted(lambda: model.loss(model(micro), micro)["lm"].backward())
    model.zero_grad(set_to_none=True)
    model.end_step()
    return found


def own_work(width: int, dim: int, grid: tuple[int, int], images: int, denoiser: int, device: str) -> float:
    """Seconds of what ROSS adds to a step: noise, loss, its backward pass into the hidden states, its optimizer.

    The ratio of two whole steps is noisier than the few hundredths that are asked about; this is not.
    """
    head = make_head("dit", width, dim, width=denoiser).to(device)
    optimizer = torch.optim.AdamW(head.parameters(), lr=0.0, fused=True)
    objective = objective_named("epsilon")
    shares = objective.shares(1000).float().to(device)
    count = images * grid[0] * grid[1]
    hidden = torch.randn(count, width, device=device, requires_grad=True)
    target = torch.randn(count, dim, device=device)
    uid = torch.arange(1, images + 1, device=device)
    key = view_keys(1, uid, uid, uid, uid)
    seconds = []
    for _ in range(22):
        hidden.grad = None
        synchronise(device)
        begun = time.perf_counter()
        views = Views.of([grid] * images, torch.device(device))
        noise = draw_noise(key, views, 4, dim, 1000)
        reconstruction_loss(head, hidden, target, views, objective, noise, shares).mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        synchronise(device)
        seconds.append(time.perf_counter() - begun)
    return quartiles(seconds[2:])[1]


def step(shape: str, built: Built, options: Any) -> dict[str, Any]:
    """A step with and without ROSS in ``composer.Trainer``."""
    device = options.device
    plain = text_batch(built, rows=ROWS, length=LENGTH)
    ross = Storing(target={"name": "pixels", "cell": CELL}, width=WIDTHS[shape])
    base = VisionLanguageModel(built.hf, built.processor).train()
    with_ross = VisionLanguageModel(built.hf, built.processor).train()
    (micro,) = split_batch(dict(plain), None, training=False)
    target = ROSS(target={"name": "pixels", "cell": CELL}).prepare(
        base, 0
    )  # its dim is that of the head below
    dim = target.args[2]
    stored = {**plain, "patch_targets": torch.randn(len(micro["patch_position"]), dim).bfloat16()}
    runs: dict[str, Variant] = {
        "baseline": composer_trainer(base, adamw(built.hf), plain, 1, device),
        "ross": composer_trainer(with_ross, adamw(built.hf), stored, 1, device, [ross]),
    }
    losses = {name: variant().loss for name, variant in runs.items()}
    assert abs(losses["baseline"] - losses["ross"]) < 1e-4, (
        losses
    )  # the learning rate is 0: lm stays the same
    series = interleave(
        runs,
        rounds=options.rounds or (2 if options.quick else 60),
        seconds=options.seconds or 120.0,
        warmup=0,
        least=2 if options.quick else 4,
    )
    before = baseline_operations(base, plain, device)
    width = built.hf.config.text_config.hidden_size
    with torch.device("meta"):
        head = make_head("dit", width, dim, width=WIDTHS[shape])
    grid = tuple(int(n) for n in plain["view_grid"][0])
    added = ross_flops(width, head, ross.draws, grid, dim, images=len(plain["view_grid"]))  # type: ignore[arg-type]
    images = len(plain["view_grid"])
    own = own_work(width, dim, (grid[0], grid[1]), images, WIDTHS[shape], device)
    return {
        "own_work_s": own,
        "own_work_ratio": 1 + own / series["baseline"].median,
        "shape": shape,
        "denoiser_width": WIDTHS[shape],
        "draws": ross.draws,
        "operations_ratio": 1 + added / before,
        "variants": {name: one.as_dict() for name, one in series.items()},
        "ratio": ratio(series["ross"], series["baseline"]),
    }


def loss_against_loop(options: Any) -> dict[str, Any]:
    """The vectorised loss and a loop over pictures, forward and backward, on the same head and noise."""
    device = torch.device(options.device)
    images, grid, width, dim, draws = 16, (8, 8), 128, 16, 4
    torch.manual_seed(0)
    head = make_head("dit", width, dim, width=128).to(device)
    for parameter in head.parameters():  # no longer zero at the output, or there would be nothing to compare
        torch.nn.init.normal_(parameter, std=0.02)
    objective = objective_named("epsilon")
    shares = objective.shares(1000).float().to(device)
    patches = grid[0] * grid[1]
    hidden = torch.randn(images * patches, width, device=device, requires_grad=True)
    target = torch.randn(images * patches, dim, device=device)
    uid = torch.arange(1, images + 1, device=device)
    zero = torch.zeros_like(uid)
    key = view_keys(1, uid, zero, zero, uid)

    def vectorised() -> torch.Tensor:
        views = Views.of([grid] * images, device)
        noise = draw_noise(key, views, draws, dim, 1000)
        return reconstruction_loss(head, hidden, target, views, objective, noise, shares).mean()

    def loop() -> torch.Tensor:
        total = torch.zeros((), device=device)
        for i in range(images):
            own = slice(i * patches, (i + 1) * patches)
            views = Views.of([grid], device)
            for k in range(
                draws
            ):  # the condition is normed and projected anew for each copy, as the reference does
                noise = draw_noise(key[i : i + 1], views, draws, dim, 1000)
                one = type(noise)(noise.time[k : k + 1], noise.noise[k : k + 1])
                total = (
                    total
                    + reconstruction_loss(
                        head, hidden[own], target[own], views, objective, one, shares
                    ).mean()
                )
        return total / (images * draws)

    def timed(loss: Any) -> Variant:
        def run() -> Timed:
            seconds, value = [], torch.zeros(())
            for _ in range(3):
                hidden.grad = None
                head.zero_grad(set_to_none=True)
                synchronise(options.device)
                begun = time.perf_counter()
                value = loss()
                value.backward()
                synchronise(options.device)
                seconds.append(time.perf_counter() - begun)
            return Timed(seconds, float(value))

        return run

    runs = {"vectorised": timed(vectorised), "loop": timed(loop)}
    values = {name: variant().loss for name, variant in runs.items()}
    assert abs(values["loop"] - values["vectorised"]) < 1e-4, values
    series = interleave(runs, rounds=3 if options.quick else 10, seconds=options.seconds or 60.0)
    return {
        "images": images,
        "grid": grid,
        "draws": draws,
        "variants": {name: one.as_dict() for name, one in series.items()},
        "ratio": ratio(series["loop"], series["vectorised"]),
    }


def main() -> None:
    """Count, measure, print, save."""
    options = report.parser(__doc__, SHAPES).parse_args()
    operations = table()
    report.table(
        "operations of a step, tower counted (1,000 tokens, 729 patches, targets stored)",
        ("language model", "denoiser width", "draws", "baseline TFLOP", "ROSS TFLOP", "ratio"),
        [
            (
                o["language_model"],
                o["denoiser_width"],
                o["draws"],
                f"{o['baseline_TFLOP']:.2f}",
                f"{o['ross_TFLOP']:.3f}",
                f"{o['ratio']:.3f}",
            )
            for o in operations
        ],
    )
    built = build("smollm2-135m", options.device, IMAGE_SIZE)
    steps = [step(shape, built, options) for shape in options.shape or SHAPES]
    report.table(
        "a step with ROSS / without (SmolLM2-135M shape, targets stored; quartiles of rounds)",
        ("proportions", "denoiser width", "operations", "own work", "points apart", "whole steps"),
        [
            (
                s["shape"],
                s["denoiser_width"],
                f"{s['operations_ratio']:.3f}",
                f"{s['own_work_ratio']:.3f}",
                f"{100 * (s['own_work_ratio'] - s['operations_ratio']):+.1f}",
                report.spread(s["ratio"]),
            )
            for s in steps
        ],
    )
    loop = loss_against_loop(options)
    report.console().print(
        f"the loss alone, loop over {loop['images']} pictures x {loop['draws']} draws / vectorised: {report.spread(loop['ratio'])}"
    )
    report.save(
        NAME,
        options.quick,
        {
            "environment": report.environment(options.device),
            "operations": operations,
            "steps": steps,
            "loss_against_loop": loop,
            "targets": {"at_7B": TARGET_AT_7B, "points_from_operations": TARGET_POINTS},
        },
    )


if __name__ == "__main__":
    main()
