"""Datasets by name, as on the command line, loaded by the loaders of `datasets`."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from glob import glob
from pathlib import Path
from typing import Any

from visual_ground.errors import GroundingFileError, GroundingValueError
from visual_ground.training.data.columns import Columns
from visual_ground.training.data.files import readable, shard_rows
from visual_ground.training.data.lines import line_rows

# Which loader of `datasets` reads files with this ending.
LOADERS = {
    ".csv": "csv",
    ".tsv": "csv",
    ".json": "json",
    ".jsonl": "json",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".tar": "webdataset",
}
# One line is one row, and a quotation mark is one: FROMAGe's tables are written so. What is no UTF-8 is marked, and
# later left out by row, in place of ending the run.
_MARKED: dict[str, Any] = {"encoding_errors": "replace"}
# Nan is bread, and None, null and NA are words too; only a field with nothing in it is empty.
_FIELDS: dict[str, Any] = {**_MARKED, "keep_default_na": False, "na_values": [""]}
OPTIONS: dict[str, dict[str, Any]] = {
    ".csv": _FIELDS,
    ".tsv": {**_FIELDS, "sep": "\t", "quoting": csv.QUOTE_NONE},
    ".json": _MARKED,
    ".jsonl": _MARKED,
}
# The usual names of columns, the likeliest first.
IMAGE_NAMES = ("image", "images", "jpg", "jpeg", "png", "webp", "image_path", "file_name")
CAPTION_NAMES = ("caption", "captions", "text", "txt", "sentence", "sentences")
# Rows of a stream that are shuffled among each other.
SHUFFLED = 1000


def load_rows(name: str, split: str = "train", streaming: bool = False) -> Any:
    """Load a dataset.

    Args:
        name: a folder of tar shards, parquet files, or images with a metadata file; one .tar, .csv, .tsv, .json,
            .jsonl, .parquet or .arrow file, or a pattern of them with "*"; or a Hub id.
        split: which part of it.
        streaming: read it row by row, in the order of its files, without a copy on the disk.

    Returns:
        A `datasets.Dataset`, or a `datasets.IterableDataset`.

    Raises:
        GroundingFileError: it cannot be loaded.
    """
    from datasets import load_dataset
    from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError

    path = Path(name)
    options: dict[str, Any] = {"split": split, "streaming": streaming}
    try:
        if path.is_dir():
            return _load_folder(path, options)
        return _load_files(path, options) if path.suffix.lower() in LOADERS else readable(load_dataset(name, **options))
    except StopIteration as error:  # What `datasets` raises for a file of JSON lines without any.
        raise GroundingFileError(f"The dataset {name!r} is empty.") from error
    except (OSError, ValueError, DatasetNotFoundError) as error:
        raise GroundingFileError(f"The dataset {name!r} cannot be loaded: {error}") from error
    except DatasetGenerationError as error:
        reason = error.__cause__ or error
        raise GroundingFileError(f"The dataset {name!r} is damaged, or of no one form: {reason}") from error


def _load_files(path: Path, options: dict[str, Any]) -> Any:
    """Load one file, or several by a pattern."""
    from datasets import load_dataset

    streaming, files = options["streaming"], {options["split"]: str(path)}
    if path.suffix.lower() == ".tar":
        return shard_rows(sorted(glob(str(path))) or [str(path)], streaming)
    if LOADERS[path.suffix.lower()] in ("json", "csv") and (rows := line_rows(str(path), streaming)) is not None:
        return rows
    return readable(
        load_dataset(LOADERS[path.suffix.lower()], data_files=files, **options, **OPTIONS.get(path.suffix.lower(), {}))
    )


def _load_folder(path: Path, options: dict[str, Any]) -> Any:
    """Load a folder; img2dataset puts a table beside each of its tar shards, so shards come first."""
    from datasets import load_dataset

    if shards := sorted(str(file) for file in path.rglob("*.tar")):
        return shard_rows(shards, options["streaming"])
    if files := sorted(str(file) for file in path.rglob("*.parquet")):
        return readable(load_dataset("parquet", data_files={options["split"]: files}, **options))
    return readable(load_dataset("imagefolder", data_dir=str(path), **options))


def find_columns(names: Sequence[str], image: str | None = None, caption: str | None = None) -> Columns:
    """Return where the images and captions are: in the given columns, or else in those with a usual name.

    Args:
        names: the dataset's columns.
        image: the image column, None to find it.
        caption: the caption column, None to find it.

    Raises:
        GroundingValueError: no such column; the error lists the dataset's columns.

    Example:
        >>> find_columns(["__key__", "jpg", "json", "txt"])
        Columns(image='jpg', caption='txt', folder=None)
    """
    image_column = next((name for name in ((image,) if image else IMAGE_NAMES) if name in names), None)
    caption_column = next((name for name in ((caption,) if caption else CAPTION_NAMES) if name in names), None)
    if image_column is None or caption_column is None:
        asked = [(image_column, image or "one for each image"), (caption_column, caption or "one for each caption")]
        missing = [name for column, name in asked if column is None]
        raise GroundingValueError(
            f"The dataset has no columns {missing}; its columns are {list(names)}. Name them: --image-column, "
            "--caption-column."
        )
    return Columns(image_column, caption_column)


def column_names(rows: Any) -> Iterable[str]:
    """Return the column names of a `datasets` dataset; some streams must be opened to know them.

    Raises:
        GroundingFileError: such a stream whose first row cannot be read.
    """
    try:
        return rows.column_names or list(next(iter(rows), {}))
    except Exception as error:  # Each of its loaders has errors of its own.
        raise GroundingFileError(f"The dataset is damaged ({type(error).__name__}: {error}).") from error


def folder_of(name: str) -> str | None:
    """Return the folder that a table's relative paths are relative to, its own, or None if it is not one file."""
    path = Path(name)
    return str(path.parent) if path.suffix.lower() in LOADERS and "*" not in name else None
