"""Search engines that are saved with an image index, beside its vectors."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Protocol

from visual_ground.index.engines.base import VectorIndex
from visual_ground.index.engines.exact import ExactIndex
from visual_ground.index.engines.faiss_index import FaissIndex

if TYPE_CHECKING:
    from typing_extensions import Self


class SavedEngine(VectorIndex, Protocol):
    """An engine that has files of its own in the folder of an index, and whose vectors an `ExactIndex` keeps.

    Attributes:
        FILES: the names of its files, all or none of which a folder has.
        exact: the vectors.
    """

    FILES: ClassVar[tuple[str, ...]]
    exact: ExactIndex

    def whole(self) -> Self:
        """Return the engine without removed vectors; those after them move up."""

    def writers(self, belongs_to: Callable[[], str]) -> dict[str, Callable[[Path], object]]:
        """Return what writes each of `FILES`; `belongs_to` gives the checksum of the vectors, written before."""

    @classmethod
    def read(cls, folder: Path, exact: ExactIndex, belongs_to: str) -> Self:
        """Open the files in a folder.

        Raises:
            GroundingError: they are damaged or belong to other vectors, or what reads them is not installed.
        """

    @property
    def description(self) -> str:
        """What the README of an index says of it, such as its recall; may be empty."""


# An engine that stands here is written, opened, described and published with an index.
SAVED_ENGINES: tuple[type[SavedEngine], ...] = (FaissIndex,)
