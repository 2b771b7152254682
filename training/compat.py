"""Every patch that a dependency needs, in one place; each with its reason and a test that notices its end.

``apply()`` is called once by the command line and by ``training.train``; it may be called again.

What cannot be patched away, and is accepted: device synchronisations in a training step that are not ours.
Composer 0.32.1 waits for the device for the batch size of each step, for each optimizer step with a closure
(``.item()`` of the loss), for each logged loss, and for the sample counts; transformers' LLaVA looks at
placeholder masks (``get_placeholder_mask``), LLaVA-NeXT and Qwen2-VL at image sizes.
"""

from __future__ import annotations

import io
import pickle
import types
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from packaging.version import Version

from ..models.errors import UserError

TORCH = Version(torch.__version__.split("+")[0])


def apply(*, trust_checkpoints: bool = False) -> None:
    """Apply all patches that the installed versions need.

    Args:
        trust_checkpoints: let checkpoints run code while they load (``trust_checkpoint: true``).
    """
    average_gradients_on_gloo()
    load_checkpoints_without_code(trust_checkpoints)
    load_checkpoints_of_either_form()
    wait_for_files_of_ones_own_node()
    keep_frozen_parameters_frozen()


def average_gradients_on_gloo() -> None:
    """Make FSDP2 average gradients over CPU ranks.

    torch 2.7's gloo backend treats ``ReduceOp.AVG`` as a sum in ``reduce_scatter_tensor``, without a word, so
    FSDP2 on CPU gives gradients that are world-size times too large. (AdamW hides it; gradient clipping and
    SGD do not.) Later versions average.
    """
    if Version("2.8") <= TORCH:
        return
    from torch.distributed.fsdp._fully_shard import _fsdp_collectives as collectives

    if getattr(collectives._get_gradient_divide_factors, "_opsin", False):
        return
    stock = collectives._get_gradient_divide_factors

    def divide_factors(
        reduce_scatter_group: Any, all_reduce_group: Any, reduce_dtype: Any, device_type: str = ""
    ) -> Any:
        if dist.get_backend(reduce_scatter_group) != "gloo":
            return stock(reduce_scatter_group, all_reduce_group, reduce_dtype, device_type)
        ranks = reduce_scatter_group.size() * (all_reduce_group.size() if all_reduce_group is not None else 1)
        return 1.0, float(ranks)

    divide_factors._opsin = True  # type: ignore[attr-defined]
    collectives._get_gradient_divide_factors = divide_factors  # type: ignore[assignment]


def load_checkpoints_without_code(trust: bool = False) -> None:
    """Let Composer read checkpoints without running what they contain.

    Composer 0.32.1 calls ``torch.load(weights_only=False)`` and torch's distributed checkpoints ``pickle.load``:
    a checkpoint from elsewhere can run anything. Here only tensors, numbers, containers and numpy's random
    state are read; anything else is refused in one line. (A safe loader was written upstream and never
    released.)
    """
    from composer.utils import checkpoint
    from torch.distributed.checkpoint import filesystem
    from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner

    global _TRUSTED
    _TRUSTED = trust
    stock_bytes = getattr(DefaultLoadPlanner.load_bytes, "_stock", DefaultLoadPlanner.load_bytes)
    if trust:
        checkpoint._torch_load_with_validation = _STOCK_LOAD or checkpoint._torch_load_with_validation
        filesystem.pickle = pickle  # type: ignore[attr-defined]
        DefaultLoadPlanner.load_bytes = stock_bytes  # type: ignore[method-assign]
        return
    _remember(checkpoint._torch_load_with_validation)
    checkpoint._torch_load_with_validation = _load_tensors_only
    filesystem.pickle = types.SimpleNamespace(  # type: ignore[attr-defined]
        load=lambda file: _MetadataUnpickler(file).load(), dump=pickle.dump, dumps=pickle.dumps
    )

    def load_bytes(self: Any, read_item: Any, value: io.BytesIO) -> None:
        # What is no tensor in a distributed checkpoint; upstream unpickles anything. It gets our own bytes.
        own = io.BytesIO()
        torch.save(load_plain(value), own)
        own.seek(0)
        stock_bytes(self, read_item, own)

    load_bytes._stock = stock_bytes  # type: ignore[attr-defined]
    DefaultLoadPlanner.load_bytes = load_bytes  # type: ignore[method-assign]


def load_checkpoints_of_either_form() -> None:
    """Let Composer load what another layout has written: one process, DDP and FSDP2 go on with each other's checkpoints.

    Composer 0.32.1 loads only the form that it would write: "load_path must be a directory" under FSDP2, and
    without it a folder is taken for a file. (Both hold the same state: ``training.checkpoints``.)
    """
    from composer.utils import checkpoint

    if hasattr(checkpoint.load_checkpoint, "_stock"):
        return
    stock = checkpoint.load_checkpoint

    def load_checkpoint(path: str, state: Any, logger: Any, object_store: Any = None, **options: Any) -> Any:
        from composer.utils import partial_format

        from .checkpoints import in_form

        path = partial_format(path, run_name=state.run_name)
        with in_form(path, state.fsdp_sharded_state_dict_enabled, object_store) as (path, store):
            return stock(path, state, logger, object_store=store, **options)

    load_checkpoint._stock = stock  # type: ignore[attr-defined]
    checkpoint.load_checkpoint = load_checkpoint


def wait_for_files_of_ones_own_node() -> None:
    """Let each node of a job have its own signal file.

    Composer 0.32.1 lets the processes of a node wait for a file that the node's first one writes and removes, and gives
    all nodes the name that rank 0 has drawn. Where nodes share the folder, each removes the others' file: starting with
    ``autoresume`` ends in FileNotFoundError, or in waiting for ever.
    """
    from composer.utils import dist as composer_dist

    stock = composer_dist.get_node_signal_file_name
    if hasattr(stock, "_stock"):
        return

    def get_node_signal_file_name(rng: Any = None) -> str:
        drawn = stock(rng).rpartition("_")[2]  # the same on all ranks
        return f"._signal_file_node{composer_dist.get_node_rank()}_{drawn}"

    get_node_signal_file_name._stock = stock  # type: ignore[attr-defined]
    composer_dist.get_node_signal_file_name = get_node_signal_file_name


_STOCK_LOAD: Any = None
_TRUSTED: bool | None = None


def keep_frozen_parameters_frozen() -> None:
    """Let Composer's algorithms that replace modules (LowPrecisionLayerNorm) meet frozen ones.

    Composer 0.32.1 looks for every replaced parameter in the optimizer and raises where it is not, as in a frozen vision
    tower; with an optimizer of one group it would train it from then on.
    """
    from composer.utils import module_surgery

    stock = module_surgery.update_params_in_optimizer
    if getattr(stock, "_opsin", False):
        return

    def update(old_params: Any, new_params: Any, optimizers: Any) -> None:
        old, new = list(old_params), list(new_params)
        if len(old) == len(new):
            for before, after in zip(old, new, strict=True):
                after.requires_grad_(before.requires_grad)
        old, new = ([p for p in parameters if p.requires_grad] for parameters in (old, new))
        if old or new:
            stock(old, new, optimizers)

    update._opsin = True  # type: ignore[attr-defined]
    update._stock = stock  # type: ignore[attr-defined]
    module_surgery.update_params_in_optimizer = update


def load_file(path: Path, map_location: str = "cpu") -> Any:
    """A checkpoint's file outside Composer, by the same rule; without code unless ``apply`` was told to trust.

    Raises:
        UserError: it holds more than tensors and plain data.
    """
    safe()
    return (
        torch.load(path, map_location=map_location, weights_only=False)
        if _TRUSTED
        else load_plain(path, map_location)
    )


def safe() -> None:
    """Nothing that a checkpoint holds is run, from now on, unless ``apply`` was told otherwise."""
    if _TRUSTED is None:
        load_checkpoints_without_code()


def _remember(stock: Any) -> None:
    global _STOCK_LOAD
    if stock is not _load_tensors_only:
        _STOCK_LOAD = stock


def _load_tensors_only(checkpoint_filepath: Path | str, map_location: str) -> Any:
    from composer.utils.checkpoint import _ensure_valid_checkpoint

    return load_plain(_ensure_valid_checkpoint(checkpoint_filepath), map_location)


def load_plain(file: Any, map_location: str | None = None) -> Any:
    """``torch.load`` of tensors and plain data alone.

    Raises:
        UserError: the file holds anything else.
    """
    try:
        with torch.serialization.safe_globals(_allowed()):
            return torch.load(file, map_location=map_location, weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"the checkpoint holds more than tensors and plain data ({_culprit(error)}) and was not loaded; set "
            "trust_checkpoint: true only for a file that you made yourself"
        ) from error


def _culprit(error: Exception) -> str:
    text = str(error)
    for start in ("GLOBAL ", "Unsupported global: "):
        if start in text:
            return text.split(start, 1)[1].split()[0].strip("`,.")
    return text.splitlines()[0][:120]


def _allowed() -> list[Any]:
    """Plain data classes in Composer's checkpoints."""
    import _codecs
    import datetime

    import numpy as np
    from torch.torch_version import TorchVersion

    core: Any = getattr(np, "_core", None) or getattr(np, "core")  # noqa: B009  (numpy 2 / 1)
    dtypes = [
        getattr(np.dtypes, n) for n in ("UInt32DType", "Int64DType", "Float64DType") if hasattr(np, "dtypes")
    ]
    plain = [TorchVersion, datetime.timedelta, _codecs.encode]
    return [core.multiarray._reconstruct, np.ndarray, np.dtype, *dtypes, *plain]


_METADATA = frozenset(
    {
        *(
            ("torch.distributed.checkpoint.metadata", name)
            for name in (
                "Metadata", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata",
                "TensorProperties", "MetadataIndex", "StorageMeta", "_MEM_FORMAT_ENCODING",
            )
        ),
        ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
        ("torch", "Size"),
        ("torch", "device"),
        ("torch.serialization", "_get_layout"),
        ("collections", "OrderedDict"),
        ("pathlib", "PosixPath"),
        ("pathlib", "Path"),
    }
)  # fmt: skip


class _MetadataUnpickler(pickle.Unpickler):
    """Reads a distributed checkpoint's ``.metadata``: torch's own record classes, by exact name, nothing else.

    By exact name, because pickle follows dots: ``filesystem`` + ``os.system`` would be found otherwise.
    """

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _METADATA or (
            module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        ):
            return super().find_class(module, name)
        raise UserError(
            f"checkpoint metadata names {module}.{name}, which is no plain data; it was not loaded. Set "
            "trust_checkpoint: true only for a checkpoint that you made yourself"
        )
