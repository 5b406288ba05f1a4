"""Saying `[RET]`: the logits processor that steers it, and the way from generated ids to interleaved parts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor

from visual_ground.errors import GroundingValueError
from visual_ground.generation.output import RetrievedImage
from visual_ground.index.image_index import ImageIndex


@dataclass(frozen=True)
class RetrievalSettings:
    """How an answer says and shows images.

    Args:
        images_per_ret: images shown at each `[RET]`, at least 1.
        max_images: `[RET]`s per answer; None for any number, 0 for none.
        ret_bias: added to `[RET]`'s logit.
        min_new_tokens_before_ret: tokens that an answer says before its first `[RET]`.
        min_new_tokens_between_rets: tokens that an answer says between two `[RET]`s.
        allow_repeats: whether one answer may show an image twice.
    """

    images_per_ret: int = 1
    max_images: int | None = None
    ret_bias: float = 0.0
    min_new_tokens_before_ret: int = 0
    min_new_tokens_between_rets: int = 0
    allow_repeats: bool = False

    def __post_init__(self) -> None:
        if self.images_per_ret < 1:
            raise GroundingValueError(f"images_per_ret must be at least 1, got {self.images_per_ret}.")
        least = min(self.min_new_tokens_before_ret, self.min_new_tokens_between_rets)
        if least < 0 or (self.max_images is not None and self.max_images < 0):
            raise GroundingValueError("Numbers of tokens and max_images must not be negative.")

    @classmethod
    def take_from(cls, options: dict[str, Any]) -> RetrievalSettings:
        """Take these settings out of the options of `generate`; the rest are transformers'."""
        return cls(**{field.name: options.pop(field.name) for field in fields(cls) if field.name in options})


class RetLogitsProcessor(LogitsProcessor):
    """Applies `RetrievalSettings` to `[RET]`'s logit at each step.

    Args:
        ret_token_id: its id.
        prompt_length: ids before the first generated one.
        settings: what to apply.
    """

    def __init__(self, ret_token_id: int, prompt_length: int, settings: RetrievalSettings) -> None:
        self.ret_token_id, self.prompt_length, self.settings = ret_token_id, prompt_length, settings

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return scores (b, v + 1) with `[RET]`'s column biased, and -inf where it must not be said."""
        new = input_ids[:, self.prompt_length :]
        column = scores[:, self.ret_token_id] + self.settings.ret_bias
        if new.shape[1] < self.settings.min_new_tokens_before_ret:
            column = torch.full_like(column, float("-inf"))
        elif self.settings.max_images is not None:
            said = (new == self.ret_token_id).sum(-1)
            column = column.masked_fill(said >= self.settings.max_images, float("-inf"))
        if gap := self.settings.min_new_tokens_between_rets:
            column = column.masked_fill((new[:, -gap:] == self.ret_token_id).any(-1), float("-inf"))
        scores = scores.clone()
        scores[:, self.ret_token_id] = column
        return scores


def split_at_ret(ids: Sequence[int], ret_token_id: int, tokenizer: Any) -> list[str | None]:
    """Cut generated ids into text, with None for each `[RET]`; empty text is left out.

    Text is decoded cumulatively, so that tokenizers which mark word starts keep the spaces around an image.
    """
    parts: list[str | None] = []
    said: list[int] = []
    before = ""
    for token in [*ids, None]:
        if token is not None and token != ret_token_id:
            said.append(token)
            continue
        whole = tokenizer.decode(said, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        if len(whole) > len(before):
            parts.append(whole[len(before) :])
            before = whole
        if token is not None:
            parts.append(None)
    return parts


def retrieve(states: Tensor, index: ImageIndex | None, settings: RetrievalSettings) -> list[tuple[RetrievedImage, ...]]:
    """Find the images of one answer.

    Args:
        states: (r, q), the retrieval vectors of its `[RET]`s in order.
        index: where to search; None gives one image without id for each `[RET]`.
        settings: how many images, and whether one may come twice.

    Returns:
        For each `[RET]`, its images, best first; fewer than asked where the index has no more.
    """
    if index is None or not len(states):
        return [(RetrievedImage(),) for _ in states]
    found = index.search(states, settings.images_per_ret * (1 if settings.allow_repeats else len(states)))
    shown: set[int] = set()
    answers = []
    for positions, scores in zip(found.positions.tolist(), found.scores.tolist(), strict=True):
        fresh = [(p, s) for p, s in zip(positions, scores, strict=True) if settings.allow_repeats or p not in shown]
        fresh = fresh[: settings.images_per_ret]
        shown.update(p for p, _ in fresh)
        answers.append(tuple(_image(index, position, score) for position, score in fresh))
    return answers


def _image(index: ImageIndex, position: int, score: float) -> RetrievedImage:
    name, image, metadata = index.entry(position)
    return RetrievedImage(name, score, image, metadata)
