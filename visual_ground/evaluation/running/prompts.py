"""Prompts whose images are given as features, which the cache holds, instead of pictures to be encoded again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import torch
from PIL import Image
from torch import Tensor
from transformers import BatchFeature

from visual_ground.generation.generate import generate_ids, with_padding
from visual_ground.generation.options import silent_ids
from visual_ground.generation.retrieval_token import RetrievalSettings
from visual_ground.model import GroundedModel
from visual_ground.prompts.encoded import EncodedPrompt
from visual_ground.scoring.query_vectors import last_vectors

# As `GroundedModel.prepare` reads it, but an image is a tensor (f,), its features, and a string is always text.
FeaturePrompt: TypeAlias = str | Sequence[Any]

# Stands for an image whose features are known, while a prompt is turned into ids.
_STAND_IN = Image.new("RGB", (1, 1))


def without_features(prompt: FeaturePrompt) -> tuple[Any, list[Tensor]]:
    """Return a prompt with a tiny picture for each features, and the features in order.

    Args:
        prompt: a string, a list of texts and features (f,), or chat messages whose contents are such lists.
    """
    if isinstance(prompt, str):
        return prompt, []
    features: list[Tensor] = []

    def read(part: Any) -> Any:
        if isinstance(part, Tensor):
            features.append(part)
            return _STAND_IN
        if isinstance(part, str):
            return {"type": "text", "text": part}
        if isinstance(part, Mapping) and isinstance(part.get("content"), (list, tuple)):
            return {**part, "content": [read(one) for one in part["content"]]}
        return part

    return [read(part) for part in prompt], features


def batch_of(
    model: GroundedModel, encoded: Sequence[EncodedPrompt], features: Sequence[Tensor]
) -> tuple[BatchFeature, Tensor | None]:
    """Return input_ids and attention_mask (b, s), padded on the left, and image tokens (n * k, d) on the LM's device.

    Args:
        model: the grounded model.
        encoded: the prompts.
        features: (f,) of each image in them, in order.
    """
    batch = model.processor.batch([EncodedPrompt(one.ids, ()) for one in encoded]).to(model.frozen_lm.device)
    tokens = model.active.image_tokens(image_features=torch.stack(list(features))) if features else None
    return batch, tokens


def embed_encoded(model: GroundedModel, encoded: Sequence[EncodedPrompt], features: Sequence[Tensor]) -> Tensor:
    """Return unit vectors (n, q), read at the last id of each prompt; see `batch_of` for the arguments."""
    batch, tokens = batch_of(model, encoded, features)
    return last_vectors(model.frozen_lm, model.active, batch["input_ids"], batch["attention_mask"], tokens)


@torch.no_grad()
def embed_prompts(model: GroundedModel, prompts: Sequence[FeaturePrompt]) -> Tensor:
    """Return unit vectors (n, q), read after each prompt (`without_features`) as by `GroundedModel.embed_text`."""
    read = [without_features(prompt) for prompt in prompts]
    encoded = model.processor.encode_queries([prompt for prompt, _ in read])
    return embed_encoded(model, encoded, [one for _, features in read for one in features])


@torch.no_grad()
def answer_prompts(model: GroundedModel, prompts: Sequence[FeaturePrompt], **options: Any) -> list[str]:
    """Return the text that the LM writes after each prompt, greedily where the options say nothing else.

    Args:
        model: the grounded model.
        prompts: see `without_features`.
        options: for transformers' `generate`, such as `max_new_tokens`.
    """
    read = [without_features(prompt) for prompt in prompts]
    encoded = [model.processor.encode(prompt) for prompt, _ in read]
    return answer_encoded(model, encoded, [one for _, features in read for one in features], **options)


@torch.no_grad()
def answer_encoded(
    model: GroundedModel, encoded: Sequence[EncodedPrompt], features: Sequence[Tensor], **options: Any
) -> list[str]:
    """Return the text that the LM writes after each prompt; see `answer_prompts`, and `batch_of` for the arguments."""
    batch, tokens = batch_of(model, encoded, features)
    tokens, padded = with_padding(model.active, tokens, {"do_sample": False, **options})
    parts = model.frozen_lm, model.active
    sequences = generate_ids(*parts, batch, tokens, RetrievalSettings(max_images=0), padded)
    silent, vocabulary = silent_ids(*parts), model.processor.vocabulary
    answers = sequences[:, batch["input_ids"].shape[1] :].tolist()
    kept = [[i for i in ids if i not in silent and vocabulary.is_token(i)] for ids in answers]
    return [str(model.tokenizer.decode(ids, skip_special_tokens=True)).strip() for ids in kept]
