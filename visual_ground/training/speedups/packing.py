"""Labelled rows become what one run of the LM reads: padded, or packed several to a row without padding."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from visual_ground.errors import GroundingStateError
from visual_ground.model import GroundedModel
from visual_ground.training.data.examples import IGNORED, LabelledIds

# Positions of a packed row, more where a sequence is longer: attention costs their square, and all fits in a cache.
PACKED_WIDTH = 128
LEADS_KEPT = 64

# A window that is longer than a caption is none.
PLAIN_LAYERS = (DynamicLayer, DynamicSlidingWindowLayer)

KeysValues = list[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class PackedBatch:
    """What one run of the LM reads.

    Args:
        ids: (m, s).
        mask: (m, p + s), or (m, 1, s, p + s) to be added to the attention scores where packed; p is the lead's length.
        positions: (m, s) where packed, else None.
        predicting: (m, s) bool, where the next id is a label.
        targets: (labels,), in the order of `predicting`.
        spans: for each sequence in reading order its number, row, first position and length.
    """

    ids: Tensor
    mask: Tensor
    positions: Tensor | None
    predicting: Tensor
    targets: Tensor
    spans: tuple[tuple[int, int, int, int], ...]


def rows_of(batch: Mapping[str, Tensor]) -> list[LabelledIds]:
    """Return the sequences of a padded batch: input_ids, attention_mask and labels, each (b, s), right-padded."""
    lengths = batch["attention_mask"].sum(-1).tolist()
    pairs = zip(batch["input_ids"].tolist(), batch["labels"].tolist(), lengths, strict=True)
    return [LabelledIds(tuple(ids[:n]), tuple(labels[:n])) for ids, labels, n in pairs]


def pieces(
    model: GroundedModel, rows: Sequence[LabelledIds], packed: bool, mini_batch_size: int | None = None, lead: int = 0
) -> list[PackedBatch]:
    """Lay rows out for the LM, those of like length together.

    Args:
        model: the grounded model, for its pad id, device and dtype.
        rows: the sequences; `labels` may be one longer than `ids`, for what follows the last id.
        packed: several sequences in a row, each blind to the others; else one in a row, and padding.
        mini_batch_size: sequences in a piece at most; None sets no limit.
        lead: p, positions whose keys and values the LM is given besides.
    """
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i].ids))
    limit = mini_batch_size or len(order)
    groups = [order[i : i + limit] for i in range(0, len(order), limit)]
    if packed:
        return [_lay_out(model, rows, _bins(rows, group), lead, True) for group in groups]
    alike = [some for group in groups for some in _of_like_length(rows, group)]
    return [_lay_out(model, rows, [[i] for i in some], lead, False) for some in alike]


def _of_like_length(rows: Sequence[LabelledIds], order: Sequence[int]) -> list[list[int]]:
    """Cut a falling order where the longest would be twice the shortest: padding costs time."""
    groups: list[list[int]] = []
    for i in order:
        if not groups or 2 * len(rows[i].ids) <= len(rows[groups[-1][0]].ids):
            groups.append([])
        groups[-1].append(i)
    return groups


def _bins(rows: Sequence[LabelledIds], order: Sequence[int]) -> list[list[int]]:
    """Share sequences out, the longest first, each into the row that is the emptiest yet."""
    width = max(PACKED_WIDTH, len(rows[order[0]].ids))
    total = sum(len(rows[i].ids) for i in order)
    bins: list[list[int]] = [[] for _ in range(min(len(order), -(-total // width)))]
    filled = [0] * len(bins)
    for i in order:
        emptiest = filled.index(min(filled))
        bins[emptiest].append(i)
        filled[emptiest] += len(rows[i].ids)
    return bins


def _lay_out(
    model: GroundedModel, rows: Sequence[LabelledIds], bins: Sequence[Sequence[int]], lead: int, packed: bool
) -> PackedBatch:
    spans, length = [], 0
    for row, numbers in enumerate(bins):
        start = 0
        for i in numbers:
            spans.append((i, row, start, len(rows[i].ids)))
            start += len(rows[i].ids)
        length = max(length, start)
    ids = torch.full((len(bins), length), model.processor.pad_token_id)
    following, positions, owner = torch.full_like(ids, IGNORED), torch.zeros_like(ids), torch.full_like(ids, -1)
    for i, row, start, count in spans:
        place = slice(start, start + count)
        ids[row, place] = torch.tensor(rows[i].ids)
        next_labels = torch.tensor(rows[i].labels[1:], dtype=torch.long)
        following[row, start : start + len(next_labels)] = next_labels
        positions[row, place] = torch.arange(lead, lead + count)
        owner[row, place] = i
    predicting = following != IGNORED
    device = model.adapter.logit_scale.device
    mask = _block_mask(owner, lead, dtype_of(model)) if packed else _padding_mask(owner, lead)
    tensors = [tensor.to(device) for tensor in (ids, mask, positions, predicting, following[predicting])]
    return PackedBatch(tensors[0], tensors[1], tensors[2] if packed else None, tensors[3], tensors[4], tuple(spans))


def _padding_mask(owner: Tensor, lead: int) -> Tensor:
    return torch.nn.functional.pad((owner >= 0).long(), (lead, 0), value=1)


def _block_mask(owner: Tensor, lead: int, dtype: torch.dtype) -> Tensor:
    """Return (m, 1, s, p + s): every position sees the lead and its own sequence up to itself, and nothing else."""
    length = owner.shape[1]
    seen = (owner[:, :, None] == owner[:, None]) & torch.ones(length, length, dtype=torch.bool).tril()
    seen = torch.nn.functional.pad(seen, (lead, 0), value=True)[:, None]
    return torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)


def read(
    model: GroundedModel,
    piece: PackedBatch,
    image_tokens: Tensor | None = None,
    lead: KeysValues | None = None,
    whole_head: bool = False,
    keep: bool = False,
) -> tuple[Tensor, Any]:
    """Run the LM over a piece; return what its head read at the labels (labels, h), and its output.

    Args:
        model: the grounded model.
        piece: what to read.
        image_tokens: (n * k, d).
        lead: keys and values (1, heads, p, width) of each layer, of what stands before every sequence.
        whole_head: run the output head at every label, for logits (1, labels, columns); else at one only.
        keep: have the LM return its keys and values, those of the lead first.
    """
    options: dict[str, Any] = {} if piece.positions is None else {"position_ids": piece.positions}
    if lead is not None:
        shared = [
            (keys.expand(len(piece.ids), -1, -1, -1), values.expand(len(piece.ids), -1, -1, -1))
            for keys, values in lead
        ]
        options["cache"] = _growing_cache(shared) if keep else fixed_cache(shared)
    positions = piece.predicting.flatten().nonzero()[:, 0]
    options |= {"max_logits": None if whole_head else 1, "use_cache": keep or lead is not None}
    reading = model.frozen_lm.read(piece.ids, piece.mask, positions, image_tokens, **options)
    return reading.head_input, reading.output


class _FixedLayer(DynamicLayer):
    """A layer's keys and values that a run reads and does not add to, so that it can be run again."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Return the kept and the new ones, joined."""
        assert self.keys is not None and self.values is not None, "fixed_cache sets them"
        return torch.cat([self.keys, key_states], -2), torch.cat([self.values, value_states], -2)


def dtype_of(model: GroundedModel) -> torch.dtype:
    """Return the type of number that the LM computes in."""
    return getattr(model.lm, "dtype", torch.float32)


def fixed_cache(layers: KeysValues) -> DynamicCache:
    """Return a cache of keys and values (m, heads, p, width) that stays as it is."""
    cache = DynamicCache()
    for keys, values in layers:
        layer = _FixedLayer()
        layer.lazy_initialization(keys, values)
        layer.keys, layer.values = keys, values
        cache.layers.append(layer)
    return cache


def _growing_cache(layers: KeysValues) -> DynamicCache:
    """Return a cache of keys and values (m, heads, p, width) that a run adds its own to."""
    cache = DynamicCache()
    for number, (keys, values) in enumerate(layers):
        cache.update(keys, values, number)
    return cache


def plain_layers(output: Any, length: int) -> KeysValues:
    """Return each layer's keys and values (m, heads, length, width), of every position that was run.

    Args:
        output: what the LM returned, run with `use_cache=True`.
        length: how many positions were run.

    Raises:
        GroundingStateError: an LM that keeps something else, such as a state space or less than all positions.
    """
    # As transformers name it from 5.24 on, and before.
    cache = getattr(output, "cache" if hasattr(output, "cache") else "past_key_values", None)
    layers = getattr(cache, "layers", None)
    if type(cache) is not DynamicCache or not layers or any(type(x) not in PLAIN_LAYERS for x in layers):
        raise GroundingStateError(f"{type(cache).__name__} is not one plain key-value cache per layer.")
    if any(layer.keys.shape[-2] != length for layer in layers):
        raise GroundingStateError(f"A layer keeps fewer than the {length} positions that were run.")
    return [(layer.keys, layer.values) for layer in layers]


class SharedPrefixCache:
    """Keys and values of what stands before many sequences alike, none of it trained; each is run once.

    Args:
        model: the grounded model, whose LM must keep one plain key-value cache per layer.
    """

    def __init__(self, model: GroundedModel) -> None:
        self._model = model
        self._kept: OrderedDict[tuple[int, ...], KeysValues] = OrderedDict()

    @torch.no_grad()
    def get(self, ids: tuple[int, ...]) -> KeysValues | None:
        """Return each layer's keys and values (1, heads, p, width) of p ids, or None where there are no ids."""
        if not ids:
            return None
        if ids not in self._kept:
            tensor = torch.tensor([ids], device=self._model.adapter.logit_scale.device)
            ones = torch.ones_like(tensor)
            last = torch.full((1,), len(ids) - 1, device=tensor.device)
            output = self._model.frozen_lm.read(tensor, ones, last, use_cache=True).output
            self._kept[ids] = plain_layers(output, len(ids))
            if len(self._kept) > LEADS_KEPT:
                self._kept.popitem(last=False)
        return self._kept[ids]
