"""Captions of our scenes, whose facts are known exactly."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ...models.errors import UserError
from .base import Measure, Scorer
from .caption_facts import Compared, compare, measures_of, scene_of
from .caption_reading import read_caption


class SceneCaptions(Scorer):
    """``scene_captions``: facts of a caption against those in ``meta`` (``objects``, ``sign``, ``chart``).

    Measures: see ``caption_facts.measures_of``. A caption is right when it names every object (or bar, and the sign)
    with all its attributes, says nothing wrong and makes nothing up. A caption that names nothing has no reading; it
    finds nothing, and invents nothing. CHAIR follows Rohrbach et al. 2018 with the scenes' own vocabulary: a mention is
    hallucinated if nothing in the picture agrees with it, however often it is mentioned.
    """

    name = "scene_captions"
    primary = "f1"

    def parse(self, record: Mapping[str, Any]) -> str | None:
        """What is said, in one line; None: nothing that could be read."""
        return str(read_caption(record["output"])) or None

    def right(self, record: Mapping[str, Any], parsed: str | None) -> bool:
        """Whether all is named, nothing wrong and nothing made up.

        Raises:
            UserError: ``meta`` is not that of a scene.
        """
        return compared(record).exact

    def measures(self, marked: Sequence[Mapping[str, Any]]) -> dict[str, Measure]:
        """As the class says."""
        return measures_of([compared(record) for record in marked])


def compared(record: Mapping[str, Any]) -> Compared:
    """A caption against its scene, in counts; nothing is said where the model was never asked.

    Raises:
        UserError: ``meta`` is not that of a scene.
    """
    try:
        scene = scene_of(record["meta"])
    except (KeyError, TypeError) as error:
        raise UserError(
            f"suite {record.get('suite')}, {record.get('id')}: scene_captions needs the facts of a scene in meta "
            f"(objects, sign, chart), as the suite 'scenes' with stream: caption has them"
        ) from error
    return compare(read_caption("" if record.get("error") else record["output"]), scene)
