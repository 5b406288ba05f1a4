"""Answers decoded as the published code decodes them, for comparing with the paper.

`GroundedModel.generate` differs on purpose: it raises `[RET]`'s logit by adding, where multiplying lowers a negative
one; it stops where the LM ends its answer; and it drops no text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from visual_ground.errors import GroundingValueError
from visual_ground.generation.output import InterleavedOutput
from visual_ground.generation.retrieval_token import RetLogitsProcessor, RetrievalSettings, retrieve
from visual_ground.index.image_index import ImageIndex
from visual_ground.model import GroundedModel


@dataclass(frozen=True)
class PublishedDecoding:
    """The published settings of an answer, under their published names.

    Args:
        num_words: tokens to generate, always exactly so many; 0 returns the prompt with the images of its `[RET]`s.
        min_word_tokens: tokens before the first `[RET]`.
        ret_scale_factor: factor of `[RET]`'s logit.
        max_num_rets: `[RET]`s that are looked up; text after the last of them is dropped.
        max_img_per_ret: images for each.
    """

    num_words: int = 32
    min_word_tokens: int = 0
    ret_scale_factor: float = 1.0
    max_num_rets: int = 1
    max_img_per_ret: int = 1

    def __post_init__(self) -> None:
        if min(self.num_words, self.min_word_tokens) < 0 or min(self.max_num_rets, self.max_img_per_ret) < 1:
            raise GroundingValueError(
                f"Numbers of tokens must be at least 0 and numbers of images at least 1, got {self}."
            )


class ScaleRet(LogitsProcessor):
    """Multiplies one column of the scores, `[RET]`'s, by a factor."""

    def __init__(self, ret_token_id: int, factor: float) -> None:
        self.ret_token_id, self.factor = ret_token_id, factor

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return the scores (b, v + 1) with that column multiplied."""
        scores = scores.clone()
        scores[:, self.ret_token_id] *= self.factor
        return scores


@torch.no_grad()
def answer_as_published(
    model: GroundedModel, prompt: Any, index: ImageIndex, decoding: PublishedDecoding | None = None
) -> InterleavedOutput:
    """Answer one prompt greedily, with the published conventions.

    Args:
        model: the grounded model, mostly of the preset "fromage".
        prompt: one prompt, as in `prepare`.
        index: where images are searched; no image comes twice in one answer.
        decoding: the settings.

    Returns:
        Texts, each cut at its first newline or else at its first full stop, and each `[RET]`'s images after them.

    Raises:
        GroundingValueError: `num_words=0` and a prompt without `[RET]`.

    """
    decoding = decoding or PublishedDecoding()
    batch = model.prepare([prompt])
    image_tokens = model.active.image_tokens(batch.get("pixel_values"))
    ids = _generate(model, batch, image_tokens, decoding) if decoding.num_words else batch["input_ids"]
    start = batch["input_ids"].shape[1] if decoding.num_words else 0
    ret_positions = [i for i in range(start, ids.shape[1]) if ids[0, i] == model.ret_token_id][: decoding.max_num_rets]
    if not ret_positions and not decoding.num_words:
        raise GroundingValueError(f"With num_words=0 there must be a {model.config.ret_token!r} in the prompt.")
    if not ret_positions:
        return InterleavedOutput((_cut(_text(model, ids[0, start:].tolist())),))
    vectors = _ret_vectors(model, ids, ret_positions, image_tokens)
    retrieved = retrieve(vectors, index, RetrievalSettings(images_per_ret=decoding.max_img_per_ret))
    parts: list[Any] = []
    for position, images in zip(ret_positions, retrieved, strict=True):
        parts += [part for part in (_cut(_text(model, ids[0, start:position].tolist())), *images) if part]
        start = position + 1
    return InterleavedOutput(tuple(parts))


def _ret_vectors(
    model: GroundedModel, ids: Tensor, ret_positions: Sequence[int], image_tokens: Tensor | None
) -> Tensor:
    """Return the retrieval vectors (r, q) at these positions of ids (1, s)."""
    positions, mask = torch.tensor(ret_positions, device=ids.device), torch.ones_like(ids)
    states = model.frozen_lm.hidden_states(ids, mask, positions, model.config.text_layers, image_tokens)
    return model.active.embed_states(states).cpu()


def _generate(model: GroundedModel, batch: Any, image_tokens: Tensor | None, decoding: PublishedDecoding) -> Tensor:
    """Return the prompt's ids and `num_words` greedy ones, (1, s)."""
    settings = RetrievalSettings(
        max_images=None, min_new_tokens_before_ret=decoding.min_word_tokens, min_new_tokens_between_rets=0
    )
    delay_ret = RetLogitsProcessor(model.ret_token_id, batch["input_ids"].shape[1], settings)
    scale_ret = ScaleRet(model.ret_token_id, decoding.ret_scale_factor)
    return model.frozen_lm.generate(
        batch["input_ids"],
        image_tokens,
        attention_mask=batch["attention_mask"],
        max_new_tokens=decoding.num_words,
        logits_processor=LogitsProcessorList([delay_ret, scale_ret]),
        eos_token_id=None,
        pad_token_id=model.processor.pad_token_id,
        do_sample=False,
    )


def _text(model: GroundedModel, ids: Sequence[int]) -> str:
    """Decode the ids, without `[RET]` and images, which the tokenizer does not know."""
    known = [i for i in ids if i != model.ret_token_id and i < model.frozen_lm.vocabulary.first_image_id]
    return str(model.tokenizer.decode(known, skip_special_tokens=True, clean_up_tokenization_spaces=False))


def _cut(text: str) -> str:
    """Cut a text at its first newline, or else at its first full stop."""
    for mark, kept in (("\n", 0), (".", 1)):
        if mark in text:
            return text[: text.index(mark) + kept]
    return text
