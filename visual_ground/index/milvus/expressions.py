"""Filters on metadata as the boolean expressions of Milvus.

Metadata are stored by the kind of their values, `entry["number"]["year"]`, `entry["string"]["licence"]`, so that a
comparison only ever meets values of its own kind. Milvus Lite knows `in` for plain columns only, and it and the server
disagree on `not` if a value is missing: an `in` becomes several comparisons, and a `not` is moved down to them.
"""

from __future__ import annotations

import json
import math
from typing import Any

from visual_ground.index.table.filters import COMPARISONS, Comparison, Condition, fits_int64, kind_of

SIGNS = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}
OPPOSITES = {"eq": "ne", "ne": "eq", "lt": "ge", "ge": "lt", "gt": "le", "le": "gt"}
# Position -1 is no image, see `collection`.
ALL, NONE = "position >= 0", "position < -1"


def expression(condition: Condition) -> str:
    """Return a condition as Milvus writes it.

    Example:
        >>> from visual_ground.index.table.filters import parse_filter
        >>> expression(parse_filter({"licence": "CC0"}))
        'entry["string"]["licence"] == "CC0"'
    """
    return _translate(condition, True)


def key_of(id: str | int) -> str:
    """Return an id as the text by which it is looked up; the number 1 and the string "1" differ."""
    return json.dumps(id, ensure_ascii=False)


def quote(text: str) -> str:
    """Return a text as a literal of Milvus."""
    for letter, escape in (("\\", "\\\\"), ('"', '\\"'), ("\n", "\\n"), ("\r", "\\r")):
        text = text.replace(letter, escape)
    return f'"{text}"'


def listed(values: list[int] | list[str]) -> str:
    """Return values as a list of Milvus."""
    return f"[{', '.join(quote(value) if isinstance(value, str) else str(value) for value in values)}]"


def _translate(condition: Condition, holds: bool) -> str:
    if isinstance(condition, Comparison):
        return _compare(condition, holds)
    if condition.joined_by == "not":
        return _translate(condition.conditions[0], not holds)
    return _joined([_translate(one, holds) for one in condition.conditions], (condition.joined_by == "and") == holds)


def _joined(parts: list[str], all_of: bool) -> str:
    neutral, deciding = (ALL, NONE) if all_of else (NONE, ALL)
    parts = list(dict.fromkeys(part for part in parts if part != neutral))
    if not parts or deciding in parts:
        return deciding if parts else neutral
    return parts[0] if len(parts) == 1 else f"({(' and ' if all_of else ' or ').join(parts)})"


def _compare(one: Comparison, holds: bool) -> str:
    if one.operator == "in":
        return _joined([_leaf(one.column, "eq", value, holds) for value in one.value], not holds)
    return _leaf(one.column, one.operator, one.value, holds)


def _leaf(column: str, how: str, value: Any, holds: bool) -> str:
    """Return whether a comparison holds, or does not: then also if there is no value of its kind."""
    if column == "id" and how == "eq" and (isinstance(value, str) or type(value) is int):
        return f"key {'==' if holds else '!='} {quote(key_of(value))}"
    kind = kind_of(value)
    # An id is kept as metadata are, under a name that no column has.
    path = f'entry["id"]["{kind}"]' if column == "id" else f'entry["{kind}"][{quote(column)}]'
    there, missing = f"exists {path}", f"not exists {path}"
    if isinstance(value, float) and math.isinf(value):
        always = COMPARISONS[how](0.0, value)  # As for any value that is stored, which is finite.
        return (there if holds else missing) if always else (NONE if holds else ALL)
    literal = _literal(value)
    # Where the value is missing, Milvus may take `!=` as true.
    if holds:
        plain = f"{path} {SIGNS[how]} {literal}"
        return f"({there} and {plain})" if how == "ne" else plain
    return f"({missing} or {path} {SIGNS[OPPOSITES[how]]} {literal})"


def _literal(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return quote(value)
    return repr(float(value)) if isinstance(value, float) or not fits_int64(value) else str(int(value))
