"""Which entries of an index are meant on the command line: by id, or by a filter."""

from __future__ import annotations

import json


def known_id(index: object, text: str) -> str | int:
    """Return the number that a word on the command line stands for, if that is the entry's id."""
    from visual_ground import ImageIndex

    if isinstance(index, ImageIndex) and text not in index and text.isdecimal():
        return int(text)
    return text


def parsed_filter(text: str) -> dict[str, object]:
    """Return the filter that `--filter` has as JSON."""
    from visual_ground.errors import GroundingValueError

    try:
        values = json.loads(text)
    except ValueError as error:
        raise GroundingValueError(f'--filter must be JSON such as {{"year": 1990}}, got {text!r}: {error}.') from error
    if not isinstance(values, dict):
        raise GroundingValueError(f'--filter must be a JSON object such as {{"year": 1990}}, got {text!r}.')
    return values
