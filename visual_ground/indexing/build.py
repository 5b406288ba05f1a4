"""`build_index`: an index of many images, part by part, so that it can be continued after a stop at any point."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from dataclasses import replace
from itertools import chain, islice
from pathlib import Path
from time import monotonic
from typing import Any

from tqdm import tqdm

from visual_ground.indexing.decoding import Batch, read_batches
from visual_ground.indexing.options import BuildOptions, BuildReport, PixelEmbedder
from visual_ground.indexing.parts import PARTS_FOLDER, finish, open_parts, write_part
from visual_ground.indexing.sources import SourceImage, read_source

__all__ = ["BuildOptions", "BuildReport", "PixelEmbedder", "build_index"]

logger = logging.getLogger(__name__)

NAMED = 10  # Unreadable images that the log names; the report has all.


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
    done = open_parts(parts, options, space)
    started, consumed = monotonic(), sum(part["consumed"] for part in done)
    items = islice(_sharded(read_source(source), options), consumed, None)
    batches = read_batches(
        items, model.vision.preprocessing, options.batch_size, options.workers, options.thumbnail_size
    )
    with tqdm(unit=" images", initial=consumed, disable=not options.progress, desc="index") as bar:
        for group in _groups(batches, options.part_size // options.batch_size):
            done.append(write_part(parts, len(done), model, group, options, bar))
    seconds, new = monotonic() - started, sum(part["consumed"] for part in done) - consumed
    unreadable = [(name, why) for part in done for name, why in part["unreadable"]]
    finish(Path(folder), parts, done, space, options.caption_weight)
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
