"""`ImageFeatures`: the features of a task's images, each encoded once and kept on disk."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from visual_ground.processes import Processes
from visual_ground.progress import counted
from visual_ground.vision.encoder import VisionEncoder
from visual_ground.vision.features.cache import FeatureCache

ABSENT, UNREADABLE = "images that are not there", "images that cannot be read"


@dataclass(frozen=True)
class Images:
    """Images that could be read, in the order in which they were given.

    Args:
        names: n names.
        features: (n, f), on the CPU.
        missing: the names of the others, by reason; for `Plan.missing`.

    Attributes:
        rows: the row of each name.
    """

    names: Sequence[str]
    features: Tensor
    missing: Mapping[str, Sequence[str]]
    rows: Mapping[str, int] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "rows", {name: row for row, name in enumerate(self.names)})

    def __contains__(self, name: str) -> bool:
        return name in self.rows

    def __getitem__(self, name: str) -> Tensor:
        """Return the features (f,) of an image."""
        return self.features[self.rows[name]]


class ImageFeatures:
    """Encodes images in batches that are the same whatever the number of processes.

    Args:
        vision: the encoder.
        folder: where the features are kept, as in `FeatureCache`.
        processes: each encodes its share.
        batch_size: images encoded at once.
        progress: show a progress bar.
    """

    def __init__(
        self, vision: VisionEncoder, folder: Path, processes: Processes, batch_size: int = 32, progress: bool = False
    ) -> None:
        self._cache, self._processes = FeatureCache(folder, vision), processes
        self._batch_size, self._progress = batch_size, progress and processes.is_main

    def read(self, images: Mapping[str, Any]) -> Images:
        """Return the features of images (paths, or PIL images) by name, and which are absent or damaged.

        Raises:
            GroundingValueError: features that float16 cannot hold.
            GroundingFileError: the disk is full.
        """
        there = {name: image for name, image in images.items() if not _is_absent(image)}
        names, size = list(there), self._batch_size
        batches = [names[start : start + size] for start in range(0, len(names), size)]
        if self._processes.count > 1:
            for batch in self._shown(self._processes.share(batches)):
                self._place([there[name] for name in batch])
            self._processes.wait()  # From now on the features are only looked up.
        rows = [row for batch in self._shown(batches) for row in self._place([there[name] for name in batch])]
        readable = [name for name, row in zip(names, rows, strict=True) if row >= 0]
        found = [row for row in rows if row >= 0]
        features = self._cache.file.read(found) if found else torch.empty(0, self._cache.feature_dim)
        absent = [name for name in images if name not in there]
        unreadable = [name for name, row in zip(names, rows, strict=True) if row < 0]
        return Images(readable, features, {ABSENT: absent, UNREADABLE: unreadable})

    def _shown(self, batches: list[list[str]]) -> Iterable[list[str]]:
        return counted(batches, "images", "batches", self._progress)

    def _place(self, images: Sequence[Any]) -> list[int]:
        # What cannot be read gets a row below 0.
        rows: list[int] = self._cache.place(images, self._batch_size, refuse=lambda position, error: None).tolist()
        return rows


def _is_absent(image: Any) -> bool:
    return isinstance(image, (str, Path)) and not Path(image).is_file()
