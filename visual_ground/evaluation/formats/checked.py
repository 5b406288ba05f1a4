"""JSON of benchmarks, read key by key: what is missing or of another type is named with its file and entry."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from visual_ground.errors import GroundingFileError, GroundingValueError

KINDS = {str: "a string", int: "a whole number", float: "a number", list: "a list", dict: "an object"}


def read_json(path: Path) -> Any:
    """Return what a JSON file holds.

    Raises:
        GroundingFileError: it cannot be read, or is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise GroundingFileError(f"{path} cannot be read: {error.strerror or error}.") from error
    except ValueError as error:
        raise GroundingFileError(f"{path} is not JSON: {error}. Download it again.") from error


def find_file(folder: Path, names: Sequence[str], what: str) -> Path:
    """Return the first of several files that is there.

    Args:
        folder: the benchmark's.
        names: where the file may be in it, the official place first.
        what: what it holds, for the message.

    Raises:
        GroundingFileError: none is there.
    """
    for name in names:
        if (folder / name).is_file():
            return folder / name
    places = " or ".join(repr(name) for name in names)
    raise GroundingFileError(f"{folder} has no {what}: {places} is missing. Pass the folder that has it as data=.")


def take(entry: Any, key: str, kind: type, where: str) -> Any:
    """Return an entry's value of a key.

    Args:
        entry: what should be an object with that key.
        key: the key.
        kind: str, int, float, list or dict; whole numbers are floats too.
        where: the file and the entry, for messages.

    Raises:
        GroundingValueError: the key is missing, or its value is of another type.
    """
    if not isinstance(entry, Mapping) or key not in entry:
        found = sorted(entry) if isinstance(entry, Mapping) else type(entry).__name__
        raise GroundingValueError(f"{where} has no {key!r}, only {found}. Is this the official file?")
    value = entry[key]
    fits = isinstance(value, (int, float) if kind is float else kind) and not isinstance(value, bool)
    if not fits:
        raise GroundingValueError(f"{where}: {key!r} should be {KINDS[kind]}, got {str(value)[:80]!r}.")
    return value


def take_all(entry: Any, key: str, kind: type, where: str) -> list[Any]:
    """Return an entry's list whose members are all of one type; see `take`."""
    members: list[Any] = take(entry, key, list, where)
    for position, member in enumerate(members):
        take({key: member}, key, kind, f"{where}, {key}[{position}]")
    return members


def entries(value: Any, where: str) -> list[tuple[str, Any]]:
    """Return the members of a list, each with its place for messages.

    Raises:
        GroundingValueError: no list, or an empty one.
    """
    if not isinstance(value, list) or not value:
        found = "an empty list" if isinstance(value, list) else type(value).__name__
        raise GroundingValueError(f"{where} should be a list of entries, got {found}. Is this the official file?")
    return [(f"{where}, entry {position}", entry) for position, entry in enumerate(value)]


def check_unique(ids: Iterable[Any], where: str, what: str) -> None:
    """Raise where an id comes twice.

    Raises:
        GroundingValueError: names the first few.
    """
    seen: set[Any] = set()
    twice = [name for name in ids if name in seen or seen.add(name)]  # type: ignore[func-returns-value]
    if twice:
        raise GroundingValueError(f"{where}: {what} {twice[:5]} come twice ({len(twice)} in all); each must come once.")


def check_same_ids(ids: Iterable[Any], others: Iterable[Any], what: str, where: tuple[str, str]) -> None:
    """Raise where two files are not about the same ids.

    Raises:
        GroundingValueError: names the first few that only one of the files has.
    """
    one, other = set(ids), set(others)
    if one != other:
        raise GroundingValueError(
            f"{where[0]} and {where[1]} are not about the same {what}: only the first has {sorted(one - other)[:5]} "
            f"({len(one - other)}), only the second {sorted(other - one)[:5]} ({len(other - one)}). Take both files of "
            "the same split and year."
        )
