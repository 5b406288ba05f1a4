"""What is given to an index, and what a saved one holds, as entries for Milvus."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from visual_ground.index.milvus.rows import Entry
from visual_ground.index.places import check_images
from visual_ground.index.remote_images import ImageLink, LinkRules, is_url
from visual_ground.index.state import Ids, IndexState
from visual_ground.index.table.rows import THUMBNAIL, check_counts, check_distinct, check_ids, check_metadata
from visual_ground.vision.decoding import to_thumbnail
from visual_ground.vision.images import to_rgb
from visual_ground.vision.link_rules import is_address

THUMBNAIL_SIZE = 256  # Pixels; some 15 kB, and a cell of Milvus has 65 kB.


def make_entries(
    ids: Ids, images: Sequence[Any] | None, metadata: Sequence[Mapping[str, Any]] | None, count: int
) -> list[Entry]:
    """Check what comes with `count` vectors, and return it as entries.

    Raises:
        GroundingValueError: lengths differ, ids repeat, or metadata that is no JSON.
        GroundingTypeError: ids that are neither strings nor integers, or images that are none.
    """
    check_images(images)
    check_counts(count, ids=ids, images=images, metadata=metadata)
    check_ids(ids)
    check_metadata(metadata or [])
    check_distinct(ids)
    kept = [_kept(image, None) for image in images or [None] * count]
    return [
        Entry(one, *image, dict(values)) for one, image, values in zip(ids, kept, metadata or [{}] * count, strict=True)
    ]


def entries_of(state: IndexState) -> Iterator[Entry]:
    """Yield the entries of a saved index; pictures that are inside its folder become thumbnails."""
    entries = state.entries
    for position in entries.positions():
        image, thumbnail = entries.cell(position, "image"), entries.cell(position, THUMBNAIL)
        if entries.cell(position, "file") is not None:
            image = None if thumbnail is not None else to_rgb(state.image(position))
        yield Entry(entries.id(position), *_kept(image, thumbnail), entries.metadata(position))


def image_of(entry: Entry, rules: LinkRules) -> str | ImageLink | None:
    """Return the path of an entry's image if the rules let it be opened, and else a link.

    An index in Milvus has no folder of its own, and may have been written by anyone.
    """
    if entry.image is None:
        return None
    folders = [Path(folder) for folder in rules.folders]
    if not is_url(entry.image) and folders and rules.allow_path(entry.image, folders[0]):
        return entry.image
    return ImageLink(entry.image)


def _kept(image: Any, thumbnail: bytes | None) -> tuple[str | None, bytes | None]:
    """Return the address and the thumbnail that Milvus keeps of an image."""
    if isinstance(image, ImageLink):
        return image.address, thumbnail
    if image is None or isinstance(image, (str, os.PathLike)):
        path = None if image is None else os.fspath(image)
        return path if path is None or is_address(path) else os.path.abspath(path), thumbnail
    return None, thumbnail or to_thumbnail(to_rgb(image), THUMBNAIL_SIZE)
