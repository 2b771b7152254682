"""What lmms-eval finds through the entry points ``lmms_eval.models``: ``--model opsin`` and ``--model opsin_chat``.

lmms-eval imports this module whenever it lists its models, so it is free of torch.
"""

from __future__ import annotations

from typing import Any

MODEL = "opsin"
"""Asks with the words a task makes; ranks answers too."""

CHAT_MODEL = "opsin_chat"
"""Asks with the messages a task makes (pictures between words, earlier turns); cannot rank. A name of its own: where one
name has both, lmms-eval takes this one, and tasks that rank fail."""

_WRAPPER = "opsin.evaluation.lmms.wrapper"


def manifest() -> list[Any]:
    """Manifests of lmms-eval's model registry."""
    from lmms_eval.models.registry_v2 import ModelManifest  # pyright: ignore[reportMissingImports]

    return [
        ModelManifest(model_id=MODEL, simple_class_path=f"{_WRAPPER}.Opsin"),
        ModelManifest(model_id=CHAT_MODEL, chat_class_path=f"{_WRAPPER}.OpsinChat"),
    ]
