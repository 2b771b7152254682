"""The one exception for what the user can mend."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Bad input: one clear line (what, where, the nearest right thing). The command line ends with exit code 2.

    Raised for everything a user can mend by changing a YAML, a path, a dataset or a flag; a traceback is
    shown only with ``--debug``.
    """


def user_error_in(error: BaseException | None) -> UserError | None:
    """The :class:`UserError` that another error wraps: as its cause, or as a rank's failure in a checkpoint's load."""
    while error is not None:
        if isinstance(error, UserError):
            return error
        failures = getattr(error, "failures", None)  # torch's CheckpointException: rank -> (error, traceback)
        for failure in failures.values() if isinstance(failures, dict) else ():
            found = user_error_in(failure[0] if isinstance(failure, tuple) else failure)
            if found is not None:
                return found
        error = error.__cause__
    return None


def one_line(error: UserError) -> str:
    """The line of an error; a DataLoader hands one from its workers on with their traceback as text."""
    text = str(error)
    if "\nOriginal Traceback" in text:
        text = text.rpartition(f"{type(error).__name__}: ")[2].strip().partition("\n")[0]
    return text


def nearest(name: str, known: Iterable[str]) -> str:
    """Hint that names the closest valid name: ``"; did you mean 'l2t'?"``, else the list of what there is."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    if close:
        return f"; did you mean '{close[0]}'?"
    return f"; known: {', '.join(known)}" if known else ""
