"""Parts of messages about data: addresses and errors, in one line and without credentials."""

from __future__ import annotations

import os
import re

from ..models.errors import UserError

GO_ON = "when that is mended, the same command goes on from the last checkpoint"
"""What to do about an error in the middle of a run."""

_USER = re.compile(r"(://)[^/\s@'\"]*@")
_QUERY = re.compile(r"(://[^\s?'\"]*)\?[^\s'\"]*")
_SECRET = re.compile(r"SECRET|TOKEN(?!IZER)|PASSWORD|PASSWD|(ACCESS|ACCOUNT|GCS|API)_KEY")
_SHORTEST = 8  # of a value that is searched for: replacing "a" everywhere would tell more than it hides


def shown(text: str) -> str:
    """A text as it may be printed: no user or query in an address, no value of a variable that names a secret."""
    for name, value in os.environ.items():
        if len(value) >= _SHORTEST and _SECRET.search(name.upper()):
            text = text.replace(value, "***")
    return _QUERY.sub(r"\1?***", _USER.sub(r"\1***@", text))


def first_line(error: BaseException | None) -> str:
    """Kind and first line of an error."""
    text = shown(str(error)).strip().splitlines() if error is not None else []
    return f"{type(error).__name__}: {text[0][:300]}" if text else type(error).__name__


class ShardUnreadable(UserError, RuntimeError):
    """A shard that was there when the run began cannot be read; a RuntimeError, as Streaming's own are."""


def unreadable(where: str, why: str) -> ShardUnreadable:
    """The one line about a shard: its address, the cause, and what to do."""
    place = f"{where}: " if where and where not in why else ""
    return ShardUnreadable(f"dataset: a shard could not be read: {place}{why}; {GO_ON}")
