"""Scenes as MDS shards, in a folder or in object storage, with the sentence counts beside them.

``streaming``, which takes seconds to import, is imported when writing starts.
"""

from __future__ import annotations

import multiprocessing
import tempfile
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from ...models.errors import UserError
from ..sentences import SIDECAR, SentenceCounts, dataset_hash
from ..shards import refuse_local, refuse_remote, write_shards
from .config import SceneConfig
from .language import template_sentences
from .records import sample

_BATCH = 64
_AHEAD = 4  # batches in flight a worker: enough to keep it busy, few enough to stay small in memory


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
) -> SentenceCounts:
    """Write samples 0 .. ``samples`` - 1 of a split as a dataset.

    The shards do not depend on ``workers``. Beside ``index.json`` lies ``sentences.json``: how often each
    instruction sentence occurs in turns of samples with pictures, and the generator's own templates.

    Args:
        out: an empty or new folder, or a remote one (``s3://bucket/folder``; whatever Streaming can upload
            to).
        config: settings of the scenes.
        seed: seed of the split.
        split: one of ``SPLITS``.
        stream: one of ``STREAMS``.
        samples: number of samples, at least 1; even for ``minimal_pairs``.
        workers: processes that generate; 0: this one. They are spawned, so a script needs its ``__main__``
            guard.
        size_limit: most bytes in a shard.
        progress: called after each sample with the number of samples written so far.

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
    remote = urlparse(str(out)).scheme != ""
    with tempfile.TemporaryDirectory() as beside:
        uploader = refuse_remote(str(out), beside) if remote else refuse_local(Path(out).expanduser())
        counts, index = write_shards(
            str(out) if remote else str(Path(out).expanduser()),
            _records(config, seed, split, stream, samples, workers),
            size_limit,
            progress,
        )
        counts.dataset = dataset_hash(index)
        counts.templates = template_sentences(config)
        if uploader is None:
            counts.save(Path(out).expanduser() / SIDECAR)
        else:
            counts.save(Path(beside) / SIDECAR)
            uploader.upload_file(SIDECAR)
    return counts


def _batch(
    config: SceneConfig, seed: int, split: str, stream: str, first: int, end: int
) -> list[dict[str, Any]]:
    return [sample(config, seed, split, i, stream) for i in range(first, end)]


def _records(
    config: SceneConfig, seed: int, split: str, stream: str, samples: int, workers: int
) -> Iterator[dict[str, Any]]:
    """Records in order, generated here or by ``workers`` processes."""
    if workers <= 0:
        for i in range(samples):
            yield sample(config, seed, split, i, stream)
        return
    flying: deque[Future[list[dict[str, Any]]]] = deque()
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        for first in range(0, samples, _BATCH):
            end = min(first + _BATCH, samples)
            flying.append(pool.submit(_batch, config, seed, split, stream, first, end))
            if len(flying) > workers * _AHEAD:
                yield from flying.popleft().result()
        while flying:
            yield from flying.popleft().result()
