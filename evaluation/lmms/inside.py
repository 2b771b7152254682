"""Tasks of lmms-eval asked in this process, of a model that is there: for use in training.

What lmms-eval 0.7.3 would change is left as it was: random states (it seeds them unless told not to), the timeout of process
groups made later (its import sets 24 hours), the model (``wrapper.Opsin.clean``). It still replaces how file locks and
``ssl.SSLContext`` behave in the process, and some of its tasks add to sums that are never set back (OCRBench): those belong
into ``run.run_lmms``.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from composer.utils import dist

from ...models.errors import UserError
from ..adapter import VLMAdapter
from .results import numbers


def ask_inside(
    adapter: VLMAdapter, folder: str | Path, tasks: Sequence[str], *, limit: int | None = None
) -> dict[str, Any]:
    """Ask tasks whose YAMLs lie in a folder; every rank calls this, they share the documents, all get the result.

    Args:
        adapter: the model.
        folder: with the task YAMLs (``tasks.write_tasks``); those of lmms-eval itself are not looked at.
        tasks: which of them.
        limit: only the first documents of each.

    Returns:
        ``tasks`` and ``groups`` as ``run.run_lmms`` gives them.

    Raises:
        UserError: a task that is not there, or has no result.
    """
    timeouts: Any = torch.distributed.distributed_c10d
    before = timeouts.default_pg_timeout
    try:
        from lmms_eval.evaluator import simple_evaluate  # pyright: ignore[reportMissingImports]
        from lmms_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise UserError(f"lmms-eval is not installed in this environment ({error})") from error
    finally:
        timeouts.default_pg_timeout = before
    from .wrapper import Opsin

    manager = TaskManager("ERROR", include_path=[str(folder)], include_defaults=False)
    lacking = [name for name in tasks if name not in manager.all_tasks]
    if lacking:
        raise UserError(
            f"lmms: {folder}: has no task {lacking[0]}; there are {', '.join(manager.all_tasks) or 'none'}"
        )
    found = simple_evaluate(
        model=Opsin(adapter=adapter, batch_size=adapter.batch_size),
        tasks=list(tasks),
        task_manager=manager,
        limit=limit,
        bootstrap_iters=0,
        log_samples=False,
        random_seed=None,  # type: ignore[arg-type]
        numpy_random_seed=None,  # type: ignore[arg-type]
        torch_random_seed=None,  # type: ignore[arg-type]
        distributed_executor_backend="torchrun",  # the other one makes an Accelerator of its own
        cli_args=Namespace(output_path=str(folder), process_with_media=False, reasoning_tags=None),
    )
    shared: list[Any] = [None]
    if dist.get_global_rank() == 0:
        try:
            shared = [numbers(found, tasks)]
        except UserError as error:  # the other ranks wait for what becomes of it
            shared = [str(error)]
    dist.broadcast_object_list(shared, src=0)
    if isinstance(shared[0], str):
        raise UserError(f"lmms-eval: {shared[0]}")
    return shared[0]
