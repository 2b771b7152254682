"""Every loss term is its own sum over its own global count, however the batch was cut up.

Composer scales the whole loss of a micro-batch by the micro-batch's share of samples (or of tokens), and
data-parallel wrappers average gradients over ranks. A mean over some other thing (labelled tokens, patches,
images) would be weighted wrongly by both. So: counts of the whole step are summed over all ranks once, each
term divides its local sum by that count, and undoes what Composer and the wrapper will apply.

1. A method declares at ``BATCH_START`` how many things its term will sum over in the device batch
   (:func:`declare`), in any order; the model's own ``lm`` term is declared by ``split_batch``.
2. ``split_batch`` sums all declared counts over ranks with one all-reduce (:func:`denominators`) and hands
   every micro-batch the same divisors.
3. ``loss`` divides (:func:`term`).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

_PREFIX, _UNIT = "count/", "unit/"
TERMS = "terms"
"""Key of a micro-batch under which :func:`term` leaves its values by name, for whoever logs them."""
DENOMINATORS = "denominators"
"""Key of a micro-batch that holds the divisors, by term."""


def declare(batch: dict[str, Any], name: str, count: torch.Tensor | float, unit: str = "") -> None:
    """Declare the number of things over which term ``name`` sums in this device batch.

    Every rank must declare the same names in every step, with 0 where it has nothing.

    Args:
        batch: the device batch.
        name: of the term.
        count: how many, or the sum of their weights.
        unit: what is counted, for the log: ``tokens``, ``patches``, ``views`` ...
    """
    batch[_PREFIX + name] = torch.as_tensor(count, dtype=torch.float64).detach().cpu().reshape(())
    batch[_UNIT + name] = unit


def unit_of(batch: dict[str, Any], name: str) -> str:
    """What term ``name`` counts; empty: nobody said."""
    return batch.get(_UNIT + name, "")


def declared(batch: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Counts declared so far, sorted by name."""
    return {k[len(_PREFIX) :]: batch[k] for k in sorted(batch) if k.startswith(_PREFIX)}


def denominators(counts: dict[str, torch.Tensor], microbatches: int) -> dict[str, torch.Tensor]:
    """Divisors of each term's local sum: ``max(global count, 1) / (ranks * micro-batches)``, float32 scalars.

    The factor undoes Composer's 1/micro-batches (``split_batch`` gives all of them the same weight) and the
    wrapper's mean over ranks. One all-reduce, of a vector, for all terms.
    """
    names = sorted(counts)
    vector = global_sum(torch.stack([counts[n] for n in names]))
    ranks = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    scaled = (vector.clamp(min=1.0) / (ranks * microbatches)).float()
    return {n: scaled[i] for i, n in enumerate(names)}


def global_sum(vector: torch.Tensor) -> torch.Tensor:
    """Sum over all ranks of a CPU vector; on GPU clusters the result lies on the GPU (nobody waits for it)."""
    if not (dist.is_available() and dist.is_initialized()):
        return vector
    vector = vector.cuda(non_blocking=True) if dist.get_backend() == "nccl" else vector.clone()
    dist.all_reduce(vector)
    return vector


def term(local_sum: torch.Tensor, name: str, batch: dict) -> torch.Tensor:
    """A loss term: this micro-batch's sum, divided such that the step's total is the global mean.

    Args:
        local_sum: scalar, summed over what :func:`declare` counted.
        name: the declared name.
        batch: the micro-batch, as ``split_batch`` made it. The term stays there under ``TERMS`` until the micro-batch
            goes: whoever logs it need not know the method.
    """
    value = local_sum / batch[DENOMINATORS][name]
    terms = batch.setdefault(TERMS, {})
    terms[name] = terms[name] + value if name in terms else value
    return value
