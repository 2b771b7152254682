"""ViFT as a Composer algorithm: the data mixture of a run, its promise, and vision parameters in text-only steps."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from composer.core import State, Time, TimeUnit
from composer.loggers import Logger
from composer.utils import dist

from ...data.mixture_spec import BATCHES
from ...data.streaming import StreamingVLMDataset
from ...models.errors import UserError, nearest
from ...models.vlm import VisionLanguageModel
from ..base import VisionAlgorithm, agree
from .functional import refused_documents, shows_picture
from .ledger import LEARNT, NATS, Ledger
from .prompts import caption_pool
from .rules import Rule, make_rules
from .text_steps import VisionAtRest

log = logging.getLogger(__name__)

_CHECKS = (1, 4, 16)


class ViFT(VisionAlgorithm):
    """Train on captions and text-only instructions, never on questions about pictures.

    Source: arXiv 2502.11427. Acts on which stream of a ``data.streaming.StreamingVLMDataset`` each batch comes from; the
    loss is the ordinary one. What fuses both abilities while generating is ``algorithms.vift.steering``.

    Args:
        mixture: ``weights`` or ``phases`` of the streams, ``ramp``, as ``data.mixture_spec.make_mixture`` takes them;
            None: the dataset's own mixture, else each stream by its size ("natural proportions", as in the released code).
        batches: ``single``: every optimizer step has one kind of data, as in the released code; ``mixed``. None: as the
            dataset's own mixture says, else ``single``.
        rules: the mixture changes when a logged metric asks for it: ``{metric, below | above, weights}`` each, where
            ``metric`` is ``vift/nll/STREAM`` (nats a labelled token since the last look, of all ranks) or
            ``metrics/LABEL/NAME`` of an evaluator. Looked at where an epoch ends, after evaluators; the first that holds and
            did not act yet acts. From then on its weights stay, whatever phases were to come.
        decision_interval: batches between looks (``50ba``): an epoch of the data is then as long; None: as it is.
        caption_prompts: sentences that may stand beside a picture, or a file with one a line; none: no words at all
            (punctuation is none).
        max_refused: most samples with a picture and another sentence; above it the run stops (checked after 1, 4, 16 and
            every ``log_interval`` batches and where an epoch ends). They are never learnt from. None: no limit.
        freeze_vision_on_text_steps: in text-only steps tower and projector keep their bits: else the optimizer's momentum
            and weight decay would move them. These are batches of a stream of kind ``text``; where batches are mixed, or
            kinds are not said, those in which no rank has a picture, for which ranks ask each other once a step.
        log_interval: batches between entries of ``vift/nll/STREAM``, ``vift/refused`` ...
        refused_log: JSONL file in which refused samples are named (a run's ``skipped.jsonl``).
    """

    name: ClassVar[str] = "vift"
    stages: ClassVar[tuple[str, ...]] = ("instruct",)

    def __init__(
        self,
        mixture: Mapping[str, Any] | None = None,
        batches: str | None = None,
        rules: Sequence[Mapping[str, Any]] = (),
        decision_interval: str | None = None,
        caption_prompts: Sequence[str] | str = (),
        max_refused: int | None = 0,
        freeze_vision_on_text_steps: bool = True,
        log_interval: int = 10,
        refused_log: str | None = None,
    ):
        where = f"algorithms.{self.name}"
        if mixture is not None and not isinstance(mixture, Mapping):
            raise UserError(f"{where}.mixture: '{mixture}': give weights or phases")
        if batches is not None and batches not in BATCHES:
            raise UserError(f"{where}.batches '{batches}': unknown{nearest(str(batches), BATCHES)}")
        for key, value, least in (("max_refused", max_refused, 0), ("log_interval", log_interval, 1)):
            if value is None and key == "max_refused":
                continue
            if type(value) is not int or value < least:
                raise UserError(f"{where}.{key}: {value}: use {least} or more")
        self.mixture = None if mixture is None else dict(mixture)
        self.batches = batches
        self.rules: list[Rule] = make_rules(rules, f"{where}.rules")
        self.interval = _batches(decision_interval, f"{where}.decision_interval")
        self.pool = caption_pool(caption_prompts, f"{where}.caption_prompts")
        if not len(self.pool):
            self.leaves_out = {
                "visual_instructions": "without caption_prompts no picture keeps words beside it"
            }
        self.max_refused = max_refused
        self.freeze_vision_on_text_steps = bool(freeze_vision_on_text_steps)
        self.log_interval = log_interval
        self.streams: list[str] = ["all"]
        self.kinds: list[str | None] = [None]
        self.decided: list[dict[str, Any]] = []
        self._dataset: StreamingVLMDataset | None = None
        self._single = False
        self._rest: VisionAtRest | None = None
        self.ledger = Ledger(refused_log)
        self._rested = 0

    # What the data will be

    def use(self, dataset: StreamingVLMDataset, duration: str | None) -> None:
        """Have the dataset mixed as this method says; before its first epoch, alike on all ranks.

        Args:
            dataset: the training data.
            duration: of the training, for phases in ``dur``.

        Raises:
            UserError: a stream of questions about pictures, or a mixture or a rule that does not fit the data.
        """
        where = f"algorithms.{self.name}"
        self._dataset, self.streams, self.kinds = dataset, dataset.stream_names, dataset.stream_kinds
        own = dataset.mixture_spec
        for name, kind in zip(self.streams, self.kinds, strict=True):
            if kind == "instruction" and self._may_come(name, own):
                raise UserError(
                    f"{where}: dataset.streams.{name} is of kind instruction, and ViFT trains on no questions about pictures; "
                    "leave it out, give it weight 0, or take its captions and text with `opsin data split-vift`"
                )
        for rule in self.rules:
            rule.check(self.streams, where)
        if len(self.streams) < 2:
            if self.mixture is not None or self.rules or self.interval is not None:
                raise UserError(
                    f"{where}: there is one stream, so nothing to mix; name several (dataset.streams)"
                )
            self._single = True
            return
        spec = self.mixture if self.mixture is not None else own or {"weights": self._natural(dataset)}
        batches = self.batches or spec.get("batches") or (own or {}).get("batches") or "single"
        wanted = {"duration": duration, **spec, "batches": batches}
        size = None
        if self.interval is not None:
            if str(duration).strip().endswith("ep"):
                raise UserError(
                    f"{where}.decision_interval: an epoch is {self.interval} batches then; give max_duration in ba, not in ep"
                )
            size = self.interval * dataset.global_batch
            if dataset.epoch_size_asked is not None:
                raise UserError(
                    f"{where}.decision_interval: it is the length of an epoch, and so is epoch_size; give one"
                )
        try:
            dataset.use_mixture(wanted, size)
        except UserError as error:
            text = str(error).replace(
                "dataset.mixture", f"{where}.mixture" if self.mixture is not None else "dataset.mixture"
            )
            raise UserError(text) from error
        self._single = batches == "single"

    def _may_come(self, stream: str, own: Mapping[str, Any] | None) -> bool:
        """Whether a stream has a weight at any time, by the mixture in force or by a rule."""
        spec = own if self.mixture is None else self.mixture
        if not spec:
            return True
        asked = [phase.get("weights") or {} for phase in spec.get("phases") or [spec]]
        asked += [rule.weights for rule in self.rules]
        return any(weights.get(stream, 0) for weights in asked)

    @staticmethod
    def _natural(dataset: StreamingVLMDataset) -> dict[str, float]:
        sizes = map(float, dataset.samples_per_stream)
        return dict(zip(dataset.stream_names, sizes, strict=True))

    def before_load(self, model: VisionLanguageModel, state: State, logger: Logger) -> None:
        """Set the mixture, before a checkpoint says where in it training stands."""
        if state.max_duration is not None:  # else ``fit`` will say it
            self._begin(state)

    def fit_start(self, model: VisionLanguageModel, state: State, logger: Logger) -> None:
        """Set it where the data came with ``fit``; find the optimizer's vision parameters."""
        self._begin(state)
        for rule in self.rules:
            rule.check_evaluators(state.eval_metrics, f"algorithms.{self.name}")
        if self.freeze_vision_on_text_steps and self._rest is None:
            self._rest = VisionAtRest(state.optimizers[0])
            self._rest.rested = self._rested

    def init(self, model: VisionLanguageModel, state: State, logger: Logger) -> None:
        """Give vision parameters optimizer groups of their own, where they share one with others."""
        if self.freeze_vision_on_text_steps:
            for optimizer in state.optimizers:
                VisionAtRest.set_apart(optimizer, model)

    def _begin(self, state: State) -> None:
        dataset = getattr(state.dataloader, "dataset", None)
        if state.dataloader is None or dataset is self._dataset:
            return
        if not isinstance(dataset, StreamingVLMDataset):
            if self.mixture is not None or self.rules:
                raise UserError(
                    f"algorithms.{self.name}: a mixture needs opsin.data.streaming.StreamingVLMDataset, not "
                    f"{type(dataset).__name__}"
                )
            return
        before = len(dataset)
        self.use(dataset, None if state.max_duration is None else str(state.max_duration.to_timestring()))
        if len(dataset) != before:
            state.set_dataloader(state.dataloader, state.dataloader_label)

    # Its promise

    def after_dataloader(self, model: VisionLanguageModel, state: State, logger: Logger) -> None:
        """Refuse documents that have a picture and a specific question; say which stream each one is of."""
        batch = state.batch
        owner = batch["document_sample"]
        stream = torch.where(owner >= 0, batch["sample_stream"].long()[owner.clamp(min=0)], -1)
        batch["row/vift_stream"] = stream
        refused = refused_documents(
            roles=batch["roles"],
            document_ids=batch["document_ids"],
            image_ids=batch["image_ids"],
            sentence_ids=batch["sentence_ids"],
            pool=self.pool,
            documents=owner.shape[1],
        )
        text = torch.tensor([kind == "text" for kind in self.kinds] + [False])
        shown = shows_picture(batch["image_ids"], batch["document_ids"], owner.shape[1])
        refused |= shown & text[stream]  # -1 is the last one
        batch["refused"] = batch["refused"] | refused
        self.ledger.refuse(batch, refused, stream, self.streams)

    def batch_start(self, model: VisionLanguageModel, state: State, logger: Logger) -> None:
        """Let vision parameters rest where no rank has a picture."""
        if self._rest is not None and self._rest.groups:
            self._rest.resting = self._text_only(state.batch)

    def _text_only(self, batch: dict[str, Any]) -> bool:
        """Whether no sample of the global batch has a picture, as all ranks say.

        Batches of a single stream say so by its kind; else ranks have to ask each other.
        """
        kind = self.kinds[0]
        if len(self.kinds) > 1:  # a mixture has whole global batches: no rank is without a sample
            of = batch["sample_stream"][0]
            kind = self.kinds[int(of)] if self._single and of >= 0 else None
        if kind is not None:
            return kind == "text"
        return not agree(bool((batch["image_ids"] >= 0).any()))

    def after_train_batch(self, model: VisionLanguageModel, state: State, logger: Logger) -> None:
        """Before the optimizer's update."""
        if self._rest is not None:
            self._rest.begin()

    # What it saw

    def after_loss(self, model: VisionLanguageModel, state: State, logger: Logger) -> None:
        """Add up nats and labelled tokens by stream, without waiting for the device."""
        outputs: Any = state.outputs
        batch = state.batch
        self.ledger.learn(batch, outputs["nll"].detach(), batch["row/vift_stream"], len(self.streams))

    def batch_end(self, model: VisionLanguageModel, state: State, logger: Logger) -> None:
        """Sum over ranks; log now and then; stop above ``max_refused``."""
        self.ledger.close_step()
        if self._rest is not None:
            self._rest.give_back()
        done = int(state.timestamp.batch)
        if done % self.log_interval == 0 or done in _CHECKS:
            self._look(logger)

    def epoch_end(self, model: VisionLanguageModel, state: State, logger: Logger) -> None:
        """Log."""
        self._look(logger)

    def epoch_checkpoint(self, model: VisionLanguageModel, state: State, logger: Logger) -> None:
        """Look at the rules: alike on all ranks, since what they look at is."""
        since = self.ledger.since_decision() if self.rules else None
        if since is None:
            return
        chosen: list[Any] = [self._decision(since, state)]
        dist.broadcast_object_list(chosen, src=0)
        if chosen[0] is None:
            return
        decided: dict[str, Any] = {**chosen[0], "batch": int(state.timestamp.batch)}
        rule = self.rules[decided["rule"]]
        assert self._dataset is not None
        self._dataset.set_mixture(rule.weights)
        self.decided.append(decided)
        log.info("vift: %s is %.4g, so the mixture becomes %s", rule.text, decided["value"], rule.weights)
        logger.log_metrics({"vift/rule": decided["rule"], "vift/rule_value": decided["value"]})

    def _decision(self, since: torch.Tensor, state: State) -> dict[str, Any] | None:
        """The first rule that did not act yet and whose metric asks for it, and the metric's value."""
        nll = {
            name: float(since[NATS, i] / since[LEARNT, i]) if since[LEARNT, i] > 0 else None
            for i, name in enumerate(self.streams)
        }
        acted = {d["rule"] for d in self.decided}
        for i, rule in enumerate(self.rules):
            if i not in acted:
                value = rule.value(nll, state.eval_metrics)
                if value is not None and rule.holds(value):
                    return {"rule": i, "value": value}
        return None

    def fit_end(self, model: VisionLanguageModel, state: State, logger: Logger) -> None:
        """A run may end in mid-epoch."""
        self._look(logger)
        if self._rest is not None:
            self._rest.remove()
            self._rested, self._rest = self._rest.rested, None

    def _look(self, logger: Logger) -> None:
        refused, metrics = self.ledger.entries(self.streams)
        if self._rest is not None and metrics:
            metrics["vift/text_steps"] = self._rest.rested
        logger.log_metrics(metrics)
        if self.max_refused is None or refused <= self.max_refused:
            return
        named = list(dict.fromkeys(n for part in dist.all_gather_object(self.ledger.named) for n in part))[:3]
        by = ", ".join(
            f"{int(metrics[k])} of {n}" for n in self.streams if (k := f"vift/refused/{n}") in metrics
        )
        raise UserError(
            f"algorithms.{self.name}: {refused} samples have a picture and words that are no caption prompt, or a picture in a "
            f"stream of kind text ({by}; such as {', '.join(named)}), more than max_refused={self.max_refused}; leave them out "
            "(`opsin data split-vift`), or name the words under caption_prompts"
        )

    # Checkpoints

    def state_dict(self) -> dict[str, Any]:
        """Decisions so far and what the next ones stand on."""
        return {
            **super().state_dict(),
            "rules": [rule.text for rule in self.rules],
            "decided": self.decided,
            "text_steps": self._rested if self._rest is None else self._rest.rested,
            **self.ledger.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any], strict: bool = False) -> None:
        """Go on from there.

        Raises:
            UserError: rules have acted, and now there are others.
        """
        decided = state.get("decided", [])
        acted = max((d["rule"] for d in decided), default=-1) + 1
        if state.get("rules", [])[:acted] != [rule.text for rule in self.rules][:acted]:
            raise UserError(
                f"algorithms.{self.name}.rules: {acted} of the checkpoint's have acted, and they are others now; bring them "
                "back, or start a new run from its weights (init_from)"
            )
        self.decided = list(decided)
        self.ledger.load_state_dict(state)
        self._rested = int(state.get("text_steps", 0))


def _batches(interval: str | None, where: str) -> int | None:
    """``50ba`` -> 50."""
    if interval is None:
        return None
    try:
        time = Time.from_timestring(str(interval))
    except ValueError as error:
        raise UserError(f"{where}: '{interval}': use batches, such as 50ba") from error
    if time.unit != TimeUnit.BATCH or time.value < 1:
        raise UserError(f"{where}: '{interval}': use batches, such as 50ba")
    return int(time.value)
