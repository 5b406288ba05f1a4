"""The text-retrieval pass for less: what stands before `[RET]` depends on nothing trained.

So it runs without gradient, once for each caption, and only the single position of `[RET]` runs with gradient, on the
kept keys and values. The cross entropy of a caption's tokens needs of the prefix only the head's input, the log
normaliser of the LM's own columns and the label's logit; `[RET]`'s column is added to these. Both are exact.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from visual_ground.errors import GroundingStateError
from visual_ground.model import GroundedModel
from visual_ground.training.examples import IGNORED

ROWS_AT_ONCE = 32
PLAIN = (DynamicLayer, DynamicSlidingWindowLayer)


@dataclass(frozen=True)
class RetrievalPass:
    """What the text-retrieval pass gives: the loss of its labels, and the vectors (b, q) at its `[RET]`s."""

    loss: Tensor
    vectors: Tensor


@dataclass(frozen=True)
class Prefix:
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


class PrefixStore:
    """Runs captions up to `[RET]` without gradient, and keeps what it found while there is room.

    Args:
        model: the grounded model, whose LM must keep one plain key-value cache per layer.
        limit_bytes: how much to keep; 0 keeps nothing.
        window: the LM's shortest attention window, as a run of another store found it; None where there is none.
    """

    def __init__(self, model: GroundedModel, limit_bytes: int = 0, window: int | None = None) -> None:
        self.model, self.limit_bytes, self.held_bytes, self.window = model, limit_bytes, 0, window
        self._kept: dict[tuple[int, ...], Prefix] = {}

    def run(self, batch: Mapping[str, Tensor]) -> RetrievalPass:
        """Compute what `losses.plain_retrieval` computes, for a batch whose rows end with `[RET]`."""
        prefixes = self._prefixes(batch)
        return RetrievalPass(self._text_loss(prefixes), self._vectors(prefixes))

    def fits(self, batch: Mapping[str, Tensor]) -> bool:
        """Return whether every `[RET]` of the batch sees its whole caption through the LM's attention window."""
        return self.window is None or batch["input_ids"].shape[1] <= self.window

    def _prefixes(self, batch: Mapping[str, Tensor]) -> list[Prefix]:
        lengths = batch["attention_mask"].sum(-1).tolist()
        rows = [tuple(ids[:n].tolist()) for ids, n in zip(batch["input_ids"], lengths, strict=True)]
        firsts = [int((labels != IGNORED).nonzero()[0]) for labels in batch["labels"]]
        missing = {row: first for row, first in zip(rows, firsts, strict=True) if row not in self._kept}
        fresh: dict[tuple[int, ...], Prefix] = {}
        # By length, so that one long row does not pad all others.
        ordered = sorted(missing, key=len)
        for start in range(0, len(ordered), ROWS_AT_ONCE):
            some = ordered[start : start + ROWS_AT_ONCE]
            fresh |= zip(some, self._compute(some, [missing[row] for row in some]), strict=True)
        for row, prefix in fresh.items():
            if self.held_bytes + prefix.nbytes <= self.limit_bytes:
                self._kept[row] = prefix
                self.held_bytes += prefix.nbytes
        return [fresh.get(row) or self._kept[row] for row in rows]

    @torch.no_grad()
    def _compute(self, rows: Sequence[tuple[int, ...]], firsts: Sequence[int]) -> list[Prefix]:
        """Run rows, each ending with `[RET]` and labelled from `firsts` on, up to before their `[RET]`."""
        model = self.model
        device = model.adapter.logit_scale.device
        length = max(map(len, rows)) - 1
        ids = torch.full((len(rows), length), model.pad_id)
        mask, predicting = torch.zeros_like(ids), torch.zeros_like(ids, dtype=torch.bool)
        for i, (row, first) in enumerate(zip(rows, firsts, strict=True)):
            start = length - len(row) + 1
            ids[i, start:], mask[i, start:] = torch.tensor(row[:-1]), 1
            predicting[i, start + max(first, 1) - 1 :] = True
        with model.bind(None, predicting.to(device)) as call:
            output = model.run(ids.to(device), mask.to(device), use_cache=True)
        logits = output.logits[0].float()
        logits[:, model.ret_token_id] = float("-inf")
        counts = predicting.sum(-1).tolist()
        pieces = zip(logits.split(counts), call.head_input[0].split(counts), strict=True)
        layers = _plain_layers(getattr(output, "past_key_values", None))
        windows = [layer.sliding_window for layer in output.past_key_values.layers if layer.is_sliding]
        self.window = min(windows, default=None)
        prefixes = []
        for i, (scores, head_input) in enumerate(pieces):
            own = torch.tensor(rows[i][len(rows[i]) - counts[i] : -1], device=scores.device)
            start = length - len(rows[i]) + 1
            # Cloned, so that a kept slice does not hold the whole batch's memory.
            kept = [torch.stack([keys[i, :, start:], values[i, :, start:]]) for keys, values in layers]
            labels = scores[: len(own)].gather(-1, own[:, None])[:, 0]
            prefixes.append(Prefix(kept, head_input.clone(), scores.logsumexp(-1), labels))
        return prefixes

    def _text_loss(self, prefixes: Sequence[Prefix]) -> Tensor:
        """Return the mean cross entropy of all captions' tokens and `[RET]`s."""
        row = self.model.adapter.ret_rows()[1]
        counts = [len(prefix.head_input) for prefix in prefixes]
        ret = torch.cat([prefix.head_input for prefix in prefixes]).to(row) @ row
        normaliser = torch.logaddexp(torch.cat([prefix.log_normaliser for prefix in prefixes]).to(ret), ret)
        last = torch.tensor(counts, device=ret.device).cumsum(0) - 1
        own = torch.cat([prefix.label_logits for prefix in prefixes]).sum().to(ret)
        return (normaliser.sum() - own - ret[last].sum()) / sum(counts)

    def _vectors(self, prefixes: Sequence[Prefix]) -> Tensor:
        """Run the single position of `[RET]` on the kept keys and values; return (b, q)."""
        model = self.model
        device = model.adapter.logit_scale.device
        lengths = [prefix.keys_values[0].shape[2] for prefix in prefixes]
        longest = max(lengths)
        cache = DynamicCache()
        for layer in range(len(prefixes[0].keys_values)):
            padded = [
                torch.nn.functional.pad(prefix.keys_values[layer], (0, 0, longest - n, 0))
                for prefix, n in zip(prefixes, lengths, strict=True)
            ]
            keys, values = torch.stack(padded, 1)
            cache.update(keys, values, layer)
        mask = torch.arange(longest + 1) >= longest - torch.tensor(lengths)[:, None]
        ids = torch.full((len(prefixes), 1), model.ret_token_id, device=device)
        said = torch.ones_like(ids, dtype=torch.bool)
        with model.bind(None, said) as call:
            output = model.run(
                ids,
                mask.long().to(device),
                past_key_values=cache,
                use_cache=True,
                output_hidden_states=model.needs_hidden_states,
            )
        return model.ret_embeddings(call, output, said)


def _plain_layers(cache: object) -> list[tuple[Tensor, Tensor]]:
    """Return each layer's keys and values (b, heads, s, width); a window that nothing has left yet is as good as none.

    Raises:
        GroundingStateError: an LM that keeps something else, such as a state space, or that has let go of something.
    """
    layers = getattr(cache, "layers", None)
    if type(cache) is not DynamicCache or not layers or any(type(layer) not in PLAIN for layer in layers):
        raise GroundingStateError(f"{type(cache).__name__} is not one plain key-value cache per layer.")
    if any(layer.keys.shape[2] < layer.get_seq_length() for layer in layers):
        raise GroundingStateError("A caption is longer than the LM's attention window.")
    return [(layer.keys, layer.values) for layer in layers]
