"""HTML, built so that nothing a user wrote can become markup: every string is escaped unless it is ``Markup``."""

from __future__ import annotations

import html
import json
import math
import re
from collections.abc import Mapping
from typing import Any

VOID = {"img", "input"}
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")


class Markup(str):
    """Text that is HTML already."""

    __slots__ = ()


Child = Any
"""``Markup``, text or a number (escaped), None (nothing), or an iterable of these."""


def text(value: object) -> Markup:
    """Text as HTML; what HTML or UTF-8 cannot hold (control characters, lone surrogates) becomes U+FFFD."""
    if isinstance(value, Markup):
        return value
    clean = _CONTROL.sub("�", str(value)).replace("\r\n", "\n").replace("\r", "\n")
    clean = clean.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return Markup(html.escape(clean, quote=True))


def breakable(value: object) -> Markup:
    """A name that lines may break after ``_``, ``/`` and ``-``, instead of anywhere."""
    return value if isinstance(value, Markup) else Markup(re.sub(r"([_/-])(?=\w)", r"\1<wbr>", text(value)))


def join(*children: Child) -> Markup:
    """Children one after the other."""
    parts: list[str] = []
    for child in children:
        if child is None:
            continue
        if isinstance(child, str | int | float):
            parts.append(text(child))
        else:
            parts.extend(join(*child))
    return Markup("".join(parts))


def tag(name: str, /, *children: Child, **attributes: object) -> Markup:
    """An element.

    Args:
        name: of the element.
        children: what is in it.
        attributes: ``class_`` stands for ``class``, ``aria_label`` for ``aria-label``; None and False leave one out, True
            writes its name alone.
    """
    written = "".join(
        f" {key.rstrip('_').replace('_', '-')}" + ("" if value is True else f'="{text(value)}"')
        for key, value in attributes.items()
        if value is not None and value is not False
    )
    if name in VOID:
        return Markup(f"<{name}{written}>")
    return Markup(f"<{name}{written}>{join(*children)}</{name}>")


def data_block(identity: str, value: Any) -> Markup:
    """JSON that scripts can read and no text in it can leave: every ``<`` is written as its escape.

    Numbers that JSON does not have (NaN, infinity) become null.
    """
    written = json.dumps(_finite(value), ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    written = written.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
    return Markup(f'<script type="application/json" id="{text(identity)}">{written}</script>')


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(key): _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return value
