"""Suites asked while training: the same questions at every look, on all ranks, without touching a random state."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from composer.core import State
from composer.loggers import Logger
from composer.utils import dist

from ..algorithms.base import unwrap
from ..data.candidates import candidate_rows
from ..data.chat import BadConversation
from ..data.encode import Rejected
from ..data.prompts import prompts_of
from ..evaluation.adapter import TAKES_MASKS, VLMAdapter
from ..evaluation.asking import ask_suite
from ..evaluation.ranks import on_all_ranks
from ..evaluation.records import Item, prediction, write_predictions
from ..models.errors import UserError
from ..models.vlm import VisionLanguageModel
from .eval_config import suite_of
from .looks import Looks
from .schema import Spec


class SuiteMonitor(Looks):
    """Asks suites of questions at intervals and at the end of training, and logs their scores.

    ``metrics/SUITE/MEASURE`` as Composer's evaluators log theirs. Ranks share the questions; answers are put together by
    question before they are scored, so that pairs and groups are whole and no question counts twice, whatever the
    number of ranks. Questions that the model cannot be asked are left out once, at the start, and counted.

    Args:
        suites: name -> ``suite`` (registered; default: the name) and its keywords, as ``opsin eval`` takes them.
        interval: between looks, in Composer's notation (``500ba``, ``1ep``).
        limit: questions of each suite, the first ones.
        batch_size: questions a call of the model.
        folder: where ``ba<batch>/<suite>.jsonl`` is written; None: predictions are not kept.
    """

    folder_name: ClassVar[str] = "suites"

    def __init__(
        self,
        suites: dict[str, Spec],
        interval: str = "1ep",
        limit: int = 500,
        batch_size: int = 16,
        folder: str | None = None,
    ):
        for name, value in (("limit", limit), ("batch_size", batch_size)):
            if value < 1:
                raise UserError(f"callbacks.suite_monitor.{name}: {value} is less than 1")
        super().__init__("suite_monitor", interval)
        if not suites:
            raise UserError("callbacks.suite_monitor.suites: name at least one suite")
        place = lambda *keys: ".".join(("callbacks.suite_monitor", *keys))  # noqa: E731
        self.suites = {name: suite_of(name, spec or {}, place, "suites") for name, spec in suites.items()}
        self.limit, self.batch_size, self.folder = limit, batch_size, folder
        self._items: dict[str, list[Item]] = {}
        self._adapter: VLMAdapter | None = None

    def fit_start(self, state: State, logger: Logger) -> None:
        """Read the questions, and leave out what this model cannot be asked."""
        loader: Any = state.train_dataloader
        self._adapter = VLMAdapter(unwrap(state.model), loader.collate_fn, batch_size=self.batch_size)
        decoder: Any = self._adapter.model.anatomy.decoder(self._adapter.model.hf)
        shares = decoder.config._attn_implementation in TAKES_MASKS
        for name, suite in self.suites.items():
            if suite.mode == "rank" and state.fsdp_enabled and not shares:
                raise UserError(
                    f"callbacks.suite_monitor.suites.{name}: mode: rank with parallelism_config.fsdp2 needs attention that "
                    f"takes masks ({', '.join(TAKES_MASKS)})"
                )
            items = list(suite.load())[: self.limit]
            # Ranks go by one list: a picture that cannot be read once, on one of them, must not part them.
            check = partial(_askable, self._adapter, suite.mode)
            asked = on_all_ranks(items, check, self.batch_size)
            kept = [item for item, fits in zip(items, asked, strict=True) if fits]
            if not kept:
                raise UserError(
                    f"callbacks.suite_monitor.suites.{name}: none of its {len(items)} questions can be asked"
                )
            try:  # what a scorer cannot do with these questions it says now, not in the middle of training
                suite.scorer.score([prediction(name, item, "") for item in kept])
            except UserError as error:
                raise UserError(f"callbacks.suite_monitor.suites.{name}: {error}") from error
            self._items[name] = kept
            if len(kept) < len(items):
                logger.log_metrics({f"metrics/{name}/left_out": len(items) - len(kept)})
        self.begin(state)

    def look(self, state: State, logger: Logger) -> None:
        """Ask all suites, log their scores, keep the answers."""
        assert self._adapter is not None
        sharded = bool(state.fsdp_enabled)
        with whole(self._adapter.model, sharded):
            for name, suite in self.suites.items():
                asked = ask_suite(self._adapter, name, suite, self._items[name], even=sharded)
                found = {k: m.value for k, m in asked.scores.measures.items() if m.value is not None}
                logger.log_metrics({f"metrics/{name}/{key}": value for key, value in found.items()})
                if self.folder is not None and dist.get_global_rank() == 0:
                    folder = Path(self.folder) / f"ba{self.last}"
                    folder.mkdir(parents=True, exist_ok=True)
                    write_predictions(folder / f"{name}.jsonl", asked.records)


def askable(adapter: VLMAdapter, item: Item, mode: str) -> bool:
    """Whether the model can be asked: its pictures can be read, and its prompt fits; where choices are ranked, with each."""
    encoder = adapter.collator.encoder
    try:
        if mode == "rank":
            candidate_rows(encoder, item.stored(), [list(item.choices)])
        else:
            prompts_of(encoder, item.stored())
    except (Rejected, BadConversation, UserError):
        return False
    return True


def _askable(adapter: VLMAdapter, mode: str, items: list[Item]) -> list[bool]:
    return [askable(adapter, item, mode) for item in items]


@contextlib.contextmanager
def whole(model: VisionLanguageModel, sharded: bool) -> Iterator[None]:
    """Parameters outside decoder layers, gathered: ``generate`` calls the Hugging Face model past ``net.forward``.

    Decoder layers gather their own in their ``forward``, as ever.
    """
    if not sharded:
        yield
        return
    net: Any = model.net
    net.unshard()
    try:
        yield
    finally:
        net.reshard()
