"""What values an adapter's `adapter_config.json` may hold: its text comes from strangers."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from typing import Any

from visual_ground.errors import GroundingFileError, GroundingValueError


def check_keys(values: Mapping[str, Any], known: Collection[str], where: str) -> None:
    """Raise GroundingFileError if a JSON object has keys besides the known ones."""
    if unknown := sorted(set(values) - set(known)):
        raise GroundingFileError(
            f"Unknown keys {unknown} in the adapter's {where}; known are {sorted(known)}. Save the adapter again."
        )


def check_fields(instance: Any, rules: Mapping[str, Callable[[Any], bool]]) -> None:
    """Raise GroundingValueError if a dataclass's field does not obey its rule."""
    for name, is_valid in rules.items():
        value = getattr(instance, name)
        if not is_valid(value):
            raise GroundingValueError(f"{type(instance).__name__}.{name} cannot be {value!r}.")


def is_text(value: Any) -> bool:
    """Return whether a value is a string."""
    return isinstance(value, str)


def is_name_or_none(value: Any) -> bool:
    """Return whether a value is None, or a string that can be printed on one line."""
    return value is None or (isinstance(value, str) and value != "" and value.isprintable())


def is_number(value: Any) -> bool:
    """Return whether a value is a number that a float can hold; JSON knows larger ones."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e300 and value == value


def is_count(value: Any) -> bool:
    """Return whether a value is a whole number from 0 to what 64 bits hold."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def is_mapping(value: Any) -> bool:
    """Return whether a value is a mapping with strings as keys."""
    return isinstance(value, Mapping) and all(map(is_text, value))


def is_setting(value: Any) -> bool:
    """Return whether a value is a string, a bool, a number or None."""
    return value is None or isinstance(value, (str, bool)) or is_number(value)


def is_metrics(value: Any) -> bool:
    """Return whether a value is a mapping from names to finite numbers."""
    return is_mapping(value) and all(map(is_number, value.values())) and all(map(math.isfinite, value.values()))
