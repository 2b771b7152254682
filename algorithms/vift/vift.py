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
from ...data.schema import id_of
from ...data.streaming import StreamingVLMDataset
from ...models.errors import UserError, nearest
from ...models.normalise import global_sum
from ...models.vlm import VisionLanguageModel
from ..base import VisionAlgorithm, agree
from .functional import refused_documents, shows_picture
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
            ``metrics/LABEL/NAME`` of an evaluator. Looked at where an epoch ends; each acts once, in their order.
        decision_interval: batches between looks (``50ba``): an epoch of the data is then as long; None: as it is.
        caption_prompts: sentences that may stand beside a picture, or a file with one a line; none: no words at all.
        max_refused: most samples with a picture and another sentence; above it the run stops (checked after 1, 4, 16 and
            every ``log_interval`` batches and where an epoch ends). They are never learnt from. None: no limit.
        freeze_vision_on_text_steps: where no sample of a step has a picture, tower and projector keep their bits: else
            the optimizer's momentum and weight decay would move them.
        log_interval: batches between entries of ``vift/nll/STREAM``, ``vift/refused`` ...
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
        self.max_refused = max_refused
        self.freeze_vision_on_text_steps = bool(freeze_vision_on_text_steps)
        self.log_interval = log_interval
        self.streams: list[str] = ["all"]
        self.kinds: list[str | None] = [None]
        self.decided: list[dict[str, Any]] = []
        self._dataset: StreamingVLMDataset | None = None
        self._single = False
        self._rest: VisionAtRest | None = None
        self._here: torch.Tensor | None = (
            None  # (3, S) of this rank in this step: refused, nats, labelled tokens
        )
        self._total: torch.Tensor | None = None  # of all ranks since training began
        self._seen: torch.Tensor | None = None  # that total at the last look
        self._logged: torch.Tensor | None = None  # and at the last entry
        self._named: list[str] = []
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
        for name, kind in zip(self.streams, self.kinds, strict=True):
            if kind == "instruction":
                raise UserError(
                    f"{where}: dataset.streams.{name} is of kind instruction, and ViFT trains on no questions about pictures; "
                    "leave it out, or take its captions and text with `opsin data split-vift`"
                )
        for rule in self.rules:
            rule.check(self.streams, where)
        if len(self.streams) < 2:
            if self.mixture is not None or self.rules:
                raise UserError(
                    f"{where}: there is one stream, so nothing to mix; name several (dataset.streams)"
                )
            self._single = True
            return
        own = dataset.mixture_spec
        spec = self.mixture or own or {"weights": self._natural(dataset)}
        batches = self.batches or spec.get("batches") or "single"
        wanted = {"duration": duration, **spec, "batches": batches}
        size = None
        if self.interval is not None:
            if str(duration).strip().endswith("ep"):
                raise UserError(
                    f"{where}.decision_interval: an epoch is {self.interval} batches then; give max_duration in ba, not in ep"
                )
            size = self.interval * dataset.global_batch
        try:
            dataset.use_mixture(wanted, size)
        except UserError as error:
            text = str(error).replace(
                "dataset.mixture", f"{where}.mixture" if self.mixture else "dataset.mixture"
            )
            raise UserError(text) from error
        self._single = batches == "single"

    @staticmethod
    def _natural(dataset: StreamingVLMDataset) -> dict[str, float]:
        sizes = map(float, dataset.samples_per_stream)
        return dict(zip(dataset.stream_names, sizes, strict=True))

    def before_load(self, model: VisionLanguageModel, state: State, logger: Logger) -> None:
        """Set the mixture, before a checkpoint says where in it training stands."""
        self._begin(state)

    def fit_start(self, model: VisionLanguageModel, state: State, logger: Logger) -> None:
        """Set it where the data came with ``fit``; find the optimizer's vision parameters."""
        self._begin(state)
        for rule in self.rules:
            rule.check_evaluators([e.label for e in state.evaluators], f"algorithms.{self.name}")
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
        counts = torch.zeros(3, len(self.streams), dtype=torch.float64)
        if bool(refused.any()):
            found = stream[refused]
            counts[0].index_add_(0, found, torch.ones(len(found), dtype=torch.float64))
            if len(self._named) < 3:
                self._named += [
                    f"'{id_of(batch['sample_ids'][i].tolist())}' of {self.streams[s]}"
                    for i, s in zip(owner[refused].tolist(), found.tolist(), strict=True)
                ]
        self._here = counts

    def batch_start(self, model: VisionLanguageModel, state: State, logger: Logger) -> None:
        """Let vision parameters rest where no rank has a picture."""
        if self._rest is not None and self._rest.groups:
            self._rest.end()  # an update that never came, as with a gradient scaler that skips one
            self._rest.resting = self._text_only(state.batch)

    def _text_only(self, batch: dict[str, Any]) -> bool:
        """Whether no sample of the global batch has a picture, as all ranks say.

        Batches of a single stream say so by its kind; else ranks have to ask each other.
        """
        of = batch["sample_stream"]
        of = of[of >= 0].long()
        if self._single and len(of):
            kind = self.kinds[int(of[0])]
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
        batch, nll = state.batch, outputs["nll"].detach()
        length = batch["input_ids"].shape[1]
        rows = batch["label_rows"]
        document = batch["document_ids"].flatten()[rows].long().clamp(min=0)
        stream = batch["row/vift_stream"][rows // length, document]
        real = (batch["label_weights"] > 0) & (stream >= 0)
        at = torch.where(real, stream, len(self.streams))  # what counts for none goes behind the last
        sums = nll.new_zeros(2, len(self.streams) + 1, dtype=torch.float64)
        values = torch.stack([torch.where(real, nll, 0.0).double(), real.double()])
        sums.index_add_(1, at, values)
        assert self._here is not None
        here = self._here.to(sums.device)
        here[1:] += sums[:, :-1]
        self._here = here

    def batch_end(self, model: VisionLanguageModel, state: State, logger: Logger) -> None:
        """Sum over ranks; log now and then; stop above ``max_refused``."""
        if self._here is not None:
            total = global_sum(self._here)
            self._total = total if self._total is None else self._total.to(total.device) + total
            self._here = None
        done = int(state.timestamp.batch)
        if done % self.log_interval == 0 or done in _CHECKS:
            self._look(logger)

    def epoch_end(self, model: VisionLanguageModel, state: State, logger: Logger) -> None:
        """Look at the rules: alike on all ranks, since what they look at is."""
        self._look(logger)
        if not self.rules or self._total is None:
            return
        total = self._total.cpu()
        since = total if self._seen is None else total - self._seen
        self._seen = total
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
            name: float(since[1, i] / since[2, i]) if since[2, i] > 0 else None
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
        if self._total is None:
            return
        total = self._total.cpu()
        new = total if self._logged is None else total - self._logged
        self._logged = total
        refused = int(total[0].sum())
        metrics: dict[str, float] = {"vift/refused": refused}
        for i, name in enumerate(self.streams):
            if total[0, i]:
                metrics[f"vift/refused/{name}"] = int(total[0, i])
            if new[2, i]:
                metrics[f"vift/nll/{name}"] = float(new[1, i] / new[2, i])
        if self._rest is not None:
            metrics["vift/text_steps"] = self._rest.rested
        logger.log_metrics(metrics)
        if self.max_refused is not None and refused > self.max_refused:
            named = [n for part in dist.all_gather_object(self._named) for n in part][:3]
            by = ", ".join(f"{int(n)} of {name}" for name, n in zip(self.streams, total[0], strict=True) if n)
            raise UserError(
                f"algorithms.{self.name}: {refused} samples have a picture and words that are no caption prompt ({by}; such as "
                f"{', '.join(named)}), more than max_refused={self.max_refused}; leave them out (`opsin data split-vift`), or "
                "name the words under caption_prompts"
            )

    # Checkpoints

    def state_dict(self) -> dict[str, Any]:
        """Decisions so far and what the next ones stand on."""
        keep = lambda t: None if t is None else t.tolist()  # noqa: E731
        return {
            "rules": [rule.text for rule in self.rules],
            "decided": self.decided,
            "total": keep(self._total),
            "seen": keep(self._seen),
            "logged": keep(self._logged),
            "text_steps": self._rested if self._rest is None else self._rest.rested,
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
        given = lambda key: None if state.get(key) is None else torch.tensor(state[key], dtype=torch.float64)  # noqa: E731
        self._total, self._seen, self._logged = given("total"), given("seen"), given("logged")
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
