"""Indexes that other tools wrote: embeddings in .npy files, and what they stand for in parquet files."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from visual_ground.errors import GroundingFileError, GroundingValueError
from visual_ground.index.image_index import ImageIndex
from visual_ground.index.table.rows import COLUMN_TYPES
from visual_ground.vision.identity import ImageSpace

# Where clip-retrieval puts its embeddings and their metadata.
EMBEDDINGS_FOLDER, METADATA_FOLDER = "img_emb", "metadata"
# The usual names of the column of addresses, and of a column of names; the likeliest first.
ADDRESS_COLUMNS = ("image_path", "url", "uri", "path", "image")
ID_COLUMNS = ("id", "key", "image_path")
ROWS_AT_ONCE = 1 << 16


def read_embeddings(
    source: str | os.PathLike[str],
    table: str | os.PathLike[str] | None = None,
    dim: int | None = None,
    space: ImageSpace | None = None,
) -> ImageIndex:
    """Read embeddings of images as an index; they are scaled to length 1.

    Args:
        source: a folder of clip-retrieval or autofaiss, with `img_emb/*.npy` and `metadata/*.parquet`, or one .npy file
            of (n, q).
        table: a parquet file of n rows, for one .npy file; None if there is none.
        dim: the width that they must have; any if None.
        space: `model.image_space` of the model that they are for, which then is checked as for an index that it built.

    Raises:
        GroundingFileError: a file that is missing or damaged.
        GroundingValueError: another width, other numbers of rows, or embeddings that are not finite.
    """
    path = Path(source)
    arrays, tables = _files(path, table)
    index: ImageIndex | None = None
    for number, file in enumerate(arrays):
        vectors = _read_vectors(file, dim, space)
        first = 0 if index is None else len(index)
        ids, addresses, metadata = _read_rows(tables[number], len(vectors)) if tables else (None, None, None)
        ids = list(range(first, first + len(vectors))) if ids is None else ids
        if index is None:
            index, dim = ImageIndex(vectors, ids, addresses, metadata), vectors.shape[1]
        else:
            index.add(vectors, ids, addresses, metadata)
    assert index is not None
    # Strangers may have written where pictures are: only those inside the folder are opened.
    folder, entries = path if path.is_dir() else path.parent, index._state.entries.from_elsewhere()
    index._state = replace(index._state, entries=entries, folder=folder, space=space)
    return index


def _files(path: Path, table: str | os.PathLike[str] | None) -> tuple[list[Path], list[Path]]:
    """Return the files of embeddings and those of metadata."""
    if path.is_dir():
        arrays = sorted(path.glob(f"{EMBEDDINGS_FOLDER}/*.npy")) or sorted(path.glob("*.npy"))
        tables = sorted(path.glob(f"{METADATA_FOLDER}/*.parquet")) or sorted(path.glob("*.parquet"))
    else:
        arrays, tables = [path], [] if table is None else [Path(table)]
    if not arrays:
        raise GroundingFileError(
            f"{str(path)!r} holds no embeddings: neither {EMBEDDINGS_FOLDER}/*.npy, as clip-retrieval writes them, nor "
            "*.npy."
        )
    if tables and len(tables) != len(arrays):
        raise GroundingValueError(f"{str(path)!r} holds {len(arrays)} .npy files and {len(tables)} parquet files.")
    return arrays, tables


def _read_vectors(path: Path, dim: int | None, space: ImageSpace | None) -> torch.Tensor:
    dim = len(space.vectors[0]) if space is not None else dim
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise GroundingFileError(f"The embeddings {str(path)!r} cannot be read: {error}.") from error
    if array.ndim != 2 or array.dtype.kind != "f" or (dim is not None and array.shape[1] != dim):
        raise GroundingValueError(
            f"{str(path)!r} holds {array.dtype} of shape {array.shape}; expected floats of shape (n, "
            f"{'q' if dim is None else dim}){'' if space is None else f', as {space} makes them'}."
        )
    half = array.dtype == np.float16
    vectors = torch.empty(array.shape, dtype=torch.float16 if half else torch.float32)
    for start in range(0, len(array), ROWS_AT_ONCE):
        rows = torch.from_numpy(np.array(array[start : start + ROWS_AT_ONCE], dtype=np.float32))
        vectors[start : start + len(rows)] = torch.nn.functional.normalize(rows, dim=-1)
    return vectors


def _read_rows(path: Path, count: int) -> tuple[Any, Any, list[dict[str, Any]]]:
    """Return ids (None if no column has distinct ones), addresses (None likewise) and metadata."""
    try:
        table = pq.read_table(path, partitioning=None)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise GroundingFileError(f"The metadata {str(path)!r} cannot be read: {error}.") from error
    if table.num_rows != count:
        raise GroundingValueError(f"{str(path)!r} has {table.num_rows} rows, and there are {count} embeddings for it.")
    columns = {name: table[name].to_pylist() for name in table.column_names}
    ids = next((columns[name] for name in ID_COLUMNS if name in columns and _are_ids(columns[name])), None)
    address = next((name for name in ADDRESS_COLUMNS if name in columns), None)
    addresses = None if address is None else [one if isinstance(one, str) else None for one in columns[address]]
    kept = [name for name in columns if name not in ("id", address)]
    metadata = [{name: columns[name][row] for name in kept if _is_plain(columns[name][row])} for row in range(count)]
    return ids, addresses, metadata


def _are_ids(values: Sequence[Any]) -> bool:
    return all(type(value) in (str, int) for value in values) and len(set(values)) == len(values)


def _is_plain(value: Any) -> bool:
    return type(value) in COLUMN_TYPES and value == value and value not in (float("inf"), float("-inf"))
