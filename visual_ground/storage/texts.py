"""Which texts a file in UTF-8 can hold."""

from __future__ import annotations


def is_unicode(text: str) -> bool:
    """Return whether a text has no half of a pair of surrogates, which neither files nor tokenizers take.

    Python reads file names and arguments that are not UTF-8 into such halves.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
