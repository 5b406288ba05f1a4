"""Streams of examples: a `datasets.IterableDataset`, of which every process reads its own part."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

from datasets import IterableDataset as Rows
from datasets.distributed import split_dataset_by_node
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from visual_ground.errors import GroundingError, GroundingValueError
from visual_ground.processes import Processes
from visual_ground.training.data.columns import Columns, open_rows
from visual_ground.training.data.preparing import Indices, Preparing
from visual_ground.training.data.reading import example_of, prompt_of, read_image
from visual_ground.training.data.sampler import picker
from visual_ground.training.data.skipped import Skipped
from visual_ground.vision.features.store import FeatureFile
from visual_ground.vision.identity import image_key
from visual_ground.vision.images import image_name


@dataclass(frozen=True)
class StreamFeatures:
    """The cached features of a process's part of a stream."""

    file: FeatureFile
    places: Indices

    def sample(self, limit: int) -> Tensor:
        """Return the features of all images, or of at most `limit` of them at even distances, (n, f)."""
        return self.file.read(self.places[:: max(1, -(-len(self.places) // limit))])


class ExampleStream(IterableDataset[dict[str, Any]]):
    """The rows of a stream, over and over, each time with the stream's own next epoch of shuffling.

    Made by `prepare_stream`. What cannot be used is left out; without a cache it is noted in the next example's
    `skipped`.

    Args:
        rows: this process's part of the stream.
        columns: where the images and captions are.
        features: of its images; None decodes the images.
        seed: of what is sampled.
    """

    def __init__(self, rows: Rows, columns: Columns, features: StreamFeatures | None, seed: int = 0) -> None:
        self.rows, self.columns, self.features, self.seed = rows, columns, features, seed
        self._processes = Processes.launched()

    def take(self, count: int) -> list[dict[str, Any]]:
        """Return the first `count` examples."""
        return list(itertools.islice(self, count))

    def __iter__(self) -> Iterator[dict[str, Any]]:
        if self.features is not None:
            self.features.file.refresh()
        # A copy, because workers that are given one stream share its epoch.
        rows, worker = deepcopy(self.rows), get_worker_info()
        index, workers = (0, 1) if worker is None else (worker.id, worker.num_workers)
        draw, step = index * self._processes.count + self._processes.index, workers * self._processes.count
        skipped: list[str] = []
        for epoch in itertools.count():
            rows.set_epoch(epoch)
            epoch_start = draw
            for row in rows:
                example = self._example(row, draw, skipped)
                if example is not None:
                    yield {**example, "skipped": skipped}
                    draw, skipped = draw + step, []
            if draw == epoch_start:
                raise GroundingValueError(
                    f"This process's part of the stream has no usable example. The first are: {skipped[:3]}"
                )

    def _example(self, row: Mapping[str, Any], draw: int, skipped: list[str]) -> dict[str, Any] | None:
        """Return an example, or None where the row cannot be used."""
        images, problem = self.columns.images(row), self.columns.problem_of(row)
        if problem is not None or not images:
            if self.features is None:  # Else it was reported when the features were cached.
                skipped.append(f"a row of the stream: {problem or 'it has no image'}")
            return None
        choose = picker(self.seed, draw)
        prompt = self._prompt(row, skipped)
        if prompt is None:
            return None
        example = {**example_of(row, self.columns, choose), **prompt, "row": draw, "draw": draw}
        image = choose(images)
        try:
            key = image_key(image)
        except GroundingError as error:
            skipped.append(f"{image_name(image)}: {error}")
            return None
        # Equal images are one group; 15 hex digits of the image's key fit into an int64.
        example["group"] = int(key[:15], 16)
        if self.features is None:
            decoded = read_image(image, skipped)
            return None if decoded is None else {**example, "image": decoded}
        place = self.features.file.rows.get(key)
        return None if place is None else {**example, "image_features": self.features.file.read([place])[0]}

    def _prompt(self, row: Mapping[str, Any], skipped: list[str]) -> dict[str, Any] | None:
        """Return a row's prompt as in `prompt_of`, or None where one of its images cannot be read."""
        split, features = self.columns.split_prompt(row), None
        if split is not None and self.features is not None:
            try:
                places = [self.features.file.rows.get(image_key(image)) for image in split.images]
            except GroundingError:
                return None  # It was reported when the features were cached.
            if None in places:
                return None
            features = self.features.file.read([place for place in places if place is not None])
        return prompt_of(row, self.columns, features, skipped)


class _StreamImages:
    """The images of a stream's usable rows, and an error for every other row."""

    def __init__(self, rows: Rows, columns: Columns) -> None:
        self.rows, self.columns = rows, columns

    def __iter__(self) -> Iterator[Any]:
        for row in self.rows:
            images, problem = self.columns.images(row), self.columns.problem_of(row)
            if problem is None and images:
                yield from images
                yield from self.columns.prompt_images(row)
            else:
                yield GroundingValueError(problem or "it has no image")


def prepare_stream(rows: Rows, preparing: Preparing) -> ExampleStream:
    """Return the examples of this process's part of a stream; where there is a cache, its images are cached first."""
    columns, cache, processes = preparing.columns, preparing.cache, Processes.launched()
    part = open_rows(rows, columns)
    if processes.count > 1:
        part = split_dataset_by_node(part, rank=processes.index, world_size=processes.count)
    if cache is None:
        return ExampleStream(part, columns, None, preparing.seed)
    skipped = Skipped(preparing.max_skipped)

    def refuse(position: int, error: GroundingError) -> None:
        skipped.seen = position + 1
        skipped.add(f"image {position} of the stream: {error}")

    images = _StreamImages(part, columns)
    places = cache.place(images, preparing.batch_size, preparing.workers, preparing.progress, refuse)
    skipped.check(len(places))
    skipped.finish()
    return ExampleStream(part, columns, StreamFeatures(cache.file, places[places >= 0]), preparing.seed)
