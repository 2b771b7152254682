"""The page of the docs that shows the table: `python -m opsin.training.compatibility_page > docs/compatibility.md`."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

from transformers import AutoConfig

from ..models.anatomy import CAPABILITIES, anatomy_of, families
from ..models.attention import TAKE_MASKS
from .compatibility import DEFAULTS, NEEDS, OK, REFUSED, SETTINGS, Verdict, of_method, of_run
from .composer_rules import RULES as COMPOSERS
from .registry import METHODS, algorithms

ATTENTION = (*TAKE_MASKS, "flash_attention_2")
ALONE = "no method"

COLUMNS: dict[str, dict[str, Any]] = {
    **{name: {"attn_implementation": name} for name in ATTENTION},
    "packing": {"packing": True},
    "LoRA": {"lora": True},
    "FSDP2": {"fsdp2": True},
    "compile": {"compile": True},
    "checkpointing": {"activation_checkpointing": True},
}
"""Column -> settings other than the defaults."""

STAGES = {
    "align": {"stage": "align", "chat_template": "plain"},
    "instruct": {"stage": "instruct", "chat_template": "vicuna_v1"},
}
"""Stages as LLaVA has them."""

BESIDE: dict[str, dict[str, Any]] = {
    "packing": {"packing": True},
    "independent turns": {"turns": "independent"},
    "bidirectional images": {"bidirectional_images": True},
}


def lacks_of(family: str) -> Mapping[str, str]:
    """What a family lacks (``Anatomy.refuses``), from its default configuration."""
    from ..models import own_llava as own_llava  # a family of our own, which transformers learns of there

    return getattr(anatomy_of(SimpleNamespace(config=AutoConfig.for_model(family))), "refuses", {})


def cell(method: Any, changes: Mapping[str, Any], lacks: Mapping[str, str]) -> list[Verdict]:
    """What is to be said about a method (None: no method) in an otherwise ordinary run."""
    facts = {**DEFAULTS, "turns": "chained", **STAGES["instruct"], **changes}
    if method is None:
        return of_run(facts, lacks)
    # Its paper's stage, where the stage is not the question; a row says what its method adds.
    stages = getattr(method, "stages", ())
    if "stage" not in changes and stages and "instruct" not in stages:
        facts |= STAGES[stages[0]]
    return of_method(method, facts, lacks)


def status(verdicts: list[Verdict]) -> str:
    """One word: refused, warning or ok; what holds with some keywords only counts as its own footnote."""
    always = [v.status for v in verdicts if not v.only]
    if not always:
        return OK
    return REFUSED if REFUSED in always else always[0]


class _Notes:
    """Footnotes, each sentence once."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def mark(self, verdicts: list[Verdict]) -> str:
        """A cell: its status and the numbers of its footnotes."""
        numbers = []
        for verdict in verdicts:
            only = f"With {verdict.only}: {verdict.status}. " if verdict.only else ""
            text = only + ": ".join(part for part in (verdict.setting, verdict.why) if part) + "."
            if text not in self.texts:
                self.texts.append(text)
            numbers.append(self.texts.index(text) + 1)
        word = status(verdicts)
        return word + (f" ({', '.join(map(str, sorted(set(numbers))))})" if numbers else "")


def _table(head: list[str], rows: list[list[str]]) -> list[str]:
    lines = [head, ["---"] * len(head), *rows]
    return ["| " + " | ".join(line) + " |" for line in lines]


def page() -> str:
    """The whole page, Markdown."""
    notes = _Notes()
    rows: dict[str, Any] = {ALONE: None, **{name: algorithms.get(name, name) for name in METHODS}}
    lacks = {family: lacks_of(family) for family in families()}
    out = [
        "# What goes with what",
        "",
        "Written by `python -m opsin.training.compatibility_page`, from what methods, families and attention implementations",
        "declare; `tests/training/test_compatibility.py` holds it, refuses every refused cell and trains the others.",
        "",
        "*refused* ends in one line before training, in `opsin train --check` and in the run itself; a *warning* is printed by",
        "both. Nothing is switched off silently. Each cell is one setting in an otherwise ordinary run (`sdpa`, no packing,",
        "turns chained, the stage of the method's paper).",
        "",
        "## Methods and settings",
        "",
        *_table(
            ["", *COLUMNS],
            [[n, *(notes.mark(cell(m, c, {})) for c in COLUMNS.values())] for n, m in rows.items()],
        ),
        "",
        "`flash_attention_2` needs a GPU and the package flash-attn, `flex_attention` a GPU to train on.",
        "",
        "## Methods and stages",
        "",
        *_table(
            ["", *STAGES],
            [[n, *(notes.mark(cell(m, c, {})) for c in STAGES.values())] for n, m in rows.items() if m is not None],
        ),
        "",
        "`align` with the template `plain`, `instruct` with `vicuna_v1`. A method is used in the stages of its paper unless its",
        "`stages` names others.",
        "",
        "## Methods and families",
        "",
        *_table(
            ["", *rows],
            [
                [f, *(notes.mark(cell(m, {"family": f}, lacks[f])) for m in rows.values())]
                for f in lacks
            ],
        ),
        "",
        "## Settings among themselves",
        "",
        *_table(
            ["", *BESIDE],
            [
                [f"`{a}`", *(notes.mark(cell(None, {"attn_implementation": a, **c}, {})) for c in BESIDE.values())]
                for a in ATTENTION
            ]
            + [[f, *(notes.mark(cell(None, {"family": f, **c}, lacks[f])) for c in BESIDE.values())] for f in lacks],
        ),
        "",
        *(f"* {conditions.replace(',', ' and').replace('=', ': ')}: {state}: {why}." for conditions, (state, why) in SETTINGS.items()),
        "",
        "## Composer's own algorithms",
        "",
        "By their names in a YAML; all others are left to Composer.",
        "",
        *_table(
            ["", "when", "", "why"],
            [
                [f"`{name}`", conditions.replace("=", ": ") or "always", state, why]
                for name, rules in COMPOSERS.items()
                for conditions, (state, why) in rules.items()
            ],
        ),
        "",
        "## Notes",
        "",
        *(f"{number}. {text}" for number, text in enumerate(notes.texts, 1)),
        "",
        "## For a method of your own",
        "",
        "Class attributes, or attributes of an instance where its arguments decide:",
        "",
        "* `needs`: " + "; ".join(f"`{name}` ({what})" for name, what in NEEDS.items()) + ".",
        "* `refuses` and `warns`: conditions -> why. Conditions are joined by commas, each `name=value` or `name!=value`; a name",
        f"  is one of {', '.join(f'`{n}`' for n in (*DEFAULTS, 'family', 'stage'))}, a key of the YAML",
        "  (`train_loader.padding_side`) or a keyword of the method.",
        "",
        "What a family lacks is `refuses` of its `Anatomy`: "
        + "; ".join(f"`{name}` ({what})" for name, what in CAPABILITIES.items())
        + ".",
    ]  # fmt: skip
    return "\n".join(out) + "\n"


if __name__ == "__main__":
    print(page(), end="")
