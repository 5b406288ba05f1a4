"""Where the images of an index come from: folders, files, tar shards and datasets, read one by one in a fixed order."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from visual_ground.errors import GroundingFileError, GroundingTypeError, GroundingValueError
from visual_ground.index.table.filters import fits_int64
from visual_ground.index.table.rows import COLUMN_TYPES
from visual_ground.rows import PROBLEM, picture_of, rows_by_number, undecoded
from visual_ground.storage.shards import read_shard
from visual_ground.storage.texts import is_unicode
from visual_ground.vision.formats import IMAGE_SUFFIXES
from visual_ground.vision.images import ImageLike
from visual_ground.vision.link_rules import is_url

# The usual names of a dataset's column of images, the likeliest first.
IMAGE_COLUMNS = ("image", "images", "jpg", "jpeg", "png", "webp", "img")
FEATURES_COLUMN = "image_features"  # As `GroundedModel.embed_images` calls what the encoder gives.


@dataclass(frozen=True)
class SourceImage:
    """An image that is to be indexed.

    Args:
        id: its name in the index; None for its number in the source.
        image: what is embedded: a PIL image, a path, `{"bytes": ..., "path": ...}`, or the encoder's features (f,).
        address: the path or URL that the index keeps; None if it has none.
        metadata: what the index keeps of it.
    """

    id: str | int | None
    image: ImageLike | Tensor
    address: str | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)


def described(source: Any) -> str:
    """Return by what a source is known again when a build of it is continued: its paths, or its kind and length."""
    paths = [source] if isinstance(source, (str, os.PathLike)) else source
    if isinstance(paths, Sequence) and paths and all(isinstance(one, (str, os.PathLike)) for one in paths):
        names = [os.fspath(one) for one in paths]
        digest = hashlib.sha256("\0".join(names).encode("utf-8", "surrogatepass")).hexdigest()[:16]
        return f"{len(names)} paths, {digest}, the first of which is {names[0]!r}"
    return f"a {type(source).__name__}{f' of {len(source)} rows' if hasattr(source, '__len__') else ''}"


def read_source(source: Any) -> Iterator[SourceImage]:
    """Yield the images of a source, always in the same order.

    Args:
        source: a path, or several: of image files, of folders, which are read with all below them, and of tar shards
            as webdataset has them (`a.jpg`, `a.txt`, `a.json`); or a dataset as in training, or any other iterable of
            rows with an image in one of `IMAGE_COLUMNS`, or the encoder's features of it in `FEATURES_COLUMN`; other
            columns become metadata.

    Raises:
        GroundingFileError: a path that leads nowhere.
        GroundingTypeError: none of these.
    """
    if isinstance(source, (str, os.PathLike)):
        source = [source]
    if isinstance(source, Sequence) and all(isinstance(one, (str, os.PathLike)) for one in source):
        seen: set[str] = set()
        for image in (image for path in source for image in _read_path(Path(path))):
            if image.address not in seen:  # A file may be named besides the folder that it is in.
                seen.add(str(image.address))
                yield image
    elif hasattr(source, "__len__") and hasattr(source, "__getitem__"):
        yield from _read_rows(undecoded(rows_by_number(source), IMAGE_COLUMNS))
    elif isinstance(source, Iterable):
        yield from _read_rows(undecoded(source, IMAGE_COLUMNS))
    else:
        raise GroundingTypeError(f"A source must be paths or rows with images, got {type(source).__name__}.")


def _read_path(path: Path) -> Iterator[SourceImage]:
    if path.is_dir():
        # Hidden files and folders hold no pictures: thumbnails, and the ._a.png that macOS puts beside a.png.
        for file in sorted(p for p in path.rglob("*") if p.is_file()):
            if any(part.startswith(".") for part in file.relative_to(path).parts):
                continue
            if file.suffix.lower() in IMAGE_SUFFIXES or file.suffix == ".tar":
                yield from _read_path(file)
    elif not path.is_file():
        raise GroundingFileError(f"There is no file or folder {str(path)!r} to index.")
    elif path.suffix == ".tar":
        yield from _read_shard(path)
    else:
        # The index keeps the whole path, so that the picture is found from wherever the index is used.
        yield SourceImage(str(path), str(path), os.path.abspath(path))


def _read_shard(path: Path) -> Iterator[SourceImage]:
    """Yield the images of a tar shard; a damaged part of it is one that cannot be read."""
    for sample in read_shard(path):
        if sample.problem is not None:
            yield SourceImage(f"{path.name}: {sample.problem}", {"bytes": b"", "path": sample.problem})
        else:
            yield from _sample(path, sample.key, sample.members)


def _sample(path: Path, key: str, members: Mapping[str, bytes]) -> Iterator[SourceImage]:
    suffix = next((one for one in members if f".{one}" in IMAGE_SUFFIXES), None)
    if suffix is None:
        return
    metadata: dict[str, Any] = {}
    if "json" in members:
        try:
            values = json.loads(members["json"])
        except (ValueError, RecursionError):
            values = None
        metadata |= _plain(values) if isinstance(values, dict) else {}
    if "txt" in members:
        metadata["caption"] = members["txt"].decode("utf-8", errors="replace").strip()
    address = _url(metadata)
    image = {"bytes": members[suffix], "path": f"{key}.{suffix}"}
    yield SourceImage(f"{path.name}/{key}", image, address, metadata)


def _read_rows(rows: Iterable[Any]) -> Iterator[SourceImage]:
    column = None
    for number, row in enumerate(rows):
        if not isinstance(row, Mapping):
            raise GroundingTypeError(f"A row must be a mapping with an image, got {type(row).__name__}.")
        if row.get(PROBLEM):
            yield SourceImage(f"row {number}", {"bytes": b"", "path": f"row {number}: {row[PROBLEM]}"})
            continue
        if column is None:
            column = next((name for name in (FEATURES_COLUMN, *IMAGE_COLUMNS) if name in row), None)
        if column is None:
            columns = [*IMAGE_COLUMNS, FEATURES_COLUMN]
            raise GroundingValueError(f"A row needs an image in a column {columns}; it has {sorted(row)}.")
        image, id = picture_of(row.get(column)), row.get("id")
        if column == FEATURES_COLUMN and image is not None:
            image = torch.as_tensor(image, dtype=torch.float32)
        address = _url(row) or (image if isinstance(image, str) else None)
        metadata = _plain({name: value for name, value in row.items() if name not in (column, "id", "url")})
        yield SourceImage(id if isinstance(id, (str, int)) else None, image, address, metadata)


def _url(values: Mapping[str, Any]) -> str | None:
    """Return the address on the network in `url`. A path there, which could lead anywhere, is none."""
    address = values.get("url")
    return address if isinstance(address, str) and is_url(address) else None


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """Keep strings, numbers and booleans; the rest, such as arrays of a dataset, is not for an index."""
    kept = {name: value for name, value in values.items() if type(value) in COLUMN_TYPES and isinstance(name, str)}
    return {name: value for name, value in kept.items() if is_unicode(name) and _can_be_kept(value)}


def _can_be_kept(value: Any) -> bool:
    """Return whether a string has whole characters, and a number is finite and of 64 bits at most."""
    if isinstance(value, str):
        return is_unicode(value)
    return math.isfinite(value) if isinstance(value, float) else fits_int64(value)
