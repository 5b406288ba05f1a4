"""The errors of this package: one base class, and each subclass is also the builtin that it specialises."""

from collections.abc import Iterator
from contextlib import contextmanager


class GroundingError(Exception):
    """Base class of every error that this package raises on purpose.

    Each text says what came, what was expected, and what to do.
    """


class GroundingValueError(GroundingError, ValueError):
    """A value of the right type that cannot be used."""


class GroundingTypeError(GroundingError, TypeError):
    """An object of a type that cannot be used."""


class GroundingIndexError(GroundingError, IndexError):
    """An id or position outside the table that it points into."""


class GroundingFileError(GroundingError, OSError):
    """A file or folder that is missing, half-written, or of another format."""


class GroundingStateError(GroundingError, RuntimeError):
    """A call that the object's present state does not allow, such as grounding a language model twice."""


@contextmanager
def needing(advice: str) -> Iterator[None]:
    """Turn an ImportError in the block into a GroundingStateError that says what to install."""
    try:
        yield
    except ImportError as error:
        raise GroundingStateError(advice) from error
