"""Images with captions, as evaluators read them: in batches, each image encoded once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from visual_ground.errors import GroundingTypeError
from visual_ground.model import GroundedModel
from visual_ground.vision.encoder import VisionEncoder


class Pairs(Protocol):
    """Mappings by number, each with a `caption` and an `image` or `image_features` (f,); a dataset, or a list."""

    def __len__(self) -> int: ...

    def __getitem__(self, number: int, /) -> Mapping[str, Any]: ...


class EvaluationPairs:
    """Pairs whose captions and image features are read once, however many evaluators and evaluations there are.

    Args:
        pairs: a dataset with the columns `caption` and `image`, or `image_features`; see `Pairs`.
        batch_size: images encoded at once.
    """

    def __init__(self, pairs: Pairs, batch_size: int = 64) -> None:
        self.pairs, self.batch_size = pairs, batch_size
        self._encoder: VisionEncoder | None = None
        self._captions: list[str] = []
        self._features = torch.empty(0)

    @classmethod
    def of(cls, pairs: Pairs | EvaluationPairs) -> EvaluationPairs:
        """Return `pairs`, wrapped where they are not yet."""
        return pairs if isinstance(pairs, EvaluationPairs) else cls(pairs)

    def __len__(self) -> int:
        return len(self.pairs)

    def read(self, model: GroundedModel) -> tuple[list[str], Tensor]:
        """Return the n captions, and the features (n, f) that the model's vision encoder gives their images.

        Raises:
            GroundingTypeError: a pair without a caption that is a string.
        """
        if self._encoder is not model.vision:
            captions: list[str] = []
            features = []
            for start in range(0, len(self.pairs), self.batch_size):
                numbers = range(start, min(start + self.batch_size, len(self.pairs)))
                batch = [self.pairs[i] for i in numbers]
                captions += [_caption(pair) for pair in batch]
                features.append(image_features(model, batch, self.batch_size))
            self._captions, self._features = captions, torch.cat(features) if features else torch.empty(0)
            self._encoder = model.vision
        return self._captions, self._features


def _caption(pair: Mapping[str, Any]) -> str:
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
        model: the grounded model, whose vision encoder runs where the features are not given.
        pairs: n mappings, all with `image_features` (f,), or all with `image`.
        batch_size: images encoded at once.
    """
    vision, device = model.vision, model.active.device
    if "image_features" in pairs[0]:
        return torch.stack([torch.as_tensor(pair["image_features"]) for pair in pairs]).to(device)
    batches = [[pair["image"] for pair in pairs[i : i + batch_size]] for i in range(0, len(pairs), batch_size)]
    return torch.cat([vision(vision.preprocess(images)).to(device) for images in batches])
