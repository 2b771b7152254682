"""Steps without any picture: tower and projector keep their bits, and no rank waits for another.

Their gradients are exactly 0 in such a step (they run on a dummy picture, whose output counts for nothing), and still
AdamW moves them: by its momentum and by weight decay. So their rate and decay are 0 for that one update. Momentum
itself decays as in any step, and nothing is missing from a checkpoint.
"""

from __future__ import annotations

from typing import Any

import torch

from ...models.parts import named_parts
from ...models.vlm import VisionLanguageModel

PARTS = ("vision_tower", "mm_projector")
_KEYS = ("lr", "weight_decay")


class VisionAtRest:
    """Groups of an optimizer that hold vision parameters, and their rest.

    Args:
        optimizer: whose groups say their ``part``; see :meth:`set_apart`.

    Attributes:
        groups: those of tower and projector.
        resting: whether the next update leaves them as they are; the same on all ranks.
        rested: updates that did.
    """

    def __init__(self, optimizer: torch.optim.Optimizer):
        self.groups: list[dict[str, Any]] = [g for g in optimizer.param_groups if g.get("part") in PARTS]
        self.resting = False
        self.rested = 0
        self._kept: list[dict[str, Any]] = []
        self._handle = optimizer.register_step_post_hook(lambda *_: self.end())

    @staticmethod
    def set_apart(optimizer: torch.optim.Optimizer, model: VisionLanguageModel) -> None:
        """Split groups that hold vision parameters and others, as a plain ``AdamW(model.parameters())`` has them.

        Before a model is wrapped. Groups that say their part stay as they are.
        """
        vision = {id(p): part for part, _, p in named_parts(model) if part in PARTS}
        split: list[dict[str, Any]] = []
        for group in optimizer.param_groups:
            inside = [p for p in group["params"] if id(p) in vision]
            if "part" in group or not inside:
                split.append(group)
                continue
            rest = [p for p in group["params"] if id(p) not in vision]
            if rest:
                split.append({**group, "params": rest})
            split.append({**group, "params": inside, "part": PARTS[0]})
        optimizer.param_groups[:] = split

    def begin(self) -> None:
        """Just before an update: rate and decay of 0, if it is to leave them alone."""
        if self.resting and not self._kept:
            self._kept = [{key: group[key] for key in _KEYS if key in group} for group in self.groups]
            for group, kept in zip(self.groups, self._kept, strict=True):
                group.update(dict.fromkeys(kept, 0.0))

    def end(self) -> None:
        """Just after it: as before."""
        if self._kept:
            for group, kept in zip(self.groups, self._kept, strict=True):
                group.update(kept)
            self._kept = []
            self.resting = False
            self.rested += 1

    def give_back(self) -> None:
        """After an update that never came, as where a gradient scaler skips one: what nobody has set since."""
        for group, kept in zip(self.groups, self._kept, strict=False):
            group.update({key: value for key, value in kept.items() if group[key] == 0.0})
        self._kept = []

    def remove(self) -> None:
        """Leave the optimizer without a trace."""
        self.give_back()
        self._handle.remove()
