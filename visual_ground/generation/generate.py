"""Answers in text and images: transformers' own `generate`, then a search for each `[RET]` that it generated."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import BatchFeature, LogitsProcessor, StoppingCriteriaList

from visual_ground.adapter.attached import AttachedAdapter
from visual_ground.errors import GroundingTypeError, GroundingValueError
from visual_ground.generation.listener import AnswerListener
from visual_ground.generation.logits.forbidden import ForbiddenColumns
from visual_ground.generation.logits.ret_gate import RetGate
from visual_ground.generation.options import complete_options, ended_by_itself, option_of, silent_ids
from visual_ground.generation.output import InterleavedOutput, RetrievedImage
from visual_ground.generation.retrieval_token import RetLogitsProcessor, RetrievalSettings, retrieve, split_at_ret
from visual_ground.generation.sentences import cut_to_sentences
from visual_ground.index.base import RetrievalIndex
from visual_ground.index.image_index import ImageIndex
from visual_ground.lm.frozen_lm import FrozenLM
from visual_ground.scoring.query_vectors import ret_vectors


@torch.no_grad()
def generate(
    frozen_lm: FrozenLM,
    attached: AttachedAdapter,
    batch: BatchFeature,
    index: RetrievalIndex | None,
    settings: RetrievalSettings,
    options: Mapping[str, Any],
) -> list[InterleavedOutput]:
    """Answer a batch of prompts; see `GroundedModel.generate`.

    Args:
        frozen_lm: the LM.
        attached: the active adapter.
        batch: as from `GroundedModel.prepare`, padded on the left.
        index: where images are searched; None leaves each `[RET]` an image without id.
        settings: when `[RET]` is generated and how many images are shown.
        options: for transformers' `generate`.

    Raises:
        GroundingTypeError: an index that cannot be searched.
        GroundingValueError: an index of vectors of another width, or one that another adapter built.
    """
    check_index(index, attached)
    image_tokens, options = with_padding(attached, attached.prompt_image_tokens(batch.get("pixel_values")), options)
    mask, start = batch["attention_mask"], batch["input_ids"].shape[1]
    per_prompt = option_of(frozen_lm, options, "num_return_sequences") or 1
    listener = AnswerListener(frozen_lm, attached, mask, per_prompt=per_prompt)
    with frozen_lm.bind():  # One block for both: if the adapter is disabled elsewhere meanwhile, neither is affected.
        sequences = generate_ids(frozen_lm, attached, batch, image_tokens, settings, options, listener)
        vectors = listener.vectors_of(sequences)
        if vectors is None:
            mask = mask.repeat_interleave(len(sequences) // len(mask), 0)
            vectors = ret_vectors(frozen_lm, attached, sequences, mask, start, image_tokens)
    silent, has_ended = silent_ids(frozen_lm, attached), ended_by_itself(frozen_lm, attached, options)
    answers = [[i for i in ids if i not in silent] for ids in sequences[:, start:].tolist()]
    outputs = [_interleave(attached, *answer, index, settings) for answer in zip(answers, vectors, strict=True)]
    if not settings.complete_sentences:
        return outputs
    answered = zip(outputs, map(has_ended, sequences[:, start:].tolist()), strict=True)
    return [output if whole else InterleavedOutput(cut_to_sentences(output.parts)) for output, whole in answered]


def with_padding(
    attached: AttachedAdapter, image_tokens: Tensor | None, options: Mapping[str, Any]
) -> tuple[Tensor | None, Mapping[str, Any]]:
    """Return image tokens and options, with a padding id that cannot be read as text.

    If the tokenizer has neither PAD nor EOS, any token of its own used as padding would be read as part of the answer.
    One extra virtual image token is the padding then: it is never generated, and never text.

    Args:
        attached: the active adapter.
        image_tokens: (n * k, d), of the prompts' images.
        options: for transformers' `generate`; a `pad_token_id` in them takes precedence.
    """
    processor = attached.processor
    if processor.names_padding or options.get("pad_token_id") is not None:
        return image_tokens, options
    filler = attached.adapter.ret_input.detach().reshape(1, -1)
    count = 0 if image_tokens is None else len(image_tokens)
    tokens = filler if image_tokens is None else torch.cat([image_tokens, filler.to(image_tokens)])
    return tokens, {**options, "pad_token_id": processor.vocabulary.first_image_id + count}


def generate_ids(
    frozen_lm: FrozenLM,
    attached: AttachedAdapter,
    batch: BatchFeature,
    image_tokens: Tensor | None,
    settings: RetrievalSettings,
    options: Mapping[str, Any],
    listener: AnswerListener | None = None,
) -> Tensor:
    """Run transformers' `generate`; return ids (b * num_return_sequences, s), which begin with the prompts'."""
    processor, ids, mask = attached.processor, batch["input_ids"], batch["attention_mask"]
    seen = None if listener is None else listener.seen
    count = 0 if image_tokens is None else len(image_tokens)
    places = () if seen is None else seen.places
    first = list[LogitsProcessor]()
    if attached.adapter.has_ret_gate:
        first.append(gate := RetGate(frozen_lm, attached, ids, mask))
        if option_of(frozen_lm, options, "guidance_scale") not in (None, 1):
            gate.read_prompts(image_tokens)
    first.append(RetLogitsProcessor(processor.ret_token_id, ids.shape[1], settings, places, processor.tokenizer.decode))
    last = ForbiddenColumns(processor.vocabulary, attached.config.mask_spare_columns, count)
    options = complete_options(frozen_lm, processor, options, ids, first, last)
    if seen is not None:  # The ids of one image follow each other in a fixed order, which no other may change.
        options["logits_processor"].append(seen)
    if listener is not None:
        options["stopping_criteria"] = StoppingCriteriaList([*(options.get("stopping_criteria") or []), listener])
    sequences = frozen_lm.generate(ids, image_tokens, attention_mask=mask, **options)
    if listener is not None:
        listener.finish()
    return sequences


def check_index(index: Any, attached: AttachedAdapter) -> None:
    """Raise if an index cannot be searched with this adapter's vectors."""
    if index is None:
        return
    if not isinstance(index, RetrievalIndex):
        raise GroundingTypeError(
            f"index must be an ImageIndex, an object with the same dim, search and entry, or None; got "
            f"{type(index).__name__}."
        )
    if index.dim != attached.config.retrieval_dim:
        built = index.info()["built_with"] if isinstance(index, ImageIndex) else "a model that it does not name"
        raise GroundingValueError(
            f"The index holds vectors of width {index.dim}, built with {built}; this model is {attached.image_space}, "
            f"and its retrieval space has width {attached.config.retrieval_dim}. Build the index with this model."
        )
    if isinstance(index, ImageIndex):
        index.check_model(attached.image_space)


def _interleave(
    attached: AttachedAdapter,
    ids: list[int],
    vectors: Tensor,
    index: RetrievalIndex | None,
    settings: RetrievalSettings,
) -> InterleavedOutput:
    processor = attached.processor
    images = iter(retrieve(vectors, index, settings))
    parts: list[str | RetrievedImage] = []
    ids = [i for i in ids if processor.vocabulary.is_token(i) or i == processor.ret_token_id]
    for text in split_at_ret(ids, processor.ret_token_id, processor.tokenizer):
        parts += next(images) if text is None else [text]
    return InterleavedOutput(tuple(parts))
