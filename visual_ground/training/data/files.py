"""Rows of files with damage in them: what cannot be read is a row with a `PROBLEM`, where `datasets` would stop.

Tar shards are read here; tables only where some of their lines are damaged, and else by `datasets`.
"""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterator, Sequence
from glob import glob
from itertools import chain, islice, zip_longest
from typing import Any, TextIO

from visual_ground.errors import GroundingFileError
from visual_ground.prompts.types import IMAGE_SUFFIXES
from visual_ground.storage.shards import read_shard
from visual_ground.training.data.rows import KEY, PROBLEM

# Samples of shards in which the columns are looked for; one of them may lack some.
INSPECTED = 100


def shard_rows(files: Sequence[str], streaming: bool) -> Any:
    """Return the rows of tar shards: a column for each kind of member, images as files and all else as text.

    Args:
        files: the shards.
        streaming: as in `load_rows`.

    Raises:
        GroundingFileError: there is no sample in them.
    """
    import datasets

    samples = islice((s for file in files for s in read_shard(file) if s.problem is None), INSPECTED)
    names = sorted({name for sample in samples for name in sample.members})
    if not names:
        raise GroundingFileError(f"There is no sample in the shards {list(files)[:3]}: are they tar files, and whole?")
    kinds: dict[str, Any] = {name: datasets.Image() if _is_image(name) else datasets.Value("string") for name in names}
    features = datasets.Features({KEY: datasets.Value("string"), PROBLEM: datasets.Value("string"), **kinds})
    return _generated(_read_shards, {"files": _dated(files), "names": [names] * len(files)}, features, streaming)


def _read_shards(files: Sequence[tuple[str, int, int]], names: Sequence[Sequence[str]]) -> Iterator[dict[str, Any]]:
    for (file, _, _), columns in zip(files, names, strict=True):
        for sample in read_shard(file):
            row: dict[str, Any] = {KEY: sample.key, PROBLEM: sample.problem}
            for name in columns:
                data = sample.members.get(name)
                if _is_image(name):
                    row[name] = None if data is None else {"bytes": data, "path": f"{sample.key}.{name}"}
                else:
                    row[name] = None if data is None else data.decode("utf-8", errors="replace")
            yield row


def _is_image(name: str) -> bool:
    return f".{name.rpartition('.')[2]}" in IMAGE_SUFFIXES


def line_rows(pattern: str, streaming: bool) -> Any | None:
    """Return the rows of files of JSON lines or fields, or None where no line is damaged and `datasets` can read them.

    Args:
        pattern: path of the file, or a pattern of several.
        streaming: as in `load_rows`.
    """
    files = sorted(glob(pattern))
    names: set[str] = set()
    damaged = False
    for row in chain.from_iterable(map(_read_lines, files)):
        damaged |= PROBLEM in row
        names |= set(row)
    if not damaged or names == {PROBLEM}:
        return None
    return _generated(_read_tables, {"files": _dated(files), "names": [sorted(names)] * len(files)}, None, streaming)


def _read_tables(files: Sequence[tuple[str, int, int]], names: Sequence[Sequence[str]]) -> Iterator[dict[str, Any]]:
    for (file, _, _), columns in zip(files, names, strict=True):
        for row in _read_lines(file):
            yield {name: row.get(name) for name in columns}


def _read_lines(file: str) -> Iterator[dict[str, Any]]:
    """Yield the rows of a file of lines; nothing where JSON stands in it as one list."""
    with open(file, encoding="utf-8-sig", errors="replace", newline="") as lines:
        where = os.path.basename(file)
        if file.lower().endswith((".csv", ".tsv")):
            yield from _fields(lines, where, file.lower().endswith(".tsv"))
            return
        for number, line in enumerate(lines, 1):
            if number == 1 and not line.lstrip().startswith("{"):
                return
            if line.strip():
                yield _json_object(line, f"line {number} of {where}")


def _json_object(line: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
        if "\\u" in line:  # Half of a surrogate pair, which Arrow refuses.
            json.dumps(row, ensure_ascii=False).encode("utf-8")
    except (ValueError, RecursionError) as error:
        return {PROBLEM: f"{where} is no JSON: {error}"}
    return row if isinstance(row, dict) else {PROBLEM: f"{where} is no JSON object"}


def _fields(lines: TextIO, where: str, by_tabs: bool) -> Iterator[dict[str, Any]]:
    """Yield the rows of a table of fields; one with more fields than its head would be read as something else."""
    reader = csv.reader(lines, delimiter="\t", quoting=csv.QUOTE_NONE) if by_tabs else csv.reader(lines)
    head: list[str] = []
    while True:
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield {PROBLEM: f"line {reader.line_num} of {where} cannot be read: {error}"}
            continue
        if not head:
            head = fields
        elif len(fields) > len(head):
            about = f"line {reader.line_num} of {where} has {len(fields)} fields, and the head has {len(head)}"
            yield {PROBLEM: about}
        elif fields:
            yield {name: value or None for name, value in zip_longest(head, fields)}


def readable(rows: Any) -> Any:
    """Return a table of `datasets` in which text that is no UTF-8 is marked, as it is in files of text."""
    import datasets

    if isinstance(rows, datasets.IterableDataset):
        if rows.features is None:
            return rows
        marked = rows.with_format("arrow").map(marked_table, batched=True, features=rows.features)
        return marked.with_format(None)
    if all(_is_valid(chunk) for column in rows.data.columns for chunk in column.chunks):
        return rows
    marked = rows.with_format("arrow").map(marked_table, batched=True, features=rows.features)
    return marked.with_format(None)


def marked_table(table: Any) -> Any:
    """Return an Arrow table in which the bytes of a text that are no UTF-8 are replaced by U+FFFD."""
    import pyarrow as pa

    columns = [pa.chunked_array([_marked(chunk) for chunk in one.chunks], one.type) for one in table.columns]
    return pa.table(columns, schema=table.schema)


def _marked(values: Any) -> Any:
    import pyarrow as pa

    if _is_valid(values):
        return values
    kind = values.type
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        whole = pa.concat_arrays([values])  # Without an offset, so that offsets and values belong together.
        return type(values).from_arrays(whole.offsets, _marked(whole.values), mask=whole.is_null())
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        return values
    raw = values.cast(pa.large_binary() if pa.types.is_large_string(kind) else pa.binary()).to_pylist()
    return pa.array([None if one is None else one.decode("utf-8", errors="replace") for one in raw], kind)


def _is_valid(values: Any) -> bool:
    import pyarrow as pa

    kind = values.type
    texts = kind.value_type if pa.types.is_list(kind) or pa.types.is_large_list(kind) else kind
    if not (pa.types.is_string(texts) or pa.types.is_large_string(texts)):
        return True
    try:
        values.validate(full=True)
    except pa.ArrowInvalid:
        return False
    return True


def _dated(files: Sequence[str]) -> list[tuple[str, int, int]]:
    """Return files with their times and sizes, so that `datasets` does not take an older copy for them."""
    return [(file, (about := os.stat(file)).st_mtime_ns, about.st_size) for file in files]


def _generated(read: Any, arguments: dict[str, Any], features: Any, streaming: bool) -> Any:
    import datasets

    if streaming:  # Its lists of arguments, one entry for each file, are split among processes.
        return datasets.IterableDataset.from_generator(read, features=features, gen_kwargs=arguments)
    return datasets.Dataset.from_generator(read, features=features, gen_kwargs=arguments)
