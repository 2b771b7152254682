"""What JARVIS's masks cost to make: drawn, laid out on tokens and written for attention, against loops that do the same.

Ours is what training runs: ``JARVIS.enter``, the patch index, ``cut`` and ``JARVIS.ask``, ``Step.sees`` and a form of
``models.attention``. The loops go sample by sample and block by block. Both give the same masks for the
same blocks, which is checked first. Then what does not depend on the machine: how many operations each part dispatches for
other numbers of rows, blocks and pictures, and the largest tensor on the way to a block mask.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import report

report.quiet()

import torch  # noqa: E402
from jarvis_ways import BETWEEN, SIDE, Loop, Ours, check, device_batch  # noqa: E402
from measure import Timed, Variant, interleave, ratio  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

from opsin.models import attention  # noqa: E402

NAME = "jarvis_masks"
SHAPES = {"1 picture": (16, 1, 640), "2 pictures": (8, 2, 1280)}
"""Rows, pictures a row, tokens a row."""
TARGET = 2.0
LONG = 8192


def timed(work: Callable[[], Any], burst: int = 5) -> Variant:
    """A variant that does some work a few times."""

    def run() -> Timed:
        seconds = []
        for _ in range(burst):
            begun = time.perf_counter()
            work()
            seconds.append(time.perf_counter() - begun)
        return Timed(seconds)

    return run


def measure(shape: str, options: Any) -> dict[str, Any]:
    """Times of the parts and of all together."""
    rows, pictures, length = SHAPES[shape]
    plain = device_batch(rows, pictures, length)
    ours, loop = Ours(plain), Loop(plain, pictures)
    shares = check(ours, loop)
    batch, blocks = ours.sampled(), loop.sampled()
    step, placed = ours.laid_out(batch), loop.laid_out(blocks)
    work: dict[str, tuple[Callable[[], Any], Callable[[], Any] | None]] = {
        "sampler": (ours.sampled, loop.sampled),
        "layout": (lambda: ours.laid_out(batch), lambda: loop.laid_out(blocks)),
    }
    for form in ("bool", "additive", "block mask"):
        has_loop = form != "block mask"
        work[f"mask, {form}"] = (
            lambda form=form: ours.written(step, form),
            (lambda form=form: loop.written(placed, form)) if has_loop else None,
        )
        work[f"together, {form}"] = (
            lambda form=form: ours.written(ours.laid_out(ours.sampled()), form),
            (lambda form=form: loop.written(loop.laid_out(loop.sampled()), form)) if has_loop else None,
        )
    runs = {f"ours: {part}": timed(mine) for part, (mine, _) in work.items()}
    runs.update({f"loop: {part}": timed(theirs) for part, (_, theirs) in work.items() if theirs})
    series = interleave(
        runs,
        rounds=options.rounds or (4 if options.quick else 40),
        seconds=options.seconds or 60.0,
        least=4,
    )
    return {
        "rows": rows,
        "pictures_a_row": pictures,
        "length": length,
        "patches_covered": shares,
        "parts": {
            part: {
                "ours": series[f"ours: {part}"].as_dict(),
                **(
                    {"loop": series[f"loop: {part}"].as_dict(),
                     "ratio": ratio(series[f"loop: {part}"], series[f"ours: {part}"])} if theirs else {}
                ),
            }
            for part, (_, theirs) in work.items()
        },
    }  # fmt: skip


class Operations(TorchDispatchMode):
    """Counts what is dispatched, views too, and remembers the largest tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.count = self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        self.count += 1
        for one in made if isinstance(made, (tuple, list)) else (made,):
            if isinstance(one, torch.Tensor):  # a view with stride 0 has elements, but no memory
                shape = [n for n, stride in zip(one.shape, one.stride(), strict=True) if stride]
                self.largest = max(self.largest, torch.Size(shape).numel())
        return made


def operations(rows: int, pictures: int, blocks: int, side: int = 8) -> dict[str, int]:
    """Operations of each part, for rows of one length and blocks that fit at the first draw (another draw is as many more).

    Masks are counted as a GPU writes them: a CPU writes in pieces that fit its cache.
    """
    plain = device_batch(rows, pictures, 3 * (side * side + BETWEEN) + 24, side)
    ours = Ours(plain, {"blocks": blocks, "scale": [0.05, 0.1]})
    piece, attention.CPU_PIECE = attention.CPU_PIECE, 1 << 60
    try:
        batch = ours.sampled()
        part = ours.cut(batch)
        step = ours.asked(part)
        work: dict[str, Callable[[], Any]] = {
            "sampler (CPU)": ours.sampled,
            "cut (CPU)": lambda: ours.cut(batch),
            "ask": lambda: ours.asked(part),
            **{form: (lambda form=form: ours.written(step, form)) for form in ("bool", "additive", "block mask")},
        }  # fmt: skip
        found = {}
        for name, one in work.items():
            one()
            with Operations() as counter:
                one()
            found[name] = counter.count
    finally:
        attention.CPU_PIECE = piece
    return found


def largest() -> dict[str, float]:
    """Largest tensor on the way to a block mask of a long row, beside a mask of all pairs."""
    ours = Ours(device_batch(1, 3, LONG))
    step = ours.laid_out(ours.sampled())
    with Operations() as counter:
        ours.written(step, "block mask")
    return {"length": LONG, "elements": counter.largest, "share_of_pairs": counter.largest / LONG**2}


def main() -> None:
    """Check, measure, count, print, save."""
    options = report.parser(__doc__, tuple(SHAPES)).parse_args()
    found = {shape: measure(shape, options) for shape in options.shape or SHAPES}
    for shape, one in found.items():
        report.table(
            f"{shape} of {SIDE}x{SIDE} patches a row, {one['rows']} rows of {one['length']} tokens",
            ("part", "loop, ms", "ours, ms", "loop / ours"),
            [
                (
                    part,
                    f"{1e3 * times['loop']['median_s']:.2f}" if "loop" in times else "",
                    f"{1e3 * times['ours']['median_s']:.2f}",
                    report.spread(times["ratio"]) if "loop" in times else "",
                )
                for part, times in one["parts"].items()
            ],
        )
    sizes = [(b, i, k) for b in (1, 4, 16) for i in (1, 3) for k in (1, 4, 8)]
    counts = [{"rows": b, "pictures": i, "blocks": k, **operations(b, i, k)} for b, i, k in sizes]
    report.table(
        "operations dispatched (the first two parts: on the CPU)",
        list(counts[0]),
        [list(one.values()) for one in counts],
    )
    long = largest()
    report.console().print(
        f"block mask of {LONG:,} tokens: the largest tensor has {long['elements']:,} elements, "
        f"{long['share_of_pairs']:.2%} of all pairs"
    )
    report.save(
        NAME,
        options.quick,
        {
            "environment": report.environment("cpu"),
            "shapes": found,
            "operations": counts,
            "block_mask": long,
            "target": {"together": TARGET},
        },
    )


if __name__ == "__main__":
    main()
