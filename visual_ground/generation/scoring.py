"""Prompts without an answer: their retrieval vectors, and the likelihoods of given continuations."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from visual_ground.adapter.attached import AttachedAdapter
from visual_ground.lm.frozen_lm import FrozenLM
from visual_ground.prompts.types import Prompts


@torch.no_grad()
def embed_prompts(frozen_lm: FrozenLM, attached: AttachedAdapter, prompts: Prompts) -> Tensor:
    """Return unit vectors (n, q), read behind each prompt; see `GroundedModel.embed_text`."""
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


def query_vectors(
    frozen_lm: FrozenLM, attached: AttachedAdapter, queries: Sequence[Sequence[int]], image_tokens: Tensor | None
) -> Tensor:
    """Return the unit vectors (n, q) read at the last id of each query.

    Args:
        frozen_lm: the LM.
        attached: the active adapter.
        queries: n queries as ids, each ending with `GroundingProcessor.retrieval_suffix`.
        image_tokens: (m * k, d), of the images in the ids.
    """
    length = max(map(len, queries))
    pad_id, device = attached.processor.pad_token_id, frozen_lm.device
    ids = torch.tensor([[*[pad_id] * (length - len(query)), *query] for query in queries], device=device)
    mask = torch.tensor([[0] * (length - len(query)) + [1] * len(query) for query in queries], device=device)
    return last_vectors(frozen_lm, attached, ids, mask, image_tokens)


def last_vectors(
    frozen_lm: FrozenLM, attached: AttachedAdapter, ids: Tensor, mask: Tensor, image_tokens: Tensor | None
) -> Tensor:
    """Return the unit vectors (b, q) read at the last position of ids (b, s), which are padded on the left."""
    last = torch.arange(1, len(ids) + 1, device=ids.device) * ids.shape[1] - 1
    states = frozen_lm.hidden_states(ids, mask, last, attached.config.text_layers, image_tokens)
    return attached.embed_states(states)
