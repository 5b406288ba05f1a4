"""Prompts without an answer: their retrieval vectors, and the likelihoods of given continuations."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from visual_ground.adapter.attached import AttachedAdapter
from visual_ground.lm.frozen_lm import FrozenLM
from visual_ground.prompts.types import Prompts
from visual_ground.scoring.query_vectors import last_vectors


@torch.no_grad()
def embed_prompts(frozen_lm: FrozenLM, attached: AttachedAdapter, prompts: Prompts) -> Tensor:
    """Return unit vectors (n, q), read after each prompt; see `GroundedModel.embed_text`."""
    processor = attached.processor
    batch = processor.batch(processor.encode_queries(prompts)).to(frozen_lm.device)
    image_tokens = attached.image_tokens(batch.get("pixel_values"))
    return last_vectors(frozen_lm, attached, batch["input_ids"], batch["attention_mask"], image_tokens)


@torch.no_grad()
def log_likelihood(
    frozen_lm: FrozenLM, attached: AttachedAdapter, prompts: Prompts, continuations: Sequence[str]
) -> Tensor:
    """Return log p(continuation | prompt), (n,), in nats; see `GroundedModel.log_likelihood`."""
    encoded, lengths = attached.processor.encode_continuations(prompts, continuations)
    batch = attached.processor.batch(encoded).to(frozen_lm.device)
    image_tokens = attached.image_tokens(batch.get("pixel_values"))
    return frozen_lm.log_likelihood(batch["input_ids"], batch["attention_mask"], lengths, image_tokens)
