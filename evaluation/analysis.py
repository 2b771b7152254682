"""What every analysis is: questions, a look at the model, numbers and a picture."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol

from ..models.errors import UserError
from .adapter import VLMAdapter
from .suites import Suite


class Result(Protocol):
    """Numbers and a picture of them."""

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        ...

    def picture(self, path: Path) -> Path | None:
        """Write a PNG; None: there is nothing to draw."""
        ...


class Analysis(ABC):
    """A measurement that is more than a score.

    Class attributes:
        name: as it is registered.
    """

    name: ClassVar[str]

    @abstractmethod
    def samples(self) -> list[dict[str, Any]]:
        """What it looks at, in stored form, one exchange each; read before any model is loaded.

        Raises:
            UserError: it cannot be read, or there is nothing.
        """

    @abstractmethod
    def run(self, adapter: VLMAdapter, samples: Sequence[dict[str, Any]]) -> Result:
        """Look at a model. Every rank calls this with the same samples.

        Args:
            adapter: the model.
            samples: of :meth:`samples`.
        """


class OfQuestions(Analysis):
    """An analysis of the questions of a suite.

    Args:
        data: the suite; None: scenes, as the subclass wants them.
        limit: the first so many questions.
    """

    def __init__(self, data: Suite | None = None, limit: int = 200):
        if limit < 2:
            raise UserError(f"limit: {limit}: use 2 or more questions")
        self.data = data
        self.limit = limit

    @abstractmethod
    def default_data(self) -> Suite:
        """Questions where the configuration names none."""

    def samples(self) -> list[dict[str, Any]]:
        """The first questions of its suite."""
        items = list((self.data or self.default_data()).load())[: self.limit]
        if not items:
            raise UserError(f"{self.name}: no question to look at")
        return [item.stored() for item in items]
