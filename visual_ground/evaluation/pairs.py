"""Images with captions, as evaluators read them: in batches, each image encoded once."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from visual_ground.errors import GroundingTypeError, GroundingValueError
from visual_ground.model import GroundedModel
from visual_ground.rows import PROBLEM, picture_of, rows_by_number
from visual_ground.vision.encoder import VisionEncoder
from visual_ground.vision.identity import image_key


class Pairs(Protocol):
    """Mappings by number, each with a `caption` and an `image` or `image_features` (f,); a dataset, or a list."""

    def __len__(self) -> int: ...

    def __getitem__(self, number: int, /) -> Mapping[str, Any]: ...


class EvaluationPairs:
    """Pairs whose captions and image features are read once, however many evaluators and evaluations there are.

    Args:
        pairs: a dataset as in training, but no stream, with the columns `caption` and `image`, or `image_features`.
            Pairs with the same `group`, or without such a column the same image, are about the same image.
        batch_size: images encoded at once.

    Raises:
        GroundingTypeError: several datasets, a stream, or no dataset.

    Attributes:
        groups: (n,) numbers, equal if two pairs are about the same image; known once they were read.
    """

    groups: Tensor

    def __init__(self, pairs: Pairs, batch_size: int = 64) -> None:
        self.pairs, self.batch_size = rows_by_number(pairs), batch_size
        if not hasattr(self.pairs, "__len__"):
            raise GroundingTypeError(
                f"Pairs to evaluate on are read by number, and a {type(pairs).__name__} has none. Pass "
                "list(stream.take(1000))."
            )
        self._encoder: VisionEncoder | None = None
        self._captions: list[str] = []
        self._features = torch.empty(0)

    @classmethod
    def of(cls, pairs: Pairs | EvaluationPairs) -> EvaluationPairs:
        """Return `pairs`, wrapped if they are not yet."""
        return pairs if isinstance(pairs, EvaluationPairs) else cls(pairs)

    def __len__(self) -> int:
        return len(self.pairs)

    def read(self, model: GroundedModel) -> tuple[list[str], Tensor]:
        """Return the n captions, and the features (n, f) that the model's vision encoder gives their images.

        Raises:
            GroundingTypeError: a pair without a caption that is a string.
            GroundingValueError: a pair that the dataset itself cannot read.
        """
        if self._encoder is not model.vision:
            captions: list[str] = []
            features, groups = [], Groups()
            for start in range(0, len(self.pairs), self.batch_size):
                numbers = range(start, min(start + self.batch_size, len(self.pairs)))
                batch = [self.pairs[i] for i in numbers]
                captions += [_caption(pair) for pair in batch]
                features.append(image_features(model, batch, self.batch_size))
                for pair in batch:
                    groups.add(pair)
            self.groups = torch.tensor(groups.numbers)
            self._captions, self._features = captions, torch.cat(features) if features else torch.empty(0)
            self._encoder = model.vision
        return self._captions, self._features


class Groups:
    """Numbers pairs, equal if two have the same `group` or the same image.

    Attributes:
        numbers: one for each pair that was added.

    Example:
        >>> groups = Groups()
        >>> for image in ("a.png", "b.png", "a.png"):
        ...     groups.add({"image": image})
        >>> groups.numbers
        [0, 1, 0]
    """

    def __init__(self) -> None:
        self.numbers: list[int] = []
        self._of: dict[Any, int] = {}

    def add(self, pair: Mapping[str, Any]) -> None:
        """Number one more pair."""
        keys: list[Any] = [("image", _image_key(pair))]
        if pair.get("group") is not None:
            keys.append(("group", pair["group"]))
        known = sorted({self._of[key] for key in keys if key in self._of})
        number = known[0] if known else len(self.numbers)
        for joined in known[1:]:  # This pair says that two groups are one.
            self.numbers = [number if other == joined else other for other in self.numbers]
            self._of = {key: number if other == joined else other for key, other in self._of.items()}
        self._of.update(dict.fromkeys(keys, number))
        self.numbers.append(number)


def _image_key(pair: Mapping[str, Any]) -> Any:
    image = picture_of(pair.get("image"))
    if image is None:
        return torch.as_tensor(pair["image_features"]).numpy(force=True).tobytes()
    return os.fspath(image) if isinstance(image, (str, os.PathLike)) else image_key(image)


def _caption(pair: Mapping[str, Any]) -> str:
    if problem := pair.get(PROBLEM):
        raise GroundingValueError(f"A pair to evaluate on cannot be used: {problem}. Mend it, or leave it out.")
    caption = pair.get("caption")
    if not isinstance(caption, str):
        raise GroundingTypeError(
            f"A pair to evaluate on has a string as `caption`, got {caption!r} in {sorted(pair)}. For other columns, "
            "or lists of captions, give "
            "visual_ground.training.data.examples.ExampleDataset(rows, sample=False, columns=...)."
        )
    return caption


@torch.no_grad()
def image_features(model: GroundedModel, pairs: Sequence[Mapping[str, Any]], batch_size: int = 64) -> Tensor:
    """Return the features (n, f) of pairs' images, on the adapter's device.

    Args:
        model: the grounded model, whose vision encoder runs if the features are not given.
        pairs: n mappings, all with `image_features` (f,), or all with `image`.
        batch_size: images encoded at once.
    """
    vision, device = model.vision, model.active.device
    if "image_features" in pairs[0]:
        return torch.stack([torch.as_tensor(pair["image_features"]) for pair in pairs]).to(device)
    batches = [
        [picture_of(pair["image"]) for pair in pairs[i : i + batch_size]] for i in range(0, len(pairs), batch_size)
    ]
    return torch.cat([vision(vision.preprocess(images)).to(device) for images in batches])
