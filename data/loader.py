"""Dataset, encoder, collator and loader put together: everything between storage and the Trainer."""

from __future__ import annotations

import math
import re
import signal
from collections.abc import Iterator, Sequence
from multiprocessing.process import BaseProcess
from typing import Any

from torch.utils.data import DataLoader

from ..models.anatomy import image_encoder_for
from ..models.errors import UserError
from .chat import chat_template
from .collate import VLMCollator
from .dataset_check import address_of
from .encode import ConversationEncoder
from .messages import GO_ON
from .streaming import StreamingVLMDataset
from .worker_process import set_up_worker

_SILENT = re.compile(r"DataLoader timed out after ([\d.]+) seconds")
_KILLED = re.compile(
    r"DataLoader worker \(pid(?:\(s\))? ([\d, ]+)\) (is killed by signal: [^.]*|exited unexpectedly)"
)


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
            "worker_init_fn": set_up_worker,
        }
    return VLMLoader(
        dataset,
        batch_size=batch_size,
        collate_fn=collator,
        num_workers=num_workers,
        pin_memory=pin_memory,
        drop_last=drop_last,
        **workers,
    )


class VLMLoader(DataLoader):
    """A DataLoader whose first error is its last.

    A dead or silent worker is told in one line. After any error all workers end at once: torch would leave that to the
    interpreter's exit, where each takes 5 s, and go on without the worker that had it if somebody asked.
    """

    def __iter__(self) -> Any:
        """Batches of an epoch."""
        return _Batches(super().__iter__(), self)


class _Batches:
    def __init__(self, batches: Any, loader: VLMLoader):
        self.batches, self.loader = batches, loader
        self.failure: Exception | None = None

    def __iter__(self) -> Iterator[Any]:
        return self

    def __len__(self) -> int:
        return len(self.batches)

    def __next__(self) -> Any:
        if self.failure is not None:
            raise self.failure
        try:
            return next(self.batches)
        except StopIteration:
            raise
        except Exception as error:
            streams = getattr(self.loader.dataset, "streams", ())
            workers = getattr(self.batches, "_workers", ())
            lost = lost_worker(error, ", ".join(address_of(stream) for stream in streams), workers)
            self.failure = lost or error
            if hasattr(self.batches, "_shutdown_workers"):
                self.batches._shutdown_workers()
                self.loader._iterator = None
            if lost is None:
                raise
            raise lost from error


def lost_worker(
    error: BaseException | None, where: str = "", workers: Sequence[BaseProcess] = ()
) -> UserError | None:
    """What torch's error about a dead or silent worker comes to; None: it is another error.

    Torch raises it wherever the main process is when the worker dies, so not only where it waits for a batch. Where a batch
    has come whose tensors are still the worker's to hand over, the error is that of a closed connection.

    Args:
        error: what was raised.
        where: address of the data.
        workers: the loader's processes, whose exit codes say how one ended when torch no longer does.
    """
    place = f"{where}: " if where else ""
    if isinstance(error, ConnectionError | EOFError):
        return _lost_while_handing_over(place, workers)
    if not isinstance(error, RuntimeError) or isinstance(error, UserError):
        return None
    if silent := _SILENT.search(str(error)):
        return UserError(
            f"dataset: {place}no batch for {float(silent[1]):g} s (train_loader.timeout): its store does not answer, or "
            f"num_workers are too few; {GO_ON}"
        )
    if killed := _KILLED.search(str(error)):
        return _told(place, killed[1], _how_it_ended(error, killed, workers))
    return None


def _told(place: str, pid: str, how: str) -> UserError:
    return UserError(
        f"dataset: {place}the worker process {pid} that loads data {how}, most often because memory ran out "
        f"(lower train_loader.num_workers or prefetch_factor); {GO_ON}"
    )


def _lost_while_handing_over(place: str, workers: Sequence[BaseProcess]) -> UserError | None:
    for worker in workers:
        worker.join(0.2)  # its sockets are closed a little before it is gone
        if worker.exitcode is not None and worker.exitcode < 0:
            return _told(place, str(worker.pid), _by_signal(worker))
    return None


def _by_signal(worker: BaseProcess) -> str:
    assert worker.exitcode is not None
    return f"was killed by signal: {signal.strsignal(-worker.exitcode)}"


def _how_it_ended(error: BaseException, killed: re.Match[str], workers: Sequence[BaseProcess]) -> str:
    """Torch names the signal only in the first of its two errors, which the second may hide or come before."""
    if cause := _KILLED.search(str(error.__cause__)):
        killed = cause
    if killed[2] != "exited unexpectedly":
        return killed[2].replace("is killed", "was killed", 1)
    for worker in workers:
        if str(worker.pid) == killed[1] and worker.exitcode is not None and worker.exitcode < 0:
            return _by_signal(worker)
    return killed[2]
