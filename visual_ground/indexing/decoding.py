"""Images are read and made into pixels by other processes, while this one runs the encoder."""

from __future__ import annotations

import os
import pickle
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import islice
from multiprocessing import get_context, parent_process
from typing import Any

import numpy as np
import torch
from torch import Tensor

from visual_ground.errors import GroundingError, GroundingStateError, GroundingValueError
from visual_ground.index.table.rows import check_ids, check_texts
from visual_ground.indexing.sources import SourceImage
from visual_ground.storage.texts import printable
from visual_ground.vision.decoding import to_thumbnail
from visual_ground.vision.images import image_name, to_rgb
from visual_ground.vision.preprocessing import Preprocessing

AHEAD = 2  # Batches that each process has waiting, so that none of them waits for the encoder.


@dataclass(frozen=True)
class Batch:
    """Images that were read.

    Args:
        items: those that could be read.
        pixels: (b, c, h, w) of them; (b, f) if the source has features.
        thumbnails: JPEG files of them; None for each if none were asked for.
        unreadable: names of the others, and why; those that an index cannot hold are among them.
        consumed: how many images of the source these were, the unreadable included.
        last: the name of the last of these.
    """

    items: list[SourceImage]
    pixels: Tensor
    thumbnails: list[bytes | None]
    unreadable: list[tuple[str, str]]
    consumed: int
    last: str


def read_batches(
    items: Iterable[SourceImage],
    preprocessing: Preprocessing,
    batch_size: int,
    workers: int,
    thumbnail_size: int | None,
) -> Iterator[Batch]:
    """Yield images as batches of pixels, in order.

    Args:
        items: what to read.
        preprocessing: the encoder's.
        batch_size: images in a batch, before those that cannot be read are left out.
        workers: processes that read; 0 for this one.
        thumbnail_size: the side of thumbnails in pixels; None for none.

    Raises:
        GroundingValueError: an image processor that cannot be sent to another process.
        GroundingStateError: a process that was killed.
    """
    iterator = iter(items)
    batches = iter(lambda: list(islice(iterator, batch_size)), [])
    if not workers:
        yield from (_read(batch, preprocessing, thumbnail_size) for batch in batches)
        return
    _check_sendable(preprocessing)
    with ExitStack() as stack:
        # Processes that are spawned share nothing with the threads of torch and of a GPU, which a fork would break.
        pool = ProcessPoolExecutor(workers, get_context("spawn"), _start, (preprocessing, thumbnail_size))
        stack.callback(pool.shutdown, wait=True, cancel_futures=True)
        try:
            yield from _in_order(pool, batches, workers * AHEAD)
        except BrokenProcessPool as error:
            raise GroundingStateError(
                "A process that reads images was killed (out of memory?). Build again with fewer workers; what is done "
                "is kept."
            ) from error


def _check_sendable(preprocessing: Preprocessing) -> None:
    try:
        pickle.dumps(preprocessing)
    except (pickle.PicklingError, TypeError, AttributeError) as error:
        raise GroundingValueError(
            f"The image processor cannot be sent to another process ({error}). Use workers=0, or one that is a "
            "function of a module or an object of a class."
        ) from error


def _in_order(pool: Executor, batches: Iterator[list[SourceImage]], ahead: int) -> Iterator[Batch]:
    waiting: deque[Future[tuple[Any, ...]]] = deque()
    for batch in batches:
        waiting.append(pool.submit(_read_there, batch))
        if len(waiting) > ahead:
            yield _received(waiting.popleft())
    while waiting:
        yield _received(waiting.popleft())


def _received(future: Future[tuple[Any, ...]]) -> Batch:
    items, pixels, *rest = future.result()
    return Batch(items, torch.from_numpy(pixels), *rest)


_there: dict[str, Any] = {}  # What a reading process was started with.


def _start(preprocessing: Preprocessing, thumbnail_size: int | None) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    _there.update(preprocessing=preprocessing, thumbnail_size=thumbnail_size)


def _end_with_parent() -> None:
    """End this process when the one that started it is gone: if that was killed, nobody else would tell it."""
    if (parent := parent_process()) is not None:
        parent.join()
        os._exit(1)


def _read_there(items: list[SourceImage]) -> tuple[Any, ...]:
    batch = _read(items, _there["preprocessing"], _there["thumbnail_size"])
    # An image has served its purpose; only what the index keeps travels back, and pixels as an array, not by handles.
    kept = [SourceImage(item.id, "", item.address, item.metadata) for item in batch.items]
    return kept, batch.pixels.numpy(), batch.thumbnails, batch.unreadable, batch.consumed, batch.last


def _read(items: Sequence[SourceImage], preprocessing: Preprocessing, thumbnail_size: int | None) -> Batch:
    read, pixels, thumbnails, unreadable = [], list[Tensor](), list[bytes | None](), []
    for item in items:
        try:
            # An entry that an index cannot hold is left out here, where it ends no build.
            check_ids([] if item.id is None else [item.id])
            check_texts("image", [item.address])
            picture = None
            if isinstance(item.image, Tensor) and item.image.dim() == 1:  # Features; other tensors are pictures.
                pixels.append(item.image[None])
            else:
                picture = to_rgb(item.image)
                pixels.append(preprocessing([picture]))
        except GroundingError as error:
            unreadable.append((printable(name_of(item)), str(error)))
            continue
        read.append(item)
        small = None if thumbnail_size is None or picture is None else to_thumbnail(picture, thumbnail_size)
        thumbnails.append(small)
    shapes = {tuple(one.shape[1:]) for one in pixels}
    if len(shapes) > 1 and min(map(len, shapes)) == 1:
        raise GroundingValueError(
            f"Features of a source must be of one width, and have no images between them; got {sorted(shapes)}."
        )
    stacked = torch.cat(pixels) if pixels else torch.from_numpy(np.zeros((0, 3, 1, 1), dtype=np.float32))
    return Batch(read, stacked, thumbnails, unreadable, len(items), name_of(items[-1]))


def name_of(item: SourceImage) -> str:
    """Return what an image of a source is called."""
    return image_name(item.image) if item.id is None else str(item.id)
