"""``opsin data split-vift``: an instruction set as captions and text-only instructions."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from rich.progress import Progress


def split_commands(app: typer.Typer) -> None:
    """Add the command to ``opsin data``."""
    app.command("split-vift")(split_vift)


def split_vift(
    source: Annotated[str, typer.Argument(metavar="IN", help="Dataset (folder or URL), or LLaVA's JSON.")],
    out: Annotated[
        str,
        typer.Argument(
            metavar="OUT",
            help="New folder, or s3://bucket/folder, for captions and text. The same command goes on.",
        ),
    ],
    images: Annotated[str | None, typer.Option(help="Folder of the pictures of LLaVA's JSON.")] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="Further caption prompts: a text file, one sentence a line.")
    ] = None,
    prompts_only: Annotated[
        bool, typer.Option("--prompts-only", help="Only those, and pictures alone; no built-in prompts.")
    ] = False,
    caption_prompt: Annotated[
        str, typer.Option(help="none: a caption's user turn is the picture alone; keep: as it was.")
    ] = "none",
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="Leave samples with bad pictures out, named in skipped.jsonl.")
    ] = False,
    workers: Annotated[int, typer.Option(min=0, help="Processes that make samples; 0: this one.")] = 0,
) -> None:
    """Split an instruction set for ViFT: captions, text-only instructions, counts of what is dropped."""
    from ..data.convert.split_vift import REPORT, open_samples, split
    from ..data.convert.vift_rule import Rule, read_prompts
    from ..data.messages import shown

    rule = Rule(read_prompts(prompts) if prompts else frozenset(), not prompts_only, caption_prompt)
    samples = open_samples(source, images, out)
    with Progress(transient=True) as bar:
        tasks: dict[str, Any] = {}

        def progress(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bar.add_task(what, total=total)
            bar.update(tasks[what], completed=done)

        def resumed(side: str, there: int) -> None:
            said = f"{shown(out)}: {there} samples of {side} are there already"
            bar.console.print(said, highlight=False, markup=False, soft_wrap=True)

        report = split(
            samples, out, rule, skip_bad=skip_bad, workers=workers, progress=progress, resumed=resumed
        )
    print(as_text(report))
    if getattr(samples, "targets", False):
        print("stored patch_targets are not copied; compute them anew (`opsin data latents`, `features`)")
    print(f"the same in numbers: {shown(out).rstrip('/')}/{REPORT}")


def as_text(report: Mapping[str, Any]) -> str:
    """A report (``split.json``) for people."""
    from ..data.convert.vift_report import listed, short

    captions, text, dropped = report["captions"], report["text"], report["dropped"]
    lines = [
        f"{report['samples']} samples read: {captions['samples']} captions, {text['samples']} text-only instructions, "
        f"{sum(dropped.values())} dropped"
    ]
    if dropped:
        lines.append(f"dropped: {listed(dropped)}")
    if report["first_unusable"]:
        lines.append(f"first unusable: {short(report['first_unusable'], 200)}")
    lines.append(
        f"exchanges dropped: {captions['exchanges_dropped']} of samples that give a caption, {report['dropped_exchanges']} of "
        "dropped samples"
    )
    words = f"words in answers: {captions['answer_words']} of captions, {text['answer_words']} of text"
    if text["samples"]:
        words += f" (1 : {text['answer_words'] / captions['answer_words']:.2f})"
    else:
        words += "; there is no text-only instruction, so no folder for it"
    lines.append(words)
    if report["frequent_sentences"]:
        lines.append(
            "most frequent sentences of first turns of dropped samples with pictures (for --prompts):"
        )
        width = len(str(report["frequent_sentences"][0]["samples"]))
        lines += [
            f"  {each['samples']:>{width}}  {short(each['sentence'], 100)}"
            for each in report["frequent_sentences"]
        ]
    lines.append("as streams of a run, in natural proportion:")
    streams: dict[str, Any] = {"train_loader": report["train_loader"]}
    if report[
        "caption_prompts"
    ]:  # the words that were kept beside pictures, which the method's guard has to know
        streams["algorithms"] = {"vift": {"caption_prompts": report["caption_prompts"]}}
    body = yaml.safe_dump(streams, sort_keys=False, default_flow_style=None, width=10_000, allow_unicode=True)
    return "\n".join(lines) + "\n\n" + body
