"""Dataset, encoder, collator and loader put together: everything between storage and the Trainer."""

from __future__ import annotations

import math
from typing import Any

from torch.utils.data import DataLoader

from ..models.anatomy import image_encoder_for
from ..models.errors import UserError
from .chat import chat_template
from .collate import VLMCollator
from .encode import ConversationEncoder
from .streaming import StreamingVLMDataset


def build_encoder(
    processor: Any,
    config: Any,
    *,
    template: str = "vicuna_v1",
    system_prompt: str | None = None,
    max_seq_len: int = 2048,
    turns: str = "meta",
) -> ConversationEncoder:
    """The encoder for a model: its processor and configuration, a chat template by name.

    Args:
        processor: Hugging Face processor.
        config: Hugging Face configuration of the model.
        template, system_prompt: see ``data.chat.chat_template``.
        max_seq_len, turns: see ``data.encode.ConversationEncoder``.
    """
    tokenizer = processor.tokenizer
    return ConversationEncoder(
        tokenizer,
        image_encoder_for(processor, config),
        chat_template(template, tokenizer.eos_token or "", system_prompt),
        max_seq_len=max_seq_len,
        turns=turns,
    )


def build_loader(
    collator: VLMCollator,
    dataset: StreamingVLMDataset,
    batch_size: int,
    *,
    num_workers: int = 2,
    prefetch_factor: int = 4,
    persistent_workers: bool = True,
    pin_memory: bool = False,
    timeout: float = 300.0,
    drop_last: bool = False,
) -> DataLoader:
    """A DataLoader of device batches.

    Args:
        drop_last: as the dataset's ``tail: drop``, which makes all batches of all ranks whole.

    Raises:
        UserError: the dataset has not even one batch (Composer would loop for ever over nothing).
    """
    batches = len(dataset) // batch_size if drop_last else math.ceil(len(dataset) / batch_size)
    if batches == 0:
        samples = getattr(dataset, "samples_a_rank", len(dataset))
        raise UserError(
            f"dataset: {samples} samples a rank make no batch of {batch_size}; lower global_train_batch_size "
            "or set train_loader.drop_last: false"
        )
    workers: dict[str, Any] = {}
    if num_workers:
        workers = {
            "prefetch_factor": prefetch_factor,
            "persistent_workers": persistent_workers,
            "timeout": timeout,
        }
    return DataLoader(
        dataset,
        batch_size=batch_size,
        collate_fn=collator,
        num_workers=num_workers,
        pin_memory=pin_memory,
        drop_last=drop_last,
        **workers,
    )
