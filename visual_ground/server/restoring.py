"""Finds the pictures of this server in Markdown that comes back to it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from urllib.parse import unquote

# An escaped character, the beginning of a picture, or the end of its text, with the address if there is one. Each
# character is read a few times at most, whatever a stranger writes: no part of an address can begin another one.
_PIECE = re.compile(r'\\.|(!\[)|\](?:\(([^()\s]*)(?: "(?:\\.|[^"\\])*")?\))?', re.DOTALL)


def own_pictures(text: str) -> Iterator[tuple[int, int, str]]:
    r"""Yield where each picture of `/images/` begins and ends in Markdown, and its id.

    Example:
        >>> text = 'See ![a \\] cat](http://here/images/a%20cat?signature=1 "Jane"), ![no](/other/x)'
        >>> [(text[begin:end][:9], name) for begin, end, name in own_pictures(text)]
        [('![a \\] ca', 'a cat')]
    """
    begin: int | None = None
    for piece in _PIECE.finditer(text):
        if piece[1]:
            begin = piece.start() if begin is None else begin
        elif piece[0].startswith("]"):
            _, is_own, name = (piece[2] or "").partition("?")[0].rpartition("/images/")
            if begin is not None and is_own and name:
                yield begin, piece.end(), unquote(name)
            begin = None
