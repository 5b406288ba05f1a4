"""`build_index`: an index of many images, part by part, so that it can be continued after a stop at any point."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import chain, islice
from pathlib import Path
from time import monotonic
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor
from tqdm import tqdm

from visual_ground.errors import GroundingFileError, GroundingValueError
from visual_ground.index.exact import ExactIndex
from visual_ground.index.files import SPACE, write_index
from visual_ground.index.state import IndexState
from visual_ground.index.table.entries import Entries, Segment, make_entries
from visual_ground.index.table.table_file import read_table, write_table
from visual_ground.indexing.decoding import Batch, read_batches
from visual_ground.indexing.sources import SourceImage, read_source
from visual_ground.storage.tensors import FORMAT_VERSION, read_json, write_json
from visual_ground.vision.encoder import VisionEncoder
from visual_ground.vision.identity import ImageSpace

logger = logging.getLogger(__name__)

PARTS_FOLDER = ".building"
NAMED = 10  # Unreadable images that the log names; the report has all.


class PixelEmbedder(Protocol):
    """What `build_index` needs of a model, as `GroundedModel` has it."""

    @property
    def vision(self) -> VisionEncoder:
        """The encoder."""

    @property
    def image_space(self) -> ImageSpace:
        """Which vectors it gives to images."""

    def embed_images(self, *, image_features: Tensor) -> Tensor:
        """Map features (n, f) to unit vectors (n, q)."""


@dataclass(frozen=True)
class BuildOptions:
    """How an index is built.

    Args:
        batch_size: images that the encoder runs at once.
        workers: processes that read images; 0 for this one.
        thumbnail_size: the side in pixels of thumbnails that the index keeps; None for none.
        half: keep vectors as float16, half as large.
        part_size: images in a part, which is lost when the build is stopped before it is done; a multiple of batch_size
            is used.
        shard: (i, n) builds every n-th image from the i-th on, so that n processes build n indexes that can be merged.
        progress: show a progress bar.
    """

    batch_size: int = 32
    workers: int = 0
    thumbnail_size: int | None = None
    half: bool = False
    part_size: int = 2048
    shard: tuple[int, int] = (0, 1)
    progress: bool = True

    def __post_init__(self) -> None:
        if min(self.batch_size, self.part_size, self.shard[1], self.thumbnail_size or 1) < 1 or self.workers < 0:
            raise GroundingValueError(f"Sizes and numbers of an index's build must be at least 1, got {self}.")
        if not 0 <= self.shard[0] < self.shard[1]:
            raise GroundingValueError(f"shard must be (i, n) with 0 <= i < n, got {self.shard}.")


@dataclass(frozen=True)
class BuildReport:
    """What a build did.

    Args:
        num_images: images in the index.
        unreadable: names of those that are not, and why.
        images_per_second: of this run; what an earlier run had done is not counted.
    """

    num_images: int
    unreadable: list[tuple[str, str]] = field(default_factory=list)
    images_per_second: float = 0.0


def build_index(
    model: PixelEmbedder, source: Any, folder: str | os.PathLike[str], options: BuildOptions | None = None
) -> BuildReport:
    """Embed the images of a source and save them as an index.

    Parts that are done are kept in the folder's `.building`. After a stop, the same call continues behind the last of
    them, and makes the same index as if it had not been stopped. Memory does not grow with the number of images.

    Args:
        model: the grounded model, whose image layer gives the vectors.
        source: as in `sources.read_source`.
        folder: where the index goes. An index that is there stays until the new one is whole.
        options: how.

    Raises:
        GroundingFileError: a source that leads nowhere, or a folder that cannot be written.
        GroundingValueError: no image that can be read, ids that repeat, or an unfinished build with other options.
    """
    options = BuildOptions() if options is None else options
    options = replace(options, part_size=-(-options.part_size // options.batch_size) * options.batch_size)
    parts = Path(folder, PARTS_FOLDER)
    space = model.image_space
    done = _open_parts(parts, options, space)
    started, consumed = monotonic(), sum(part["consumed"] for part in done)
    items = islice(_sharded(read_source(source), options), consumed, None)
    batches = read_batches(
        items, model.vision.preprocessing, options.batch_size, options.workers, options.thumbnail_size
    )
    with tqdm(unit=" images", initial=consumed, disable=not options.progress, desc="index") as bar:
        for group in _groups(batches, options.part_size // options.batch_size):
            done.append(_write_part(parts, len(done), model, group, options, bar))
    seconds, new = monotonic() - started, sum(part["consumed"] for part in done) - consumed
    unreadable = [(name, why) for part in done for name, why in part["unreadable"]]
    _finish(Path(folder), parts, done, space)
    for name, why in unreadable[:NAMED]:
        logger.warning("%s is left out of the index: %s", name, why)
    if len(unreadable) > NAMED:
        logger.warning("%d images in all are left out of the index.", len(unreadable))
    return BuildReport(sum(part["count"] for part in done), unreadable, new / max(seconds, 1e-9))


def _sharded(items: Iterator[SourceImage], options: BuildOptions) -> Iterator[SourceImage]:
    first, step = options.shard
    for number, item in islice(enumerate(items), first, None, step):
        yield item if item.id is not None else replace(item, id=number)


def _groups(batches: Iterator[Batch], size: int) -> Iterator[Iterator[Batch]]:
    for first in batches:
        yield chain([first], islice(batches, size - 1))


def _open_parts(parts: Path, options: BuildOptions, space: ImageSpace) -> list[dict[str, Any]]:
    """Return what is done of a build; start one where nothing is."""
    about = {
        "format_version": FORMAT_VERSION,
        "batch_size": options.batch_size,
        "part_size": options.part_size,
        "thumbnail_size": options.thumbnail_size,
        "half": options.half,
        "shard": list(options.shard),
    }
    try:
        parts.mkdir(parents=True, exist_ok=True)
        if (parts / "build.json").is_file():
            begun = read_json(parts / "build.json")
            before = ImageSpace.from_dict(begun.pop(SPACE, None), len(space.vectors[0]))
            if begun != about or not before.is_same(space):
                raise GroundingValueError(
                    f"{str(parts)!r} holds an unfinished build of {before} and {begun}, and this one is of {space} and "
                    f"{about}. Continue it with the same adapter and options, or delete that folder."
                )
        write_json(parts / "build.json", {**about, SPACE: space.to_dict()})
    except OSError as error:
        raise GroundingFileError(f"The index cannot be built in {str(parts.parent)!r}: {error}.") from error
    numbers = range(len(list(parts.glob("*.done.json"))))
    return [json.loads((parts / f"{number:06d}.done.json").read_text(encoding="utf-8")) for number in numbers]


@torch.no_grad()
def _write_part(
    parts: Path, number: int, model: PixelEmbedder, batches: Iterator[Batch], options: BuildOptions, bar: Any
) -> dict[str, Any]:
    """Embed some batches and write them; the part counts from the moment at which its `.done.json` is there."""
    vectors, items, thumbnails = list[Tensor](), list[SourceImage](), list[bytes | None]()
    part: dict[str, Any] = {"consumed": 0, "unreadable": []}
    for batch in batches:
        if batch.items:
            vectors.append(model.embed_images(image_features=_features(model, batch)).float().cpu())
        items += batch.items
        thumbnails += batch.thumbnails
        part["consumed"] += batch.consumed
        part["unreadable"] += batch.unreadable
        bar.update(batch.consumed)
    part["count"] = len(items)
    if items:
        block = torch.cat(vectors)
        entries = make_entries(
            [item.id for item in items if item.id is not None],
            [item.address for item in items],
            [item.metadata for item in items],
            len(items),
            0,
        )
        write_table(parts / f"{number:06d}.parquet", [entries.with_thumbnails(thumbnails).segments[0].table])
        ExactIndex(block.half() if options.half else block).save(parts / f"{number:06d}.safetensors")
    write_json(parts / f"{number:06d}.done.json", part)
    return part


def _features(model: PixelEmbedder, batch: Batch) -> Tensor:
    """Return the features (b, f) of a batch of pixels, or of features.

    Raises:
        GroundingValueError: features of another width than the encoder's, or not finite.
    """
    if batch.pixels.dim() == 4:
        features: Tensor = model.vision(batch.pixels)
        return features
    wanted, width = model.vision.feature_dim, batch.pixels.shape[-1]
    if width != wanted or not bool(torch.isfinite(batch.pixels).all()):
        raise GroundingValueError(
            f"The encoder {model.vision.name or type(model.vision.model).__name__} has features of width {wanted}, and "
            f"the source has some of width {width} or not finite. Give features of this encoder, or images."
        )
    return batch.pixels


def _finish(folder: Path, parts: Path, done: list[dict[str, Any]], space: ImageSpace) -> None:
    """Join the parts into an index, and delete them."""
    numbers = [number for number, part in enumerate(done) if part["count"]]
    if not numbers:
        names = [name for part in done for name, _ in part["unreadable"]]
        raise GroundingValueError(f"There is no image that can be read, and so nothing to index; tried {names[:3]}.")
    engine = ExactIndex.of_blocks(ExactIndex.load(parts / f"{number:06d}.safetensors") for number in numbers)
    segments = tuple(Segment(read_table(parts / f"{number:06d}.parquet")) for number in numbers)
    for name in ("id", "id_number"):
        counts = pa.concat_tables([segment.table.select([name]) for segment in segments])[name].value_counts()
        if twice := [one["values"].as_py() for one in counts if one["values"].is_valid and one["counts"].as_py() > 1]:
            raise GroundingValueError(
                f"ids must be distinct, and {twice[:5]} come twice. Give each image of the source its own, delete "
                f"{str(parts)!r}, and build again."
            )
    entries = Entries(segments, np.zeros(len(engine), dtype=bool), True, True, _next_id(segments))
    write_index(folder, IndexState(engine, entries, space=space))
    shutil.rmtree(parts)


def _next_id(segments: tuple[Segment, ...]) -> int:
    numbers = [pa.compute.max(segment.table["id_number"]).as_py() for segment in segments]
    return max((number + 1 for number in numbers if number is not None), default=0)
