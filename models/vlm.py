"""A Hugging Face vision-language model as a Composer model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from composer.models import ComposerModel
from torch import nn
from torchmetrics import Metric

from .anatomy import Anatomy, Pictures
from .compile import CompileSettings
from .errors import UserError
from .metrics import ExactMatch, TokenNLL
from .net import VisionLanguageNet
from .normalise import DENOMINATORS, term
from .parts import named_parts
from .step import Step


class VisionLanguageModel(ComposerModel):
    """Wraps a Hugging Face VLM for ``composer.Trainer``. It has exactly one child, ``net``.

    The loss is a dict: ``lm`` first; every method adds its own key to ``state.loss``, Composer sums them and
    logs ``loss/train/<key>``.

    Args:
        hf: a ``...ForConditionalGeneration`` of a registered family (``models.families()``).
        processor: its Hugging Face processor; needed for generation, export and pictures.
        bidirectional_images: let visual tokens see all tokens of their own image. Plain ``transformers``
            does not know this: see ``models.export``.

    Attributes:
        head_options: optimizer options of heads that do not name their own (``lr``, ``weight_decay``).
        saved_heads: method -> tensors of its head in the run that this one starts from; taken over when the
            method attaches its head.
        compile_settings: how blocks of heads are compiled when they are attached (``models.compile``); None: not.

    Example:
        >>> model = VisionLanguageModel(LlavaForConditionalGeneration.from_pretrained(path), processor)
        >>> Trainer(model=model, train_dataloader=spec, algorithms=[L2T()], max_duration="1ep").fit()
    """

    def __init__(self, hf: nn.Module, processor: Any = None, *, bidirectional_images: bool = False):
        super().__init__()
        self.net = VisionLanguageNet(hf, bidirectional_images=bidirectional_images)
        self.processor = processor
        self.saved_heads: dict[str, dict[str, torch.Tensor]] = {}
        self.head_options: dict[str, Any] = {}
        self.compile_settings: CompileSettings | None = None
        self._step: Step | None = None

    @property
    def hf(self) -> Any:
        """The Hugging Face model."""
        return self.net.hf

    @property
    def anatomy(self) -> Anatomy:
        """Where this family keeps its parts."""
        return self.net.anatomy

    def step(self, batch: dict) -> Step:
        """The record of the micro-batch ``batch``, made anew when another one comes."""
        if self._step is None or self._step.batch is not batch:
            self._step = Step(batch)
        return self._step

    def end_step(self) -> None:
        """Forget the current record: no tensor lives longer than its micro-batch."""
        self._step = None

    def forward(self, batch: dict) -> dict[str, torch.Tensor]:
        """Run one micro-batch; see :meth:`VisionLanguageNet.forward`.

        Raises:
            UserError: the batch was not made by ``data.batch.split_batch``.
        """
        if "label_rows" not in batch:
            raise UserError(
                "this batch has no label index: give the Trainer data.batch.vlm_data_spec(dataloader), because "
                "Composer's default split_batch loses image rows"
            )
        step = self.step(batch)
        outputs = self.net(batch, step)
        # FSDP2 of newer torch hands the net a copy of the record; what it tapped comes back among the outputs.
        step.tapped.update({n: outputs[f"tap{n}"] for n in step.taps if f"tap{n}" in outputs})
        step.branched.update({n: outputs[f"branch/{n}"] for n in step.branches if f"branch/{n}" in outputs})
        return outputs

    def loss(self, outputs: dict[str, torch.Tensor], batch: dict) -> dict[str, torch.Tensor]:
        """``{"lm": scalar}``: weighted cross-entropy in nats over the labelled tokens of the whole step.

        Sums over this micro-batch, divided by the global sum of ``lm`` weights (``models.normalise``).
        """
        weights = batch["label_weights"]
        local = torch.where(weights > 0, outputs["nll"] * weights, torch.zeros_like(outputs["nll"])).sum()
        if "zero" in outputs:
            local = local + outputs["zero"]
        if DENOMINATORS not in batch:
            raise UserError("this batch was split for evaluation (no denominators); train with vlm_data_spec")
        return {"lm": term(local, "lm", batch)}

    def eval_forward(self, batch: dict, outputs: Any | None = None) -> dict[str, torch.Tensor]:
        """Outputs that the evaluation metrics read."""
        if outputs is not None and "correct" in outputs:
            return outputs
        return self.net(batch, Step(batch))

    def get_metrics(self, is_train: bool) -> dict[str, Metric]:
        """``nll`` (nats a token) and ``exact_match`` (share of answers that greedy decoding gives), evaluation only."""
        return {} if is_train else {"nll": TokenNLL(), "exact_match": ExactMatch()}

    def update_metric(self, batch: dict, outputs: dict[str, torch.Tensor], metric: Metric) -> None:
        """Feed one metric with one micro-batch."""
        metric.update(outputs, batch)

    @torch.no_grad()
    def logits(self, batch: dict) -> torch.Tensor:
        """Logits (B, L, vocabulary) at every position of a device batch, for comparisons; training never needs them."""
        step = Step(batch)
        hidden = self.net.hidden(batch, step)
        return self.anatomy.head(self.hf, hidden.flatten(0, 1)).unflatten(0, hidden.shape[:2])

    def pictures(self, batch: dict) -> Pictures:
        """Each view of a micro-batch as the tower saw it: (3, rows * patch, columns * patch) in [0, 1]."""
        return self.anatomy.pictures(batch, self.processor)

    def parameters_of(self, parts: Sequence[str]) -> list[nn.Parameter]:
        """Parameters of some parts (``anatomy.PARTS``)."""
        return [p for part, _, p in named_parts(self) if part in parts]
