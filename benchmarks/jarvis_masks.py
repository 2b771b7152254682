"""What JARVIS's masks cost to make: drawn, laid out on tokens and written for attention, against loops that do the same.

Ours is what training runs: ``JARVIS.enter``, the patch index, ``cut`` and ``JARVIS.ask``, ``Step.sees`` and a form of
``models.attention``. The loops (``jarvis_loop.py``) go sample by sample and block by block. Both give the same masks for the
same blocks, which is checked first. Then what does not depend on the machine: how many operations each part dispatches for
other numbers of rows, blocks and pictures, and the largest tensor on the way to a block mask.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import report

report.quiet()

import torch  # noqa: E402
from jarvis_loop import Blocks, place, sample_blocks, write_mask  # noqa: E402
from measure import Timed, Variant, interleave, ratio  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

from opsin.algorithms.jarvis import JARVIS  # noqa: E402
from opsin.algorithms.jarvis.cut import CODE  # noqa: E402
from opsin.algorithms.jarvis.sampler import BLOCKS, CONTEXT, MaskConfig  # noqa: E402
from opsin.data.batch import CUT  # noqa: E402
from opsin.models import attention  # noqa: E402
from opsin.models.layout import patch_index  # noqa: E402
from opsin.models.step import Step  # noqa: E402

NAME = "jarvis_masks"
SHAPES = {"1 picture": (16, 1, 640), "2 pictures": (8, 2, 1280)}
"""Rows, pictures a row, tokens a row."""
SIDE, IMAGE_TOKEN, BEFORE, BETWEEN, LEFT = 24, 7, 3, 5, 9
"""Patches either way; the token that shows a patch; words before a row's first picture and before another; padding."""
TARGET = 2.0
LONG = 8192


def device_batch(rows: int, pictures: int, length: int, side: int = SIDE) -> dict[str, Any]:
    """What of a device batch concerns masks: full rows, but for up to ``LEFT`` tokens of padding."""
    patches = side * side
    row = torch.arange(rows).repeat_interleave(pictures)
    nth = torch.arange(pictures).repeat(rows)
    start = BEFORE + nth * (patches + BETWEEN)
    assert int(start[-1]) + patches < length - LEFT, "no room for the pictures"
    ids = torch.ones(rows, length, dtype=torch.int64)
    image = torch.full((rows, length), -1, dtype=torch.int16)
    for i in range(pictures):
        here = slice(int(start[i]), int(start[i]) + patches)
        ids[:, here], image[:, here] = IMAGE_TOKEN, i
    valid = torch.arange(length) < length - (torch.arange(rows) % (LEFT + 1))[:, None]
    count = len(row)
    return {
        "input_ids": ids,
        "attention_mask": valid.long(),
        "image_ids": image,
        "document_ids": torch.where(valid, 0, -1).to(torch.int16),
        "branch_ids": torch.zeros(rows, length, dtype=torch.int16),
        "view_grid": torch.full((count, 2), side),
        "view_row": row,
        "view_document": torch.zeros(count, dtype=torch.int64),
        "view_image": nth,
        "view_start": start,
        "view_stride": torch.full((count,), side),
        "document_uid": torch.arange(rows)[:, None] + 1000,
        "document_visit": torch.zeros(rows, 1, dtype=torch.int64),
        "refused": torch.zeros(rows, 1, dtype=torch.bool),
        "plain_attention": True,
    }


class Ours:
    """The library's way, part by part."""

    def __init__(self, plain: dict[str, Any], masks: str | dict[str, Any] = "default"):
        self.plain = plain
        self.method = JARVIS(
            target={"name": "tower", "path": "scenes"},
            masks=masks,
            text_loss="masked",
            ntp_probability=0.0,
        )

    def sampled(self) -> dict[str, Any]:
        """Codes and weights of patches, on the CPU."""
        batch = dict(self.plain)
        self.method.enter(batch)
        return batch

    def cut(self, batch: dict[str, Any]) -> dict[str, Any]:
        """A micro-batch's indexes, on the CPU."""
        part, shape = dict(batch), batch["input_ids"].shape
        found = patch_index(*(part[f"view_{key}"] for key in ("row", "start", "stride", "grid")), shape[1])
        part["patch_position"], part["patch_view"] = found.position, found.view
        part.update(part[CUT + self.method.name](part))
        return part

    def asked(self, part: dict[str, Any]) -> Step:
        """What the method writes into the record of a micro-batch, where the model is."""
        step = Step(part)
        net = SimpleNamespace(auxiliary={self.method.name: SimpleNamespace(latent=None)})
        self.method.ask(SimpleNamespace(step=lambda _: step, net=net), part)  # type: ignore[arg-type]
        return step

    def laid_out(self, batch: dict[str, Any]) -> Step:
        """Both."""
        return self.asked(self.cut(batch))

    @staticmethod
    def written(step: Step, form: str) -> Any:
        """The mask in one of the forms that kernels take."""
        see = step.sees(bidirectional_images=True)
        assert see is not None
        if form == "bool":
            return attention.dense(see)
        return attention.additive(see, torch.float32) if form == "additive" else attention.block_mask(see)


class Loop:
    """The stated way, part by part."""

    def __init__(self, plain: dict[str, Any], pictures: int):
        self.plain, self.pictures, self.config = plain, pictures, MaskConfig()
        self.generator = torch.Generator().manual_seed(0)

    def sampled(self) -> list[list[Blocks]]:
        """Blocks of each row's pictures."""
        return [
            [sample_blocks(self.generator, (SIDE, SIDE), self.config) for _ in range(self.pictures)]
            for _ in self.plain["input_ids"]
        ]

    def laid_out(self, blocks: list[list[Blocks]]) -> Any:
        """Where pictures are, what is hidden and what predicted."""
        return place(self.plain["input_ids"], IMAGE_TOKEN, blocks, SIDE * SIDE)

    def written(self, placed: Any, form: str) -> torch.Tensor:
        """The mask."""
        dtype = torch.bool if form == "bool" else torch.float32
        return write_mask(self.plain["attention_mask"], placed[0], dtype)


def check(ours: Ours, loop: Loop) -> dict[str, float]:
    """Both ways agree: on masks and targets, given ours' blocks; on how much is covered, drawn by either."""
    batch = ours.sampled()
    step = ours.laid_out(batch)
    codes = batch[CODE].view(-1, loop.pictures, SIDE * SIDE)
    blocks = [[Blocks.of(code, loop.config.blocks) for code in row] for row in codes]
    placed = loop.laid_out(blocks)
    assert step.hidden is not None and torch.equal(step.hidden, placed[1])
    part = step.batch
    counts = torch.zeros(placed[1].numel()).index_add_(0, placed[2], torch.ones(len(placed[2])))
    assert torch.equal(counts[part["patch_position"][part["jarvis/targets"]]], part["jarvis/weights"])
    real = part["attention_mask"].bool()  # padding: ours sees itself, wherever it is
    bools = [way.written(s, "bool")[:, 0][real] for way, s in ((ours, step), (loop, placed))]
    floats = [way.written(s, "additive")[:, 0][real] for way, s in ((ours, step), (loop, placed))]
    assert torch.equal(*bools) and torch.equal(*floats), "the masks differ"
    drawn = [one for _ in range(8) for row in loop.sampled() for one in row]
    loops = {
        "targets": sum(len(torch.cat(one.targets).unique()) for one in drawn),
        "context": sum(len(one.context) for one in drawn),
    }
    shares = {f"loop_{key}": value / len(drawn) / SIDE**2 for key, value in loops.items()}
    many = Ours(device_batch(8 * len(codes), loop.pictures, part["input_ids"].shape[1])).sampled()[CODE]
    shares["ours_targets"] = float(((many & BLOCKS) != 0).float().mean())
    shares["ours_context"] = float(((many & CONTEXT) != 0).float().mean())
    for key in ("targets", "context"):
        assert abs(shares[f"loop_{key}"] - shares[f"ours_{key}"]) < 0.04, shares
    return shares


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
