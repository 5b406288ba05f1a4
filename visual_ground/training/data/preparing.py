"""Examples before the first step: captions checked, features cached, what cannot be used left out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import Tensor

from visual_ground.errors import GroundingError, GroundingValueError
from visual_ground.training.data.columns import Columns, Skipped, chosen, open_rows, usable_rows
from visual_ground.training.data.examples import ExampleDataset
from visual_ground.vision.feature_cache import FeatureCache
from visual_ground.vision.feature_store import FeatureFile


class StoredFeatures:
    """The features of each row's images, read from the cache's file when they are asked for.

    Args:
        file: the cache's file.
        places: for each row, where its images' features are.
    """

    def __init__(self, file: FeatureFile, places: Sequence[np.ndarray]) -> None:
        self.file = file
        self._ends = np.cumsum([len(rows) for rows in places])
        self._places = np.concatenate(places)

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, number: int) -> Tensor:
        return self.file.read(self.place(number))

    def place(self, number: int) -> np.ndarray:
        """Return where the features of a row's images are."""
        if not 0 <= number < len(self):
            raise IndexError(number)
        return self._places[self._ends[number - 1] if number else 0 : self._ends[number]]

    def spread(self, limit: int) -> Tensor:
        """Return the features of all images, or of `limit` of them, evenly spread, (n, f)."""
        return self.file.read(self._places[:: max(1, -(-len(self._places) // limit))])


@dataclass(frozen=True)
class Preparing:
    """How examples are prepared.

    Args:
        columns: where the images and captions are.
        cache: keeps the features; None leaves images as they are.
        feature_dim: f, the width of the model's features.
        max_skipped: the part of the images and captions that may be unusable.
        batch_size: images encoded at once.
        workers: processes that read and decode.
        progress: show progress bars.
        seed: of what is taken at random.
    """

    columns: Columns
    cache: FeatureCache | None
    feature_dim: int
    max_skipped: float = 0.01
    batch_size: int = 64
    workers: int = 0
    progress: bool = False
    seed: int = 0

    def examples(self, rows: Any, sample: bool) -> ExampleDataset:
        """Return a dataset's usable rows, with their images' features where there is a cache.

        Every process of a distributed run computes the features of its share; all get all.

        Raises:
            GroundingTypeError, GroundingValueError: a dataset that cannot be used, see `open_rows` and `Skipped`.
        """
        rows = open_rows(rows, self.columns)
        skipped = Skipped(self.max_skipped, len(rows))
        numbers = np.array(usable_rows(rows, self.columns, skipped))
        rows = chosen(rows, numbers.tolist())
        features = None
        if "image_features" in rows[0]:
            self._check_widths(rows)
        elif self.cache is not None:
            places = self._places(rows, numbers, skipped)
            good = [i for i, place in enumerate(places) if len(place)]
            if not good:
                skipped.check(0)
            rows, numbers = chosen(rows, good), numbers[good]
            features = StoredFeatures(self.cache.file, [places[i] for i in good])
        skipped.finish()
        groups = _groups(rows, features)
        return ExampleDataset(rows, features, groups, sample, self.columns, numbers.tolist(), self.seed)

    def _places(self, rows: Any, numbers: np.ndarray, skipped: Skipped) -> list[np.ndarray]:
        """Return, for each row, where the features of its readable images are."""
        assert self.cache is not None
        state, images = PartialState(), ImagesOf(rows, self.columns)
        own = range(state.process_index, len(images), state.num_processes)
        skipped.total = max(len(rows), len(images))

        def refuse(position: int, error: GroundingError) -> None:
            skipped.add(f"row {numbers[images.owners[own[position]]]}: {error}")

        found = self.cache.place(_Part(images, own), self.batch_size, self.workers, self.progress, refuse)
        places = np.full(len(images), -1)
        for index, part in gather_object([(state.process_index, found)]):
            places[index :: state.num_processes] = part
        parts = np.split(places, np.searchsorted(images.owners, np.arange(1, len(rows))))
        return [part[part >= 0] for part in parts]

    def _check_widths(self, rows: Any) -> None:
        for number in range(min(len(rows), 100)):
            width = len(rows[number]["image_features"])
            if width != self.feature_dim:
                raise GroundingValueError(
                    f"Row {number} has image_features of width {width}, and this model's encoder gives "
                    f"{self.feature_dim}: they are another encoder's. Compute them with this one, or give images."
                )


class ImagesOf(Sequence):
    """All images of a dataset, row by row; each is read when it is asked for.

    Args:
        rows: the dataset.
        columns: where its images are.

    Attributes:
        owners: for each image, its row.
    """

    def __init__(self, rows: Any, columns: Columns) -> None:
        self.columns = columns
        self.rows = rows.select_columns([columns.image]) if hasattr(rows, "select_columns") else rows
        counts = self._counts()
        self.owners = np.repeat(np.arange(len(rows)), counts)
        self._slots = np.arange(len(self.owners)) - np.repeat(np.cumsum(counts) - counts, counts)

    def __len__(self) -> int:
        return len(self.owners)

    def __getitem__(self, number: Any) -> Any:
        return self.columns.images(self.rows[int(self.owners[number])])[self._slots[number]]

    def _counts(self) -> np.ndarray:
        kind = (getattr(self.rows, "features", None) or {}).get(self.columns.image)
        if kind is not None and not hasattr(kind, "feature"):
            return np.ones(len(self.rows), dtype=int)  # One each, as the dataset says without being read.
        return np.array([len(self.columns.images(row)) for row in self.rows])


class _Part(Sequence):
    """Some of a sequence's entries, by number."""

    def __init__(self, whole: Sequence, numbers: range) -> None:
        self.whole, self.numbers = whole, numbers

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, number: Any) -> Any:
        return self.whole[self.numbers[number]]


def _groups(rows: Any, features: StoredFeatures | None) -> Sequence[int]:
    """Number the rows so that those with the same `group`, or else the same first image, have the same number."""
    names = getattr(rows, "column_names", None) or rows[0]
    if "group" in names:
        numbers: dict[Any, int] = {}
        few = rows.select_columns(["group"]) if hasattr(rows, "select_columns") else rows
        keys = [("row", i) if row.get("group") is None else ("group", row["group"]) for i, row in enumerate(few)]
        return [numbers.setdefault(key, len(numbers)) for key in keys]
    if features is None:
        return range(len(rows))
    return [int(features.place(i)[0]) for i in range(len(rows))]
