"""Answers in text and pictures: transformers' own `generate`, then a search for each `[RET]` that was said."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BatchFeature, LogitsProcessorList

from visual_ground.adapter.attached import AttachedAdapter
from visual_ground.errors import GroundingTypeError, GroundingValueError
from visual_ground.generation.output import InterleavedOutput
from visual_ground.generation.retrieval_token import RetLogitsProcessor, RetrievalSettings, retrieve, split_at_ret
from visual_ground.index.image_index import ImageIndex
from visual_ground.lm.frozen_lm import FrozenLM


@torch.no_grad()
def generate(
    frozen_lm: FrozenLM,
    attached: AttachedAdapter,
    batch: BatchFeature,
    index: ImageIndex | None,
    settings: RetrievalSettings,
    options: Mapping[str, Any],
) -> list[InterleavedOutput]:
    """Answer a batch of prompts; see `GroundedModel.generate`.

    Args:
        frozen_lm: the LM.
        attached: the active adapter.
        batch: as from `GroundedModel.prepare`, padded on the left.
        index: where images are searched.
        settings: how `[RET]` is said and images are shown.
        options: for transformers' `generate`.
    """
    check_index(index, attached)
    image_tokens = attached.image_tokens(batch.get("pixel_values"))
    sequences = generate_ids(frozen_lm, attached, batch, image_tokens, settings, options)
    mask, start = batch["attention_mask"], batch["input_ids"].shape[1]
    mask = mask.repeat_interleave(len(sequences) // len(mask), 0)
    vectors = ret_vectors(frozen_lm, attached, sequences, mask, start, image_tokens)
    return [
        _interleave(attached, ids[start:].tolist(), found, index, settings)
        for ids, found in zip(sequences, vectors, strict=True)
    ]


def generate_ids(
    frozen_lm: FrozenLM,
    attached: AttachedAdapter,
    batch: BatchFeature,
    image_tokens: Tensor | None,
    settings: RetrievalSettings,
    options: Mapping[str, Any],
) -> Tensor:
    """Run transformers' `generate`; return ids (b * num_return_sequences, s), the prompts' among them."""
    options, processor = dict(options), attached.processor
    steer = RetLogitsProcessor(processor.ret_token_id, batch["input_ids"].shape[1], settings)
    options["logits_processor"] = LogitsProcessorList([steer, *(options.pop("logits_processor", None) or [])])
    if "stop_strings" in options:
        options.setdefault("tokenizer", processor.tokenizer)
    options.setdefault("pad_token_id", processor.pad_token_id)
    return frozen_lm.generate(batch["input_ids"], image_tokens, attention_mask=batch["attention_mask"], **options)


def ret_vectors(
    frozen_lm: FrozenLM,
    attached: AttachedAdapter,
    sequences: Tensor,
    mask: Tensor,
    start: int,
    image_tokens: Tensor | None,
) -> list[Tensor]:
    """Return, for each sequence, the retrieval vectors (r, q) of the `[RET]`s said from `start` on.

    One forward over the finished sequences reads them, so that beams, sampling and any cache give the same.

    Args:
        frozen_lm: the LM.
        attached: the active adapter.
        sequences: (b, s), prompts and answers.
        mask: (b, start), of the prompts.
        start: where the answers begin.
        image_tokens: (n * k, d), of the prompts' images.
    """
    is_ret = sequences == attached.processor.ret_token_id
    is_ret[:, :start] = False
    if not bool(is_ret.any()):
        return [torch.empty(0, attached.config.retrieval_dim) for _ in sequences]
    asking = is_ret.any(-1)
    stop = int(is_ret.any(0).nonzero().max()) + 1
    ids, positions = sequences[asking, :stop], is_ret[asking, :stop].flatten().nonzero()[:, 0]
    mask = nn.functional.pad(mask[asking], (0, stop - start), value=1)
    states = frozen_lm.hidden_states(ids, mask, positions, attached.config.text_layers, image_tokens)
    return list(attached.embed_states(states).cpu().split(is_ret.sum(-1).tolist()))


def check_index(index: Any, attached: AttachedAdapter) -> None:
    """Raise where an index cannot be searched with this adapter's vectors.

    Raises:
        GroundingTypeError: not an index.
        GroundingValueError: vectors of another width.
    """
    if index is None:
        return
    if not callable(getattr(index, "search", None)):
        raise GroundingTypeError(f"index must be an ImageIndex or None, got {type(index).__name__}.")
    if index.vectors.shape[1] != attached.config.retrieval_dim:
        raise GroundingValueError(
            f"The index holds vectors of width {index.vectors.shape[1]}, this model's retrieval space has width "
            f"{attached.config.retrieval_dim}. Build the index with this model."
        )


def _interleave(
    attached: AttachedAdapter, ids: list[int], vectors: Tensor, index: ImageIndex | None, settings: RetrievalSettings
) -> InterleavedOutput:
    processor = attached.processor
    images = iter(retrieve(vectors, index, settings))
    parts: list[Any] = []
    # An LM with more rows than its tokenizer has tokens can say ids that are no text.
    ids = [i for i in ids if i < processor.vocabulary.num_tokens or i == processor.ret_token_id]
    for text in split_at_ret(ids, processor.ret_token_id, processor.tokenizer):
        parts += next(images) if text is None else [text]
    return InterleavedOutput(tuple(parts))
