"""`build_index`: an index of many images, part by part, so that it can be continued after a stop at any point."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain, islice
from pathlib import Path
from time import monotonic
from typing import Any, TypeAlias, TypeVar, cast

from visual_ground.errors import GroundingError
from visual_ground.indexing.decoding import Batch, read_batches
from visual_ground.indexing.options import BuildOptions, BuildReport, PixelEmbedder
from visual_ground.indexing.parts import PARTS_FOLDER, finish, open_parts, write_part
from visual_ground.indexing.sources import SourceImage, read_source
from visual_ground.processes import Processes
from visual_ground.progress import progress_bar

__all__ = ["BuildOptions", "BuildReport", "PixelEmbedder", "build_index"]

logger = logging.getLogger(__name__)

Result = TypeVar("Result")
Parts: TypeAlias = list[dict[str, Any]]
NAMED = 10  # Unreadable images that the log names; the report has all.


def build_index(
    model: PixelEmbedder, source: Any, folder: str | os.PathLike[str], options: BuildOptions | None = None
) -> BuildReport:
    """Embed the images of a source and save them as an index.

    Parts that are done are kept in the folder's `.building`. After a stop, the same call continues after the last of
    them, and makes the same index as if it had not been stopped. Memory holds one part's vectors and thumbnails and, in
    the end, all ids, addresses and metadata. Processes that `accelerate launch` started build together, in a folder
    that all of them see; each must call this.

    Args:
        model: the grounded model, whose image layer gives the vectors.
        source: as in `sources.read_source`.
        folder: where the index goes. An index that is there stays until the new one is whole.
        options: how.

    Raises:
        GroundingFileError: a source that leads nowhere, or a folder that cannot be written.
        GroundingValueError: no image that can be read, ids that repeat, or an unfinished build with other options.
        GroundingStateError: another of the processes has failed.
    """
    options = BuildOptions() if options is None else options
    options = replace(options, part_size=-(-options.part_size // options.batch_size) * options.batch_size)
    processes = Processes() if options.shard is not None else Processes.launched()
    builds = [Path(folder, PARTS_FOLDER)]
    if processes.count > 1:
        builds = [builds[0] / f"{number:05d}-of-{processes.count:05d}" for number in range(processes.count)]
        options = replace(options, shard=(processes.index, processes.count))
    started = monotonic()
    new = _together(processes, partial(_build_parts, model, source, builds[processes.index], options))
    rate = sum(new) / max(monotonic() - started, 1e-9)
    join: Callable[[], Parts] = partial(finish, Path(folder), builds, model.image_space, options.caption_weight)
    done = _together(processes, join if processes.is_main else list[dict[str, Any]])[0]
    unreadable = [(name, why) for part in done for name, why in part["unreadable"]]
    if processes.is_main:
        _name(unreadable)
    return BuildReport(sum(part["count"] for part in done), unreadable, rate)


def _together(processes: Processes, work: Callable[[], Result]) -> list[Result]:
    """Do some work in each process, and return what it gave in all of them."""
    result, failure = None, None
    try:
        result = work()
    except GroundingError as error:
        failure = error
    processes.raise_together(failure)
    return cast("list[Result]", processes.gather(result))


def _build_parts(model: PixelEmbedder, source: Any, parts: Path, options: BuildOptions) -> int:
    """Write the parts that are missing, and return how many images they were made of."""
    done = open_parts(parts, options, model.image_space)
    consumed = sum(part["consumed"] for part in done)
    items = islice(_sharded(read_source(source), options.shard or (0, 1)), consumed, None)
    batches = read_batches(
        items, model.vision.preprocessing, options.batch_size, options.workers, options.thumbnail_size
    )
    shown = options.progress and (options.shard is None or options.shard[0] == 0)
    with progress_bar("index", " images", None, shown, initial=consumed) as bar:
        for group in _groups(batches, options.part_size // options.batch_size):
            done.append(write_part(parts, len(done), model, group, options, bar))
    return int(sum(part["consumed"] for part in done) - consumed)


def _sharded(items: Iterator[SourceImage], shard: tuple[int, int]) -> Iterator[SourceImage]:
    for number, item in islice(enumerate(items), shard[0], None, shard[1]):
        yield item if item.id is not None else replace(item, id=number)


def _groups(batches: Iterator[Batch], size: int) -> Iterator[Iterator[Batch]]:
    for first in batches:
        yield chain([first], islice(batches, size - 1))


def _name(unreadable: Sequence[tuple[str, str]]) -> None:
    for name, why in unreadable[:NAMED]:
        logger.warning("%s is left out of the index: %s", name, why)
    if len(unreadable) > NAMED:
        logger.warning("%d images in all are left out of the index.", len(unreadable))
