"""Jobs for ranks that ask lmms-eval's tasks inside their processes."""

from __future__ import annotations

from typing import Any


def ask(model: str, folder: str, tasks: list[str]) -> dict[str, Any]:
    """What a rank is told; all share the documents."""
    from opsin.evaluation.adapter import VLMAdapter
    from opsin.evaluation.lmms.inside import ask_inside
    from opsin.evaluation.open_model import open_folder

    opened, collator = open_folder(model)
    return ask_inside(VLMAdapter(opened, collator, batch_size=4), folder, tasks)
