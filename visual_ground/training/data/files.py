"""Rows of files with damage in them, where `datasets` would stop: tar shards, and text that is no UTF-8 in tables.

What cannot be read of a shard is a row with a `PROBLEM`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

from visual_ground.errors import GroundingFileError
from visual_ground.storage.shards import read_shard
from visual_ground.training.data.rows import KEY, PROBLEM
from visual_ground.vision.formats import IMAGE_SUFFIXES

# Samples of shards in which the columns are looked for; one of them may lack some.
INSPECTED = 100


def shard_rows(files: Sequence[str], streaming: bool) -> Any:
    """Return the rows of tar shards: a column for each kind of member, images as files and all else as text.

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
    return generated(_read_shards, {"files": dated(files), "names": [names] * len(files)}, features, streaming)


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
    """Return an Arrow array, with or without texts at any depth, in which each is UTF-8."""
    import pyarrow as pa

    if _is_valid(values):
        return values
    kind, types = values.type, pa.types
    if types.is_dictionary(kind):
        return pa.DictionaryArray.from_arrays(values.indices, _marked(values.dictionary))
    if types.is_struct(kind):
        parts = [_marked(values.field(i)) for i in range(kind.num_fields)]
        return pa.StructArray.from_arrays(parts, fields=list(kind), mask=values.is_null())
    whole = pa.concat_arrays([values])  # Without an offset, so that offsets and values belong together.
    if types.is_list(kind) or types.is_large_list(kind):
        return type(values).from_arrays(whole.offsets, _marked(whole.values), mask=whole.is_null())
    if types.is_fixed_size_list(kind):
        return type(values).from_arrays(_marked(whole.values), kind.list_size, mask=whole.is_null())
    if not (types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)):
        return values
    raw = values.cast(pa.large_binary() if types.is_large_string(kind) else pa.binary()).to_pylist()
    return pa.array([None if one is None else one.decode("utf-8", errors="replace") for one in raw], kind)


def _is_valid(values: Any) -> bool:
    import pyarrow as pa

    try:
        values.validate(full=True)  # Texts that lie deeper too.
    except pa.ArrowInvalid:
        return False
    return True


def dated(files: Sequence[str]) -> list[tuple[str, int, int]]:
    """Return files with their times and sizes, so that `datasets` does not take an older copy for them."""
    return [(file, (about := os.stat(file)).st_mtime_ns, about.st_size) for file in files]


def generated(read: Any, arguments: dict[str, Any], features: Any, streaming: bool) -> Any:
    """Return the rows that a generator yields, as a dataset, or as a stream of `datasets` where `streaming`."""
    import datasets

    if streaming:  # Its lists of arguments, one entry for each file, are split among processes.
        return datasets.IterableDataset.from_generator(read, features=features, gen_kwargs=arguments)
    return datasets.Dataset.from_generator(read, features=features, gen_kwargs=arguments)
