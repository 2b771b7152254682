"""Callbacks that look at the model at intervals and at the end of training."""

from __future__ import annotations

from abc import ABC, abstractmethod

from composer.core import Callback, State, Time
from composer.loggers import Logger

from ..models.errors import UserError


class Looks(Callback, ABC):
    """Calls :meth:`look` at each interval and, unless that was the last batch, at the end of training.

    Args:
        key: the callback's name in a YAML, for messages.
        interval: between looks, in Composer's notation (``500ba``, ``1ep``).

    Raises:
        UserError: the interval is none.
    """

    def __init__(self, key: str, interval: str):
        self.interval = interval_of(key, interval)
        self.shown, self.last = 0, -1

    @abstractmethod
    def look(self, state: State, logger: Logger) -> None:
        """Look at the model; ``self.last`` is the batch."""

    def begin(self, state: State) -> None:
        """To be called at FIT_START: after a resumption the next look is due at the next interval."""
        self.shown = self._number(state)

    def batch_end(self, state: State, logger: Logger) -> None:
        """A look at each interval."""
        if self._number(state) > self.shown and self.interval.unit != "ep":
            self._look(state, logger)

    def epoch_end(self, state: State, logger: Logger) -> None:
        """A look at each interval of epochs."""
        if self._number(state) > self.shown:
            self._look(state, logger)

    def fit_end(self, state: State, logger: Logger) -> None:
        """A last look."""
        if self.last != int(state.timestamp.batch):
            self._look(state, logger)

    def _look(self, state: State, logger: Logger) -> None:
        self.shown, self.last = self._number(state), int(state.timestamp.batch)
        self.look(state, logger)

    def _number(self, state: State) -> int:
        """Intervals that are over."""
        return int(state.timestamp.get(self.interval.unit).value) // int(self.interval.value)


def interval_of(key: str, text: str) -> Time:
    """An interval of a callback in Composer's notation.

    Raises:
        UserError: it is none, or less than one batch.
    """
    try:
        interval = Time.from_timestring(text)
    except ValueError as error:
        raise UserError(f"callbacks.{key}.interval: '{text}': use 100ba, 1ep and the like") from error
    if interval.unit not in ("ba", "ep", "sp", "tok") or interval.value < 1:
        raise UserError(f"callbacks.{key}.interval: '{text}': use 1ba or more, or 1ep or more")
    return interval
