"""Datasets by name: what a name on the command line stands for, loaded by `datasets`' own loaders."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from visual_ground.errors import GroundingFileError, GroundingValueError
from visual_ground.training.data.columns import Columns

LOADERS = {
    ".csv": "csv",
    ".tsv": "csv",
    ".json": "json",
    ".jsonl": "json",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".tar": "webdataset",
}
IMAGE_NAMES = ("image", "images", "jpg", "jpeg", "png", "webp", "image_path", "file_name")
CAPTION_NAMES = ("caption", "captions", "text", "txt", "sentence", "sentences")
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
    from datasets.exceptions import DatasetNotFoundError

    path, options = Path(name), {"split": split, "streaming": streaming}
    try:
        if path.is_dir():
            return _load_folder(path, options)
        if path.suffix in LOADERS:
            more = {"sep": "\t"} if path.suffix == ".tsv" else {}
            return load_dataset(LOADERS[path.suffix], data_files={split: str(path)}, **options, **more)
        return load_dataset(name, **options)
    except (OSError, ValueError, DatasetNotFoundError) as error:
        raise GroundingFileError(f"The dataset {name!r} cannot be loaded: {error}") from error


def _load_folder(path: Path, options: dict[str, Any]) -> Any:
    """Load a folder; img2dataset puts a table beside each of its tar shards, so shards come first."""
    from datasets import load_dataset

    for suffix in (".tar", ".parquet"):
        if files := sorted(str(file) for file in path.rglob(f"*{suffix}")):
            return load_dataset(LOADERS[suffix], data_files={options["split"]: files}, **options)
    return load_dataset("imagefolder", data_dir=str(path), **options)


def find_columns(names: Sequence[str], image: str | None = None, caption: str | None = None) -> Columns:
    """Return where the images and captions are: the columns that are named, or else those with a usual name.

    Args:
        names: the dataset's columns.
        image: the image column, None to find it.
        caption: the caption column, None to find it.

    Raises:
        GroundingValueError: no such column; those there are are listed.

    Example:
        >>> find_columns(["__key__", "jpg", "json", "txt"])
        Columns(image='jpg', caption='txt', folder=None)
    """
    found_image = next((n for n in ((image,) if image else IMAGE_NAMES) if n in names), None)
    found_caption = next((n for n in ((caption,) if caption else CAPTION_NAMES) if n in names), None)
    if found_image is None or found_caption is None:
        asked = [(found_image, image or "one for each image"), (found_caption, caption or "one for each caption")]
        missing = [name for found, name in asked if found is None]
        raise GroundingValueError(
            f"The dataset has no columns {missing}; its columns are {list(names)}. Name them: --image-column, "
            "--caption-column."
        )
    return Columns(found_image, found_caption)


def column_names(rows: Any) -> Iterable[str]:
    """Return the columns of a `datasets` dataset; a stream may have to be opened for them."""
    return rows.column_names or list(next(iter(rows), {}))


def folder_of(name: str) -> str | None:
    """Return where a table's relative paths start: beside it."""
    path = Path(name)
    return str(path.parent) if path.suffix in LOADERS and "*" not in name else None
