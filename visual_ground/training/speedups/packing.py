"""Unpadded sequences are laid out for one run of the LM: padded, or several packed into a row without padding.

This is the only place that decides the layout; both losses read what it makes. Everything that depends on the ids is
computed here from Python numbers and sent to the device once: whoever asks a tensor on a GPU for one of its numbers
waits until the GPU has done all that it was given before.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from visual_ground.lm.reading import LMReading
from visual_ground.model import GroundedModel
from visual_ground.training.data.sequences import IGNORE_INDEX, TokenSequence
from visual_ground.training.speedups.attention import short_attention
from visual_ground.training.speedups.kv_cache import KeysValues, expanded, fixed_cache, growing_cache

# Positions in a packed row, or more if one sequence is longer. Attention costs the square of a row's length, so rows
# stay short, and yet several captions long, so that little is left for padding.
PACKED_WIDTH = 128


@dataclass(frozen=True)
class Span:
    """Where one sequence is in a `PackedBatch`.

    Args:
        index: its number among the sequences that were laid out.
        row: its row of the batch.
        start: its first position in the row.
        length: its number of ids.
        labels: which of the batch's labels are its.
    """

    index: int
    row: int
    start: int
    length: int
    labels: slice


@dataclass(frozen=True)
class PackedBatch:
    """What one run of the LM reads, on the LM's device.

    Args:
        ids: (b, s).
        attention_mask: (b, p + s), or (b, 1, s, p + s) to be added to the attention scores if packed; p is the
            length of the prefix whose keys and values are kept.
        position_ids: (b, s) if packed; else None, and the LM counts by itself.
        label_positions: (labels,) positions of the flattened ids at which the next id is a label.
        targets: (labels,), the labels.
        spans: the sequences, row by row.
        has_virtual: whether any id is `[RET]` or an image token.
    """

    ids: Tensor
    attention_mask: Tensor
    position_ids: Tensor | None
    label_positions: Tensor
    targets: Tensor
    spans: tuple[Span, ...]
    has_virtual: bool

    @property
    def last_positions(self) -> Tensor:
        """The position of each sequence's last id in the flattened ids, (sequences,), in order of the spans."""
        width = self.ids.shape[1]
        return on_device([span.row * width + span.start + span.length - 1 for span in self.spans], self.ids.device)


def lay_out(
    model: GroundedModel,
    sequences: Sequence[TokenSequence],
    packed: bool,
    mini_batch_size: int | None = None,
    prefix_length: int = 0,
) -> list[PackedBatch]:
    """Lay sequences out for the LM, those of similar length together.

    Args:
        model: the grounded model, for its pad id, device and dtype.
        sequences: their `labels` may be one longer than their `ids`, for what follows the last id.
        packed: several sequences in a row, none of which sees another; else one in a row, and padding.
        mini_batch_size: sequences in one run of the LM at most; None sets no limit.
        prefix_length: p, positions in front of each sequence whose keys and values the LM is given.
    """
    longest_first = sorted(range(len(sequences)), key=lambda i: -len(sequences[i].ids))
    limit = mini_batch_size or len(longest_first)
    groups = [longest_first[i : i + limit] for i in range(0, len(longest_first), limit)]
    if packed:
        return [_build(model, sequences, _share_out(sequences, group), prefix_length, True) for group in groups]
    similar = [part for group in groups for part in _of_similar_length(sequences, group)]
    return [_build(model, sequences, [[i] for i in part], prefix_length, False) for part in similar]


def pad_in_order(model: GroundedModel, sequences: Sequence[TokenSequence]) -> PackedBatch:
    """Lay all sequences out in one batch, padded on the right, in their order."""
    return _build(model, sequences, [[i] for i in range(len(sequences))], 0, False)


def _of_similar_length(sequences: Sequence[TokenSequence], longest_first: Sequence[int]) -> list[list[int]]:
    """Cut if the longest would be twice the shortest: padding costs as much time as tokens do."""
    groups: list[list[int]] = []
    for i in longest_first:
        if not groups or 2 * len(sequences[i].ids) <= len(sequences[groups[-1][0]].ids):
            groups.append([])
        groups[-1].append(i)
    return groups


def _share_out(sequences: Sequence[TokenSequence], longest_first: Sequence[int]) -> list[list[int]]:
    """Share sequences out among as many rows as are needed, each into the emptiest."""
    width = max(PACKED_WIDTH, len(sequences[longest_first[0]].ids))
    total = sum(len(sequences[i].ids) for i in longest_first)
    rows: list[list[int]] = [[] for _ in range(min(len(longest_first), -(-total // width)))]
    filled = [0] * len(rows)
    for i in longest_first:
        emptiest = filled.index(min(filled))
        rows[emptiest].append(i)
        filled[emptiest] += len(sequences[i].ids)
    return rows


def _build(
    model: GroundedModel, sequences: Sequence[TokenSequence], rows: Sequence[Sequence[int]], prefix: int, packed: bool
) -> PackedBatch:
    width = max(sum(len(sequences[i].ids) for i in row) for row in rows)
    size, device = len(rows) * width, model.frozen_lm.device
    ids, positions, owners = [model.processor.pad_token_id] * size, [0] * size, [-1] * size
    labels: list[tuple[int, int]] = []
    spans = []
    for row, indices in enumerate(rows):
        begin = row * width
        for index in indices:
            sequence, first_label, length = sequences[index], len(labels), len(sequences[index].ids)
            place = slice(begin, begin + length)
            ids[place], owners[place] = sequence.ids, [index] * length
            positions[place] = range(prefix, prefix + length)
            # The id at a position predicts the next one, hence the labels from the second on.
            labels += [(begin + n, label) for n, label in enumerate(sequence.labels[1:]) if label != IGNORE_INDEX]
            spans.append(Span(index, row, begin - row * width, length, slice(first_label, len(labels))))
            begin += length
    ret, first_image_id = model.ret_token_id, model.frozen_lm.vocabulary.first_image_id
    owner = torch.tensor(owners).view(len(rows), width)
    mask = _block_mask(owner, prefix, model.frozen_lm.dtype) if packed else _padding_mask(owner, prefix)
    return PackedBatch(
        on_device(ids, device).view(len(rows), width),
        mask.to(device, non_blocking=True),
        on_device(positions, device).view(len(rows), width) if packed else None,
        on_device([position for position, _ in labels], device),
        on_device([label for _, label in labels], device),
        tuple(spans),
        any(i == ret or i >= first_image_id for i in ids),
    )


def on_device(numbers: Sequence[int], device: torch.device) -> Tensor:
    """Return whole numbers as a tensor (n,) long, without waiting for what the device is doing."""
    return torch.tensor(numbers, dtype=torch.long).to(device, non_blocking=True)


def _padding_mask(owner: Tensor, prefix: int) -> Tensor:
    return pad((owner >= 0).long(), (prefix, 0), value=1)


def _block_mask(owner: Tensor, prefix: int, dtype: torch.dtype) -> Tensor:
    """Return (b, 1, s, p + s): every position sees the prefix and its own sequence up to itself, and nothing else."""
    length = owner.shape[1]
    seen = (owner[:, :, None] == owner[:, None]) & torch.ones(length, length, dtype=torch.bool).tril()
    return additive_mask(pad(seen, (prefix, 0), value=True)[:, None], dtype)


def additive_mask(seen: Tensor, dtype: torch.dtype) -> Tensor:
    """Turn a mask of what is seen into one that is added to the attention scores."""
    return torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)


def read(
    model: GroundedModel,
    batch: PackedBatch,
    positions: Tensor | None = None,
    image_tokens: Tensor | None = None,
    prefix: KeysValues | None = None,
    keep: bool = False,
    **options: Any,
) -> LMReading:
    """Run the LM over a batch and read it at some positions.

    Args:
        model: the grounded model.
        batch: what to read.
        positions: (r,), of the flattened ids; where the labels are predicted if None.
        image_tokens: (n * k, d).
        prefix: keys and values (1, heads, p, width) of each layer, of what stands in front of every sequence.
        keep: have the LM return its keys and values, those of the prefix first.
        options: for `FrozenLM.read`.
    """
    if prefix is not None:
        keys_values = expanded(prefix, len(batch.ids))
        options["cache"] = growing_cache(keys_values) if keep else fixed_cache(keys_values)
    if batch.position_ids is not None or model.frozen_lm.takes_positions:
        # None has the LM count by itself, as it does without; but `run` need not look for padding in the mask then.
        options["position_ids"] = batch.position_ids
    options |= {"use_cache": keep or prefix is not None, "has_virtual": batch.has_virtual}
    positions = batch.label_positions if positions is None else positions
    with short_attention(model.frozen_lm.device, batch.attention_mask.shape[-1]):
        return model.frozen_lm.read(batch.ids, batch.attention_mask, positions, image_tokens, **options)
