"""Ability-fused inference on any decoder: states of the question alone steer the answer about its picture.

For a prompt with pictures, M, and the same words without them, T, both are run once as they are; what enters each
decoder layer of a window is kept for the tokens that both prompts end with. While the answer is generated, the prompt's
states at these layers and tokens become ``fused_states`` of them. Nothing is done while decoding: what was changed
lives on in the KV cache.

It works through hooks on the decoder layers and needs nothing of how a model was trained. Source: arXiv 2502.11427 and
its released code; the differences (the common suffix instead of the last N tokens, one strength for all depths) are
named in the method card.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any
from weakref import WeakSet

import torch
from torch import nn

from ...models.anatomy import anatomy_of
from ...models.errors import UserError
from .functional import Suffix, common_suffix, fused_states, last_tokens, prompt_ends
from .fusion import Fusion

_IN_FORCE: WeakSet[nn.Module] = WeakSet()
"""Models that are steered now: a pass over them would not be one as it is."""


class AbilityFusion:
    """Fuses what a model makes of a question alone into what it makes of the question with its picture.

    Args:
        model: a Hugging Face vision-language model with ``generate``.
        fusion: how, or (a, b) by layer.
        layers: its decoder layers, first to last; None: as its family keeps them (``models.anatomy``).

    Example:
        >>> fusion = AbilityFusion(model, Fusion(strength=0.35))
        >>> inputs = processor(images=picture, text=with_image, return_tensors="pt")
        >>> text = processor.tokenizer(without_image, return_tensors="pt")
        >>> with fusion.on(inputs, text):
        ...     out = model.generate(**inputs)

    Raises:
        UserError: the model's family is not known and ``layers`` are not given, or the window does not fit.
    """

    def __init__(
        self,
        model: nn.Module,
        fusion: Fusion | Mapping[int, tuple[float, float]] | None = None,
        layers: Sequence[nn.Module] | None = None,
    ):
        self.model = model
        self.layers = list(layers if layers is not None else anatomy_of(model).decoder_layers(model))
        given = Fusion() if fusion is None else fusion
        self.fusion = given if isinstance(given, Fusion) else Fusion()
        found = given.coefficients(len(self.layers)) if isinstance(given, Fusion) else dict(given)
        self.coefficients = {layer: ab for layer, ab in found.items() if ab != (0, 0)}
        if unknown := [layer for layer in found if not 0 <= layer < len(self.layers)]:
            raise UserError(f"fusion: layer {unknown[0]}: the model has layers 0 to {len(self.layers) - 1}")

    @contextlib.contextmanager
    def on(
        self,
        inputs: Mapping[str, Any],
        text: Mapping[str, Any],
        *,
        ends: torch.Tensor | None = None,
        text_ends: torch.Tensor | None = None,
        most: torch.Tensor | None = None,
        around: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext,
    ) -> Iterator[None]:
        """Two passes now, fusion in every prompt that the model runs inside; no trace afterwards, even of a failure.

        Args:
            inputs: what ``generate`` gets: ``input_ids`` and ``attention_mask`` (B, L), pixels and so on.
            text: the same prompts without pictures, ``input_ids`` and ``attention_mask`` (B, L').
            ends: (B,) first column behind each prompt, where more follows (scoring); None: all of the row.
            text_ends: the same for ``text``.
            most: (B,) most tokens to fuse, such as those of the last user turn; None: all that both end with. Not for
                ``align: paper_code``, which has its own number.
            around: context for the pass over ``inputs``, as for the generation.

        Raises:
            UserError: two prompts that have no token at their ends in common; or, while it is on: the model is given
                other prompts, or is fused already.
        """
        if not self.coefficients:
            yield
            return
        if self.model in _IN_FORCE:
            raise UserError("fusion: it is on for this model already; leave that context first")
        suffix, text_suffix, alike = self._aligned(inputs, text, ends, text_ends, most)
        device = next(self.model.parameters()).device
        same = bool(alike.all())
        with torch.no_grad():
            states: dict[int, torch.Tensor] = {}
            if not same:
                states, _ = self._captured(text, text_suffix, device)
            multimodal, length = {}, int(inputs["input_ids"].shape[1])
            needed = self.fusion.mode == "add" and any(b for _, b in self.coefficients.values())
            if needed or bool(alike.any()):
                with around():
                    multimodal, length = self._captured(inputs, suffix, device)
            if same:
                states = multimodal
            elif bool(alike.any()):
                # Without a picture both prompts are one, to the bit only if both states come from one pass.
                one = alike[suffix.rows].to(device)[:, None]
                states = {k: torch.where(one, multimodal[k], v) for k, v in states.items()}
        steer = _Steer(self, suffix.to(device), states, multimodal if needed else {}, inputs, length)
        _IN_FORCE.add(self.model)
        try:
            with steer.hooks():
                yield
        finally:
            _IN_FORCE.discard(self.model)

    def _aligned(
        self,
        inputs: Mapping[str, Any],
        text: Mapping[str, Any],
        ends: torch.Tensor | None,
        text_ends: torch.Tensor | None,
        most: torch.Tensor | None,
    ) -> tuple[Suffix, Suffix, torch.Tensor]:
        """Tokens to fuse in both prompts, and (B,) bool: which rows are the same prompt (no picture)."""
        ids, mask = inputs["input_ids"].cpu(), self._mask(inputs)
        words, words_mask = text["input_ids"].cpu(), self._mask(text)
        if len(ids) != len(words):
            raise UserError(f"fusion: {len(ids)} prompts with pictures and {len(words)} without")
        ends = prompt_ends(mask) if ends is None else ends.cpu()
        text_ends = prompt_ends(words_mask) if text_ends is None else text_ends.cpu()
        common = common_suffix(ids, mask, ends, words, words_mask, text_ends)
        columns = torch.arange(ids.shape[1]) < ends[:, None]
        length = (mask.bool() & columns).sum(1)
        columns = torch.arange(words.shape[1]) < text_ends[:, None]
        words_length = (words_mask.bool() & columns).sum(1)
        count = torch.minimum(words_length, length) if self.fusion.align == "paper_code" else common
        if most is not None and self.fusion.align == "suffix":
            count = torch.minimum(count, most.cpu())
        if bool((count < 1).any()):
            row = int((count < 1).nonzero()[0])
            raise UserError(
                f"fusion: prompt {row} and its words without pictures end differently, so nothing can be fused; build both "
                "with the same chat template"
            )
        alike = (length == words_length) & (common == length)
        return last_tokens(count, ends), last_tokens(count, text_ends), alike

    def _captured(
        self, inputs: Mapping[str, Any], suffix: Suffix, device: torch.device
    ) -> tuple[dict[int, torch.Tensor], int]:
        """What enters each layer of the window at the suffix's tokens, in a pass as it is; and how long rows are there."""
        kept: dict[int, torch.Tensor] = {}
        seen: list[int] = []
        given = int(inputs["input_ids"].shape[1])

        def keep(layer: int) -> Callable[..., None]:
            def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
                x = _states(args, kwargs)
                seen.append(x.shape[1])
                at = suffix.to(x.device)
                # Models that put a picture's tokens in by themselves have longer rows than their input_ids.
                kept[layer] = x[at.rows, at.columns + (x.shape[1] - given)].clone()

            return hook

        handles = [
            self.layers[i].register_forward_pre_hook(keep(i), with_kwargs=True) for i in self.coefficients
        ]
        options: dict[str, Any] = {"use_cache": False}
        if "logits_to_keep" in inspect.signature(self.model.forward).parameters:
            options["logits_to_keep"] = 1  # nobody reads them
        mask = self._mask(inputs)
        if "position_ids" not in inputs and not bool(mask.all()) and self._counts_positions():
            # As `generate` does: padding does not count.
            options["position_ids"] = (mask.long().cumsum(1) - 1).clamp(min=0).to(device)
        try:
            self.model(**{k: _to(v, device) for k, v in inputs.items()}, **options)
        finally:
            for handle in handles:
                handle.remove()
        return kept, seen[-1]

    def _mask(self, inputs: Mapping[str, Any]) -> torch.Tensor:
        """What is a token, (B, L) on the CPU.

        Raises:
            UserError: nobody says, and there may be padding.
        """
        if inputs.get("attention_mask") is not None:
            return inputs["attention_mask"].cpu()
        ids, config = inputs["input_ids"].cpu(), getattr(self.model, "generation_config", None)
        pad = getattr(config, "pad_token_id", None)
        if len(ids) > 1 and pad is not None and bool((ids == pad).any()):
            raise UserError("fusion: padded prompts need their attention_mask")
        return torch.ones_like(ids)

    def _counts_positions(self) -> bool:
        """Whether positions are those in the row; families with positions in pictures (M-RoPE) make their own."""
        config: Any = getattr(self.model, "config", None)
        text = config.get_text_config() if hasattr(config, "get_text_config") else config
        rope = getattr(text, "rope_scaling", None) or getattr(text, "rope_parameters", None) or {}
        takes = "position_ids" in inspect.signature(self.model.forward).parameters
        return takes and "mrope_section" not in rope


class _Steer:
    """Changes the prompt's states while the model runs: by position, so that chunks and full recomputes come out alike."""

    def __init__(
        self,
        owner: AbilityFusion,
        suffix: Suffix,
        text: dict[int, torch.Tensor],
        multimodal: dict[int, torch.Tensor],
        inputs: Mapping[str, Any],
        length: int,
    ):
        self.owner, self.suffix, self.text, self.multimodal = owner, suffix, text, multimodal
        self.ids = inputs["input_ids"]
        self.rows, self.given, self.length = len(self.ids), int(self.ids.shape[1]), length
        self.first, self.begun, self.checked = 0, False, False

    @contextlib.contextmanager
    def hooks(self) -> Iterator[None]:
        layers, handles = self.owner.layers, []
        try:
            handles.append(self.owner.model.register_forward_pre_hook(self._same_prompts, with_kwargs=True))
            handles.append(layers[0].register_forward_pre_hook(self._place, with_kwargs=True))
            for layer in self.owner.coefficients:
                handles.append(
                    layers[layer].register_forward_pre_hook(self._changing(layer), with_kwargs=True)
                )
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _same_prompts(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        """Refuse other prompts than those whose states are kept; looked at in the first call that has a whole prompt."""
        ids = kwargs.get("input_ids")
        if self.checked or ids is None or ids.shape[1] < self.given:
            return
        self.checked = True
        times = max(len(ids) // self.rows, 1)
        wanted = self.ids.to(ids.device).repeat_interleave(times, 0)
        if len(wanted) != len(ids) or not torch.equal(ids[:, : self.given], wanted):
            raise UserError("fusion: the model is given other prompts than those that it was made for")

    def _place(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        """Where this call begins. Asked of the cache before the first layer adds to it; a query's length says nothing."""
        x = _states(args, kwargs)
        cache = next((c for c in (*args, *kwargs.values()) if hasattr(c, "get_seq_length")), None)
        before = 0 if cache is None else cache.get_seq_length()
        position = kwargs.get("cache_position")
        if not isinstance(before, int):  # a static cache counts what is no zeros, so padding is not among it
            before = int(before if position is None else position.flatten()[0])
        self.first = before
        if not self.begun:  # models that put a picture's tokens in by themselves
            self.length = max(self.length, x.shape[1])
            self.begun = True
        elif cache is None and x.shape[1] < self.length:
            raise UserError(
                f"fusion: {type(module).__name__} is not told of its cache, so where its input stands is not known; generate with "
                "use_cache=False"
            )

    def _changing(self, layer: int) -> Callable[..., tuple[tuple, dict] | None]:
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
            x = _states(args, kwargs)
            if self.first >= self.length:  # decoding
                return None
            new = self._changed(x, layer)
            if args:
                return (new, *args[1:]), kwargs
            return args, {**kwargs, "hidden_states": new}

        return hook

    def _changed(self, x: torch.Tensor, layer: int) -> torch.Tensor:
        suffix = self.suffix.to(x.device)
        rows, columns = suffix.rows, suffix.columns + (self.length - self.given) - self.first
        text, multimodal = self.text[layer], self.multimodal.get(layer)
        if (
            x.shape[0] != self.rows
        ):  # beams, or several answers a prompt: transformers repeats each row in place
            times = x.shape[0] // self.rows
            if times * self.rows != x.shape[0]:
                raise UserError(
                    f"fusion: made for {self.rows} prompts, and the model was given {x.shape[0]} rows"
                )
            rows = (rows[:, None] * times + torch.arange(times, device=rows.device)).flatten()
            columns, text = columns.repeat_interleave(times), text.repeat_interleave(times, 0)
            multimodal = None if multimodal is None else multimodal.repeat_interleave(times, 0)
        if self.first or x.shape[1] < self.length:  # a prompt in chunks
            here = (columns >= 0) & (columns < x.shape[1])
            rows, columns, text = rows[here], columns[here], text[here]
            multimodal = None if multimodal is None else multimodal[here]
        a, b = self.owner.coefficients[layer]
        fusion = self.owner.fusion
        new = fused_states(
            x[rows, columns], text, multimodal, a=a, b=b, mode=fusion.mode, preserve_norm=fusion.preserve_norm
        )
        return x.index_put((rows, columns), new)  # out of place: others may hold these states


def _states(args: tuple, kwargs: Mapping[str, Any]) -> torch.Tensor:
    """Hidden states of a decoder layer's call, given by position or by name."""
    return args[0] if args else kwargs["hidden_states"]


def _to(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, torch.Tensor) else value
