"""`Skipped`: what of a dataset cannot be used, counted and named."""

from __future__ import annotations

import logging

from visual_ground.errors import GroundingValueError

logger = logging.getLogger(__name__)

# How many skipped names are logged and shown in an error.
NUM_SHOWN = 10
# A stream's skipped part is judged as if it had at least so many rows: one bad row among the first ten is no 10 %.
MIN_ROWS_TO_JUDGE = 1000


class Skipped:
    """Counts what cannot be used, logs it by name, and raises where it is too much.

    Args:
        limit: the part that may be skipped.
        total: how many there are; None where that is not known, as in a stream.

    Attributes:
        names: what was skipped, and why.
    """

    def __init__(self, limit: float, total: int | None = None) -> None:
        self.limit, self.total, self.seen = limit, total, 0
        self.names: list[str] = []

    def add(self, name: str, check: bool = True) -> None:
        """Skip one, named with its reason; where `check` is True, raise GroundingValueError for one too many."""
        self.names.append(name)
        if len(self.names) <= NUM_SHOWN:
            logger.warning("Skipped %s", self.names[-1])
        if check:
            self.check(self.total or max(self.seen, MIN_ROWS_TO_JUDGE))

    def check(self, total: int) -> None:
        """Raise GroundingValueError where more than the allowed part of `total` was skipped."""
        if len(self.names) <= self.limit * total:
            return
        shown = "\n  ".join(self.names[:NUM_SHOWN])
        raise GroundingValueError(
            f"{len(self.names)} of {total} images and captions cannot be used, and max_skipped={self.limit:g} of them "
            f"may be skipped. Fix them, or raise max_skipped. The first are:\n  {shown}"
        )

    def finish(self) -> None:
        """Log how many were skipped in all."""
        if self.names:
            logger.warning("Skipped %d images and captions that cannot be used.", len(self.names))
