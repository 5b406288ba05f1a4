"""The official files of a task, read so that an error names the file, the entry and the key."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from visual_ground.errors import GroundingFileError, GroundingValueError
from visual_ground.vision.formats import IMAGE_SUFFIXES

T = TypeVar("T")
KINDS = {
    dict: "an object",
    list: "a list",
    str: "a string",
    int: "a whole number",
    float: "a number",
    bool: "a bool",
    object: "a value",
}


def find_file(data: str | os.PathLike[str], name: str) -> Path:
    """Return the path of an official file, in the folder of the data or in a folder within it.

    Raises:
        GroundingFileError: no such folder or file, or several of the name.
    """
    folder = Path(data)
    if not folder.is_dir():
        raise GroundingFileError(f"data={str(folder)!r} is no folder. Give the one that has {name!r} in it.")
    if (folder / name).is_file():
        return folder / name
    found = sorted(folder.rglob(name))
    if len(found) != 1:
        there = sorted(path.name for path in folder.rglob("*.json"))[:8]
        what = f"{[str(path) for path in found]} are several" if found else f"it has {there or 'no .json files'}"
        raise GroundingFileError(
            f"{str(folder)!r} must hold one file {name!r}; {what}. docs/evaluation.md shows the folder of each task."
        )
    return found[0]


def read_json(path: Path, kind: type[T]) -> T:
    """Return the content of a JSON file, which is an object (`dict`) or a list.

    Raises:
        GroundingFileError: cannot be read, no JSON, or of the other kind.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise GroundingFileError(f"{str(path)!r} cannot be read as JSON: {error}. Fetch it again.") from error
    if not isinstance(value, kind):
        raise GroundingFileError(
            f"{str(path)!r} must hold {KINDS[kind]}, got {_kind_of(value)}. This is another file than the task's."
        )
    return value


def entry_of(mapping: Any, key: str, kind: type[T], where: str) -> T:
    """Return an entry of a JSON object.

    Args:
        mapping: the object.
        key: which entry.
        kind: `dict`, `list`, `str`, `int` or `float`; whole numbers are numbers too.
        where: names the object in messages: file and place.

    Raises:
        GroundingValueError: there is no such entry, or it is of another kind.
    """
    if not isinstance(mapping, Mapping):
        raise GroundingValueError(f"{where} must be an object with {key!r}, got {_kind_of(mapping)}.")
    if key not in mapping:
        raise GroundingValueError(f"{where} has no {key!r}, only {sorted(map(str, mapping))[:12]}.")
    value = mapping[key]
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise GroundingValueError(f"{where}: {key!r} must be {KINDS.get(kind, kind.__name__)}, got {_kind_of(value)}.")
    return value


def entries_of(mapping: Any, key: str, kind: type[T], where: str) -> list[T]:
    """Return an entry that is a list of one kind of values; see `entry_of`."""
    values = entry_of(mapping, key, list, where)
    return [entry_of({key: value}, key, kind, f"{where}, {key}[{number}]") for number, value in enumerate(values)]


def placed(values: Any, where: str) -> list[tuple[str, Any]]:
    """Return the values of a list, each with its place for messages; raise GroundingValueError where there are none."""
    if not isinstance(values, list) or not values:
        found = "an empty one" if isinstance(values, list) else _kind_of(values)
        raise GroundingValueError(
            f"{where} must be a list of entries, got {found}. This is another file than the task's."
        )
    return [(f"{where}, entry {number}", value) for number, value in enumerate(values)]


def check_same_ids(ids: Iterable[Any], others: Iterable[Any], what: str, where: tuple[str, str]) -> None:
    """Raise GroundingValueError where only one of two files is about an id, naming the first few."""
    one, other = set(ids), set(others)
    if one != other:
        raise GroundingValueError(
            f"{where[0]} and {where[1]} are not about the same {what}: only the first has {sorted(one - other)[:5]} "
            f"({len(one - other)}), only the second {sorted(other - one)[:5]} ({len(other - one)}). Take both files of "
            "the same split and year."
        )


def number_in(sequence: Sequence[T], number: int, where: str) -> T:
    """Return an entry by number; raise GroundingValueError where there are not so many."""
    if not 0 <= number < len(sequence):
        raise GroundingValueError(f"{where} is {number}, and there are {len(sequence)} entries, numbered from 0.")
    return sequence[number]


def check_unique(ids: Iterable[Any], what: str) -> None:
    """Raise GroundingValueError where an id comes twice, naming some of them."""
    seen, twice = set(), []
    for one in ids:
        if one in seen:
            twice.append(one)
        seen.add(one)
    if twice:
        raise GroundingValueError(f"{what}: these ids come twice: {twice[:5]}. Each must come once.")


def choose(value: T, allowed: Sequence[T], name: str) -> T:
    """Return a setting that is one of those allowed, or raise GroundingValueError."""
    if value not in allowed:
        raise GroundingValueError(f"{name} must be one of {list(allowed)}, got {value!r}.")
    return value


class ImageFolder:
    """The image files in a folder and the folders within it, by name."""

    def __init__(self, data: str | os.PathLike[str]) -> None:
        self.folder = Path(data)
        self._paths: dict[str, list[Path]] = {}
        for path in sorted(self.folder.rglob("*")):
            if path.suffix.lower() in IMAGE_SUFFIXES:
                for key in (path.name, path.stem):
                    self._paths.setdefault(key, []).append(path)

    def path(self, name: str) -> Path:
        """Return the path of an image by its file's name, with or without its ending; it need not be there."""
        found = self._paths.get(name, [])
        if len(found) > 1:
            raise GroundingValueError(f"Several images have the name {name!r}: {list(map(str, found[:4]))}. Keep one.")
        return found[0] if found else self.folder / name


def _kind_of(value: Any) -> str:
    return next((words for kind, words in KINDS.items() if type(value) is kind), type(value).__name__)
