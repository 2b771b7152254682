"""Random attention layouts, and masks written out the slow and certain way."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from opsin.models.attention import Visibility, dense


class Recorder(TorchDispatchMode):
    """Counts operations and remembers the largest tensor that one of them made."""

    def __init__(self) -> None:
        super().__init__()
        self.largest, self.operations = 0, []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for made in out if isinstance(out, (tuple, list)) else (out,):
            if torch.is_tensor(made):
                # A view with stride 0 has elements, but no memory.
                shape = [n for n, stride in zip(made.shape, made.stride(), strict=True) if stride]
                self.largest = max(self.largest, torch.Size(shape).numel())
        self.operations.append(str(func))
        return out


@st.composite
def layouts(draw: Any) -> Visibility:
    """Rows of packed documents: padding on either side, trunks with pictures, branches; and any method's terms."""
    batch, length = draw(st.integers(1, 2)), draw(st.integers(1, 24))
    fields = {
        "valid": torch.zeros(batch, length, dtype=torch.bool),
        "document": torch.full((batch, length), -1, dtype=torch.int16),
        "branch": torch.zeros(batch, length, dtype=torch.int16),
        "image": torch.full((batch, length), -1, dtype=torch.int16),
    }
    for row in range(batch):
        left, right = draw(st.integers(0, length - 1)), draw(st.integers(1, length))
        left, right = min(left, right - 1), max(right, left + 1)
        fields["valid"][row, left:right] = True
        document = branch = ordinal = 0
        run = -1
        for at in range(left, right):
            step = draw(st.sampled_from("....dbii"))
            if step == "d" and at > left:
                document, branch, run = document + 1, 0, -1
            elif step == "b":
                branch, run = branch + 1, -1
            elif step == "i" and branch == 0:  # a picture begins or ends
                run, ordinal = (ordinal, ordinal + 1) if run < 0 else (-1, ordinal)
            fields["document"][row, at], fields["branch"][row, at] = document, branch
            fields["image"][row, at] = run
    bits = st.lists(st.booleans(), min_size=batch * length, max_size=batch * length)
    image = fields["image"] >= 0

    def flags(only_images: bool) -> torch.Tensor:
        drawn = torch.tensor(draw(bits)).view(batch, length)
        return drawn & image if only_images else drawn

    if draw(st.booleans()):
        fields["bidirectional"] = flags(True)
    if draw(st.booleans()):
        fields["hidden"] = flags(True)
    if draw(st.booleans()):
        fields.update(closed=flags(True), context=flags(False))
        groups = st.lists(st.integers(0, 7), min_size=batch * length, max_size=batch * length)
        fields["group_bits"] = torch.tensor(draw(groups)).view(batch, length)
        if draw(st.booleans()):
            scopes = st.lists(st.integers(-1, 2), min_size=batch * length, max_size=batch * length)
            fields["scope"] = torch.tensor(draw(scopes)).view(batch, length)
        if draw(st.booleans()):
            fields["preceding"] = flags(False)
    window = draw(st.sampled_from([None, None, 1, 2, 4, 7]))
    if window is not None and draw(st.booleans()):
        fields["position"] = _positions(fields["document"], fields["branch"])
    return Visibility(**fields, window=window)


def _positions(document: torch.Tensor, branch: torch.Tensor) -> torch.Tensor:
    """Positions in each document, a branch going on where the trunk ends."""
    out = torch.zeros(document.shape, dtype=torch.int64)
    for row in range(len(document)):
        count: dict[tuple[int, int], int] = {}
        for at in range(document.shape[1]):
            of, own = int(document[row, at]), int(branch[row, at])
            if of >= 0:
                out[row, at] = count.get((of, own), 0) + (count.get((of, 0), 0) if own else 0)
                count[of, own] = count.get((of, own), 0) + 1
    return out


def without_empty_rows(see: Visibility) -> Visibility:
    """The same, where closed queries with nothing to see are open: what whoever fills ``closed`` owes."""
    if see.closed is None:
        return see
    return see.with_terms(closed=see.closed & dense(see)[:, 0].any(-1))


def naive(see: Visibility, b: int, q: int, k: int) -> bool:
    """The docstrings of ``Visibility``, word by word, for one query and one key."""
    closed = see.closed is not None and bool(see.closed[b, q])
    if q == k and not closed:
        return True  # a token may always look at itself
    if not see.valid[b, k] or see.document[b, q] != see.document[b, k]:
        return False
    if see.branch[b, k] != 0 and see.branch[b, k] != see.branch[b, q]:
        return False
    at = torch.arange(see.valid.shape[1]).expand(see.valid.shape) if see.position is None else see.position
    near = see.window is None or int(at[b, q] - at[b, k]) < see.window
    if closed:
        assert see.context is not None and see.group_bits is not None
        if see.preceding is not None and see.preceding[b, k] and k <= q and near:
            return True
        scope = see.image if see.scope is None else see.scope
        if scope[b, q] < 0 or scope[b, q] != scope[b, k]:
            return False
        return bool(see.context[b, k] or int(see.group_bits[b, q]) & int(see.group_bits[b, k]))
    own_image = bool(see.image[b, q] >= 0 and see.image[b, q] == see.image[b, k])
    if see.hidden is not None and see.hidden[b, k]:
        return False
    if see.bidirectional is not None and see.bidirectional[b, q] and own_image:
        return True
    return k < q and near


def materialised(mask: Any, length: int) -> torch.Tensor:
    """A BlockMask written out: full blocks, and the mask's own predicate inside partial ones."""
    size = mask.BLOCK_SIZE[0]
    batch = mask.kv_num_blocks.shape[0]
    out = torch.zeros(batch, 1, length, length, dtype=torch.bool)
    index = torch.arange(length)
    for b in range(batch):
        for block in range(mask.kv_num_blocks.shape[2]):
            rows = index[block * size : (block + 1) * size]
            partial = mask.kv_indices[b, 0, block, : mask.kv_num_blocks[b, 0, block]].tolist()
            full = mask.full_kv_indices[b, 0, block, : mask.full_kv_num_blocks[b, 0, block]].tolist()
            for other in [*partial, *full]:
                columns = index[other * size : (other + 1) * size]
                seen = mask.mask_mod(torch.tensor(b), torch.tensor(0), rows[:, None], columns[None, :])
                if other in full:
                    assert bool(seen.all())
                out[b, 0, rows[:, None], columns[None, :]] = seen
    return out
