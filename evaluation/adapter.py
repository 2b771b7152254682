"""A trained model behind one small interface: answers in words, their log-likelihoods, hidden states.

The command line, monitors, analyses and harnesses all go through it. It needs no Trainer and no process group.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch

from ..algorithms.vift.fusion import Fusion
from ..algorithms.vift.steering import AbilityFusion
from ..data.candidates import CandidateRow, candidate_rows
from ..data.chat import BadConversation
from ..data.collate import VLMCollator
from ..data.encode import Rejected
from ..data.prompts import Prompt, last_turn, prompt_batch, prompts_of, without_pictures
from ..models.attention import Visibility
from ..models.errors import UserError
from ..models.vlm import VisionLanguageModel
from .forward import Probe, PromptBatch, batch_of, drawing, evaluating, model_inputs, probe, prompt_sees
from .logprobs import AnswerLogprob, Ranking, score_rows

AHEAD = 8
"""Batches whose prompts are encoded at a time, so that those of like length go together."""

TAKES_MASKS = ("sdpa", "eager", "flex_attention")
"""Attention implementations with which candidates can be branches of one row (``models.attention.mask_for``)."""


class VLMAdapter:
    """A model that is asked. Batches give what one sample at a time gives.

    The model's mode, gradients, random states and its tokenizer's padding side are as before after every call.

    Args:
        model: a model of a registered family, trained here or loaded by ``models.export.load_model``.
        collator: of its training (encoder and chat template).
        max_new_tokens: longest answer.
        batch_size: prompts, or rows of candidates, a call of the model.
        fusion: ability-fused inference (``algorithms.vift.steering``), for answers and for log-likelihoods; None: none.
        share: what candidate answers may share of one row (``data.candidates.SHARES``); None: as much as the
            attention implementation allows.
    """

    def __init__(
        self,
        model: VisionLanguageModel,
        collator: VLMCollator,
        *,
        max_new_tokens: int = 32,
        batch_size: int = 16,
        fusion: Fusion | None = None,
        share: str | None = None,
    ):
        self.model = model
        self.fusion = None if fusion is None or fusion.off else AbilityFusion(model.hf, fusion)
        self.collator = collator
        self.max_new_tokens = max_new_tokens
        self.batch_size = batch_size
        self.share = share

    def generate(
        self, samples: Sequence[dict[str, Any]], *, seed: int = 0, **options: Any
    ) -> list[list[str]]:
        """The model's greedy answer to each exchange of each stored sample.

        Args:
            samples: stored samples.
            seed: of sampling, where ``options`` ask for it (``do_sample=True``).
            options: further arguments of ``generate`` of transformers; they win over ours.

        Raises:
            Rejected, BadConversation: a sample cannot be used.
        """
        encoder = self.collator.encoder
        texts: list[list[str]] = [[] for _ in samples]
        held: list[tuple[Prompt, Prompt | None]] = []

        def answer() -> None:
            order = sorted(range(len(held)), key=lambda i: -len(held[i][0].document))
            said = [""] * len(held)
            for start in range(0, len(order), self.batch_size):
                chosen = order[start : start + self.batch_size]
                new = self._generate([held[i][0] for i in chosen], [held[i][1] for i in chosen], options)
                for i, text in zip(chosen, new, strict=True):
                    said[i] = text
            for (prompt, _), text in zip(held, said, strict=True):
                texts[prompt.sample].append(text)
            held.clear()

        with drawing(self.model, seed) if options.get("do_sample") else contextlib.nullcontext():
            for number, sample in enumerate(samples):
                prompts = prompts_of(encoder, sample, number)
                words: Sequence[Prompt | None] = [None] * len(prompts)
                if self.fusion is not None:
                    words = prompts_of(encoder, without_pictures(sample), number)
                held += zip(prompts, words, strict=True)
                if len(held) >= AHEAD * self.batch_size:
                    answer()
            answer()
        return texts

    def answer_logprobs(
        self,
        samples: Sequence[dict[str, Any]],
        answers: Sequence[Sequence[Sequence[str]]] | None = None,
        *,
        skipped: dict[int, str] | None = None,
    ) -> list[list[list[AnswerLogprob]]]:
        """Log-likelihood of each candidate answer of each exchange of each sample, tokenised as training would.

        An exchange of a chained conversation comes after the stored answers of those before it.

        Args:
            samples: stored samples.
            answers: for each sample and exchange the candidates; None: the stored answer alone.
            skipped: filled with number -> reason of samples that cannot be used; they get an empty list. None: they
                raise.

        Raises:
            Rejected, BadConversation: a sample cannot be used, and ``skipped`` is None.
            UserError: ``answers`` do not fit ``samples``.
        """
        if answers is not None and len(answers) != len(samples):
            raise UserError(f"candidate answers for {len(answers)} samples, there are {len(samples)}")
        results: list[list[list[AnswerLogprob]]] = []
        held: list[tuple[int, CandidateRow, list[Prompt]]] = []

        def score() -> None:
            rows = [row for _, row, _ in held]
            around = None if self.fusion is None else partial(self._fused_rows, held)
            found = score_rows(self.model, self.collator, rows, self.batch_size, around)
            for (number, row, _), one in zip(held, found, strict=True):
                for (turn, candidate), logprob in zip(row.slots, one, strict=True):
                    results[number][turn][candidate] = logprob
            held.clear()

        with evaluating(self.model):
            for number, sample in enumerate(samples):
                wanted = None if answers is None else answers[number]
                try:
                    rows, words = self._candidates(sample, wanted)
                except (Rejected, BadConversation) as error:
                    if skipped is None:
                        raise
                    skipped[number] = str(error)
                    results.append([])
                    continue
                counts = Counter(turn for row in rows for turn, _ in row.slots)
                results.append([[_UNSCORED] * counts[turn] for turn in range(len(counts))])
                held += [(number, row, words) for row in rows]
                if len(held) >= AHEAD * self.batch_size:
                    score()
            score()
        return results

    def rank(self, samples: Sequence[dict[str, Any]], choices: Sequence[Sequence[str]]) -> list[Ranking]:
        """Choices of each sample by their log-likelihoods.

        Args:
            samples: stored samples of one exchange each.
            choices: of each sample, in the form in which the model would say them.

        Raises:
            Rejected, BadConversation: a sample cannot be used.
            UserError: a sample has several exchanges or no choice.
        """
        found = self.answer_logprobs(samples, [[list(one)] for one in choices])
        return [Ranking(tuple(these), tuple(one[0])) for these, one in zip(choices, found, strict=True)]

    def prompt_batches(self, samples: Sequence[dict[str, Any]]) -> Iterator[PromptBatch]:
        """The prompt of each exchange of each sample, ``batch_size`` at a time, ready for ``forward.look``.

        Raises:
            Rejected, BadConversation: a sample cannot be used.
        """
        held: list[Prompt] = []
        for number, sample in enumerate(samples):
            held += prompts_of(self.collator.encoder, sample, number)
            while len(held) >= self.batch_size:
                yield batch_of(self.model, self.collator, held[: self.batch_size])
                held = held[self.batch_size :]
        if held:
            yield batch_of(self.model, self.collator, held)

    def forward_probe(self, samples: Sequence[dict[str, Any]], layers: Sequence[int]) -> list[Probe]:
        """Hidden states at every token of each exchange's prompt, float32 on the CPU: give as many samples as fit.

        Args:
            samples: stored samples.
            layers: 1 .. N: output of that decoder layer; 0: what enters the first; -1: after the final norm.

        Raises:
            Rejected, BadConversation: a sample cannot be used.
            UserError: there is no such layer.
        """
        return [one for part in self.prompt_batches(samples) for one in probe(self.model, part, layers)]

    def _generate(
        self, prompts: Sequence[Prompt], words: Sequence[Prompt | None], options: dict[str, Any]
    ) -> list[str]:
        model, encoder = self.model, self.collator.encoder
        batch = prompt_batch(self.collator, prompts)
        device = next(model.parameters()).device
        batch = {k: v.to(device) for k, v in batch.items()}
        arguments, see = model_inputs(model, batch), prompt_sees(model, batch)
        fused: contextlib.AbstractContextManager = contextlib.nullcontext()
        if self.fusion is not None:
            fused = self._fused(
                arguments, see, [w for w in words if w is not None], [last_turn(p.document) for p in prompts]
            )
        with evaluating(model), model.net.autocast(), fused, model.net.prompt(see):
            out = model.hf.generate(
                **arguments,
                **{
                    "do_sample": False,
                    "num_beams": 1,
                    "repetition_penalty": 1.0,  # what a model's own settings say, too, would not be greedy
                    "use_cache": True,
                    "max_new_tokens": self.max_new_tokens,
                    # An untrained model can write image tokens, which the next step would look for pictures for.
                    "suppress_tokens": [encoder.images.image_token_id],
                    "eos_token_id": self._ends(),
                    "pad_token_id": self.collator.pad_token_id,
                    **options,
                },
            )
        new = out[:, arguments["input_ids"].shape[1] :]
        return [t.strip() for t in encoder.tokenizer.batch_decode(new, skip_special_tokens=True)]

    def _candidates(
        self, sample: dict[str, Any], answers: Sequence[Sequence[str]] | None
    ) -> tuple[list[CandidateRow], list[Prompt]]:
        """Rows of a sample, and for fusion its prompts without pictures."""
        encoder, share = self.collator.encoder, self.share
        if share is None:
            decoder: Any = self.model.anatomy.decoder(self.model.hf)
            share = "picture" if decoder.config._attn_implementation in TAKES_MASKS else "nothing"
        if self.fusion is None:
            return candidate_rows(encoder, sample, answers, share), []
        # What is fused is the end of a prompt, which has to be the end of what a row's branches share.
        rows = candidate_rows(encoder, sample, answers, "nothing" if share == "nothing" else "prompt")
        return rows, prompts_of(encoder, without_pictures(sample))

    def _fused_rows(
        self,
        held: Sequence[tuple[int, CandidateRow, list[Prompt]]],
        micro: dict[str, Any],
        numbers: Sequence[int],
    ) -> contextlib.AbstractContextManager:
        """Fusion of the prompts of candidate rows: those of ``held`` that ``micro`` consists of."""
        rows = [held[i][1] for i in numbers]
        words = [held[i][2][row.slots[0][0]] for i, row in zip(numbers, rows, strict=True)]
        arguments, see = model_inputs(self.model, micro), prompt_sees(self.model, micro)
        ends = torch.tensor([row.prompt for row in rows])
        return self._fused(arguments, see, words, [row.last for row in rows], ends)

    def _fused(
        self,
        arguments: dict[str, Any],
        see: Visibility | None,
        words: Sequence[Prompt],
        most: Sequence[int],
        ends: torch.Tensor | None = None,
    ) -> contextlib.AbstractContextManager:
        assert self.fusion is not None
        text = prompt_batch(self.collator, words)
        return self.fusion.on(
            arguments,
            {k: text[k] for k in ("input_ids", "attention_mask")},
            ends=ends,
            most=torch.tensor(most),
            around=lambda: self.model.net.prompt(see),
        )

    def _ends(self) -> list[int] | None:
        """Tokens after which an answer is over: the tokenizer's, and the template's where it is one token."""
        encoder = self.collator.encoder
        ends = {encoder.tokenizer.eos_token_id}
        of_template = encoder.tokenizer(encoder.template.assistant_end, add_special_tokens=False)["input_ids"]
        if len(of_template) == 1:
            ends.update(of_template)
        return sorted(ends - {None}) or None


_UNSCORED = AnswerLogprob(float("nan"), 0, None, False, False)
