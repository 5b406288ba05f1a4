"""`IndexState`: all that an image index holds at one moment."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

from visual_ground.errors import GroundingIndexError, GroundingStateError, GroundingTypeError, GroundingValueError
from visual_ground.index.engines.base import VectorIndex
from visual_ground.index.engines.exact import ExactIndex
from visual_ground.index.engines.saved import SAVED_ENGINES
from visual_ground.index.places import find_image, movable
from visual_ground.index.remote_images import LinkRules, shown_together
from visual_ground.index.table.entries import Entries, make_entries
from visual_ground.index.table.filters import parse_filter
from visual_ground.index.table.rows import THUMBNAIL
from visual_ground.vision.identity import ImageSpace

# A mask over positions, a filter as in `visual_ground.index.table.filters`, or a function of an entry's metadata.
Filter: TypeAlias = Tensor | Mapping[str, Any] | Callable[[Mapping[str, Any]], Any]
Ids: TypeAlias = Sequence[str | int]


@dataclass(frozen=True)
class IndexState:
    """Vectors and entries of the same moment; a change makes another state, so that readers see one or the other.

    Args:
        engine: holds the vectors. An `ExactIndex` is not changed by `changed`; any other is.
        entries: by the engine's positions.
        folder: where the index was loaded from, in which its own images are; None where it was made here.
        rules: which images elsewhere may be opened.
        space: which model the vectors are of; None where that is not known.
        caption_weight: how far it moved vectors towards those of captions, see `captions.with_captions`.
    """

    engine: VectorIndex
    entries: Entries
    folder: Path | None = None
    rules: LinkRules = field(default_factory=LinkRules)
    space: ImageSpace | None = None
    caption_weight: float = 0.0

    @property
    def exact(self) -> ExactIndex:
        """The engine, if it is one that keeps the vectors as they are; else GroundingStateError."""
        if isinstance(self.engine, SAVED_ENGINES):
            return self.engine.exact
        if not isinstance(self.engine, ExactIndex):
            raise GroundingStateError(
                f"The vectors of this index are in a {type(self.engine).__name__}, and only an ExactIndex gives them "
                "out and is saved with the images. Save the engine by its own save(), or build an index of vectors."
            )
        return self.engine

    def image(self, position: int) -> Any:
        """Return an image as it is kept: an object, a path, or an `ImageLink` for what may not be opened."""
        image = self.entries.cell(position, "image")
        if image is not None and not isinstance(image, str):
            return image
        folder = None if self.entries.is_given(position) else self.folder
        return find_image(image, self.entries.cell(position, "file"), folder, self.rules)

    def images(self) -> list[Any] | None:
        """Return all images as `image` does, in order; None where the index was given none."""
        return [self.image(p) for p in self.entries.positions()] if self.entries.has_images else None

    def shown(self, positions: Sequence[int]) -> list[tuple[str | int, Any, Mapping[str, Any]]]:
        """Return ids, images and metadata; of an image that is elsewhere, the thumbnail if there is one."""
        entries = self.entries
        ids = [entries.id(position) for position in positions]
        kept = [(self.image(p), entries.cell(p, THUMBNAIL), str(one)) for p, one in zip(positions, ids, strict=True)]
        images, metadata = shown_together(kept, self.rules), [entries.metadata(position) for position in positions]
        return list(zip(ids, images, metadata, strict=True))

    def mask(self, filter: Filter | None) -> Tensor | None:
        """Return the positions that a filter, see `parse_filter`, allows, as a mask; None for all."""
        if filter is None or isinstance(filter, Tensor):
            return filter
        if isinstance(filter, Mapping):
            return torch.from_numpy(self.entries.mask(parse_filter(filter)))
        if not callable(filter):
            raise GroundingTypeError(
                f"filter must be a mapping, a function of an entry's metadata, or a mask, got {type(filter).__name__}."
            )
        return torch.from_numpy(self.entries.chosen_by(filter))

    def select(self, filter: Filter | None) -> list[str | int]:
        """Return the ids of the entries that a filter allows, all where None, in order."""
        mask = self.mask(filter)
        return [self.entries.id(p) for p in self.entries.positions() if mask is None or bool(mask[p])]

    def info(self) -> dict[str, Any]:
        """Return what the index holds, in numbers and names."""
        exact = self.engine if isinstance(self.engine, ExactIndex) else None
        return {
            "entries": len(self.entries),
            "dim": self.engine.dim,
            "dtype": None if exact is None else str(exact.dtype).removeprefix("torch."),
            "engine": type(self.engine).__name__,
            "columns": sorted(self.entries.columns()),
            "next_id": self.entries.next_id,
            "built_with": None if self.space is None else str(self.space),
            "caption_weight": self.caption_weight,
        }

    def check_space(self, space: ImageSpace | None, whose: str) -> None:
        """Raise GroundingValueError where the vectors are known to be of another space than those of `whose`."""
        if space is not None and self.space is not None and not self.space.is_same(space):
            raise GroundingValueError(
                f"This index was built with {self.space}, and {whose} {space}: the two give the same pictures other "
                "vectors, so that a search would find anything. Use the adapter and encoder that it was built with, "
                "or build it again."
            )

    def merged(self, other: IndexState) -> IndexState:
        """Return the state with another index's entries.

        Raises:
            GroundingValueError: an id that is in both, another adapter's vectors, or another `caption_weight`.
        """
        self.check_space(other.space, "the other with")
        state = self if len(self.entries) else replace(self, space=other.space, caption_weight=other.caption_weight)
        if len(other.entries) and state.caption_weight != other.caption_weight:
            raise GroundingValueError(
                f"This index was built with caption_weight={state.caption_weight:g}, and the other with "
                f"{other.caption_weight:g}, so that their scores are not alike. Build both with the same."
            )
        return state.changed([], other.exact.vectors, movable(other.entries, other.folder, other.rules))

    def find(self, ids: Ids) -> list[int]:
        """Return the positions of ids; raise GroundingIndexError where one is not there."""
        found = self.entries.find(ids)
        if missing := [one for one in ids if one not in found]:
            raise GroundingIndexError(
                f"The index has no entries {missing[:5]}: {len(missing)} of the {len(ids)} that were asked for."
            )
        return [found[one] for one in ids]

    def without(self, ids: Ids) -> IndexState:
        """Return the state without some entries; an id that is not there is a GroundingIndexError."""
        none = make_entries([], None, None, 0, 0)
        return self.changed(sorted(set(self.find(ids))), torch.empty(0, self.engine.dim), none)

    def updated(
        self,
        ids: Ids,
        vectors: Tensor | None,
        images: Sequence[Any] | None,
        metadata: Sequence[Mapping[str, Any]] | None,
    ) -> IndexState:
        """Return the state with other vectors, images or metadata of some entries; what is None stays."""
        entries, positions = self.entries, self.find(ids)
        thumbnails = [entries.cell(position, THUMBNAIL) if images is None else None for position in positions]
        if images is None and entries.has_images:
            images = [self.image(position) for position in positions]
        if metadata is None and entries.has_metadata:
            metadata = [entries.metadata(position) for position in positions]
        new = make_entries(ids, images, metadata, len(positions), 0).with_thumbnails(thumbnails)
        return self.changed(positions, self.exact.at(positions) if vectors is None else vectors, new)

    def changed(self, positions: Sequence[int], vectors: Tensor, new: Entries) -> IndexState:
        """Return the state without some positions, and with more vectors and their entries, whose ids must be new."""
        engine, left = self.engine, self.entries.without(positions)
        if vectors.shape != (new.end, engine.dim):
            built = "" if self.space is None else f" The index was built with {self.space}."
            raise GroundingValueError(
                f"{new.end} entries need vectors ({new.end}, {engine.dim}), got {tuple(vectors.shape)}.{built}"
            )
        if twice := list(left.find(new.id(row) for row in range(new.end))):
            raise GroundingValueError(
                f"The index already has entries {twice[:5]}, {len(twice)} in all. Give others; update() changes those."
            )
        if isinstance(engine, ExactIndex):
            engine = engine.changed(positions, vectors)
        else:
            if len(vectors):
                engine.add(vectors)
            if len(positions):
                engine.remove(positions)
        return replace(self, engine=engine, entries=left.with_rows(new))
