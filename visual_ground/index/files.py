"""The folder of an image index: vectors, entries and images, written whole or not at all and read strictly."""

from __future__ import annotations

import logging
import os
import time
import zlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from visual_ground.errors import GroundingError, GroundingFileError, GroundingValueError
from visual_ground.index.card import index_card, read_page
from visual_ground.index.engines.base import VectorIndex
from visual_ground.index.engines.exact import ExactIndex
from visual_ground.index.engines.saved import SAVED_ENGINES
from visual_ground.index.places import IMAGES_FOLDER, check_files, place_images, write_png
from visual_ground.index.remote_images import LinkRules
from visual_ground.index.state import IndexState
from visual_ground.index.table.entries import Entries, Segment
from visual_ground.index.table.rows import THUMBNAIL
from visual_ground.index.table.table_file import read_table, write_table
from visual_ground.index.table.thumbnails import THUMBNAILS_FILE, read_thumbnails, thumbnails_of, write_thumbnails
from visual_ground.index.trust import folders_of, trust, trusted
from visual_ground.storage.atomic import resolve, write_folder
from visual_ground.storage.hub import CARD_FILE
from visual_ground.storage.tensors import read_json, write_json
from visual_ground.vision.identity import ImageSpace

logger = logging.getLogger(__name__)

# Of index folders. Version 2 held ids, images and metadata as JSON.
INDEX_FORMAT_VERSION = 3
VECTORS_FILE = "index.safetensors"
TABLE_FILE = "entries.parquet"
ENTRIES_FILE = "index.json"
OWN_IMAGES = f"{IMAGES_FOLDER}/*.png"
ENGINE_FILES = tuple(name for engine in SAVED_ENGINES for name in engine.FILES)
FILES = (VECTORS_FILE, TABLE_FILE, ENTRIES_FILE, THUMBNAILS_FILE, *ENGINE_FILES, CARD_FILE, OWN_IMAGES)
SPACE, CAPTION_WEIGHT = "image_space", "caption_weight"
COUNTS, FLAGS = ("num_entries", "dim"), ("has_images", "has_metadata")
KEYS = {"format_version", *COUNTS, "dtype", *FLAGS, "next_id", "checksums", SPACE, CAPTION_WEIGHT}
TRIES, PAUSE = 50, 0.05  # How often, and after how many seconds, a reader tries again who met a writer.


def write_index(folder: str | os.PathLike[str], contents: IndexState, card: str | None = None) -> None:
    """Write vectors, ids, images and metadata; paths become absolute, and PIL images files.

    The folders of the images that the index may open are noted for this machine, see `trust`.

    Args:
        folder: where to. Files of other names in it stay as they are.
        contents: what to write.
        card: the text of README.md, if it should have one.

    Raises:
        GroundingValueError: a PIL image that cannot be read.
        GroundingTypeError: an image that is neither a PIL image nor a path or address.
        GroundingFileError: the folder cannot be written, or the disk is full; what was there is whole.
    """
    entries, engine = contents.entries, contents.exact
    tables, new_images = place_images(entries, contents.folder, Path(folder))
    checksums: dict[str, str] = {}
    checked = partial(_checked, checksums)
    searching: dict[str, Callable[[Path], object]] = {}
    if isinstance(contents.engine, SAVED_ENGINES):
        contents = replace(contents, engine=(whole := contents.engine.whole()))
        searching = whole.writers(lambda: checksums[VECTORS_FILE])
        card = index_card(contents, os.fspath(folder), read_page(folder)) if card is None else card
    page = {} if card is None else {CARD_FILE: lambda path: path.write_bytes(card.encode("utf-8"))}
    writers: dict[str, Callable[[Path], object]] = {
        **{name: partial(write_png, image) for name, image in new_images.items()},
        **page,
        VECTORS_FILE: checked(VECTORS_FILE, engine.save),
        **searching,
        **{name: checked(name, partial(write_thumbnails, entries=entries)) for name in thumbnails_of(entries)},
        TABLE_FILE: checked(TABLE_FILE, lambda path: write_table(path, tables)),
        ENTRIES_FILE: partial(_write_about, contents, checksums),
    }
    write_folder(folder, writers)


def _checked(checksums: dict[str, str], name: str, write: Callable[[Path], object]) -> Callable[[Path], object]:
    """Return a writer that also notes the checksum of its file."""

    def write_and_sum(path: Path) -> None:
        write(path)
        checksums[name] = _checksum(path)

    return write_and_sum


def _write_about(contents: IndexState, checksums: Mapping[str, str], path: Path) -> None:
    """Write `index.json`, after all other files, and note the folders whose images this index may open."""
    about = {
        "format_version": INDEX_FORMAT_VERSION,
        "num_entries": len(contents.entries),
        "dim": contents.engine.dim,
        "dtype": str(contents.exact.dtype).removeprefix("torch."),
        "has_images": contents.entries.has_images,
        "has_metadata": contents.entries.has_metadata,
        "next_id": contents.entries.next_id,
        SPACE: None if contents.space is None else contents.space.to_dict(),
        "checksums": checksums,
    }
    if contents.caption_weight:  # Versions that do not know it can read all other indexes.
        about[CAPTION_WEIGHT] = contents.caption_weight
    write_json(path, about)
    if folders := folders_of(contents.entries, contents.folder, contents.rules):
        trust(path.with_name(TABLE_FILE), path, folders)


def read_index(folder: str | os.PathLike[str], rules: LinkRules) -> IndexState:
    """Open what `write_index` wrote; vectors are mapped into memory, and images are not looked at.

    `rules` say which images may be opened later, besides those of folders that it was saved with on this machine. A
    reader who meets a writer gets the old index or the new one, never a mix.

    Raises:
        GroundingFileError: a file is missing or damaged, or a file of the folder's own is outside of it.
        GroundingValueError: another format version.
    """
    folder = Path(folder)
    for _ in range(TRIES):
        for name in (ENTRIES_FILE, VECTORS_FILE):
            if not resolve(folder, name).is_file():
                raise GroundingFileError(
                    f"{str(folder)!r} is no image index: it has no {name}. `visual-ground index convert` reads the "
                    "embeddings of other tools."
                )
        about = _read_about(resolve(folder, ENTRIES_FILE))
        try:
            contents = _read_parts(folder, about, rules)
        except GroundingError:
            if _read_about(resolve(folder, ENTRIES_FILE)) == about:
                raise
        else:
            if _read_about(resolve(folder, ENTRIES_FILE)) == about:
                return contents
        time.sleep(PAUSE)
    raise GroundingFileError(f"{str(folder)!r} is written all the time; try again when its writers are done.")


def _read_parts(folder: Path, about: dict[str, Any], rules: LinkRules) -> IndexState:
    engine, table = ExactIndex.load(folder / VECTORS_FILE), read_table(folder / TABLE_FILE)
    if not len(engine) == table.num_rows == about["num_entries"] or engine.dim != about["dim"]:
        raise GroundingValueError(
            f"{str(folder)!r} holds {len(engine)} vectors of width {engine.dim} and {table.num_rows} entries; its "
            f"{ENTRIES_FILE} says {about['num_entries']} of width {about['dim']}. Save the index again."
        )
    if THUMBNAILS_FILE in about["checksums"]:
        table = table.append_column(THUMBNAIL, read_thumbnails(folder / THUMBNAILS_FILE, table.num_rows))
    found_by = _open_search(folder, engine, about)
    check_files(table, folder)
    removed = np.zeros(len(engine), dtype=bool)
    segment = Segment(table, given=False)
    rules = trusted(rules, resolve(folder, TABLE_FILE), resolve(folder, ENTRIES_FILE))
    entries = Entries((segment,), removed, about["has_images"], about["has_metadata"], about["next_id"])
    space = None if about[SPACE] is None else ImageSpace.from_dict(about[SPACE], engine.dim)
    return IndexState(found_by, entries, folder, rules, space, about[CAPTION_WEIGHT])


def _open_search(folder: Path, exact: ExactIndex, about: dict[str, Any]) -> VectorIndex:
    """Return what finds the vectors: the engine whose files the folder has, if they can be read; else `exact`."""
    for engine in SAVED_ENGINES:
        if resolve(folder, engine.FILES[-1]).is_file():
            try:
                return engine.read(folder, exact, about["checksums"].get(VECTORS_FILE))
            except GroundingError as error:
                logger.warning("The index is searched exactly, which is slower: %s", error)
    return exact


def _read_about(path: Path) -> dict[str, Any]:
    """Read and check `index.json`."""
    # Indexes that were made elsewhere have no space, and most have no captions in their vectors.
    about = {SPACE: None, CAPTION_WEIGHT: 0.0, **read_json(path, INDEX_FORMAT_VERSION)}
    if (
        set(about) != KEYS
        or not all(type(about[name]) is int and about[name] >= 0 for name in COUNTS)
        or not all(type(about[name]) is bool for name in FLAGS)
        or type(about["next_id"]) is not int
        or not isinstance(about["checksums"], dict)
        or type(about[CAPTION_WEIGHT]) not in (int, float)
        or not 0 <= about[CAPTION_WEIGHT] <= 1
    ):
        raise GroundingFileError(f"{path} is damaged: it does not hold {sorted(KEYS)}. Save the index again.")
    return about


def _checksum(path: Path) -> str:
    checksum = 0
    with open(path, "rb") as file:
        while chunk := file.read(1 << 22):
            checksum = zlib.crc32(chunk, checksum)
    return f"{checksum:08x}"
