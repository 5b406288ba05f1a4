"""Filters on an index's metadata: one small form, checked here and translated by each engine.

A filter is a mapping from columns to what they must be; all of them must hold:

| form | an entry is allowed where |
|---|---|
| `{"licence": "CC0"}` | the value equals it |
| `{"licence": ["CC0", "CC BY"]}` | the value is one of these |
| `{"year": {"ge": 1990, "lt": 2000}}` | all comparisons hold: `eq`, `ne`, `lt`, `le`, `gt`, `ge`, `in` |
| `{"or": [FILTER, FILTER]}`, `{"and": [...]}` | any, or each, of the filters holds |
| `{"not": FILTER}` | the filter does not hold |

`id` is a column too. A comparison with a value that an entry lacks, or that is of another kind (a word and a number),
does not hold.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from visual_ground.errors import GroundingTypeError, GroundingValueError

COMPARISONS: dict[str, Callable[[Any, Any], bool]] = {
    "eq": operator.eq,
    "ne": operator.ne,
    "lt": operator.lt,
    "le": operator.le,
    "gt": operator.gt,
    "ge": operator.ge,
}
ORDERED = frozenset({"lt", "le", "gt", "ge"})
GROUPS = ("and", "or", "not")
FORMS = 'such as {"licence": "CC0"}, {"year": {"ge": 1990}}, {"licence": ["CC0", "CC BY"]} or {"not": {...}}'


@dataclass(frozen=True)
class Comparison:
    """One column compared with one value, or with several if the operator is "in"."""

    column: str
    operator: str
    value: Any

    def holds(self, value: Any) -> bool:
        """Return whether it holds for a value of the column."""
        if self.operator == "in":
            return any(same_kind(value, other) and value == other for other in self.value)
        return same_kind(value, self.value) and COMPARISONS[self.operator](value, self.value)


@dataclass(frozen=True)
class Group:
    """Several conditions, joined by "and", "or" or "not"."""

    joined_by: str
    conditions: tuple[Condition, ...]


Condition: TypeAlias = Comparison | Group


def same_kind(value: Any, other: Any) -> bool:
    """Return whether two values can be compared: two strings, two numbers, or two booleans."""
    return kind_of(value) is not None and kind_of(value) == kind_of(other)


def fits_int64(number: int) -> bool:
    """Return whether a whole number fits into 64 bits; `number in range(...)` would count where it is of a subclass."""
    return -(2**63) <= number < 2**63


def kind_of(value: Any) -> str | None:
    """Return "bool", "number" or "string"; None for values that no filter compares."""
    if isinstance(value, bool):
        return "bool"
    return "number" if isinstance(value, (int, float)) else "string" if isinstance(value, str) else None


def parse_filter(filter: Mapping[str, Any]) -> Condition:
    """Check a filter and return it as a tree.

    Raises:
        GroundingTypeError: not a mapping, or groups that are none.
        GroundingValueError: an operator that there is not, or a value that cannot be compared.

    Example:
        >>> parse_filter({"year": {"ge": 1990}})
        Comparison(column='year', operator='ge', value=1990)
    """
    if not isinstance(filter, Mapping) or not all(isinstance(name, str) for name in filter):
        raise GroundingTypeError(f"A filter must be a mapping from columns to values, {FORMS}; got {filter!r}.")
    conditions = [condition for name, value in filter.items() for condition in _parse(name, value)]
    return conditions[0] if len(conditions) == 1 else Group("and", tuple(conditions))


def columns_of(condition: Condition) -> set[str]:
    """Return the columns that a condition compares."""
    if isinstance(condition, Comparison):
        return {condition.column}
    return set().union(*map(columns_of, condition.conditions))


def _parse(name: str, value: Any) -> list[Condition]:
    if name == "not":
        return [Group("not", (parse_filter(value),))]
    if name in GROUPS:
        if isinstance(value, (str, Mapping)) or not isinstance(value, Sequence):
            raise GroundingTypeError(f'"{name}" takes a list of filters, got {value!r}.')
        return [Group(name, tuple(map(parse_filter, value)))]
    if isinstance(value, Mapping):
        if not value:
            raise GroundingValueError(f"The filter on {name!r} compares with nothing; write {FORMS}.")
        return [_compare(name, how, other) for how, other in value.items()]
    many = isinstance(value, Sequence) and not isinstance(value, str)
    return [_compare(name, "in" if many else "eq", value)]


def _compare(column: str, how: Any, value: Any) -> Comparison:
    if how == "in" and isinstance(value, Sequence) and not isinstance(value, str):
        values = value = tuple(value)
    else:
        values = (value,)
    if how not in {*COMPARISONS, "in"} or (how == "in" and value is not values):
        raise GroundingValueError(
            f"The filter on {column!r} has {how!r}: {value!r}; the operators are {[*COMPARISONS, 'in']}, and "
            '"in" takes a list.'
        )
    if wrong := [one for one in values if kind_of(one) is None or one != one]:
        raise GroundingValueError(
            f"The filter on {column!r} compares with {wrong[0]!r} of type {type(wrong[0]).__name__}; it can compare "
            "with strings, numbers and booleans."
        )
    if how in ORDERED and kind_of(value) == "bool":
        raise GroundingValueError(f"The filter on {column!r} orders by {value!r}; booleans are compared with eq or ne.")
    return Comparison(column, how, value)
