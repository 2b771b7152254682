"""Every patch that a dependency needs, in one place; each with its reason and a test that notices its end.

``apply()`` is called once by the command line and by ``training.train``; it may be called again.

What cannot be patched away, and is accepted: device synchronisations in a training step that are not ours.
Composer 0.32.1 waits for the device for the batch size of each step, for each optimizer step with a closure
(``.item()`` of the loss), for each logged loss, and for the sample counts; transformers' LLaVA looks at
placeholder masks (``get_placeholder_mask``), LLaVA-NeXT and Qwen2-VL at image sizes.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from packaging.version import Version

TORCH = Version(torch.__version__.split("+")[0])


def apply() -> None:
    """Apply all patches that the installed versions need."""
    average_gradients_on_gloo()


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

    def divide_factors(reduce_scatter_group, all_reduce_group, reduce_dtype, device_type=""):  # noqa: ANN001, ANN202
        if dist.get_backend(reduce_scatter_group) != "gloo":
            return stock(reduce_scatter_group, all_reduce_group, reduce_dtype, device_type)
        ranks = reduce_scatter_group.size() * (all_reduce_group.size() if all_reduce_group is not None else 1)
        return 1.0, float(ranks)

    divide_factors._opsin = True  # type: ignore[attr-defined]
    collectives._get_gradient_divide_factors = divide_factors  # type: ignore[assignment]
