"""Which texts UTF-8 can hold, and what is shown of others."""

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


def printable(text: str) -> str:
    r"""Return a text that every log and terminal takes, with the halves of surrogates as `\udce9`.

    Example:
        >>> printable("caf\udce9.png")
        'caf\\udce9.png'
    """
    return text.encode("utf-8", "backslashreplace").decode()
