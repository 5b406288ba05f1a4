"""`ImageIndex`: image vectors in a search engine, with ids, images and metadata beside them."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from visual_ground.errors import (
    GroundingFileError,
    GroundingIndexError,
    GroundingStateError,
    GroundingTypeError,
    GroundingValueError,
)
from visual_ground.index.base import ImageEmbedder, SearchResult, VectorIndex
from visual_ground.index.exact import ExactIndex
from visual_ground.index.files import FILES, IndexContents, index_card, publishable, read_index, write_index
from visual_ground.index.remote_images import ImageLink, LinkRules, is_url
from visual_ground.storage.hub import CARD_FILE, HubOptions, PushOptions, fetch_folder, push_folder
from visual_ground.vision.images import ImageLike, to_rgb

logger = logging.getLogger(__name__)


class ImageIndex:
    """Image vectors with what they stand for.

    Args:
        vectors: (n, q) unit vectors, searched exactly; or a search engine that holds them.
        ids: n distinct names; 0 to n - 1 where None.
        images: n PIL images, paths or addresses on the network, or None.
        metadata: n mappings, or None.
        rules: which images on the network may be fetched when they are shown; none where None.

    Raises:
        GroundingValueError: lengths differ, ids repeat, or vectors are not (n, q) and finite.
        GroundingTypeError: vectors that are neither a tensor nor a search engine.
    """

    def __init__(
        self,
        vectors: Tensor | VectorIndex,
        ids: Sequence[str | int] | None = None,
        images: Sequence[Any] | None = None,
        metadata: Sequence[Mapping[str, Any]] | None = None,
        rules: LinkRules | None = None,
    ) -> None:
        engine = ExactIndex(vectors) if isinstance(vectors, Tensor) else vectors
        if not isinstance(engine, VectorIndex):
            raise GroundingTypeError(
                f"vectors must be a tensor (n, q) or a VectorIndex, got {type(engine).__name__}; "
                "visual_ground.index.base.VectorIndex lists what a search engine needs."
            )
        self.engine: VectorIndex = engine
        self.rules = LinkRules() if rules is None else rules
        self.ids: list[str | int] = list(range(len(engine))) if ids is None else list(ids)
        self.images = None if images is None else list(images)
        self.metadata = None if metadata is None else [dict(entry) for entry in metadata]
        for name in ("ids", "images", "metadata"):
            values = getattr(self, name)
            if values is not None and len(values) != len(engine):
                raise GroundingValueError(f"{len(engine)} vectors need as many {name}, got {len(values)}.")
        if len(set(self.ids)) != len(self.ids):
            raise GroundingValueError("ids must be distinct; give each image its own.")

    @classmethod
    def build(
        cls,
        model: ImageEmbedder,
        images: Sequence[ImageLike],
        ids: Sequence[str | int] | None = None,
        metadata: Sequence[Mapping[str, Any]] | None = None,
        batch_size: int = 32,
    ) -> ImageIndex:
        """Embed images and index them.

        Args:
            model: the grounded model, whose image layer gives the vectors.
            images: PIL images or paths; paths are kept as paths.
            ids: as in the class.
            metadata: as in the class.
            batch_size: images embedded at once.

        Raises:
            GroundingValueError: no images, or one that cannot be read.
        """
        if not len(images):
            raise GroundingValueError("An index needs at least one image, got none.")
        return cls(model.embed_images(images, batch_size=batch_size), ids, images, metadata)

    @property
    def dim(self) -> int:
        """q, the width of its vectors."""
        return self.engine.dim

    @property
    def vectors(self) -> Tensor:
        """The vectors (n, q), float32 on the CPU.

        Raises:
            GroundingStateError: the search engine is not an `ExactIndex`, and so need not keep them as they are.
        """
        return self._exact.vectors

    @property
    def _exact(self) -> ExactIndex:
        if not isinstance(self.engine, ExactIndex):
            raise GroundingStateError(
                f"The vectors of this index are in a {type(self.engine).__name__}, and only an ExactIndex gives them "
                "out and is saved with the images. Save the engine by its own save(), or build an index of vectors."
            )
        return self.engine

    def __len__(self) -> int:
        return len(self.engine)

    def search(self, vectors: Tensor, k: int, filter: Tensor | None = None) -> SearchResult:
        """Return the k best entries for each query, fewer where the index is smaller.

        Args:
            vectors: (queries, q).
            k: how many, at least 1.
            filter: (n,) bool, True at the positions that may be found; all where None.

        Raises:
            GroundingValueError: k below 1, or another width than the index has.
        """
        return self.engine.search(vectors, k, filter)

    def entry(self, position: int) -> tuple[str | int, Any, Mapping[str, Any]]:
        """Return the id, image (or None) and metadata at a position.

        An image on the network is fetched where `rules` allow it, and is an `ImageLink` where not or where that fails.
        """
        if not 0 <= position < len(self):
            raise GroundingIndexError(f"Position {position} is outside this index of {len(self)} images.")
        image = None if self.images is None else self.images[position]
        return self.ids[position], self._follow(image), {} if self.metadata is None else self.metadata[position]

    def _follow(self, image: Any) -> Any:
        address = image.address if isinstance(image, ImageLink) else image
        if not isinstance(address, str) or not is_url(address):
            return image
        if self.rules.allow_host(address):
            try:
                return to_rgb(address, self.rules)
            except (GroundingFileError, GroundingValueError) as error:
                logger.warning("An image of the index is shown as its address: %s", error)
        return ImageLink(address)

    @property
    def _contents(self) -> IndexContents:
        return IndexContents(self._exact, self.ids, self.images, self.metadata)

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Save vectors, ids, images and metadata, whole or not at all (see `storage.atomic.write_folder`).

        Paths and addresses are kept as given. PIL images are written beside the index as upright RGB,
        `images/00000012.png`. The network is never used.

        Args:
            folder: where to. Files of other names in it stay as they are.

        Raises:
            GroundingValueError: a PIL image that cannot be read.
            GroundingTypeError: an image that is neither a PIL image nor a path.
            GroundingStateError: the search engine is not an `ExactIndex`.
        """
        write_index(folder, self._contents)

    def push_to_hub(
        self,
        repo_id: str,
        private: bool | None = None,
        revision: str | None = None,
        token: str | None = None,
        commit_message: str | None = None,
        create_pr: bool = False,
        copy_images: bool = False,
    ) -> str:
        """Commit the index to a dataset repository of the Hub, at once or not at all.

        Args:
            repo_id: made where it does not exist.
            private: whether a new repository is private.
            revision: branch, made where it does not exist.
            token: of the Hub; the one that was saved by logging in where None.
            commit_message: its first line.
            create_pr: open a pull request instead of committing.
            copy_images: publish the images that are local files too. PIL images are published always; paths never.

        Returns:
            The address of the commit, or of the pull request.

        Raises:
            GroundingFileError: the Hub did not take it; the repository is as it was.
            GroundingStateError: the search engine is not an `ExactIndex`.
        """
        contents = publishable(self._contents, copy_images)

        def save(folder: Path) -> None:
            page = folder / CARD_FILE
            text = page.read_text(encoding="utf-8", errors="replace") if page.is_file() else None
            write_index(folder, contents, index_card(contents, repo_id, text))

        options = PushOptions(private, revision, token, commit_message, create_pr)
        return push_folder(save, repo_id, options, FILES, kind="dataset")

    @classmethod
    def from_pretrained(
        cls, name: str | os.PathLike[str], rules: LinkRules | None = None, **hub_options: Any
    ) -> ImageIndex:
        """Load an index; the folder's own images come back as paths in it.

        Nothing outside the folder is opened, and nothing on the network, but for what `rules` allow.

        Args:
            name: local folder, or the Hub id of a dataset repository.
            rules: which hosts images may be fetched from, and which folders paths may lead into; none where None.
            hub_options: revision, subfolder, token, cache_dir, local_files_only.

        Raises:
            GroundingFileError: no such index; a file is missing or damaged, or an image of its own is outside of it.
            GroundingValueError: another format version, or not as many ids, images or metadata as vectors.

        Example:
            >>> index = ImageIndex.from_pretrained("me/index", LinkRules(hosts=["example.org"]))  # doctest: +SKIP
        """
        rules = LinkRules() if rules is None else rules
        folder = fetch_folder(name, FILES, HubOptions.of(hub_options), kind="dataset")
        saved = read_index(folder, rules)
        return cls(saved.engine, saved.ids, saved.images, saved.metadata, rules)
