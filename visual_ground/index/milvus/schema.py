"""The fields and indexes of a Milvus collection that holds an image index."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from visual_ground.errors import GroundingFileError, GroundingValueError
from visual_ground.index.milvus.connection import load_pymilvus
from visual_ground.index.milvus.rows import LONGEST

NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,200}")


@dataclass(frozen=True)
class MilvusSearch:
    """How Milvus finds vectors: its own names and values.

    Args:
        index_type: such as "HNSW", "IVF_PQ" or "DISKANN"; "AUTOINDEX" leaves it to Milvus.
        index_params: for building it, such as {"M": 32, "efConstruction": 200}.
        search_params: for searching it, such as {"ef": 128}.
    """

    index_type: str = "AUTOINDEX"
    index_params: Mapping[str, Any] = field(default_factory=dict)
    search_params: Mapping[str, Any] = field(default_factory=dict)


def check_name(name: str) -> None:
    """Raise unless a collection can be called so."""
    if not NAME.fullmatch(name):
        raise GroundingValueError(
            f"A collection of Milvus is named with letters, digits and _, not starting with a digit, got {name!r}."
        )


def schema_of(dim: int) -> Any:
    """Return the fields of a collection."""
    module = load_pymilvus()
    kinds = module.DataType
    schema = module.MilvusClient.create_schema(auto_id=False, enable_dynamic_field=False)
    schema.add_field("position", kinds.INT64, is_primary=True)
    schema.add_field("vector", kinds.FLOAT_VECTOR, dim=dim)
    schema.add_field("key", kinds.VARCHAR, max_length=LONGEST)
    schema.add_field("entry", kinds.JSON)
    schema.add_field("thumbnail", kinds.VARCHAR, max_length=LONGEST)
    return schema


def indexes_of(client: Any, search: MilvusSearch) -> Any:
    """Return the indexes of a collection: of its vectors, and of the ids as text."""
    indexes = client.prepare_index_params()
    indexes.add_index(
        "vector", index_type=search.index_type, metric_type="IP", params=dict(search.index_params), index_name="vector"
    )
    indexes.add_index("key", index_type="INVERTED", index_name="key")
    return indexes


def width_of(about: Mapping[str, Any], name: str) -> int:
    """Return the width of a collection's vectors, if it is one of ours."""
    fields = {one["name"]: one for one in about["fields"]}
    expected = {"position", "vector", "key", "entry", "thumbnail"}
    if set(fields) != expected or "dim" not in fields["vector"].get("params", {}):
        raise GroundingFileError(
            f"The Milvus collection {name!r} has the fields {sorted(fields)}, and an image index has "
            f"{sorted(expected)}. Choose another collection."
        )
    return int(fields["vector"]["params"]["dim"])
