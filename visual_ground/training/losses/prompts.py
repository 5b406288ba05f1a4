"""Prompts with images in them: the text-retrieval pass for what no prefix cache can keep, as image tokens are trained.

A batch may mix them with captions and requests, whose prefixes are kept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from visual_ground.errors import GroundingIndexError
from visual_ground.model import GroundedModel
from visual_ground.training.data.sequences import TokenSequence
from visual_ground.training.losses.cached_retrieval import PrefixCache, run_retrieval
from visual_ground.training.losses.captioning import LossSum
from visual_ground.training.losses.retrieval import RetrievalOutput, plain_retrieval, plain_states


@dataclass(frozen=True)
class Asked:
    """The retrieval part of a batch, its sequences with images apart.

    Args:
        model: the grounded model.
        texts: the sequences without images.
        prompts: those with images, whose image tokens are numbered from `first_image_id` on, in order.
        features: (m, f), of their images in order.
        order: (b,), where each of the batch's sequences is among `texts` and `prompts`, one after the other.
    """

    model: GroundedModel
    texts: Sequence[TokenSequence]
    prompts: Sequence[TokenSequence]
    features: Tensor | None
    order: Tensor

    @classmethod
    def of(cls, model: GroundedModel, sequences: Sequence[TokenSequence], features: Tensor | None) -> Asked:
        """Take a batch's sequences apart."""
        first, width = model.frozen_lm.vocabulary.first_image_id, model.config.num_visual_tokens
        tokens = [sum(i >= first for i in sequence.ids) for sequence in sequences]
        given = 0 if features is None else len(features)
        if sum(tokens) != given * width:
            raise GroundingIndexError(
                f"The retrieval sequences have {sum(tokens) // width} images, and there are features of {given}. Pass "
                "the images of the prompts that the sequences were made of."
            )
        numbers = sorted(range(len(sequences)), key=lambda i: tokens[i] > 0)
        apart, count = [sequences[i] for i in numbers], tokens.count(0)
        return cls(model, apart[:count], apart[count:], features, torch.tensor(numbers).argsort())

    def run(
        self,
        prefixes: PrefixCache | None,
        mini_batch_size: int | None = None,
        context: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> RetrievalOutput:
        """Compute the text-retrieval pass; the arguments are those of `run_retrieval`."""
        parts = []
        if self.texts:
            parts.append(run_retrieval(self.model, self.texts, prefixes, mini_batch_size, context))
        parts += [self._run(part, context) for part in self._parts(mini_batch_size)]
        output = RetrievalOutput.joined(parts)
        return RetrievalOutput(output.text, output.vectors[self.order.to(output.vectors.device)])

    def states(self, prefixes: PrefixCache | None) -> list[Tensor]:
        """Return the states that are read for retrieval, one (b, width) per text layer."""
        parts = []
        if self.texts:
            parts.append(plain_states(self.model, self.texts) if prefixes is None else prefixes.states(self.texts))
        parts += [plain_states(self.model, part.sequences, part.image_tokens()) for part in self._parts(None)]
        return [torch.cat(layer)[self.order.to(layer[0].device)] for layer in zip(*parts, strict=True)]

    def _parts(self, size: int | None) -> list[_Part]:
        """Return the prompts in parts of a size, each with its own images."""
        first, width = self.model.frozen_lm.vocabulary.first_image_id, self.model.config.num_visual_tokens
        parts, taken = [], 0
        size = min(size or len(self.prompts), len(self.prompts))
        for start in range(0, len(self.prompts), max(1, size)):
            some = self.prompts[start : start + size]
            shifted = [
                TokenSequence(tuple(i - taken * width if i >= first else i for i in one.ids), one.labels)
                for one in some
            ]
            count = sum(i >= first for one in some for i in one.ids) // width
            assert self.features is not None, "there are as many features as images"
            parts.append(_Part(self.model, shifted, self.features[taken : taken + count]))
            taken += count
        return parts

    def _run(self, part: _Part, context: Callable[[], AbstractContextManager[None]]) -> RetrievalOutput:
        def run() -> tuple[Tensor, int, Tensor]:
            with context():
                output = plain_retrieval(self.model, part.sequences, part.image_tokens())
            return output.text.total, output.text.count, output.vectors

        is_whole = len(part.sequences) == len(self.prompts)
        found = run() if is_whole else checkpoint(run, use_reentrant=False, preserve_rng_state=False)
        return RetrievalOutput(LossSum(found[0], found[1]), found[2])


@dataclass(frozen=True)
class _Part:
    """Some prompts, with the features (m, f) of their images."""

    model: GroundedModel
    sequences: Sequence[TokenSequence]
    features: Tensor

    def image_tokens(self) -> Tensor:
        """Return the image tokens (m * k, d)."""
        return self.model.adapter.image_tokens(self.features.to(self.model.active.device))


def without_images(model: GroundedModel, sequences: Sequence[TokenSequence]) -> list[TokenSequence]:
    """Return the sequences that have no images."""
    first = model.frozen_lm.vocabulary.first_image_id
    return [sequence for sequence in sequences if max(sequence.ids) < first]
