"""The text-retrieval pass for less: what stands before `[RET]` depends on nothing trained.

So it runs without gradient, once for each caption, and only the single position of `[RET]` runs with gradient, on the
kept keys and values. The cross entropy of a caption's tokens needs of the prefix only the head's input, the log
normaliser of the LM's own columns and the label's logit; `[RET]`'s column is added to these. Both are exact.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from visual_ground.errors import GroundingValueError
from visual_ground.model import GroundedModel
from visual_ground.training.data.examples import IGNORED, LabelledIds
from visual_ground.training.losses.captioning import LossSum
from visual_ground.training.losses.retrieval import CaptionLikelihoods, RetrievalOutput, plain_retrieval
from visual_ground.training.speedups.cross_entropy import own_columns
from visual_ground.training.speedups.packing import (
    PackedBatch,
    SharedPrefixCache,
    fixed_cache,
    pieces,
    plain_layers,
    read,
    rows_of,
)

CAPTIONS_PER_RUN = 32

Key = tuple[tuple[int, ...], int]


@dataclass(frozen=True)
class CaptionKV:
    """What is kept of one caption before its `[RET]`.

    Args:
        keys_values: for each layer, keys and values (2, heads, s, width).
        head_input: (labels, h), what the head read where a label follows; the last one predicts `[RET]`.
        log_normaliser: (labels,), of the LM's own columns.
        label_logits: (labels - 1,), of the caption's own tokens.
    """

    keys_values: list[Tensor]
    head_input: Tensor
    log_normaliser: Tensor
    label_logits: Tensor

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(t.nbytes for t in (*self.keys_values, self.head_input, self.log_normaliser, self.label_logits))


class PrefixStorage(Protocol):
    """Keeps prefixes beyond the memory of this process; see `prefix_files.PrefixFiles`."""

    def get(self, key: Key) -> CaptionKV | None:
        """Return what was kept, or None."""

    def put(self, fresh: Mapping[Key, CaptionKV]) -> None:
        """Keep these, where there is room."""


class PrefixCache:
    """Runs captions up to `[RET]` without gradient, and keeps what it found while there is room.

    Args:
        model: the grounded model, whose LM must keep one plain key-value cache per layer.
        limit_bytes: how much to keep in memory; 0 keeps nothing.
        packed: several captions in a row of the LM's batch, without padding.
        keeper: keeps prefixes on disk besides.
        leads: what stands before all captions runs once.
    """

    def __init__(
        self,
        model: GroundedModel,
        limit_bytes: int = 0,
        packed: bool = False,
        keeper: PrefixStorage | None = None,
        leads: bool = False,
    ) -> None:
        self.model, self.packed, self.keeper, self.leads = model, packed, keeper, leads
        self._leads = SharedPrefixCache(model)
        self.limit_bytes, self.held_bytes = limit_bytes, 0
        self._kept: dict[Key, CaptionKV] = {}

    def run(self, batch: Mapping[str, Tensor]) -> RetrievalOutput:
        """Compute what `plain_retrieval` computes, for a batch whose rows end with `[RET]`."""
        prefixes = self._prefixes(batch)
        vectors = self.model.adapter.embed_states(self._states(prefixes))
        return RetrievalOutput(self._spoken(prefixes).loss(self.model.adapter.ret_embeddings()[1]), vectors)

    def _prefixes(self, batch: Mapping[str, Tensor]) -> list[CaptionKV]:
        keys = [(row.ids, _first_label(row)) for row in rows_of(batch)]
        found: dict[Key, CaptionKV] = {}
        for key in dict.fromkeys(keys):
            prefix = self._kept.get(key) or (self.keeper.get(key) if self.keeper else None)
            if prefix is not None:
                found[key] = prefix
        missing = sorted({key for key in keys if key not in found}, key=lambda key: (len(key[0]), key))
        fresh: dict[Key, CaptionKV] = {}
        for start in range(0, len(missing), CAPTIONS_PER_RUN):
            fresh |= self._compute(missing[start : start + CAPTIONS_PER_RUN])
        if self.keeper and fresh:
            self.keeper.put(fresh)
        for key, prefix in {**found, **fresh}.items():
            if key not in self._kept and self.held_bytes + prefix.nbytes <= self.limit_bytes:
                self._kept[key] = prefix
                self.held_bytes += prefix.nbytes
        return [found.get(key) or fresh[key] for key in keys]

    @torch.no_grad()
    def _compute(self, keys: Sequence[Key]) -> dict[Key, CaptionKV]:
        """Run rows, each ending with `[RET]` and labelled from its first label on, up to before their `[RET]`."""
        # The last id of what stands before a caption predicts its first label, so that it runs with each.
        usual = tuple(self.model.processor.caption_prefix(image=False))[:-1] if self.leads else ()
        led: dict[tuple[int, ...], list[Key]] = {}
        for ids, first in keys:
            lead = usual if first > len(usual) and ids[: len(usual)] == usual else ()
            led.setdefault(lead, []).append((ids, first))
        fresh: dict[Key, CaptionKV] = {}
        for lead, some in led.items():
            fresh |= self._compute_led(lead, some)
        return fresh

    def _compute_led(self, lead: tuple[int, ...], keys: Sequence[Key]) -> dict[Key, CaptionKV]:
        model, before = self.model, len(lead)
        rows = [LabelledIds(ids[before:-1], (*[IGNORED] * (first - before), *ids[first:])) for ids, first in keys]
        fresh: dict[Key, CaptionKV] = {}
        for piece in pieces(model, rows, self.packed, lead=before):
            states, output = read(model, piece, lead=self._leads.get(lead), keep=True)
            normalisers, logits = own_columns(model, states, piece.targets)
            layers = plain_layers(output, before + piece.ids.shape[1])
            for number, row, start, count, labels in _places(piece):
                own = slice(before + start, before + start + count)
                # Joined or cloned anew, so that a kept slice does not hold the whole batch's memory.
                kept = [
                    torch.stack([torch.cat([t[row, :, :before], t[row, :, own]], -2) for t in layer])
                    for layer in layers
                ]
                numbers = normalisers[labels].clone(), logits[labels][:-1].clone()
                fresh[keys[number]] = CaptionKV(kept, states[labels].clone(), *numbers)
        return fresh

    def likelihoods(self, batch: Mapping[str, Tensor]) -> CaptionLikelihoods:
        """Return what decides how likely such a batch's captions and `[RET]`s are said, whatever `[RET]`'s row."""
        return self._spoken(self._prefixes(batch))

    def _spoken(self, prefixes: Sequence[CaptionKV]) -> CaptionLikelihoods:
        counts = torch.tensor([len(prefix.head_input) for prefix in prefixes])
        return CaptionLikelihoods(
            torch.cat([prefix.head_input for prefix in prefixes]),
            torch.cat([prefix.log_normaliser for prefix in prefixes]),
            torch.cat([prefix.label_logits for prefix in prefixes]),
            counts.cumsum(0) - 1,
        )

    def states(self, batch: Mapping[str, Tensor]) -> list[Tensor]:
        """Return the states at the `[RET]`s of such a batch, one (b, width) per text layer."""
        return self._states(self._prefixes(batch))

    def _states(self, prefixes: Sequence[CaptionKV]) -> list[Tensor]:
        """Run the single position of `[RET]` on the kept keys and values; return its states."""
        model = self.model
        device = model.adapter.logit_scale.device
        lengths = [prefix.keys_values[0].shape[2] for prefix in prefixes]
        longest = max(lengths)
        layers = []
        for layer in range(len(prefixes[0].keys_values)):
            padded = [
                torch.nn.functional.pad(prefix.keys_values[layer], (0, 0, longest - n, 0))
                for prefix, n in zip(prefixes, lengths, strict=True)
            ]
            keys, values = torch.stack(padded, 1).to(device)
            layers.append((keys, values))
        mask = torch.arange(longest + 1) >= longest - torch.tensor(lengths)[:, None]
        ids = torch.full((len(prefixes), 1), model.ret_token_id, device=device)
        return model.frozen_lm.hidden_states(
            ids,
            mask.long().to(device),
            torch.arange(len(ids), device=device),
            model.config.text_layers,
            cache=fixed_cache(layers),
            use_cache=True,
        )


def _first_label(row: LabelledIds) -> int:
    return next(n for n, label in enumerate(row.labels) if label != IGNORED)


def _places(piece: PackedBatch) -> list[tuple[int, int, int, int, slice]]:
    """Return a piece's spans, each with the slice of the labels that are its own."""
    before = torch.nn.functional.pad(piece.predicting.flatten().cumsum(0), (1, 0)).tolist()
    width = piece.predicting.shape[1]
    return [
        (number, row, start, count, slice(before[row * width + start], before[row * width + start + count]))
        for number, row, start, count in piece.spans
    ]


def run_retrieval(
    model: GroundedModel,
    batch: Mapping[str, Tensor],
    prefixes: PrefixCache | None,
    mini_batch_size: int | None = None,
    context: Callable[[], AbstractContextManager] = nullcontext,
) -> RetrievalOutput:
    """Compute the text-retrieval pass.

    Args:
        model: the grounded model.
        batch: input_ids, attention_mask, labels (b, s); each row's last id is `[RET]`.
        prefixes: None runs whole captions.
        mini_batch_size: rows whose activations are in memory at once. All vectors are computed first, and each part of
            them again when its gradient is known (gradient caching: Gao et al. 2021), so that the contrastive loss is
            that of the whole batch.
        context: what every run of rows is inside of.

    Raises:
        GroundingValueError: a caption that says `[RET]` itself.
    """
    said = ((batch["input_ids"] == model.ret_token_id) & (batch["attention_mask"] > 0)).sum(-1)
    if bool((said != 1).any()):
        wrong = (said != 1).nonzero()[:, 0].tolist()
        raise GroundingValueError(
            f"Rows {wrong} of the batch must say {model.config.ret_token} once, at their end. Take it out of the "
            "captions."
        )

    def run(part: Mapping[str, Tensor]) -> RetrievalOutput:
        with context():
            return plain_retrieval(model, part) if prefixes is None else prefixes.run(part)

    count = len(batch["input_ids"])
    if mini_batch_size is None or mini_batch_size >= count:
        return run(batch)
    starts = range(0, count, mini_batch_size)
    parts = [{name: tensor[i : i + mini_batch_size] for name, tensor in batch.items()} for i in starts]

    def again(part: Mapping[str, Tensor]) -> tuple[Tensor, int, Tensor]:
        result = run(part)
        return result.text.total, result.text.count, result.vectors

    found = [checkpoint(again, part, use_reentrant=False, preserve_rng_state=False) for part in parts]
    return RetrievalOutput.joined([RetrievalOutput(LossSum(total, n), vectors) for total, n, vectors in found])
