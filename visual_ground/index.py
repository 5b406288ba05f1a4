"""`ImageIndex`: exact search over image vectors, saved as safetensors with ids, images and metadata beside them."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path, PureWindowsPath
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from visual_ground.config import FORMAT_VERSION
from visual_ground.errors import GroundingFileError, GroundingIndexError, GroundingValueError
from visual_ground.images import to_rgb
from visual_ground.saving import read_json, resolve, write_folder, write_json, write_tensors

if TYPE_CHECKING:
    from visual_ground.model import GroundedModel

VECTORS_FILE = "index.safetensors"
ENTRIES_FILE = "index.json"
IMAGES_FOLDER = "images"


@dataclass(frozen=True)
class SearchResult:
    """The best entries for each query, best first.

    Args:
        positions: (queries, m) long, positions in the index.
        scores: (queries, m) float, inner products.
    """

    positions: Tensor
    scores: Tensor


class ImageIndex:
    """Image vectors with what they stand for.

    Args:
        vectors: (n, q) unit vectors.
        ids: n distinct names; 0 to n - 1 where None.
        images: n PIL images or paths, or None.
        metadata: n mappings, or None.

    Raises:
        GroundingValueError: lengths differ, ids repeat, or vectors are not (n, q) and finite.
    """

    def __init__(
        self,
        vectors: Tensor,
        ids: Sequence[str | int] | None = None,
        images: Sequence[Any] | None = None,
        metadata: Sequence[Mapping[str, Any]] | None = None,
    ) -> None:
        if vectors.dim() != 2 or not torch.isfinite(vectors).all():
            raise GroundingValueError(f"vectors must be finite and (n, q), got shape {tuple(vectors.shape)}.")
        self.vectors = vectors.detach().float().cpu().contiguous()
        self.ids = list(range(len(vectors))) if ids is None else list(ids)
        self.images = None if images is None else list(images)
        self.metadata = None if metadata is None else [dict(entry) for entry in metadata]
        for name in ("ids", "images", "metadata"):
            values = getattr(self, name)
            if values is not None and len(values) != len(vectors):
                raise GroundingValueError(f"{len(vectors)} vectors need as many {name}, got {len(values)}.")
        if len(set(self.ids)) != len(self.ids):
            raise GroundingValueError("ids must be distinct; give each image its own.")

    @classmethod
    def build(
        cls,
        model: GroundedModel,
        images: Sequence[Any],
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
        """
        if not len(images):
            raise GroundingValueError("An index needs at least one image, got none.")
        parts = [model.embed_images(images[i : i + batch_size]) for i in range(0, len(images), batch_size)]
        return cls(torch.cat(parts), ids, images, metadata)

    def __len__(self) -> int:
        return len(self.vectors)

    def search(self, vectors: Tensor, k: int) -> SearchResult:
        """Return the k best entries for each query, fewer where the index is smaller.

        Args:
            vectors: (queries, q).
            k: how many, at least 1.

        Raises:
            GroundingValueError: k below 1, or another width than the index has.
        """
        if k < 1:
            raise GroundingValueError(f"k must be at least 1, got {k}.")
        if vectors.dim() != 2 or vectors.shape[1] != self.vectors.shape[1]:
            raise GroundingValueError(f"Queries must be (m, {self.vectors.shape[1]}), got {tuple(vectors.shape)}.")
        scores = vectors.detach().float().cpu() @ self.vectors.T
        best = scores.topk(min(k, len(self)), dim=-1)
        return SearchResult(best.indices, best.values)

    def entry(self, position: int) -> tuple[str | int, Any, Mapping[str, Any]]:
        """Return the id, image (or None) and metadata at a position."""
        if not 0 <= position < len(self):
            raise GroundingIndexError(f"Position {position} is outside this index of {len(self)} images.")
        image = None if self.images is None else self.images[position]
        return self.ids[position], image, {} if self.metadata is None else self.metadata[position]

    def save_pretrained(self, folder: str | os.PathLike) -> None:
        """Save vectors, ids, images and metadata, whole or not at all (see `visual_ground.saving.write_folder`).

        Paths are kept as given. PIL images are written beside the index as upright RGB, `images/00000012.png`.

        Args:
            folder: where to. Files of other names in it stay as they are.

        Raises:
            GroundingValueError: a PIL image that cannot be read.
            GroundingTypeError: an image that is neither a PIL image nor a path.
        """
        places, pictures = _place_images(self.images or [], Path(folder))
        entries = {
            "format_version": FORMAT_VERSION,
            "ids": self.ids,
            "images": None if self.images is None else places,
            "metadata": self.metadata,
        }
        write_folder(
            folder,
            {
                **{name: partial(_write_png, image) for name, image in pictures.items()},
                VECTORS_FILE: lambda path: write_tensors(path, {"vectors": self.vectors}),
                ENTRIES_FILE: lambda path: write_json(path, entries),
            },
        )

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike) -> ImageIndex:
        """Load what `save_pretrained` wrote; the folder's own images come back as paths in it.

        Args:
            folder: where from.

        Raises:
            GroundingFileError: a file is missing or damaged, or an image's place is outside the folder.
            GroundingValueError: another format version, or not as many ids, images or metadata as vectors.
        """
        for name in (VECTORS_FILE, ENTRIES_FILE):
            if not resolve(folder, name).is_file():
                raise GroundingFileError(f"{str(folder)!r} is no image index: it has no {name}.")
        entries = _read_entries(resolve(folder, ENTRIES_FILE))
        images = entries["images"]
        if images is not None:
            images = [_find_image(place, folder) for place in images]
        path = resolve(folder, VECTORS_FILE)
        try:
            vectors = load_file(path)["vectors"]
        except (OSError, SafetensorError, KeyError) as error:
            raise GroundingFileError(f"{path} is damaged: {error}. Save the index again.") from error
        return cls(vectors, entries["ids"], images, entries["metadata"])


def _place_images(images: Sequence[Any], folder: Path) -> tuple[list[Any], dict[str, Any]]:
    """Return what `index.json` holds for each image, and the images to write, by file name.

    A path stands for itself and `{"file": NAME}` for a file of the folder's own. The paths of an index that was loaded
    from this folder stay files of its own, and no new image is written over them.
    """
    places: list[Any] = [
        _own_file(image, folder) or os.fspath(image) if isinstance(image, (str, os.PathLike)) else None
        for image in images
    ]
    taken = {place["file"] for place in places if isinstance(place, dict)}
    pictures = {}
    for position, image in enumerate(images):
        if image is not None and places[position] is None:
            numbered = (f"{IMAGES_FOLDER}/{number:08d}.png" for number in count(position))
            name = next(name for name in numbered if name not in taken)
            taken.add(name)
            pictures[name] = image
            places[position] = {"file": name}
    return places, pictures


def _own_file(path: str | os.PathLike, folder: Path) -> dict[str, str] | None:
    parent, name = Path(path).parent, Path(path).name
    own = re.fullmatch(r"\d{8,}\.png", name) and parent.resolve() == (folder / IMAGES_FOLDER).resolve()
    return {"file": f"{IMAGES_FOLDER}/{name}"} if own else None


def _write_png(image: Any, path: Path) -> None:
    to_rgb(image).save(path, format="PNG")


def _find_image(place: Any, folder: str | os.PathLike) -> str | None:
    """Return the path that an entry of `index.json` stands for."""
    if place is None or isinstance(place, str):
        return place
    name = place.get("file") if isinstance(place, dict) else None
    # Windows paths know both kinds of slash and drives, so this refuses the same names on every system.
    if not isinstance(name, str) or PureWindowsPath(name).anchor or ".." in PureWindowsPath(name).parts:
        raise GroundingFileError(
            f"{ENTRIES_FILE} in {str(folder)!r} places an image at {place!r}, which is not inside the folder. "
            "Do not use this index, or build it again."
        )
    return os.fspath(resolve(folder, name))


def _read_entries(path: Path) -> dict[str, Any]:
    """Read and check `index.json`."""
    entries = read_json(path)
    names = {"format_version", "ids", "images", "metadata"}
    lists: list[Any] = [entries.get("ids"), entries.get("images") or [], entries.get("metadata") or []]
    if (
        set(entries) != names
        or not all(isinstance(values, list) for values in lists)
        or not all(isinstance(value, (str, int)) for value in lists[0])
        or not all(isinstance(value, dict) for value in lists[2])
    ):
        raise GroundingFileError(
            f"{path} is damaged: it does not hold the lists {sorted(names)}. Save the index again."
        )
    return entries
