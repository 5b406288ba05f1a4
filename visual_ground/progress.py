"""What long work says of itself: a bar on a terminal, and whole lines if the standard error is a file or a pipe."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from time import monotonic
from typing import Any, TypeVar

from tqdm import tqdm

Item = TypeVar("Item")
# A log gets a line for each tenth of a stage, but none sooner than after so many seconds, and one at least so often,
# as far as there is something to say.
SHORTEST_PAUSE_S, LONGEST_PAUSE_S = 5, 30


def counted(
    items: Iterable[Item], name: str, unit: str, shown: bool, total: int | None = None, leave: bool = True
) -> Iterator[Item]:
    """Yield items, and say how many were done.

    Args:
        items: what is worked on.
        name: of the work.
        unit: what one item is.
        shown: False says nothing.
        total: how many items there are; found by `len` if None and there is one.
        leave: whether a bar stays on the screen when all is done.
    """
    if total is None:
        total = _length(items)
    with progress_bar(name, unit, total, shown, leave=leave) as bar:
        for item in items:
            yield item
            bar.update(1)


def progress_bar(
    name: str, unit: str, total: int | None, shown: bool, initial: int = 0, leave: bool = True
) -> tqdm[Any] | ProgressLines:
    """Return a context with `update(n)`, to be told each time that n more were done, after `initial` others.

    The other arguments are as in `counted`; a total of None is not known, and nothing is said of one of 0.
    """
    shown = shown and total != 0
    if shown and not sys.stderr.isatty():
        return ProgressLines(name, unit, total, initial)
    return tqdm(desc=name, unit=unit, total=total, initial=initial, disable=not shown, leave=leave)


def _length(items: Any) -> int | None:
    try:
        return len(items)
    except TypeError:  # A DataLoader has this method also if it cannot know.
        return None


class ProgressLines:
    """Says in lines of a log how many were done; the arguments are as in `progress_bar`."""

    def __init__(self, name: str, unit: str, total: int | None, initial: int = 0) -> None:
        self.name, self.unit, self.total = name, unit, total
        self._initial = self._done = initial
        self._start = self._said_at = monotonic()
        self._said = self._done
        self._say("starts" if total is None else f"{self._of_total()} starts")

    def __enter__(self) -> ProgressLines:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self._say(f"{self._of_total()} in {monotonic() - self._start:.0f} s")

    def update(self, count: int = 1) -> None:
        """Note that so many more were done."""
        self._done += count
        now = monotonic()
        is_tenth = self.total is not None and 10 * (self._done - self._said) >= self.total
        pause = SHORTEST_PAUSE_S if is_tenth else LONGEST_PAUSE_S
        if now - self._said_at >= pause and self._done != self.total:
            took, done = now - self._start, self._done - self._initial
            left = "" if self.total is None else f", about {took / done * (self.total - self._done):.0f} s left"
            self._say(f"{self._of_total()}, {took:.0f} s{left}")
            self._said_at, self._said = now, self._done

    def _of_total(self) -> str:
        count = f"{self._done}" if self.total is None else f"{self._done} of {self.total}"
        return f"{count} {self.unit.strip()}"

    def _say(self, words: str) -> None:
        # It keeps clear of bars that others may show.
        tqdm.write(f"{self.name}: {words}", file=sys.stderr)
