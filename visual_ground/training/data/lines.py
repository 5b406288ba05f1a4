"""Tables in files of text, row by row: what of them cannot be read is a row with a `PROBLEM`.

`datasets` reads such files itself where nothing in them is damaged; it would stop at what is, or read other rows.
"""

from __future__ import annotations

import csv
import json
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from glob import glob
from itertools import zip_longest
from typing import Any

from visual_ground.training.data.files import dated, generated
from visual_ground.training.data.rows import PROBLEM, is_unicode

# The longest field, in characters; the csv module's own limit would leave out pictures that are kept as base64.
LONGEST_FIELD = 2**31 - 1
SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")  # Half of a pair, in JSON; Arrow refuses it where the other is missing.
UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")  # As Excel writes "Unicode text".


def line_rows(pattern: str, streaming: bool) -> Any | None:
    """Return the rows of files of JSON or fields, or None where nothing is damaged and `datasets` can read them."""
    files = sorted(glob(pattern))
    names: set[str] = set()
    damaged = False
    for file in files:
        # Rows of a list come only where it is damaged.
        damaged |= _encoding(file) == "utf-16" or (not _is_table(file) and _is_list(file) and any(_read_rows(file)))
        for row in _read_rows(file):
            damaged |= PROBLEM in row
            names |= set(row)
    if not damaged or names == {PROBLEM}:
        return None
    return generated(_read_tables, {"files": dated(files), "names": [sorted(names)] * len(files)}, None, streaming)


def _read_tables(files: Sequence[tuple[str, int, int]], names: Sequence[Sequence[str]]) -> Iterator[dict[str, Any]]:
    for (file, _, _), columns in zip(files, names, strict=True):
        for row in _read_rows(file):
            yield {name: row.get(name) for name in columns}


def _read_rows(file: str) -> Iterator[dict[str, Any]]:
    """Yield the rows of a file; nothing where JSON stands in it as one whole list or object, and is not damaged."""
    where = os.path.basename(file)
    # A caption may hold a carriage return, which ends lines only where nothing else does.
    with open(file, encoding=_encoding(file), errors="replace", newline="\n" if _has(file, b"\n") else "") as lines:
        if _is_table(file):
            yield from _fields(_Lines(lines), where, file.lower().endswith(".tsv"))
        elif _is_list(file):
            yield from _list_entries(file, where)
        else:
            for number, line in enumerate(lines, 1):
                if number == 1 and not line.lstrip().startswith("{"):
                    return
                if line.strip():
                    yield _json_object(line, f"line {number} of {where}")


def _is_table(file: str) -> bool:
    return file.lower().endswith((".csv", ".tsv"))


def _is_list(file: str) -> bool:
    with open(file, "rb") as data:
        return data.read(1024).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"[")


def _encoding(file: str) -> str:
    with open(file, "rb") as data:
        return "utf-16" if data.read(2) in UTF16_MARKS else "utf-8-sig"


def _has(file: str, mark: bytes) -> bool:
    with open(file, "rb") as data:
        return any(mark in part for part in iter(lambda: data.read(1 << 20), b""))


def _json_object(line: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        return {PROBLEM: f"{where} is no JSON: {error}"}
    return _checked_object(row, where)


def _checked_object(row: Any, where: str) -> dict[str, Any]:
    try:
        json.dumps(row, ensure_ascii=False).encode("utf-8")
    except ValueError as error:
        return {PROBLEM: f"{where} is no JSON: {error}"}
    return row if isinstance(row, dict) else {PROBLEM: f"{where} is no JSON object"}


def _list_entries(file: str, where: str) -> Iterator[dict[str, Any]]:
    """Yield the entries of a file that is one list, where it is a list and `datasets` cannot read all of it."""
    with open(file, "rb") as data:
        raw = data.read()
    text = raw.decode("utf-8-sig", errors="replace")
    if not SURROGATE.search(raw) and "\ufffd" not in text:
        return
    try:
        entries = json.loads(text)
    except (ValueError, RecursionError):  # As a whole; `datasets` says what is wrong.
        return
    if "\ufffd" not in text and is_unicode(json.dumps(entries, ensure_ascii=False)):
        return
    for number, entry in enumerate(entries):
        yield _checked_object(entry, f"entry {number} of {where}")


class _Lines:
    """Lines that can be put back; it knows those of the present row."""

    def __init__(self, lines: Iterator[str]) -> None:
        self._lines, self._waiting, self.number = lines, list[str](), 0
        self.of_row: list[str] = []
        self.are_over = False  # That the present row asked for more lines than there are.

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = self._waiting.pop() if self._waiting else next(self._lines, None)
        if line is None:
            self.are_over = True
            raise StopIteration
        self.number += 1
        self.of_row.append(line)
        return line

    def start_row(self) -> None:
        """Forget the lines of the row before."""
        self.of_row, self.are_over = [], False

    def keep_first(self) -> None:
        """Put back all lines of the present row but the first."""
        later = self.of_row[1:]
        self._waiting += reversed(later)
        self.number -= len(later)


def _fields(lines: _Lines, where: str, by_tabs: bool) -> Iterator[dict[str, Any]]:
    """Yield the rows of a table of fields; one with more fields than its head would be read as something else."""
    reader = csv.reader(lines, delimiter="\t", quoting=csv.QUOTE_NONE) if by_tabs else csv.reader(lines)
    head: list[str] = []
    while True:
        lines.start_row()
        try:
            with _long_fields():
                fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            why = "a line break within a field" if "\r" in lines.of_row[0].rstrip("\r\n") else error
            yield {PROBLEM: f"line {lines.number} of {where} cannot be read: {why}"}
            continue
        if (len(lines.of_row) > 1 or lines.are_over) and not _closes_its_quotes(lines.of_row):
            # The rows after it would be taken for a part of this field.
            lines.keep_first()
            yield {PROBLEM: f"line {lines.number} of {where} has a quotation mark that nothing closes"}
        elif not head:
            head = fields
        elif len(fields) > len(head):
            about = f"line {lines.number} of {where} has {len(fields)} fields, and the head has {len(head)}"
            yield {PROBLEM: about}
        elif fields:
            yield {name: value or None for name, value in zip_longest(head, fields)}


@contextmanager
def _long_fields() -> Iterator[None]:
    """Let the csv module read long fields; its limit is the whole program's."""
    limit = csv.field_size_limit(LONGEST_FIELD)
    try:
        yield
    finally:
        csv.field_size_limit(limit)


def _closes_its_quotes(lines: Sequence[str]) -> bool:
    """Return whether a row of several lines is one: after the mark that closes a field, the field ends."""
    # The marks around fields are two each, and those within are doubled. Else one that nothing closes has taken the
    # opening mark of a later row for its own end.
    if sum(line.count('"') for line in lines) % 2:
        return False
    try:
        with _long_fields():
            return len(list(csv.reader(lines, strict=True))) == 1
    except csv.Error:
        return False
