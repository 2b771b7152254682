"""Scenes as MDS shards, in a folder or in object storage, with the sentence counts beside them.

``streaming``, which takes seconds to import, is imported when writing starts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ...models.errors import UserError
from ..sentences import SentenceCounts
from ..write import write_dataset
from .config import SceneConfig
from .language import template_sentences
from .records import sample


@dataclass(frozen=True)
class SceneSource:
    """Samples 0 .. ``samples`` - 1 of a split; see :func:`write`."""

    config: SceneConfig
    seed: int
    split: str
    stream: str
    samples: int

    at_once = 64

    def __len__(self) -> int:
        return self.samples

    def records(self, first: int, end: int) -> Iterator[dict[str, Any]]:
        """Samples ``first`` .. ``end`` - 1."""
        for i in range(first, end):
            yield sample(self.config, self.seed, self.split, i, self.stream)


def write(
    out: str | Path,
    *,
    config: SceneConfig,
    seed: int,
    split: str,
    stream: str,
    samples: int,
    workers: int = 0,
    size_limit: int = 1 << 24,
    progress: Callable[[int], None] | None = None,
    resumed: Callable[[int], None] | None = None,
) -> SentenceCounts:
    """Write samples 0 .. ``samples`` - 1 of a split as a dataset, or go on where an earlier process was killed.

    The shards do not depend on ``workers``. Beside ``index.json`` lies ``sentences.json``: how often each
    instruction sentence occurs in turns of samples with pictures, and the generator's own templates.

    Args:
        out: an empty or new folder, or a remote one (``s3://bucket/folder``; whatever Streaming can upload
            to); or what is left of the same call.
        config: settings of the scenes.
        seed: seed of the split.
        split: one of ``SPLITS``.
        stream: one of ``STREAMS``.
        samples: number of samples, at least 1; even for ``minimal_pairs``.
        workers: processes that generate; 0: this one. They are spawned, so a script needs its ``__main__``
            guard.
        size_limit: most bytes in a shard.
        progress: called with the number of samples that are written: those of an earlier process, then after each
            one.
        resumed: called with the number of samples that are there already, if there are any.

    Returns:
        What was written to ``sentences.json``.

    Raises:
        UserError: ``out`` is not empty or cannot be reached, or a setting is wrong; nothing is written then.
    """
    if samples < 1:
        raise UserError(f"samples: at least 1, got {samples}")
    if split == "minimal_pairs" and samples % 2:
        raise UserError(f"samples: an even number for minimal_pairs, got {samples}")
    sample(config, seed, split, 0, stream)  # a wrong name or an impossible setting ends here
    job = {"kind": "scenes", "seed": seed, "split": split, "stream": stream, "samples": samples}
    written = write_dataset(
        out, SceneSource(config, seed, split, stream, samples),
        {**job, **{f"config.{key}": value for key, value in asdict(config).items()}},
        size_limit=size_limit, workers=workers, templates=template_sentences(config), progress=progress,
        resumed=resumed,
    )  # fmt: skip
    return written.counts
