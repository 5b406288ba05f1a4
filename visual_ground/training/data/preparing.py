"""A dataset before training: captions are checked, image features cached, and unusable rows left out."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset, Subset

from visual_ground.errors import GroundingError, GroundingValueError
from visual_ground.processes import Processes
from visual_ground.progress import counted
from visual_ground.training.data.columns import Columns, open_rows, usable_rows, without_images
from visual_ground.training.data.examples import ExampleDataset
from visual_ground.training.data.prompts import PROMPT
from visual_ground.training.data.reading import first_image_key
from visual_ground.training.data.rows import select_rows
from visual_ground.training.data.skipped import Skipped
from visual_ground.vision.features.cache import FeatureCache
from visual_ground.vision.features.store import FeatureFile

Indices = NDArray[np.int64]


class StoredFeatures:
    """The features of each row's images, read from their places in the cache's file when they are needed."""

    def __init__(self, file: FeatureFile, places: Sequence[Indices]) -> None:
        self.file = file
        self._ends = np.cumsum([len(of_row) for of_row in places])
        self._places = np.concatenate(places)

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, number: int) -> Tensor:
        return self.file.read(self.place(number))

    def place(self, number: int) -> Indices:
        """Return where the features of a row's images are in the file."""
        if not 0 <= number < len(self):
            raise IndexError(number)
        return self._places[self._ends[number - 1] if number else 0 : self._ends[number]]

    def select(self, numbers: Sequence[int]) -> StoredFeatures:
        """Return the features of some rows."""
        return StoredFeatures(self.file, [self.place(number) for number in numbers])

    def sample(self, limit: int) -> Tensor:
        """Return the features of all images, or of at most `limit` of them at even distances, (n, f)."""
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
        seed: of what is sampled.
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
        """Return a dataset's usable rows as examples, with their images' features where there is a cache.

        Every process of a distributed run computes the features of its share, and reads those of all.

        Args:
            rows: the dataset.
            sample: whether one of several images and captions is sampled; else the first image is taken, once with each
                caption.

        Raises:
            GroundingTypeError, GroundingValueError: a dataset that cannot be used, see `open_rows` and `Skipped`.
        """
        rows = open_rows(rows, self.columns)
        skipped = Skipped(self.max_skipped, len(rows))
        numbers = np.array(usable_rows(rows, self.columns, skipped))
        rows = select_rows(rows, numbers.tolist())
        features, prompts, keys = None, None, None
        if "image_features" in rows[0]:
            self._check_widths(rows)
        elif self.cache is None and not sample:
            # What cannot be read must be known before anything is measured: then nothing stands in for it.
            found = self._keys_of_images(rows, numbers, skipped)
            readable = [i for i, key in enumerate(found) if key]
            rows, numbers, keys = select_rows(rows, readable), numbers[readable], [found[i] for i in readable]
        if self.cache is not None:
            rows, numbers, features, prompts = self._with_features(self.cache.file, rows, numbers, skipped)
        skipped.finish()
        groups = _groups(rows, features, keys or _addresses(rows, self.columns))
        examples = ExampleDataset(rows, features, groups, sample, self.columns, numbers.tolist(), self.seed, prompts)
        return examples if sample else examples.each_caption()

    def _with_features(
        self, file: FeatureFile, rows: Any, numbers: Indices, skipped: Skipped
    ) -> tuple[Any, Indices, StoredFeatures | None, StoredFeatures | None]:
        """Return the readable rows, their numbers, and the features of their images and of their prompts' images."""
        of_prompts = self._places_of_prompts(rows, numbers, skipped)
        # A prompt is read whole or not at all, and of a row's own images those that can be read.
        usable = np.array([bool((places >= 0).all()) for places in of_prompts])
        own: list[Indices] = []
        if "image_features" not in rows[0]:
            places = self._places(ImagesOf(rows, self.columns.images, self.columns.image), numbers, skipped)
            own = [place[place >= 0] for place in places]
            usable &= [len(place) > 0 for place in own]
        readable = usable.nonzero()[0].tolist()
        if not readable:
            skipped.check(0)
        prompts = StoredFeatures(file, [of_prompts[i] for i in readable]) if any(map(len, of_prompts)) else None
        features = StoredFeatures(file, [own[i] for i in readable]) if own else None
        return select_rows(rows, readable), numbers[readable], features, prompts

    def _keys_of_images(self, rows: Any, numbers: Indices, skipped: Skipped) -> list[str]:
        """Return by what each row's first image is known again; nothing for an image that cannot be read."""
        keys = []
        for i in counted(range(len(rows)), "images", "images", self.progress, leave=False):
            try:
                keys.append(first_image_key(rows[i], self.columns))
            except GroundingError as error:
                skipped.add(f"row {numbers[i]}: {error}")
                keys.append("")
        if not any(keys):
            skipped.check(0)
        return keys

    def _places_of_prompts(self, rows: Any, numbers: Indices, skipped: Skipped) -> list[Indices]:
        """Return, for each row, where the features of its prompt's images are."""
        if PROMPT not in (getattr(rows, "column_names", None) or [PROMPT]):
            return [np.zeros(0, dtype=np.int64)] * len(rows)
        images = ImagesOf(without_images(rows, self.columns), self.columns.prompt_images)
        return self._places(images, numbers, skipped)

    def _places(self, images: ImagesOf, numbers: Indices, skipped: Skipped) -> list[Indices]:
        """Return, for each row, where the features of its images are; -1 for one that cannot be read."""
        assert self.cache is not None
        processes, rows = Processes.launched(), images.rows
        share = range(processes.index, len(images), processes.count)
        skipped.total = max(len(rows), len(images))

        def refuse(position: int, error: GroundingError) -> None:
            skipped.add(f"row {numbers[images.owners[share[position]]]}: {error}")

        own: Any = Subset[Any](cast("Dataset[Any]", images), share)
        share_places = self.cache.place(own, self.batch_size, self.workers, self.progress, refuse)
        places = np.full(len(images), -1)
        for index, part in enumerate(processes.gather(share_places)):
            places[index :: processes.count] = part
        return np.split(places, np.searchsorted(images.owners, np.arange(1, len(rows))))

    def _check_widths(self, rows: Any) -> None:
        for number in range(min(len(rows), 100)):
            width = len(rows[number]["image_features"])
            if width != self.feature_dim:
                raise GroundingValueError(
                    f"Row {number} has image_features of width {width}, and this model's encoder gives "
                    f"{self.feature_dim}. Compute them with this encoder, or give images."
                )


class ImagesOf(Sequence[Any]):
    """Some images of a dataset, row by row; each is read when it is needed.

    Args:
        rows: the dataset.
        images_of: returns a row's images.
        column: the only one that `images_of` reads; None: any.

    Attributes:
        owners: for each image, its row.
    """

    def __init__(self, rows: Any, images_of: Callable[[Any], Sequence[Any]], column: str | None = None) -> None:
        self.images_of = images_of
        self.rows = rows.select_columns([column]) if column and hasattr(rows, "select_columns") else rows
        counts = self._counts(column)
        self.owners = np.repeat(np.arange(len(rows)), counts)
        self._slots = np.arange(len(self.owners)) - np.repeat(np.cumsum(counts) - counts, counts)

    def __len__(self) -> int:
        return len(self.owners)

    def __getitem__(self, number: Any) -> Any:
        return self.images_of(self.rows[int(self.owners[number])])[self._slots[number]]

    def _counts(self, column: str | None) -> Indices:
        kind = (getattr(self.rows, "features", None) or {}).get(column)
        if kind is not None and not hasattr(kind, "feature"):
            return np.ones(len(self.rows), dtype=int)  # An image column that is no list: nothing to read.
        return np.array([len(self.images_of(row)) for row in self.rows], dtype=int)


def _addresses(rows: Any, columns: Columns) -> list[str] | None:
    """Return where each row's first image is, if rows have addresses and no pictures, or None."""
    if columns.image not in rows[0] or not all(isinstance(one, (str, os.PathLike)) for one in columns.images(rows[0])):
        return None
    images = rows.select_columns([columns.image]) if hasattr(rows, "select_columns") else rows
    firsts = [columns.images(row)[0] for row in images]
    return [str(one) for one in firsts] if all(isinstance(one, (str, os.PathLike)) for one in firsts) else None


def _groups(rows: Any, features: StoredFeatures | None, keys: Sequence[str] | None) -> Sequence[int]:
    """Number the rows so that those with the same `group`, or else the same first image, have the same number."""
    names = getattr(rows, "column_names", None) or rows[0]
    if "group" in names:
        numbers: dict[Any, int] = {}
        groups = rows.select_columns(["group"]) if hasattr(rows, "select_columns") else rows
        named = [("row", i) if row.get("group") is None else ("group", row["group"]) for i, row in enumerate(groups)]
        return [numbers.setdefault(name, len(numbers)) for name in named]
    if features is None:
        known: dict[Any, int] = {}
        return range(len(rows)) if keys is None else [known.setdefault(key, len(known)) for key in keys]
    return [int(features.place(i)[0]) for i in range(len(rows))]
