"""L2T as a Composer algorithm: rewrites labels and loss weights when a batch is loaded."""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from composer.core import State
from composer.loggers import Logger
from composer.utils import dist

from ...data.batch import effective_weights
from ...data.schema import Role
from ...models.errors import UserError
from ...models.normalise import declare, global_sum
from ...models.step import Apart, Step
from ...models.teachers import Teacher
from ...models.vlm import VisionLanguageModel
from ..base import VisionAlgorithm
from .functional import (
    NORMALISATIONS,
    TURNS,
    Template,
    instruction_mask,
    l2t_labels,
    l2t_weights,
    normaliser,
    template_ids,
    visual_relevance,
)
from .templates import TemplateChoice, at_least, one_of

log = logging.getLogger(__name__)


class L2T(VisionAlgorithm):
    """Learn to predict the instruction as well as the response, minus templates.

    Source: arXiv 2503.22215. Changes ``labels`` and ``loss_weights``; the loss keeps its one key ``lm``.

    Args:
        lambda_instruction: weight of instruction tokens (paper: 1). 0, with ``lambda_response`` 1: off.
        lambda_response: weight of response tokens.
        normalisation: what the sum is divided by, see ``functional.normaliser``.
        turns: user turns that are learnt: ``all``, ``first``, ``later``.
        on_text_only: also documents without a picture.
        template_source: ``list`` (``templates``), ``dataset`` (the data's own list), ``frequency``
            (counts beside the data), ``none``; ``auto``: the first of these that there is.
        templates: sentences, or a file with one a line.
        template_sample: where there are no counts beside the data, count this many samples at the start
            of training; 0: stop and say how to make the counts.
        min_count, min_share, top_k, min_words, allow: see ``functional.frequent_sentences``.
        max_removed: stop when templates hold more than this share of all instruction words.
        token_weights: ``none``, or ``visual_relevance``: weigh each instruction token by what the picture
            tells about it (log p with minus without the picture), by a frozen copy of the initial model.
        relevance_clip: smallest and largest of these weights.
        image_free: predict instructions in a second pass in which no text sees a picture, at the same places, weights and
            Z; responses in the ordinary one. A control: what language alone gives. Twice the work of the language model.
        log_interval: batches between entries of ``l2t/loss_I``, ``l2t/loss_A`` ...
        report: JSON file for the templates in use and their counts.
    """

    name: ClassVar[str] = "l2t"
    stages: ClassVar[tuple[str, ...]] = ("instruct",)
    needs: ClassVar[frozenset[str]] = frozenset({"images"})
    refuses: ClassVar[dict[str, str]] = {
        "chat_template=plain": "the plain template drops the instruction, so there is nothing to learn",
        "token_weights=visual_relevance, fsdp2=true": "it copies the model, which is sharded then",
    }

    def __init__(
        self,
        lambda_instruction: float = 1.0,
        lambda_response: float = 1.0,
        normalisation: str = "pooled",
        turns: str = "all",
        on_text_only: bool = False,
        template_source: str = "auto",
        templates: Sequence[str] | str | None = None,
        template_sample: int = 0,
        min_count: int = 50,
        min_share: float = 1e-3,
        top_k: int = 50,
        min_words: int = 3,
        allow: Sequence[str] = (),
        max_removed: float = 0.5,
        token_weights: str = "none",
        relevance_clip: tuple[float, float] = (0.0, 1.0),
        image_free: bool = False,
        log_interval: int = 1,
        report: str | None = None,
    ):
        one_of("normalisation", normalisation, NORMALISATIONS)
        one_of("turns", turns, TURNS)
        one_of("token_weights", token_weights, ("none", "visual_relevance"))
        if lambda_instruction < 0 or lambda_response < 0:
            raise UserError("algorithms.l2t: weights of the loss cannot be negative")
        at_least(1, log_interval=log_interval)
        if len(relevance_clip) != 2 or not 0 <= relevance_clip[0] <= relevance_clip[1]:
            raise UserError(
                f"algorithms.l2t.relevance_clip: expected [smallest, largest] weight, got {list(relevance_clip)}"
            )
        if token_weights != "none" and normalisation == "weighted":
            raise UserError("algorithms.l2t: normalisation 'weighted' has no Z for token_weights; use pooled")
        self.lambda_instruction = float(lambda_instruction)
        self.lambda_response = float(lambda_response)
        self.normalisation = normalisation
        self.turns = turns
        self.on_text_only = on_text_only
        self.choice = TemplateChoice(
            source=template_source,
            templates=templates,
            sample=template_sample,
            min_count=min_count,
            min_share=min_share,
            top_k=top_k,
            min_words=min_words,
            allow=tuple(allow) if isinstance(allow, list | tuple) else allow,
            max_removed=max_removed,
            report=report,
        )
        self.token_weights = token_weights
        self.relevance_clip = (float(relevance_clip[0]), float(relevance_clip[1]))
        self.image_free = image_free
        self.log_interval = int(log_interval)
        if on_text_only:
            self.needs = frozenset()  # type: ignore[misc]
        if image_free or token_weights != "none":  # both hide pictures from the text behind them
            self.needs = self.needs | {"masks"}  # type: ignore[misc]
        if not on_text_only and lambda_response == 1:
            self.lives_on = {
                "visual_instructions": "without on_text_only it learns instructions about pictures alone"
            }
        self.table: list[Template] | None = None
        self.source_used = ""
        self._ids = torch.zeros(0, dtype=torch.int64)
        self._frozen: Teacher | None = None
        self._sums: torch.Tensor | None = None

    def is_off(self) -> bool:
        """Off: instruction tokens weigh nothing and response tokens weigh one."""
        return self.lambda_instruction == 0 and self.lambda_response == 1

    def init(self, model: VisionLanguageModel, state: State, logger: Logger) -> None:
        """Copy the initial model, if tokens are weighed by what it sees in the picture."""
        if self.token_weights == "visual_relevance":
            if state.fsdp_config is not None:
                raise UserError(
                    "algorithms.l2t: token_weights visual_relevance copies the model; not with FSDP2"
                )
            self._frozen = Teacher(copy.deepcopy(model.net))

    def fit_start(self, model: VisionLanguageModel, state: State, logger: Logger) -> None:
        """Decide the templates on rank 0, once; a resumed run keeps those of its checkpoint."""
        if self.table is None:
            chosen: list[Any] = [None]
            if dist.get_global_rank() == 0:
                try:
                    chosen = [self.choice.choose(getattr(state.dataloader, "dataset", None))]
                except UserError as error:  # every rank must stop
                    chosen = [error]
            dist.broadcast_object_list(chosen, src=0)
            if isinstance(chosen[0], UserError):
                raise chosen[0]
            self.table, self.source_used = chosen[0]
        assert self.table is not None
        self._ids = template_ids(self.table)
        logger.log_hyperparameters(
            {"l2t/templates": len(self.table), "l2t/template_source": self.source_used}
        )
        if self._frozen is not None:
            self._frozen.to(next(model.parameters()).device)

    def after_dataloader(self, model: VisionLanguageModel, state: State, logger: Logger) -> None:
        """Add instruction tokens to the labels of a device batch (on the CPU)."""
        batch = state.batch
        learnt = instruction_mask(
            roles=batch["roles"],
            turn_ids=batch["turn_ids"],
            branch_ids=batch["branch_ids"],
            document_ids=batch["document_ids"],
            image_ids=batch["image_ids"],
            sentence_ids=batch["sentence_ids"],
            templates=self._ids,
            turns=self.turns,
            on_text_only=self.on_text_only,
        )
        if self.lambda_instruction == 0:
            learnt = torch.zeros_like(
                learnt
            )  # labels and Z of the plain run: what weighs nothing is not counted
        batch["labels"] = l2t_labels(batch["labels"], batch["input_ids"], learnt)
        batch["loss_weights"] = l2t_weights(
            learnt,
            lambda_instruction=self.lambda_instruction,
            lambda_response=self.lambda_response,
            base=batch["loss_weights"],
        )

    def batch_start(self, model: VisionLanguageModel, state: State, logger: Logger) -> None:
        """Declare Z, from the labels that count (documents refused by another method do not)."""
        batch = state.batch
        # Tokens of weight 0 are not computed; whether they count in Z is decided by their role alone.
        ones = {**batch, "loss_weights": torch.ones_like(batch["loss_weights"])}
        counts, _ = effective_weights(ones)
        instruction = batch["roles"] == Role.INSTRUCTION
        n = torch.stack([(counts * ~instruction).double().sum(), (counts * instruction).double().sum()])
        total = global_sum(n).cpu() if self.normalisation == "separate" else n
        options = {"lambda_instruction": self.lambda_instruction, "lambda_response": self.lambda_response}
        z, _ = normaliser(n[0], n[1], normalisation=self.normalisation, **options)
        _, factor = normaliser(total[0], total[1], normalisation=self.normalisation, **options)
        declare(batch, "lm", z, "tokens")
        if self.normalisation == "separate":
            batch["loss_weights"] = torch.where(
                instruction, batch["loss_weights"] * factor, batch["loss_weights"]
            ).float()

    def before_forward(self, model: VisionLanguageModel, state: State, logger: Logger) -> None:
        """Send instruction tokens through a pass without pictures; weigh them by what the picture tells the frozen model."""
        if self._frozen is None and not self.image_free:
            return
        batch = state.batch
        hidden = batch["image_ids"] >= 0
        if self.image_free:
            labels = batch["label_roles"] == Role.INSTRUCTION
            model.step(batch).apart = Apart(labels, {"hidden": hidden})
        if self._frozen is None:
            return
        seen = self._frozen(batch, Step(batch))["nll"]
        blind = self._frozen(batch, Step(batch, visibility={"hidden": hidden}))["nll"]
        weight = visual_relevance(seen, blind, clip=self.relevance_clip)
        instruction = batch["label_roles"] == Role.INSTRUCTION
        batch["label_weights"] = torch.where(
            instruction, batch["label_weights"] * weight, batch["label_weights"]
        )

    def after_loss(self, model: VisionLanguageModel, state: State, logger: Logger) -> None:
        """Add up the losses of instruction (first and later turns) and response, without waiting for the device."""
        outputs: Any = state.outputs
        batch, nll = state.batch, outputs["nll"].detach()
        real = (batch["label_weights"] > 0) & nll.isfinite()  # a batch may be left out for one that is not
        instruction = real & (batch["label_roles"] == Role.INSTRUCTION)
        later = (batch["label_turns"] > 0) & (batch["label_branches"] == 0)
        groups = torch.stack([instruction & ~later, instruction & later, real & ~instruction])
        sums = torch.cat([torch.where(groups, nll, 0.0).double().sum(1), groups.double().sum(1)])
        self._sums = sums if self._sums is None else self._sums + sums

    def batch_end(self, model: VisionLanguageModel, state: State, logger: Logger) -> None:
        """Log loss_I and loss_A: the total is not comparable with that of ordinary instruction tuning."""
        if self._sums is None or int(state.timestamp.batch) % self.log_interval:
            return
        sums = self._sums
        self._sums = None
        dist.all_reduce(sums)
        # Numbers stay on the device until somebody writes them down.
        first, later, response, n_first, n_later, n_response = sums.unbind()
        mean = lambda total, n: total / n.clamp(min=1.0)  # noqa: E731
        logged: dict[str, Any] = {
            "l2t/loss_I": mean(first + later, n_first + n_later),
            "l2t/loss_I_first": mean(first, n_first),
            "l2t/loss_I_later": mean(later, n_later),
            "l2t/loss_A": mean(response, n_response),
            "l2t/n_I": n_first + n_later,
            "l2t/n_A": n_response,
        }
        logger.log_metrics(logged)

    def state_dict(self) -> dict[str, Any]:
        """The templates in use: a resumed run keeps its labels."""
        table = None if self.table is None else [[t.sentence, t.count] for t in self.table]
        return {**super().state_dict(), "templates": table, "template_source": self.source_used}

    def load_state_dict(self, state: dict[str, Any], strict: bool = False) -> None:
        """Take over a checkpoint's templates."""
        if state.get("templates") is not None:
            self.table = [Template(str(s), int(c)) for s, c in state["templates"]]
            self.source_used = state["template_source"]
