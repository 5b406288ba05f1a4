"""The text-retrieval pass for less: nothing that stands before `[RET]` depends on anything trained.

So captions run up to their `[RET]` without gradient, once each, and only the single position of `[RET]` runs with
gradient, on the kept keys and values. With a retrieval prompt, which is read in `[RET]`'s place, nothing that runs
depends on anything trained, and the states at its last word are kept instead. Of the caption itself, the cross entropy
needs the head's input, the log normaliser over all columns but `[RET]`'s, and the labels' logits; `[RET]`'s column is
added to these. Both are exact.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.utils.checkpoint import checkpoint

from visual_ground.errors import GroundingValueError
from visual_ground.model import GroundedModel
from visual_ground.training.data.sequences import IGNORE_INDEX, TokenSequence, with_retrieval_prompt
from visual_ground.training.losses.cached_caption import CachedCaption, Key, PrefixStorage
from visual_ground.training.losses.captioning import LossSum
from visual_ground.training.losses.retrieval import CaptionLikelihoods, RetrievalOutput, plain_retrieval
from visual_ground.training.speedups.cross_entropy import normalisers_without_ret
from visual_ground.training.speedups.kv_cache import SharedPrefixCache, fixed_cache, keys_values_of
from visual_ground.training.speedups.packing import PackedBatch, additive_mask, lay_out, on_device, read

# Captions that run up to their `[RET]` together, which bounds the memory. They are sorted by length before.
CAPTIONS_PER_RUN = 64


class PrefixCache:
    """Runs captions up to `[RET]` without gradient, and keeps the result while there is room.

    Args:
        model: the grounded model, whose LM must keep one plain key-value cache per layer.
        limit_bytes: how much to keep in memory; 0 keeps nothing.
        packed: several captions share a row of the LM's batch, without padding.
        storage: keeps them on disk as well.
        shared_prefix: the prompt prefix that all captions have in common runs once.
    """

    def __init__(
        self,
        model: GroundedModel,
        limit_bytes: int = 0,
        packed: bool = False,
        storage: PrefixStorage | None = None,
        shared_prefix: bool = False,
    ) -> None:
        self.model, self.packed, self.storage, self.shared_prefix = model, packed, storage, shared_prefix
        self._shared = SharedPrefixCache(model)
        self.limit_bytes, self.held_bytes = limit_bytes, 0
        self._kept: dict[Key, CachedCaption] = {}

    def without_memory(self) -> PrefixCache:
        """Return one that computes the same and keeps nothing."""
        return PrefixCache(self.model, packed=self.packed, shared_prefix=self.shared_prefix)

    def run(self, sequences: Sequence[TokenSequence]) -> RetrievalOutput:
        """Compute what `plain_retrieval` computes, for sequences that end with `[RET]`."""
        captions = self._captions(sequences)
        vectors = self.model.adapter.embed_states(self._states(captions))
        return RetrievalOutput(self._likelihoods(captions).loss(self.model.adapter.ret_embeddings()[1]), vectors)

    def likelihoods(self, sequences: Sequence[TokenSequence]) -> CaptionLikelihoods:
        """Return what the sequences' text loss depends on besides `[RET]`'s output embedding."""
        return self._likelihoods(self._captions(sequences))

    def states(self, sequences: Sequence[TokenSequence]) -> list[Tensor]:
        """Return the states that are read for retrieval, at `[RET]` or after it, one (b, width) per text layer."""
        return self._states(self._captions(sequences))

    def _captions(self, sequences: Sequence[TokenSequence]) -> list[CachedCaption]:
        keys = [(sequence.ids, _first_label(sequence)) for sequence in sequences]
        known: dict[Key, CachedCaption] = {}
        for key in dict.fromkeys(keys):
            caption = self._kept.get(key) or (self.storage.get(key) if self.storage else None)
            if caption is not None:
                known[key] = caption
        missing = sorted({key for key in keys if key not in known}, key=lambda key: (len(key[0]), key))
        fresh: dict[Key, CachedCaption] = {}
        for start in range(0, len(missing), CAPTIONS_PER_RUN):
            fresh |= self._compute(missing[start : start + CAPTIONS_PER_RUN])
        if self.storage and fresh:
            self.storage.put(fresh)
        for key, caption in {**known, **fresh}.items():
            if key not in self._kept and self.held_bytes + caption.nbytes <= self.limit_bytes:
                self._kept[key] = caption
                self.held_bytes += caption.nbytes
        return [known.get(key) or fresh[key] for key in keys]

    @torch.no_grad()
    def _compute(self, keys: Sequence[Key]) -> dict[Key, CachedCaption]:
        """Run captions, each labelled from its first label on, up to before their `[RET]`."""
        # The last id of the prompt predicts a caption's first label, so it runs with each caption.
        prompt = tuple(self.model.processor.caption_prefix(image=False))[:-1] if self.shared_prefix else ()
        captions: list[Key] = []
        others: list[Key] = []
        for ids, first in keys:
            follows = first > len(prompt) and ids[: len(prompt)] == prompt
            (captions if follows else others).append((ids, first))
        fresh: dict[Key, CachedCaption] = {}
        for prefix, group in ((prompt, captions), (self._common_prefix(others), others)):
            if group:
                fresh |= self._compute_after(prefix, group)
        return fresh

    def _common_prefix(self, keys: Sequence[Key]) -> tuple[int, ...]:
        """Return the text ids that all begin with, as turns of a chat do, before the last one ahead of a label."""
        if not self.shared_prefix or len(keys) < 2:
            return ()
        count, rows = 0, [ids[: first - 1] for ids, first in keys]
        for column in zip(*rows, strict=False):
            # Ids from `[RET]`'s on stand for what is trained, of which nothing is kept.
            if len(set(column)) > 1 or column[0] >= self.model.ret_token_id or column[0] < 0:
                break
            count += 1
        return rows[0][:count]

    def _compute_after(self, prefix: tuple[int, ...], keys: Sequence[Key]) -> dict[Key, CachedCaption]:
        n, fresh = len(prefix), {}
        sequences = [self._without_ret(ids, first).after(n) for ids, first in keys]
        for batch in lay_out(self.model, sequences, self.packed, prefix_length=n):
            for index, caption in self._run(batch, prefix):
                fresh[keys[index]] = caption
        return fresh

    def _without_ret(self, ids: tuple[int, ...], first: int) -> TokenSequence:
        """Return a caption without `[RET]`'s id and with its label, and the retrieval prompt, if there is one."""
        whole = TokenSequence(ids, (*[IGNORE_INDEX] * first, *ids[first:]))
        read = with_retrieval_prompt(self.model.processor, whole)
        return TokenSequence(ids[:-1], whole.labels) if read is whole else read

    def _run(self, batch: PackedBatch, prefix: tuple[int, ...]) -> Iterator[tuple[int, CachedCaption]]:
        n, count, prompted = len(prefix), len(batch.targets), bool(self.model.config.retrieval_prompt)
        options: dict[str, Any] = {"prefix": self._shared.get(prefix), "keep": not prompted, "max_logits": 1}
        if prompted:
            positions = torch.cat([batch.label_positions, batch.last_positions])
            options |= {"positions": positions, "layers": self.model.config.text_layers}
        reading = read(self.model, batch, **options)
        normalisers, logits = normalisers_without_ret(self.model, reading.head_input[:count], batch.targets)
        layers = [] if prompted else keys_values_of(reading.output, n + batch.ids.shape[1])
        for number, span in enumerate(batch.spans):
            row, place = span.row, slice(n + span.start, n + span.start + span.length)
            # Joined or cloned anew: a slice would hold the memory of the whole batch.
            keys_values = [
                torch.stack([torch.cat([t[row, :, :n], t[row, :, place]], -2) for t in layer]) for layer in layers
            ]
            states = [state[count + number].clone() for state in reading.states]
            head_input, normaliser = reading.head_input[span.labels].clone(), normalisers[span.labels].clone()
            likelihoods = head_input, normaliser, logits[span.labels][:-1].clone()
            yield span.index, CachedCaption(keys_values, states, *likelihoods)

    def _likelihoods(self, captions: Sequence[CachedCaption]) -> CaptionLikelihoods:
        ends = torch.tensor([len(caption.head_input) for caption in captions]).cumsum(0) - 1
        head_input = torch.cat([caption.head_input for caption in captions])
        return CaptionLikelihoods(
            head_input,
            torch.cat([caption.log_normaliser for caption in captions]),
            torch.cat([caption.label_logits for caption in captions]),
            ends.to(head_input.device, non_blocking=True),
        )

    def _states(self, captions: Sequence[CachedCaption]) -> list[Tensor]:
        """Return the kept states, or run the single position of `[RET]` on the kept keys and values for its states."""
        model, device = self.model, self.model.frozen_lm.device
        if model.config.retrieval_prompt:
            return [torch.stack(layer).to(device) for layer in zip(*(c.states for c in captions), strict=True)]
        lengths = [caption.keys_values[0].shape[2] for caption in captions]
        longest = max(lengths)
        layers = []
        for layer in range(len(captions[0].keys_values)):
            padded = [
                pad(caption.keys_values[layer], (0, 0, longest - caption.keys_values[layer].shape[2], 0))
                for caption in captions
            ]
            keys, values = torch.stack(padded, 1).to(device)
            layers.append((keys, values))
        seen = torch.arange(longest + 1) >= longest - torch.tensor(lengths)[:, None]
        options: dict[str, Any] = {"position_ids": on_device(lengths, device)[:, None]}
        # An LM that takes packed sequences takes this mask too. Given one (b, s), transformers waits for the GPU to see
        # whether anything is masked at all.
        mask = additive_mask(seen[:, None, None], model.frozen_lm.dtype) if self.packed else seen.long()
        return model.frozen_lm.hidden_states(
            torch.full((len(captions), 1), model.ret_token_id, device=device),
            mask.to(device, non_blocking=True),
            torch.arange(len(captions), device=device),
            model.config.text_layers,
            cache=fixed_cache(layers),
            use_cache=True,
            has_virtual=True,
            **(options if model.frozen_lm.takes_positions else {}),
        )


def _first_label(sequence: TokenSequence) -> int:
    return next(n for n, label in enumerate(sequence.labels) if label != IGNORE_INDEX)


def run_retrieval(
    model: GroundedModel,
    sequences: Sequence[TokenSequence],
    prefixes: PrefixCache | None,
    mini_batch_size: int | None = None,
    context: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> RetrievalOutput:
    """Compute the text-retrieval pass.

    Args:
        model: the grounded model.
        sequences: each ends with `[RET]`.
        prefixes: None runs whole captions.
        mini_batch_size: sequences whose activations are in memory at once. All vectors are computed first, and each
            part again when its gradient is known (gradient caching: Gao et al. 2021): the loss is the whole batch's.
        context: a context manager around every run of the LM.

    Raises:
        GroundingValueError: a caption that contains `[RET]`.
    """
    if wrong := [i for i, sequence in enumerate(sequences) if sequence.ids.count(model.ret_token_id) != 1]:
        raise GroundingValueError(
            f"Examples {wrong} of the batch must contain {model.config.ret_token} once, at their end. Remove it from "
            "the captions."
        )

    def run(part: Sequence[TokenSequence]) -> RetrievalOutput:
        with context():
            return plain_retrieval(model, part) if prefixes is None else prefixes.run(part)

    if mini_batch_size is None or mini_batch_size >= len(sequences):
        return run(sequences)
    parts = [sequences[i : i + mini_batch_size] for i in range(0, len(sequences), mini_batch_size)]

    def again(part: Sequence[TokenSequence]) -> tuple[Tensor, int, Tensor]:
        output = run(part)
        return output.text.total, output.text.count, output.vectors

    outputs = [checkpoint(again, part, use_reentrant=False, preserve_rng_state=False) for part in parts]
    return RetrievalOutput.joined([RetrievalOutput(LossSum(total, n), vectors) for total, n, vectors in outputs])
