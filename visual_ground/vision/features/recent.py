"""Features of the images that were seen last, so that a conversation does not encode its images at every turn."""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# Images whose features are kept. Those of 512 images with a thousand numbers each take 2 MB.
MAX_IMAGES = 512


class RecentFeatures:
    """Remembers features by the content of the images; those not asked for the longest go first.

    Args:
        encode: maps pixels (n, c, h, w) to features (n, f).
        max_images: how many images are remembered.

    Example:
        >>> recent = RecentFeatures(lambda pixels: pixels.flatten(1))
        >>> recent(torch.zeros(2, 3, 1, 1)).shape, len(recent)
        (torch.Size([2, 3]), 1)
    """

    def __init__(self, encode: Callable[[Tensor], Tensor], max_images: int = MAX_IMAGES) -> None:
        self.encode, self.max_images = encode, max_images
        self._kept: OrderedDict[bytes, Tensor] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._kept)

    def __reduce__(self) -> tuple[type[RecentFeatures], tuple[Any, ...]]:
        """Copies remember nothing: a lock cannot be copied, and what is remembered is found again."""
        return RecentFeatures, (self.encode, self.max_images)

    @torch.no_grad()
    def __call__(self, pixel_values: Tensor) -> Tensor:
        """Return the features (n, f) of pixels (n, c, h, w); those that are not remembered are encoded at once."""
        keys = [_content_of(pixels) for pixels in pixel_values]
        with self._lock:
            found = {key: self._kept[key] for key in keys if key in self._kept}
        # The first of several equal images stands for all of them.
        missing = {key: i for i, key in reversed([*enumerate(keys)]) if key not in found}
        if missing:
            features = self.encode(pixel_values[sorted(missing.values())])
            found |= dict(zip(sorted(missing, key=missing.__getitem__), features, strict=True))
        with self._lock:
            for key in keys:
                # A row alone would keep all of its batch in memory.
                self._kept[key] = found[key].clone() if key in missing else found[key]
                self._kept.move_to_end(key)
            while len(self._kept) > self.max_images:
                self._kept.popitem(last=False)
        return torch.stack([found[key] for key in keys])


def _content_of(pixels: Tensor) -> bytes:
    data = pixels.detach().cpu().contiguous().view(torch.uint8).numpy().data
    shape = f"{pixels.dtype} {tuple(pixels.shape)}".encode()
    return hashlib.blake2b(data, digest_size=16, key=hashlib.blake2b(shape, digest_size=16).digest()).digest()
