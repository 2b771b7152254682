"""Words that may stand beside a picture without being a question about it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from ...data.sentences import sentence_id, split_sentences
from ...models.errors import UserError


def caption_pool(prompts: Sequence[str] | str, where: str) -> torch.Tensor:
    """Sentence ids of caption prompts: (K,) int64, as they stand in a batch's ``sentence_ids``.

    Args:
        prompts: sentences, or a file with one a line.
        where: the key, for messages.

    Raises:
        UserError: the file cannot be read, or a prompt has no words.
    """
    if isinstance(prompts, str):
        try:
            lines = [
                line
                for line in Path(prompts).expanduser().read_text(encoding="utf-8-sig").splitlines()
                if line.strip()
            ]
        except (OSError, UnicodeDecodeError) as error:
            why = getattr(error, "strerror", None) or "is no text"
            raise UserError(f"{where}: {prompts}: {why}; give a file with one sentence a line") from error
    elif isinstance(prompts, Sequence):
        lines = list(prompts)
    else:
        raise UserError(f"{where}: {prompts}: give a list of sentences, or a file with one a line")
    ids = set()
    for line in lines:
        keys = [s.key for s in split_sentences(line)] if isinstance(line, str) else []
        if not any(keys):
            raise UserError(f"{where}: {line!r}: no words")
        ids |= {sentence_id(key) for key in keys}
    return torch.tensor(sorted(ids - {0}), dtype=torch.int64)
