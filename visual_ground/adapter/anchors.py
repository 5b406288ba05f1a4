"""Anchors: captions with their images' frozen features, small enough to be published with an adapter.

They are all that moving the adapter to another language model needs: no images, no old LM, no training data.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from visual_ground.errors import GroundingFileError, GroundingValueError
from visual_ground.storage.atomic import resolve, write_folder
from visual_ground.storage.tensors import write_tensors

ANCHORS_FILE = "anchors.safetensors"


@dataclass(frozen=True, eq=False)
class Anchors:
    """Captions and features of some images.

    Args:
        captions: for each of m images, one or more captions.
        features: (m, f), the frozen encoder's features; kept as float16.

    Raises:
        GroundingValueError: numbers that differ, an image without captions, or features that are not (m, f) and finite.

    Example:
        >>> anchors = Anchors([["a dog"], ["a cat", "one cat"]], torch.zeros(2, 4))
        >>> len(anchors), anchors.texts, anchors.images.tolist()
        (2, ('a dog', 'a cat', 'one cat'), [0, 1, 1])
    """

    captions: Sequence[Sequence[str]]
    features: Tensor

    def __post_init__(self) -> None:
        captions = tuple((one,) if isinstance(one, str) else tuple(one) for one in self.captions)
        features = self.features.detach().cpu().to(torch.float16)
        if features.dim() != 2 or not len(features) or not bool(torch.isfinite(features).all()):
            raise GroundingValueError(
                f"Anchor features must be finite as float16 and (m, f), got {tuple(features.shape)}."
            )
        if len(captions) != len(features):
            raise GroundingValueError(f"{len(features)} anchor images need as many captions, got {len(captions)}.")
        if not all(one and all(isinstance(text, str) and text.strip() for text in one) for one in captions):
            raise GroundingValueError("Each anchor image needs a caption that is not empty.")
        object.__setattr__(self, "captions", captions)
        object.__setattr__(self, "features", features)

    def __len__(self) -> int:
        return len(self.features)

    @property
    def texts(self) -> tuple[str, ...]:
        """All captions, image by image."""
        return tuple(text for one in self.captions for text in one)

    @property
    def images(self) -> Tensor:
        """For each of `texts`, the number of its image."""
        return torch.tensor([i for i, one in enumerate(self.captions) for _ in one])

    @property
    def groups(self) -> Tensor:
        """For each of `texts`, a group number: captions of one image share it, and so do images with one caption.

        These are the connected components of images and captions, found by union-find.
        """
        parent = list(range(len(self)))

        def root(i: int) -> int:
            while parent[i] != i:
                i = parent[i] = parent[parent[i]]
            return i

        first_image: dict[str, int] = {}
        for i, captions in enumerate(self.captions):
            for text in captions:
                one, other = root(first_image.setdefault(text, i)), root(i)
                parent[max(one, other)] = min(one, other)
        return torch.tensor([root(i) for i in self.images.tolist()])

    def take(self, count: int, seed: int = 0) -> Anchors:
        """Return `count` of the images with their captions, drawn at random; all where there are fewer."""
        chosen = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))[:count].sort().values
        return Anchors([self.captions[i] for i in chosen.tolist()], self.features[chosen])

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write `anchors.safetensors` into a folder, whole or not at all."""
        write_folder(folder, {ANCHORS_FILE: self.write})

    def write(self, path: str | os.PathLike[str]) -> None:
        """Write one safetensors file: the features, and the captions as JSON."""
        text = json.dumps(self.captions, ensure_ascii=False).encode("utf-8")
        tensors = {"features": self.features, "captions": torch.frombuffer(bytearray(text), dtype=torch.uint8)}
        write_tensors(path, tensors)

    @classmethod
    def find(cls, folder: str | os.PathLike[str]) -> Anchors | None:
        """Return the anchors of an adapter folder, or None where it has none."""
        return cls.load(folder) if resolve(folder, ANCHORS_FILE).is_file() else None

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> Anchors:
        """Read the anchors of an adapter folder; raise GroundingFileError where there are none, or damaged ones."""
        path = resolve(folder, ANCHORS_FILE)
        if not path.is_file():
            raise GroundingFileError(
                f"{str(folder)!r} has no {ANCHORS_FILE}. Make anchors of image-caption pairs of your own."
            )
        try:
            with safe_open(path, framework="pt") as stored:
                tensors = {name: stored.get_tensor(name) for name in ("captions", "features")}
            captions = json.loads(bytes(tensors["captions"].tolist()).decode("utf-8"))
            return cls(captions, tensors["features"])
        except (SafetensorError, ValueError, TypeError, RecursionError) as error:
            raise GroundingFileError(f"{path} is damaged: {error}. Fetch it again.") from error
