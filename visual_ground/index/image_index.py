"""`ImageIndex`: image vectors in a search engine, with ids, images and metadata beside them."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from visual_ground.errors import GroundingTypeError, GroundingValueError
from visual_ground.index.base import ImageEmbedder
from visual_ground.index.captions import check_weight, with_captions
from visual_ground.index.engines.base import SearchResult, VectorIndex
from visual_ground.index.engines.exact import ExactIndex
from visual_ground.index.files import FILES, read_index, write_index
from visual_ground.index.publishing import publishable, push_index
from visual_ground.index.remote_images import LinkRules
from visual_ground.index.state import Filter, Ids, IndexState
from visual_ground.index.table.entries import make_entries
from visual_ground.storage.hub import HubOptions, PushOptions, fetch_folder
from visual_ground.vision.identity import ImageSpace
from visual_ground.vision.images import ImageLike


class ImageIndex:
    """Image vectors with what they stand for.

    Entries can be added, removed and updated while others search: a search sees the index before a change or after it.
    A position is given once: what a search found can be looked up even where it has been removed since.

    Args:
        vectors: (n, q) unit vectors, searched exactly; or a search engine that holds them.
        ids: n distinct names; 0 to n - 1 where None.
        images: n PIL images, paths or addresses on the network, or None.
        metadata: n mappings of JSON values, or None.
        rules: which images on the network may be fetched when they are shown; none where None.

    Raises:
        GroundingValueError: lengths differ, ids repeat, or vectors are not (n, q) and finite.
        GroundingTypeError: vectors that are neither a tensor nor a search engine, or metadata that is no JSON.

    Example:
        >>> import torch
        >>> index = ImageIndex(torch.eye(3), ids=["a", "b", "c"], metadata=[{"year": y} for y in (1990, 2000, 2010)])
        >>> index.remove(["c"])
        >>> best = index.search(torch.tensor([[0.2, 0.1, 0.9]]), k=1, filter={"year": {"ge": 1995}})
        >>> index.entry(int(best.positions))
        ('b', None, {'year': 2000})
    """

    def __init__(
        self,
        vectors: Tensor | VectorIndex,
        ids: Ids | None = None,
        images: Sequence[Any] | None = None,
        metadata: Sequence[Mapping[str, Any]] | None = None,
        rules: LinkRules | None = None,
    ) -> None:
        engine = ExactIndex(vectors) if isinstance(vectors, Tensor) else vectors
        if not isinstance(engine, VectorIndex):
            raise GroundingTypeError(
                f"vectors must be a tensor (n, q) or a VectorIndex, got {type(engine).__name__}; "
                "visual_ground.index.engines.base.VectorIndex lists what a search engine needs."
            )
        made = make_entries(ids, images, metadata, len(engine), 0)
        self._lock, self._state = threading.RLock(), IndexState(engine, made, None, rules or LinkRules())

    @classmethod
    def build(
        cls,
        model: ImageEmbedder,
        images: Sequence[ImageLike],
        ids: Ids | None = None,
        metadata: Sequence[Mapping[str, Any]] | None = None,
        batch_size: int = 32,
        caption_weight: float = 0.0,
    ) -> ImageIndex:
        """Embed PIL images or paths with a grounded model, `batch_size` at once, and index them.

        The rest is as in the class and, for `caption_weight`, `visual_ground.indexing.options.BuildOptions`. No image,
        or one that cannot be read, is a GroundingValueError.
        """
        if not len(images):
            raise GroundingValueError("An index needs at least one image, got none.")
        check_weight(caption_weight)
        make_entries(ids, images, metadata, len(images), 0)  # Embedding takes long: what is wrong is said before.
        vectors = model.embed_images(images, batch_size=batch_size)
        index = cls(with_captions(model, vectors, metadata or [], caption_weight, batch_size), ids, images, metadata)
        index._state = replace(index._state, space=model.image_space, caption_weight=caption_weight)
        return index

    @property
    def engine(self) -> VectorIndex:
        """The search engine."""
        return self._state.engine

    @property
    def rules(self) -> LinkRules:
        """Which images elsewhere may be opened."""
        return self._state.rules

    @property
    def dim(self) -> int:
        """q, the width of its vectors."""
        return self.engine.dim

    @property
    def ids(self) -> list[str | int]:
        """The ids, in order."""
        return self._state.select(None)

    @property
    def images(self) -> list[Any] | None:
        """The images as they are kept, in order: PIL images, paths, or an `ImageLink` for what may not be opened."""
        return self._state.images()

    @property
    def metadata(self) -> list[dict[str, Any]] | None:
        """The metadata, in order."""
        entries = self._state.entries
        return [entries.metadata(p) for p in entries.positions()] if entries.has_metadata else None

    @property
    def vectors(self) -> Tensor:
        """The vectors (n, q) in order, on the CPU; a GroundingStateError where the engine is not an `ExactIndex`."""
        return self._state.exact.vectors

    def __len__(self) -> int:
        return len(self._state.entries)

    def __contains__(self, id: str | int) -> bool:
        return bool(self._state.entries.find([id]))

    def __iter__(self) -> Iterator[tuple[str | int, Any, Mapping[str, Any]]]:
        state, entries = self._state, self._state.entries
        return ((entries.id(p), state.image(p), entries.metadata(p)) for p in entries.positions())

    def search(self, vectors: Tensor, k: int, filter: Filter | None = None) -> SearchResult:
        """Return the k >= 1 best entries for each query (queries, q), fewer where fewer are allowed.

        `filter` says which entries may be found: a filter on metadata (`visual_ground.index.table.filters`), a function
        of an entry's metadata, or a mask over positions. A column that is not there is a GroundingValueError.
        """
        state = self._state
        if isinstance(state.engine, ExactIndex):
            return state.engine.search(vectors, k, state.mask(filter))
        with self._lock:  # Other engines are changed in place.
            return self._state.engine.search(vectors, k, self._state.mask(filter))

    def select(self, filter: Filter) -> list[str | int]:
        """Return the ids of the entries that a filter allows, in order."""
        return self._state.select(filter)

    def info(self) -> dict[str, Any]:
        """Return how many entries there are, their width, the engine, and the columns that a filter can compare."""
        return self._state.info()

    def find(self, ids: Iterable[str | int]) -> dict[str | int, int]:
        """Return the position of each of these ids that is in the index."""
        return self._state.entries.find(ids)

    def entry(self, position: int) -> tuple[str | int, Any, Mapping[str, Any]]:
        """Return the id, image (or None) and metadata at a position, also where it was removed after a search.

        An image elsewhere is shown by its thumbnail, if it has one. Without, one on the network is fetched where the
        rules allow it, and is an `ImageLink` where not or where that fails.
        """
        return self._state.shown([position])[0]

    def entries(self, positions: Sequence[int]) -> list[tuple[str | int, Any, Mapping[str, Any]]]:
        """Return what `entry` returns for each position; images on the network are fetched side by side."""
        return self._state.shown(positions)

    def add(
        self,
        vectors: Tensor,
        ids: Ids | None = None,
        images: Sequence[Any] | None = None,
        metadata: Sequence[Mapping[str, Any]] | None = None,
    ) -> list[str | int]:
        """Add entries with vectors (m, q), whole or not at all, and return their ids.

        Where `ids` is None they are the numbers after the highest that ever was an id, so that no removed number comes
        back. An id that is there already is a GroundingValueError.
        """
        with self._lock:
            new = make_entries(ids, images, metadata, len(vectors), self._state.entries.next_id)
            self._state = self._state.changed([], vectors, new)
            return [new.id(row) for row in range(new.end)]

    def remove(self, ids: Ids) -> None:
        """Take entries out, all or none; an id that is not there is a GroundingIndexError."""
        with self._lock:
            self._state = self._state.without(ids)

    def update(
        self,
        ids: Ids,
        vectors: Tensor | None = None,
        images: Sequence[Any] | None = None,
        metadata: Sequence[Mapping[str, Any]] | None = None,
    ) -> None:
        """Give entries other vectors, images or metadata, all or none; what is None stays, and so do their ids."""
        with self._lock:
            self._state = self._state.updated(ids, vectors, images, metadata)

    def merge(self, other: ImageIndex) -> None:
        """Add another index's entries, all or none; an id in both, or another adapter's is a GroundingValueError."""
        more = other._state
        with self._lock:
            self._state = self._state.merged(more)

    def check_model(self, space: ImageSpace) -> None:
        """Raise GroundingValueError where it is known that another adapter or encoder than the model's built it."""
        self._state.check_space(space, "this model is")

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Save vectors, ids, images and metadata, whole or not at all; files of other names stay as they are.

        Paths become absolute, and PIL images files. A GroundingError says what cannot be saved, such as another engine.
        """
        with self._lock:
            write_index(folder, self._state)

    def push_to_hub(self, repo_id: str, *, copy_images: bool = False, **options: Any) -> str:
        """Commit the index to a dataset repository of the Hub, at once or not at all; return the commit's address.

        `copy_images` publishes the images that are local files too. PIL images are published always; paths never. The
        `options` are as in `GroundedModel.push_to_hub`. After an error, the repository is as it was.
        """
        return push_index(publishable(self._state, self.images or [], copy_images), repo_id, PushOptions(**options))

    @classmethod
    def from_pretrained(
        cls, name: str | os.PathLike[str], rules: LinkRules | None = None, **hub_options: Any
    ) -> ImageIndex:
        """Open a local folder, or a dataset repository of the Hub. Vectors are mapped into memory, not read.

        An index that was saved on this machine opens images where they were then. Otherwise nothing outside the folder
        is opened, and nothing ever on the network, but for what `rules` allow. `hub_options` are revision, subfolder,
        token, cache_dir, local_files_only. One that is missing, damaged or of another format is a GroundingError.
        """
        folder = fetch_folder(name, FILES, HubOptions.of(hub_options), kind="dataset")
        state = read_index(folder, LinkRules() if rules is None else rules)
        index = cls(state.exact.vectors[:0])
        index._state = state
        return index
