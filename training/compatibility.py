"""What goes with what: one table, from which come refusals, warnings, a page of the docs, and tests.

Nobody writes the table. A method declares what it ``needs``, ``refuses`` and ``warns`` of (``algorithms.base``), a model
family what it lacks (``models.anatomy``), an attention implementation whether it takes masks (``models.attention``); what
remains is in ``SETTINGS``, two settings a line. Put together here, for anybody's methods.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ..models.anatomy import CAPABILITIES
from ..models.attention import TAKE_MASKS
from ..models.errors import nearest

OK, WARNING, REFUSED = "ok", "warning", "refused"

NEEDS = {"images": "samples with pictures", **CAPABILITIES}
"""What a method may need: of the data (looked at by the preflight), of family and attention."""

DEFAULTS: dict[str, Any] = {
    "attn_implementation": "sdpa",
    "packing": False,
    "turns": "meta",
    "bidirectional_images": False,
    "lora": False,
    "fsdp2": False,
    "compile": False,
    "activation_checkpointing": False,
    "precision": "fp32",
    "device": "gpu",
}
"""Settings that a condition may name, beside keys of the configuration and keywords of the method itself."""

SETTINGS: dict[str, tuple[str, str]] = {
    "attn_implementation=flex_attention, device=cpu": (
        REFUSED,
        "torch's FlexAttention does not train on a CPU; use sdpa",
    ),
    "compile=true, attn_implementation=flex_attention": (
        WARNING,
        "no test of this project runs the two together",
    ),
}
"""Settings that do not go with each other, whatever the methods: conditions -> (status, why)."""

KEYS = {"lora": "peft_config", "fsdp2": "parallelism_config.fsdp2", "attn_implementation": "model.attn_implementation",
        "packing": "train_loader.packing", "turns": "train_loader.turns", "bidirectional_images": "model.bidirectional_images",
        "family": "model family"}  # fmt: skip
"""What a setting is called in a YAML, where that differs."""


@dataclass(frozen=True)
class Verdict:
    """One thing that does not go, or goes with a word of warning.

    Attributes:
        status: ``warning`` or ``refused``.
        setting: what it is about, as in a YAML (``train_loader.packing: true``).
        why: one sentence.
        only: keywords of the method with which it holds, where it was asked without (``token_weights: x``).
    """

    status: str
    setting: str
    why: str
    only: str = ""

    def line(self) -> str:
        """For a message: what, and why."""
        if not self.setting:
            return self.why
        verb = "does not work with" if self.status == REFUSED else "beside"
        return f"{verb} {self.setting} ({self.why})"


def lacking(facts: Mapping[str, Any], family_lacks: Mapping[str, str]) -> dict[str, tuple[str, str]]:
    """Capability -> (setting that lacks it, why).

    Args:
        facts: settings by name; one that is not known is not there.
        family_lacks: ``Anatomy.refuses``.
    """
    found: dict[str, tuple[str, str]] = {}
    implementation = facts.get("attn_implementation")
    if implementation is not None and implementation not in TAKE_MASKS:
        found.update(
            {
                c: (
                    said("attn_implementation", implementation),
                    f"{implementation} takes no mask of ours; use sdpa, eager or flex_attention",
                )
                for c in CAPABILITIES
            }
        )
    for capability, why in family_lacks.items():
        found[capability] = (said("family", facts.get("family")), why)
    return found


def of_run(facts: Mapping[str, Any], family_lacks: Mapping[str, str]) -> list[Verdict]:
    """Settings that do not go with each other, whatever the methods."""
    verdicts = []
    lacks = lacking(facts, family_lacks)
    asks = {"packing": ("packing", True), "bidirectional_images": ("bidirectional_images", True), "branches": ("turns", "independent")}  # fmt: skip
    for capability, (key, value) in asks.items():
        if capability in lacks and facts.get(key) == value:
            setting, why = lacks[capability]
            verdicts.append(Verdict(REFUSED, f"{said(key, value)} and {setting}", why))
    if "branches" in lacks and facts.get("turns") == "meta":
        setting, why = lacks["branches"]
        verdicts.append(
            Verdict(
                WARNING, setting, f"samples whose meta says turns: independent stop the run, because {why}"
            )
        )
    for conditions, (status, why) in SETTINGS.items():
        held = parsed(conditions)
        if all(name in facts and holds(facts[name], equal, value) for name, equal, value in held):
            verdicts.append(Verdict(status, " and ".join(said(n, v) for n, _, v in held), why))
    return verdicts


def of_method(
    method: Any,
    facts: Mapping[str, Any],
    family_lacks: Mapping[str, str],
    setting: Callable[[str], Any] | None = None,
    keyword: Callable[[str], Any] | None = None,
) -> list[Verdict]:
    """What a method declares, held against settings.

    Args:
        method: an instance, or a class (then conditions on keywords are handed on as ``Verdict.only``).
        facts: settings by name; what is not known is not there, and decides nothing.
        family_lacks: see :func:`lacking`.
        setting: key of the configuration -> its value; raises LookupError.
        keyword: keyword of the method -> its value; raises LookupError. None: not known.

    Raises:
        ValueError: the method declares something that nobody knows.
    """
    verdicts = []
    lacks = lacking(facts, family_lacks)
    for need in sorted(getattr(method, "needs", ())):
        if need not in NEEDS:
            raise ValueError(f"{method} needs '{need}', which is unknown{nearest(need, NEEDS)}")
        if need in lacks:
            of, why = lacks[need]
            verdicts.append(Verdict(REFUSED, of, f"it needs {NEEDS[need]}: {why}"))
    for status, declared in ((REFUSED, "refuses"), (WARNING, "warns")):
        for conditions, why in getattr(method, declared, {}).items():
            found = _met(method, conditions, facts, setting, keyword)
            if found is not None:
                verdicts.append(Verdict(status, found[0], why, found[1]))
    stages = getattr(method, "stages", None)
    if stages is not None and facts.get("stage") in ("align", "instruct") and facts["stage"] not in stages:
        verdicts.append(
            Verdict(WARNING, said("stage", facts["stage"]), f"its paper uses it in {' and '.join(stages)}")
        )
    return verdicts


def _met(
    method: Any,
    conditions: str,
    facts: Mapping[str, Any],
    setting: Callable[[str], Any] | None,
    keyword: Callable[[str], Any] | None,
) -> tuple[str, str] | None:
    """(settings, keywords) for which all conditions hold; None: one does not."""
    found, only = [], []
    for name, equal, value in parsed(conditions):
        if name in DEFAULTS or name in ("family", "stage"):
            if name not in facts or not holds(facts[name], equal, value):
                return None
            found.append(said(name, facts[name]))
            continue
        try:
            current = facts[name] if name in facts else _look(setting, name)
            found.append(said(name, current))
        except LookupError:
            if keyword is None:
                only.append(f"{name}: {value}" if equal else f"{name} other than {value}")
                continue
            try:
                current = keyword(name)
            except LookupError as error:
                raise ValueError(
                    f"{method}: '{conditions}' names '{name}', no setting and no keyword"
                ) from error
            only.append(f"{name}: {value}" if equal else f"{name} other than {value}")
        if not holds(current, equal, value):
            return None
    return " and ".join(found), ", ".join(only)


def _look(setting: Callable[[str], Any] | None, name: str) -> Any:
    if setting is None:
        raise LookupError(name)
    return setting(name)


def parsed(text: str) -> list[tuple[str, bool, str]]:
    """``a=b, c!=d`` as (name, whether equal, value)."""
    found = []
    for one in text.split(","):
        name, equals, value = one.strip().partition("=")
        if not equals:
            raise ValueError(f"'{text}': a condition is name=value or name!=value")
        found.append((name.rstrip("!"), not name.endswith("!"), value))
    return found


def holds(current: Any, equal: bool, value: str) -> bool:
    """Whether a value is, or is not, what a condition says; case does not matter."""
    return (str(current).lower() == value.lower()) == equal


def said(name: str, value: Any) -> str:
    """A setting as in a YAML."""
    shown = str(value).lower() if isinstance(value, bool) else value
    return f"{KEYS.get(name, name)}: {shown}"
