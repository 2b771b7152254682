"""Encoded pictures -> their stored targets: decoded in threads, computed in batches, each once in a while."""

from __future__ import annotations

import io
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from PIL import Image

from ..data.patch_targets import PictureTargets, pack, picture_hash
from ..data.schema import unpack_images
from ..models.anatomy import Pictures
from ..models.errors import UserError
from ..models.geometry import EncodedImage, ImageEncoder

UNREADABLE = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)
"""What decoding a broken picture raises; ``data.encode`` leaves its sample out."""


class PictureTargetsMaker:
    """Computes the targets of pictures.

    Args:
        images: how the model takes pictures.
        shows: (batch of pixels, processor) -> each view as the tower sees it.
        target: ``moments(pictures, grids)``, ``moments_dim`` and ``to(device)``.
        device: where it runs.
        threads: threads that decode and resize.
        keep: bytes of targets kept, latest used first, for pictures that come again.
    """

    def __init__(
        self,
        images: ImageEncoder,
        shows: Callable[[dict[str, torch.Tensor], Any], Pictures],
        target: Any,
        device: torch.device,
        threads: int = 4,
        keep: int = 1 << 30,
    ):
        self.images, self.shows, self.device, self.keep = images, shows, device, keep
        self.target = target.to(device)
        self.batch = int(getattr(target, "pictures_at_once", 32))
        self.computed = self.unreadable = 0
        self._kept: OrderedDict[bytes, PictureTargets] = OrderedDict()
        self._held = 0
        self._patches: dict[tuple[int, int], tuple[int, int]] = {}
        self._pool = ThreadPoolExecutor(threads)

    def close(self) -> None:
        """Stop the threads."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def packed(self, samples: Sequence[bytes], told: Callable[[float], None]) -> list[bytes]:
        """Stored targets of samples from their ``images`` columns; ``told``: share of the pictures done."""
        named: list[list[bytes]] = []
        wanted: dict[bytes, bytes] = {}
        for value in samples:
            pictures = _pictures(value)
            named.append([picture_hash(p) for p in pictures])
            wanted.update(zip(named[-1], pictures, strict=True))
        found = {name: self._kept[name] for name in wanted if name in self._kept}
        missing = {name: data for name, data in wanted.items() if name not in found}
        for made in self._compute(missing):
            found.update((one.picture, one) for one in made)
            told((len(found) - len(wanted) + len(missing)) / len(missing))
        self._keep(found)
        return [pack([found[name] for name in names], self.target.moments_dim) for names in named]

    def size(self, value: bytes) -> int:
        """Bytes that :meth:`packed` takes for a sample; only pictures of a new size are processed for it."""
        total = 12
        for data in _pictures(value):
            total += 12
            try:
                with Image.open(io.BytesIO(data)) as picture:
                    size = picture.size
                    if size not in self._patches:
                        views = self.images.encode(picture.convert("RGB")).views
                        self._patches[size] = len(views), sum(view.patches for view in views)
            except UNREADABLE:
                continue
            views, patches = self._patches[size]
            total += 8 * views + 2 * patches * self.target.moments_dim
        return total

    def _compute(self, pictures: dict[bytes, bytes]) -> Iterable[list[PictureTargets]]:
        """In batches; the next two are decoded meanwhile."""
        names = list(pictures)
        flying: deque[list[tuple[bytes, Future[EncodedImage | None]]]] = deque()
        for start in range(0, len(names), self.batch):
            part = names[start : start + self.batch]
            flying.append([(name, self._pool.submit(self._encoded, pictures[name])) for name in part])
            if len(flying) > 2:
                yield self._batch([(name, one.result()) for name, one in flying.popleft()])
        while flying:
            yield self._batch([(name, one.result()) for name, one in flying.popleft()])

    def _encoded(self, data: bytes) -> EncodedImage | None:
        try:
            with Image.open(io.BytesIO(data)) as picture:
                return self.images.encode(picture.convert("RGB"))
        except UNREADABLE:
            return None

    @torch.no_grad()
    def _batch(self, encoded: list[tuple[bytes, EncodedImage | None]]) -> list[PictureTargets]:
        width, shown = self.target.moments_dim, [image for _, image in encoded if image is not None]
        values = torch.zeros(0, width, dtype=torch.bfloat16)
        if shown:
            views = self.shows(self.images.stack(shown), self.images.processor)
            grids = [view.grid for image in shown for view in image.views]
            moments = self.target.moments([view.to(self.device) for view in views], grids)
            if not bool(moments.isfinite().all()):
                raise UserError("the target gives values that are no numbers (NaN or infinite)")
            values = moments.to("cpu", torch.bfloat16)
        made, at = [], 0
        for name, image in encoded:
            grids = () if image is None else tuple(view.grid for view in image.views)
            end = at + sum(rows * columns for rows, columns in grids)
            # A copy: a part of the batch would keep all of it in memory.
            made.append(PictureTargets(name, grids, values[at:end].clone()))
            at = end
        self.computed += len(shown)
        self.unreadable += len(encoded) - len(shown)
        return made

    def _keep(self, found: dict[bytes, PictureTargets]) -> None:
        for name, one in found.items():
            if name not in self._kept:
                self._held += one.values.nbytes
            self._kept[name] = one
            self._kept.move_to_end(name)
        while self._held > self.keep:
            _, one = self._kept.popitem(last=False)
            self._held -= one.values.nbytes


def _pictures(value: bytes) -> list[bytes]:
    """Pictures of a sample; none where the column is broken, as training leaves the sample out."""
    try:
        return unpack_images(value)
    except ValueError:
        return []
