"""Rows by number: one way to read whatever a dataset is, for training, evaluation and indexes."""

from __future__ import annotations

import numbers
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from visual_ground.errors import GroundingTypeError

# The key under which a row says why it could not be read.
PROBLEM = "__problem__"
# What tables of other packages than `datasets` offer to become a list of rows: pandas, polars, pyarrow.
TO_ROWS = (("itertuples", "to_dict", ("records",)), ("iter_rows", "to_dicts", ()), ("to_pylist", "to_pylist", ()))


class RowsByNumber(Sequence[Any]):
    """Some rows of anything with rows by number; each is read when it is needed, and none is kept.

    A torch dataset need not raise IndexError at its end, and one over a dictionary counts from 0 all the same, so
    rows are asked for by number and never iterated over. One that cannot be read, be it that somebody's own dataset
    opens a damaged picture there, has a `PROBLEM` and nothing else, and so is left out where rows may be.

    Args:
        source: gives a row for each number.
        picked: the numbers of the rows; all if None.

    Example:
        >>> list(RowsByNumber([{"n": 1}, {"n": 2}, {"n": 3}]).select([2, 0]))
        [{'n': 3}, {'n': 1}]
    """

    def __init__(self, source: Any, picked: Sequence[int] | None = None) -> None:
        self.source = source
        self.picked: Sequence[int] = range(len(source)) if picked is None else picked

    def __len__(self) -> int:
        return len(self.picked)

    def __getitem__(self, number: Any) -> Any:
        return self._read(self.picked[number])

    def __iter__(self) -> Iterator[Any]:
        return map(self._read, self.picked)

    def _read(self, number: int) -> Any:
        try:
            row = self.source[number]
        except Exception as error:  # A dataset may raise anything.
            return {PROBLEM: f"it cannot be read ({type(error).__name__}: {error})"}
        return row if isinstance(row, Mapping) else {PROBLEM: f"it is a {type(row).__name__} and no row"}

    def select(self, indices: Sequence[int]) -> RowsByNumber:
        """Return the rows at these indices."""
        return RowsByNumber(self.source, [self.picked[i] for i in indices])


def rows_by_number(rows: Any) -> Any:
    """Return one dataset as rows by number; a `datasets` dataset without a transform stays as it is."""
    import datasets

    if isinstance(rows, (datasets.IterableDataset, RowsByNumber)):
        return rows
    if isinstance(rows, datasets.Dataset):
        return _formatted(rows)
    if isinstance(rows, Mapping):
        raise GroundingTypeError(
            f"A dataset is a sequence of rows, got a {type(rows).__name__} with {list(rows)[:5]}. Pass one of its "
            "splits, such as ds['train']; make one of columns with datasets.Dataset.from_dict(...)."
        )
    for mark, method, options in TO_ROWS:
        if hasattr(rows, mark):
            rows = getattr(rows, method)(*options)
    if isinstance(rows, (str, bytes)) or not (hasattr(rows, "__getitem__") and _has_length(rows)):
        raise GroundingTypeError(
            "A dataset must have len() and rows by number, or be a datasets.IterableDataset, got "
            f"{type(rows).__name__}. Files and folders are read by datasets.load_dataset, and "
            "datasets.IterableDataset.from_generator makes a stream of anything that can be iterated over."
        )
    # Rows of another kind are no dataset; later ones are left out one by one.
    if len(rows) and (kind := _kind_of_first(rows)) is not None:
        raise GroundingTypeError(
            f"Row 0 of the dataset is a {kind}; a row must be a dictionary, with an image and what is known of it."
        )
    return RowsByNumber(rows)


def undecoded(rows: Any, columns: Iterable[str]) -> Any:
    """Return a `datasets` dataset whose images in some columns are files, so that other processes can decode them.

    A column may have an image, or a list of images, in each row. Anything but a `datasets` dataset stays as it is.
    """
    import datasets

    if not isinstance(rows, (datasets.Dataset, datasets.IterableDataset)):
        return rows
    rows, as_file = rows.with_format(None), datasets.Image(decode=False)
    for name in columns:
        kind: Any = (rows.features or {}).get(name)
        if isinstance(kind, datasets.Image):
            rows = rows.cast_column(name, as_file)
        elif isinstance(getattr(kind, "feature", None), datasets.Image):
            rows = rows.cast_column(name, type(kind)(as_file))
    return rows


def _kind_of_first(rows: Any) -> str | None:
    """Return the kind of the first row; None if it is a mapping, or cannot be read."""
    try:
        first = rows[0]
    except Exception:  # As for any row, see `RowsByNumber`.
        return None
    return None if isinstance(first, Mapping) else type(first).__name__


def _has_length(rows: Any) -> bool:
    """Return whether there is a number of rows: torch's `ChainDataset` has `__len__`, which raises for streams."""
    try:
        return len(rows) >= 0
    except TypeError:
        return False


def picture_of(value: Any) -> Any:
    """Return a picture that a table keeps as lists of numbers, as an array; everything else as it is.

    Example:
        >>> picture_of([[[0, 0, 0], [255, 255, 255]]]).shape, picture_of(["a.png", "b.png"])
        ((1, 2, 3), ['a.png', 'b.png'])
    """
    depth, leaf = 0, value
    while isinstance(leaf, (list, tuple)) and leaf:
        depth, leaf = depth + 1, leaf[0]
    if depth not in (2, 3) or not isinstance(leaf, numbers.Real):
        return value
    try:
        return np.array(value)
    except ValueError:  # Lines of different lengths are no picture.
        return value


def _formatted(rows: Any) -> Any:
    """Return the rows of a `datasets.Dataset` with the columns and the transform that its format has."""
    wanted = rows.format
    if wanted["type"] == "custom":
        return RowsByNumber(rows)  # The transform gives the row as it is to be used.
    rows = rows.with_format(None)
    hidden = set(rows.column_names) - set(wanted["columns"])
    return rows.remove_columns(sorted(hidden)) if hidden and not wanted["output_all_columns"] else rows
