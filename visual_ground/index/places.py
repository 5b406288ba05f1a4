"""Where the images of an index are: files of its own folder, paths and addresses elsewhere, or objects in memory."""

from __future__ import annotations

import os
import re
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from visual_ground.errors import GroundingFileError
from visual_ground.index.remote_images import ImageLink, LinkRules, is_url
from visual_ground.index.table.entries import Entries, Segment
from visual_ground.index.table.table_file import live_tables
from visual_ground.storage.atomic import resolve
from visual_ground.vision.images import ImageLike, to_rgb
from visual_ground.vision.link_rules import is_address

IMAGES_FOLDER = "images"
# Names of image files that mean the same on every system: no drives, no backslash, nothing too long, and no "..".
IMAGE_NAME = re.compile(r"[\w.-]{1,200}(?:/[\w.-]{1,200}){0,7}", re.ASCII)
PLAIN_NAME = r"^[0-9A-Za-z_-][0-9A-Za-z_-]*(/[0-9A-Za-z_-]+)?\.png$"  # Nearly all; the rest is looked at one by one.
OWN_FILE = re.compile(r"\d{8,}\.png")


def place_images(entries: Entries, source: Path | None, folder: Path) -> tuple[list[pa.Table], dict[str, Any]]:
    """Return the tables to write, and the images that become files, by file name.

    The column `image` has absolute paths, and `file` names of files inside the folder. An index that was loaded from
    this folder has files in it: these stay, and no new image is written over them.
    """
    moved = source is not None and source.resolve() != folder.resolve()
    parts = [_localised(*part, source if moved else None, folder) for part in live_tables(entries)]
    taken: set[str] = set().union(*(table["file"].drop_null().to_pylist() for table, _ in parts))
    start, tables, new_images = 0, [], dict[str, Any]()
    for table, pictures in parts:
        if pictures:
            addresses, files = table["image"].to_pylist(), table["file"].to_pylist()
            for row, image in pictures.items():
                if isinstance(image, ImageLink):
                    addresses[row] = image.address
                    continue
                names = (f"{IMAGES_FOLDER}/{number:08d}.png" for number in count(start + row))
                files[row] = next(name for name in names if name not in taken)
                taken.add(files[row])
                new_images[files[row]] = image
            table = _with_images(table, addresses, files)
        tables.append(table)
        start += len(table)
    return tables, new_images


def movable(entries: Entries, source: Path | None, rules: LinkRules) -> Entries:
    """Return entries without those that were removed; paths that the rules do not allow become links."""
    parts = []
    for segment, table, rows in live_tables(entries, thumbnails=True):
        pictures = {i: segment.pictures[row] for i, row in enumerate(rows) if row in segment.pictures}
        if source is not None and not segment.given:
            columns = zip(table["image"].to_pylist(), table["file"].to_pylist(), strict=True)
            images = [find_image(address, file, source, rules) for address, file in columns]
            pictures |= {i: image for i, image in enumerate(images) if isinstance(image, ImageLink)}
            paths = [None if i in pictures else image for i, image in enumerate(images)]
            table = _with_images(table, paths, [None] * len(paths))
        parts.append(Segment(table, pictures))
    return replace(entries, segments=tuple(parts), removed=np.zeros(len(entries), dtype=bool))


def _localised(
    segment: Segment, table: pa.Table, rows: list[int], source: Path | None, folder: Path
) -> tuple[pa.Table, dict[int, Any]]:
    """Return a table with files of the folder as files and all others as paths, and its objects by row."""
    pictures = {i: segment.pictures[row] for i, row in enumerate(rows) if row in segment.pictures}
    if segment.given:
        table = _absolute(table)
    own = pc.fill_null(pc.match_substring_regex(table["image"], r"[0-9]{8}\.png$"), False)
    if not pc.any(own).as_py() and (source is None or table["file"].null_count == len(table)):
        return table, pictures
    addresses, files = table["image"].to_pylist(), table["file"].to_pylist()
    for row, (address, file) in enumerate(zip(addresses, files, strict=True)):
        if file is not None and source is not None:
            addresses[row], files[row] = os.fspath(resolve(source, file)), None
        elif address is not None and _is_own(Path(address), folder):
            addresses[row], files[row] = None, f"{IMAGES_FOLDER}/{Path(address).name}"
    return _with_images(table, addresses, files), pictures


def _absolute(table: pa.Table) -> pa.Table:
    """Return a table whose paths lead to the same files from any working folder."""
    if not pc.any(pc.invert(pc.starts_with(table["image"], "/"))).as_py():
        return table
    addresses = table["image"].to_pylist()
    absolute = [one if one is None or is_address(one) else os.path.abspath(one) for one in addresses]
    return _with_images(table, absolute, table["file"].to_pylist())


def _is_own(path: Path, folder: Path) -> bool:
    return bool(OWN_FILE.fullmatch(path.name)) and path.parent.resolve() == (folder / IMAGES_FOLDER).resolve()


def _with_images(table: pa.Table, addresses: list[Any], files: list[Any]) -> pa.Table:
    for name, values in (("image", addresses), ("file", files)):
        table = table.set_column(table.column_names.index(name), name, pa.array(values, pa.string()))
    return table


def write_png(image: ImageLike, path: Path) -> None:
    """Write an image as upright RGB."""
    to_rgb(image).save(path, format="PNG")


def find_image(address: str | None, file: str | None, folder: Path | None, rules: LinkRules) -> str | ImageLink | None:
    """Return the path of an entry's image, or a link where the rules do not allow to open it.

    Args:
        address: the column `image`.
        file: the column `file`.
        folder: the index's own; None for an index that was made here, which may open what it was given.
        rules: which paths may lead out of the folder.

    Raises:
        GroundingFileError: a file of the folder's own that is a link out of it.
    """
    if file is None or folder is None:
        if address is None or folder is None:
            return address
        return address if not is_url(address) and rules.allow_path(address, folder) else ImageLink(address)
    path = os.fspath(resolve(folder, file))
    # In huggingface_hub's cache, a snapshot's files are symbolic links into the folder blobs beside it.
    blobs = [folder.parent.parent / "blobs"] if folder.parent.name == "snapshots" else []
    if not LinkRules(folders=(*blobs,)).allow_path(path, folder):
        raise _outside(file, folder)
    return path


def check_files(table: pa.Table, folder: Path) -> None:
    """Raise GroundingFileError unless a table's own files are names inside the folder, and no entry has two images."""
    files = table["file"]
    for name in files.filter(pc.fill_null(pc.invert(pc.match_substring_regex(files, PLAIN_NAME)), False)).to_pylist():
        if not IMAGE_NAME.fullmatch(name) or ".." in name.split("/"):
            raise _outside(name, folder)
    if pc.any(pc.and_(pc.is_valid(files), pc.is_valid(table["image"]))).as_py():
        raise GroundingFileError(f"The index in {str(folder)!r} is damaged: an entry has two images.")


def _outside(place: Any, folder: Path) -> GroundingFileError:
    return GroundingFileError(
        f"The index in {str(folder)!r} places an image at {place!r}, which is not inside the folder. "
        "Do not use this index, or build it again."
    )
