"""Models of Opsin for lmms-eval: ``python -m lmms_eval --model opsin --model_args pretrained=FOLDER``.

What lmms-eval 0.7.3 does with a model, as this module relies on it:

* It turns whatever is no text and no ``GenerationResult`` into text, a (number, flag) of a ranked answer too, which its
  scorer then cannot read; so those travel in a ``GenerationResult``.
* Its scorer takes the *least* of the numbers, and divides them by the answers' characters: they are summed negative
  log-likelihoods.
* After the requests it calls :meth:`clean`, which by default deletes every module that the wrapper holds.
* On several ranks it deals documents, and fills up the ranks that have fewer with copies, whose results it drops.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from lmms_eval.api.instance import GenerationResult  # pyright: ignore[reportMissingImports]
from lmms_eval.api.model import lmms  # pyright: ignore[reportMissingImports]
from loguru import logger  # pyright: ignore[reportMissingImports]
from tqdm import tqdm

from ...algorithms.vift.fusion import Fusion
from ...data.chat import BadConversation
from ...data.encode import Rejected
from ...data.prompts import prompts_of
from ...models.errors import UserError, nearest
from ..adapter import AHEAD, VLMAdapter
from ..open_model import open_folder
from .requests import batch_key, cut, generation, pictures_of, question_of, sample_of_messages, stored

Result = TypeVar("Result")
_SPOILT = (Rejected, BadConversation, UserError)

PRECISIONS = {"fp32": None, "amp_bf16": torch.bfloat16, "amp_fp16": torch.float16}


class Opsin(lmms):
    """A trained model for lmms-eval, batched.

    Args:
        pretrained: run folder, model folder or hub name (in quotes where it has a comma).
        adapter: instead of ``pretrained``: a model that is there, which stays as it is.
        batch_size: questions a call of ``generate``.
        device: ``cpu``, ``gpu`` or ``cuda`` (each rank its own), ``cuda:1`` ...; None: a GPU if there is one.
        precision: ``fp32``, ``amp_bf16`` or ``amp_fp16``, as in training.
        chat_template, system_prompt: None: as the folder says.
        max_new_tokens: longest answer where the task names none.
        fuse: strength of ability fusion (``algorithms.vift.fusion``); None: none.
        fuse_ratio, fuse_layers, fuse_align, fuse_mode: as in ``opsin ask``; layers as ``14-28``.
        max_batch_size: not used; lmms-eval hands it on.

    Raises:
        UserError: nothing can be loaded from there, or an argument that makes no sense.
    """

    is_simple = True

    def __init__(
        self,
        pretrained: str | None = None,
        *,
        adapter: VLMAdapter | None = None,
        batch_size: int | str = 8,
        device: str | None = None,
        precision: str = "fp32",
        chat_template: str | None = None,
        system_prompt: str | None = None,
        max_new_tokens: int = 256,
        fuse: float | None = None,
        fuse_ratio: float = 1.0,
        fuse_layers: str | None = None,
        fuse_align: str = "suffix",
        fuse_mode: str = "add",
        max_batch_size: int | str | None = None,
    ):
        super().__init__()
        self.max_new_tokens = int(max_new_tokens)
        self.borrowed = adapter is not None
        self.calls = 0
        self.told: set[tuple[str, str]] = set()
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise UserError(f"batch_size '{batch_size}': use a number, 1 or more")
        self.batch_size = int(batch_size)
        if adapter is None:
            if pretrained is None:
                raise UserError("--model_args: pretrained=FOLDER is missing")
            fusion = _fusion(fuse, fuse_ratio, fuse_layers, fuse_align, fuse_mode)
            prompt = None if system_prompt is None else unquoted(system_prompt)
            if precision not in PRECISIONS:
                raise UserError(
                    f"--model_args precision={precision}: unknown{nearest(str(precision), PRECISIONS)}"
                )
            model, collator = open_folder(unquoted(pretrained), chat_template, prompt)
            model.to(_device(device))
            model.net.autocast_dtype = PRECISIONS[precision]
            adapter = VLMAdapter(model, collator, batch_size=self.batch_size, fusion=fusion)
        self.adapter: VLMAdapter | None = adapter
        self.device = next(adapter.model.parameters()).device

    def generate_until(self, requests: list[Any]) -> list[str]:
        """Answers in the order of the requests."""
        groups: dict[str, list[int]] = {}
        how: list[tuple[dict[str, Any], list[str]]] = []
        for index, request in enumerate(requests):
            options, stops, ignored = generation(self._generation_kwargs(request), self.max_new_tokens)
            self._tell_ignored(str(request.task_name), ignored)
            how.append((options, stops))
            groups.setdefault(batch_key(options, stops), []).append(index)
        answers = [""] * len(requests)
        with self._progress(len(requests), "answers") as progress:
            for indices in groups.values():
                options, stops = how[indices[0]]
                for part in self._parts(indices):
                    samples = [self._sample(requests[i]) for i in part]
                    for i, text in zip(part, self._generate(samples, options), strict=True):
                        answers[i] = cut(text, stops)
                    progress.update(len(part))
        return answers

    def loglikelihood(self, requests: list[Any]) -> list[Any]:
        """(summed negative log-likelihood in nats, whether greedy decoding gives this answer), wrapped (see above).

        Answers to the same question are measured together. The token that ends an answer is not part of the sum.
        """
        same: dict[tuple[Any, ...], list[int]] = {}
        for index, request in enumerate(requests):
            words, _, _, document, task, split = request.args
            same.setdefault((task, split, document, words), []).append(index)
        groups = list(same.values())
        results: list[Any] = [None] * len(requests)
        with self._progress(len(requests), "likelihoods") as progress:
            for part in self._parts(groups):
                samples = [self._sample(requests[group[0]]) for group in part]
                answers = [[self._continuation(requests[i]) for i in group] for group in part]
                for group, found in zip(part, self._likelihoods(samples, answers), strict=True):
                    for i, (nats, greedy) in zip(group, found, strict=True):
                        results[i] = GenerationResult(text=(-nats, greedy))  # pyright: ignore[reportArgumentType]
                    progress.update(len(group))
        return results

    def generate_until_multi_round(self, requests: list[Any]) -> list[str]:
        """Not there: rounds whose next question depends on the last answer."""
        raise UserError(
            f"{requests[0].task_name}: asks in several rounds, which this model cannot answer here"
        )

    def clean(self) -> None:
        """Give the model's memory back, unless it is borrowed: a judge may need it."""
        if not self.borrowed:
            self.adapter = None
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()

    # What follows is the only place that calls the adapter.

    def _generate(self, samples: Sequence[dict[str, Any]], options: dict[str, Any]) -> list[str]:
        adapter = self._there()
        self.calls += 1  # sampled answers of two calls, to the same question perhaps, are drawn apart
        said = self._named(samples, lambda: adapter.generate(samples, seed=self.calls, **options))
        return [texts[-1] for texts in said]

    def _likelihoods(
        self, samples: Sequence[dict[str, Any]], answers: Sequence[Sequence[str]]
    ) -> list[list[tuple[float, bool]]]:
        adapter = self._there()
        asked = [[list(choices)] for choices in answers]
        found = self._named(samples, lambda: adapter.answer_logprobs(samples, asked))
        return [[(one.sum, one.greedy) for one in exchanges[-1]] for exchanges in found]

    def _parts(self, these: list[Result]) -> Iterator[list[Result]]:
        """As many at a time as the adapter puts in order by their lengths."""
        for start in range(0, len(these), AHEAD * self.batch_size):
            yield these[start : start + AHEAD * self.batch_size]

    def _there(self) -> VLMAdapter:
        if self.adapter is None:
            raise UserError("this model was let go after its requests; make another")
        return self.adapter

    def _named(self, samples: Sequence[dict[str, Any]], work: Callable[[], Result]) -> Result:
        """Do it; where a sample cannot be asked, say which one of which task."""
        try:
            return work()
        except _SPOILT as error:
            encoder = self._there().collator.encoder
            for sample in samples:
                try:
                    prompts_of(encoder, sample)
                except _SPOILT as own:
                    raise UserError(f"{sample['id']}: {getattr(own, 'detail', own)}") from own
            names = ", ".join(sample["id"] for sample in samples)
            raise UserError(f"{names}: {getattr(error, 'detail', error)}") from error

    def _sample(self, request: Any) -> dict[str, Any]:
        words, _, to_visual, document, task, split = request.args
        where = f"task {task}, document {document}"
        doc = self.task_dict[task][split][document]
        pictures = pictures_of(None if to_visual is None else to_visual(doc), where)
        return stored(where, [("human", question_of(words, len(pictures), where))], pictures)

    def _generation_kwargs(self, request: Any) -> dict[str, Any]:
        return request.args[1]

    def _continuation(self, request: Any) -> str:
        _, answer, _, document, task, split = request.args
        text = str(answer(self.task_dict[task][split][document]) if callable(answer) else answer)
        # A task puts a space before it; here the chat template says what stands before an answer.
        if not text.strip():
            raise UserError(f"task {task}, document {document}: an empty answer cannot be ranked")
        return text.strip()

    def _progress(self, total: int, what: str) -> tqdm:
        return tqdm(total=total, desc=f"opsin: {what}", disable=self.rank != 0)

    def _tell_ignored(self, task: str, keys: Sequence[str]) -> None:
        for key in keys:
            if (task, key) not in self.told:
                self.told.add((task, key))
                logger.warning(f"opsin: task {task}: generation_kwargs.{key} has no effect on this model")


class OpsinChat(Opsin):
    """The same, asked by messages: pictures stand between the words, and earlier turns stay turns."""

    is_simple = False

    def _sample(self, request: Any) -> dict[str, Any]:
        _, to_messages, _, document, task, split = request.args
        doc = self.task_dict[task][split][document]
        return sample_of_messages(f"task {task}, document {document}", to_messages(doc))

    def _generation_kwargs(self, request: Any) -> dict[str, Any]:
        return request.args[2]


def unquoted(text: object) -> str:
    """A model argument without the quotes that kept its commas together."""
    words = str(text)
    return words[1:-1] if len(words) > 1 and words[0] == words[-1] == '"' else words


def _device(name: str | None) -> torch.device:
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name in ("cuda", "gpu"):
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device(name)


def _fusion(strength: float | None, ratio: float, layers: str | None, align: str, mode: str) -> Fusion | None:
    if strength is None:
        if layers is not None or (ratio, align, mode) != (1.0, "suffix", "add"):
            raise UserError("--model_args: fuse is missing: how strongly? (0.35 is the method's literal)")
        return None
    window = None
    if layers is not None:
        first, dash, end = str(layers).partition("-")
        if not (dash and first.isdecimal() and end.isdecimal()):
            raise UserError(f"--model_args fuse_layers={layers}: use FIRST-END, such as 14-28")
        window = (int(first), int(end))
    return Fusion(strength, ratio, window, align=align, mode=mode)
