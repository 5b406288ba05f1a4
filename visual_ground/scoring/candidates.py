"""`CandidateScorer`: how likely each of many answers is after one prompt, which runs once for all of them."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from visual_ground.adapter.attached import AttachedAdapter
from visual_ground.errors import GroundingStateError, GroundingValueError
from visual_ground.lm.frozen_lm import FrozenLM
from visual_ground.lm.key_values import cache_of, copy_of, plain_layers
from visual_ground.lm.reading import log_likelihoods
from visual_ground.prompts.encoded import EncodedPrompt

logger = logging.getLogger(__name__)

# How many candidates both methods are tested on: two, so that padding is tested too.
NUM_TRIED = 2


class CandidateScorer:
    """Log-likelihoods of candidates, such as the 100 answers of a round of VisDial.

    The LM reads the prompt once, and each candidate on a copy of the prompt's keys and values. There is no list of LMs
    that allow this: with the first candidates the numbers are compared with those of reading everything from scratch,
    and an LM that gives others (or keeps no keys and values, as a state space does) is read from scratch from then on.

    Args:
        frozen_lm: the LM.
        attached: the active adapter.
        batch_size: candidates that the LM reads at once.

    Attributes:
        shares_prompt: whether the prompt runs once; None until a candidate of several tokens came.
    """

    def __init__(self, frozen_lm: FrozenLM, attached: AttachedAdapter, batch_size: int = 50) -> None:
        if batch_size < 1:
            raise GroundingValueError(f"batch_size must be at least 1, got {batch_size}.")
        self.frozen_lm, self.attached, self.batch_size = frozen_lm, attached, batch_size
        self.shares_prompt: bool | None = None

    @torch.no_grad()
    def score(self, prompt: EncodedPrompt, candidates: Sequence[str], image_features: Tensor | None = None) -> Tensor:
        """Return log p(candidate | prompt), (n,) float32 on the CPU, in nats, summed over the tokens.

        They are those of `GroundedModel.log_likelihood` but for rounding. The order of the candidates, and what else is
        scored with one, makes no difference beyond that either.

        Args:
            prompt: as from `GroundingProcessor.encode`.
            candidates: n texts, put after the prompt.
            image_features: (m, f), of the images in the prompt; if None, the images are encoded.

        Raises:
            GroundingValueError: no candidates, or one with no tokens.
        """
        texts = [tuple(self.attached.processor.continue_text(text)) for text in candidates]
        if not texts or not all(texts):
            empty = [number for number, ids in enumerate(texts) if not ids]
            raise GroundingValueError(f"Candidates need tokens, at least one each; {empty or 'all'} have none.")
        self.attached.processor.check_ids([EncodedPrompt((*prompt.ids, *ids), ()) for ids in texts])
        image_tokens = self._image_tokens(prompt, image_features)
        # Those of similar length together: padding costs as much time as tokens do.
        order = sorted(range(len(texts)), key=lambda number: len(texts[number]))
        ordered = [texts[number] for number in order]
        # A candidate of one token does not use the cache, so it cannot test whether sharing it works.
        if self.shares_prompt is None and ordered[-1][1:]:
            self.shares_prompt = self._try(prompt, ordered[-NUM_TRIED:], image_tokens)
        way = self._from_scratch if self.shares_prompt is False else self._shared
        scores = torch.empty(len(texts))
        scores[order] = way(prompt, ordered, image_tokens)
        return scores

    def _image_tokens(self, prompt: EncodedPrompt, image_features: Tensor | None) -> Tensor | None:
        if image_features is None and prompt.images:
            image_features = self.attached.vision.encode(list(prompt.images))
        return self.attached.image_tokens(image_features=image_features)

    def _try(self, prompt: EncodedPrompt, texts: Sequence[tuple[int, ...]], image_tokens: Tensor | None) -> bool:
        """Return whether sharing the prompt gives what reading from scratch gives."""
        expected = self._from_scratch(prompt, texts, image_tokens)
        try:
            found = self._shared(prompt, texts, image_tokens)
        except Exception as error:  # Whatever an unknown LM raises here means that it does not allow this.
            logger.info("Prompts are read again for each candidate: %s: %s", type(error).__name__, error)
            return False
        # Rounding is far below this, a wrong mask or position far above.
        tolerance = 1e-4 if self.frozen_lm.dtype == torch.float32 else 3e-2
        same = torch.allclose(found, expected, rtol=tolerance, atol=tolerance)
        if not same:
            logger.info("Prompts are read again for each candidate: %s and %s differ.", found, expected)
        return same

    def _from_scratch(
        self, prompt: EncodedPrompt, texts: Sequence[tuple[int, ...]], image_tokens: Tensor | None
    ) -> Tensor:
        scores = []
        for start in range(0, len(texts), self.batch_size):
            part = texts[start : start + self.batch_size]
            encoded = [EncodedPrompt((*prompt.ids, *ids), ()) for ids in part]
            batch = self.attached.processor.batch(encoded).to(self.frozen_lm.device)
            tokens = None if image_tokens is None else image_tokens.repeat(len(part), 1)
            inputs = batch["input_ids"], batch["attention_mask"], list(map(len, part)), tokens
            scores.append(self.frozen_lm.log_likelihood(*inputs).float().cpu())
        return torch.cat(scores)

    def _shared(self, prompt: EncodedPrompt, texts: Sequence[tuple[int, ...]], image_tokens: Tensor | None) -> Tensor:
        batch = self.attached.processor.batch([EncodedPrompt(prompt.ids, ())]).to(self.frozen_lm.device)
        length = batch["input_ids"].shape[1]
        last = torch.tensor([length - 1], device=self.frozen_lm.device)
        inputs = batch["input_ids"], batch["attention_mask"], last, image_tokens
        reading = self.frozen_lm.read(*inputs, use_cache=any(ids[1:] for ids in texts))
        first = torch.log_softmax(reading.logits[0].float(), -1).cpu()
        scores = torch.stack([first[ids[0]] for ids in texts])
        for start in range(0, len(texts), self.batch_size):
            part = [number for number in range(start, min(start + self.batch_size, len(texts))) if texts[number][1:]]
            if part and plain_layers(cache := cache_of(reading.output), length) is None:
                raise GroundingStateError(f"{type(cache).__name__} is not one plain key-value cache per layer.")
            if part:
                scores[part] += self._after(cache, length, [texts[number] for number in part])
        return scores

    def _after(self, cache: Any, length: int, texts: Sequence[tuple[int, ...]]) -> Tensor:
        """Return the log-likelihoods (n,) of texts from their second ids on, read on a copy of the prompt's cache."""
        device, width = self.frozen_lm.device, max(map(len, texts)) - 1
        pad_id = self.attached.processor.pad_token_id
        ids = torch.tensor([[*text[:-1], *[pad_id] * (width - len(text) + 1)] for text in texts], device=device)
        counts = [len(text) - 1 for text in texts]
        read = torch.tensor([i * width + j for i, count in enumerate(counts) for j in range(count)], device=device)
        mask = torch.tensor([[1] * (length + n) + [0] * (width - n) for n in counts], device=device)
        copied = copy_of(cache, lambda tensor: tensor.expand(len(texts), *tensor.shape[1:]))
        logits = self.frozen_lm.read(ids, mask, read, cache=copied, use_cache=True).logits
        targets = torch.tensor([label for text in texts for label in text[1:]])
        return log_likelihoods(logits, targets, counts).cpu()
