"""What ViFT saw, by stream and over all ranks: what it refused, and the loss of what it learnt."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ...data.schema import id_of
from ...models.normalise import global_sum

REFUSED, NATS, LEARNT = range(3)
_NAMED = 3


class Ledger:
    """Counts of S streams: documents refused, nats, learnt tokens; (3, S) float64 each.

    Args:
        log: JSONL file to which each refused sample's id is appended; None: none.

    Attributes:
        total: of all ranks since training began; None before the first step.
        named: a few of the samples that this rank refused, in words.
    """

    def __init__(self, log: str | None = None):
        self.log = log
        self.total: torch.Tensor | None = None
        self.named: list[str] = []
        self._here: torch.Tensor | None = None  # of this rank in this step
        self._decided: torch.Tensor | None = None  # the total at the last decision
        self._logged: torch.Tensor | None = None  # and at the last entry

    def refuse(
        self, batch: dict[str, Any], refused: torch.Tensor, stream: torch.Tensor, names: Sequence[str]
    ) -> None:
        """Begin a step: note which documents of a device batch (on the CPU) are refused.

        Args:
            batch: the device batch.
            refused: (B, D) bool.
            stream: (B, D) int64, number of each document's stream, -1: none.
            names: of the streams.
        """
        self._here = torch.zeros(3, len(names), dtype=torch.float64)
        if not bool(refused.any()):
            return
        found = stream[refused]
        self._here[REFUSED].index_add_(0, found, torch.ones(len(found), dtype=torch.float64))
        ids = [id_of(batch["sample_ids"][i].tolist()) for i in batch["document_sample"][refused].tolist()]
        told = [(name, names[s]) for name, s in zip(ids, found.tolist(), strict=True)]
        self.named += [f"'{name}' of {of}" for name, of in told][: _NAMED - len(self.named)]
        if self.log is not None:
            lines = [
                json.dumps({"id": n, "reason": "visual_instruction", "stream": of}) + "\n" for n, of in told
            ]
            with Path(self.log).open(
                "a", encoding="utf-8"
            ) as file:  # short appends: the kernel keeps them whole
                file.write("".join(lines))

    def learn(self, batch: dict[str, Any], nll: torch.Tensor, stream: torch.Tensor, streams: int) -> None:
        """Add a micro-batch's nats and learnt tokens, without waiting for the device.

        Args:
            batch: the micro-batch.
            nll: (n,) of its labelled tokens.
            stream: (B, D) int64.
            streams: S.
        """
        rows, length = batch["label_rows"], batch["input_ids"].shape[1]
        document = batch["document_ids"].flatten()[rows].long().clamp(min=0)
        of = stream[rows // length, document]
        real = (batch["label_weights"] > 0) & (of >= 0) & nll.isfinite()
        at = torch.where(real, of, streams)  # what counts for none goes behind the last
        sums = nll.new_zeros(2, streams + 1, dtype=torch.float64)
        sums.index_add_(1, at, torch.stack([torch.where(real, nll, 0.0).double(), real.double()]))
        assert self._here is not None
        self._here = self._here.to(sums.device, non_blocking=True)
        self._here[NATS:] += sums[:, :-1]

    def close_step(self) -> None:
        """Sum over ranks; nobody waits for it."""
        if self._here is not None:
            total = global_sum(self._here)
            self.total = total if self.total is None else self.total.to(total.device) + total
            self._here = None

    def since_decision(self) -> torch.Tensor | None:
        """What came since the last call, (3, S) on the CPU; None: nothing ever did."""
        if self.total is None:
            return None
        now = self.total.cpu()
        new = now if self._decided is None else now - self._decided
        self._decided = now
        return new

    def entries(self, names: Sequence[str]) -> tuple[int, dict[str, float]]:
        """Documents refused so far, and metrics: totals, and nats a token since the last entry."""
        if self.total is None:
            return 0, {}
        total = self.total.cpu()
        new = total if self._logged is None else total - self._logged
        self._logged = total
        refused = int(total[REFUSED].sum())
        metrics: dict[str, float] = {"vift/refused": refused}
        for i, name in enumerate(names):
            if total[REFUSED, i]:
                metrics[f"vift/refused/{name}"] = int(total[REFUSED, i])
            if new[LEARNT, i]:
                metrics[f"vift/nll/{name}"] = float(new[NATS, i] / new[LEARNT, i])
        return refused, metrics

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint."""
        kept = {"total": self.total, "decided_at": self._decided, "logged": self._logged}
        return {**{k: None if t is None else t.tolist() for k, t in kept.items()}, "named": self.named}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        given = lambda key: None if state.get(key) is None else torch.tensor(state[key], dtype=torch.float64)  # noqa: E731
        self.total, self._decided, self._logged = given("total"), given("decided_at"), given("logged")
        self.named = list(state.get("named", []))
