"""Lets the model see the images of its own answer while it continues it."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from transformers import LogitsProcessor

from visual_ground.adapter.attached import AttachedAdapter
from visual_ground.errors import GroundingError
from visual_ground.generation.output import Part, RetrievedImage
from visual_ground.lm.frozen_lm import FrozenLM
from visual_ground.vision.images import to_rgb


class SeenImages(LogitsProcessor):
    """Puts images into the context of a running `generate`, each in the place of the `[RET]` that retrieved it.

    The id that was generated is replaced by that of the image's first token before the LM has read it, and the image's
    other tokens are the only ones that can come next. So a batch runs on as it is: nothing is run again, and the other
    answers wait for nothing.

    Args:
        frozen_lm: the LM, inside its `generate`.
        attached: the active adapter.
        image_tokens: (n * k, d), of the prompts' images, or None.

    Attributes:
        image_tokens: those of the prompts' images and of all that were shown since.
        places: the ids that stand where a `[RET]` was generated.
    """

    def __init__(self, frozen_lm: FrozenLM, attached: AttachedAdapter, image_tokens: Tensor | None) -> None:
        self.frozen_lm, self.attached, self.image_tokens = frozen_lm, attached, image_tokens
        self.places: set[int] = set()
        self._first_id = self._next_id
        self._shown: dict[int, list[RetrievedImage]] = {}
        self._due: dict[int, list[int]] = {}

    @property
    def _next_id(self) -> int:
        count = 0 if self.image_tokens is None else len(self.image_tokens)
        return self.attached.processor.vocabulary.first_image_id + count

    def take(self, row: int, parts: Iterable[Part]) -> None:
        """Note the images among the parts that a sequence has just shown; `write` puts them into its context."""
        if images := [part for part in parts if isinstance(part, RetrievedImage) and part.is_readable]:
            self._shown[row] = images

    def write(self, ids: Tensor) -> None:
        """Replace the `[RET]`s at the end of ids (b, s) by the first tokens of the images that they have retrieved."""
        shown, self._shown = self._shown, {}
        for row, images in shown.items():
            tokens = self._tokens(images)
            if tokens is None:
                continue
            first = self._next_id
            self.image_tokens = tokens if self.image_tokens is None else torch.cat([self.image_tokens, tokens])
            self.places.add(first)
            ids[row, -1] = first
            self._due[row] = list(range(first + 1, first + len(tokens)))
        if context := self.frozen_lm.virtual_tokens.context:
            context.image_tokens = self.image_tokens

    def _tokens(self, images: list[RetrievedImage]) -> Tensor | None:
        """Return the tokens (m * k, d) of those of the images that can be opened."""
        opened = []
        for image in images:
            try:
                opened.append(to_rgb(image.image))
            except GroundingError:  # The file may have gone since the index was built; the answer goes on without it.
                continue
        if not opened:
            return None
        pixels = self.attached.processor.preprocess(opened).to(self.frozen_lm.device)
        tokens = self.attached.prompt_tokens(pixels)
        assert tokens is not None, "there are pixels"
        return tokens if self.image_tokens is None else tokens.to(self.image_tokens)

    def passes(self, row: int, token: int) -> bool:
        """Return whether a generated token is an image's, and no part of the text."""
        if token < self._first_id:
            return False
        self._due[row] = self._due.get(row, [])[1:]
        return True

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return scores (b, columns) in which only an image's next token can win if one is due."""
        due = {row: ids[0] for row, ids in self._due.items() if ids and ids[0] < scores.shape[-1]}
        if not due:
            return scores
        scores = scores.clone()
        for row, token in due.items():
            scores[row] = float("-inf")
            scores[row, token] = 0.0
        return scores
