"""What is kept of a caption that ran up to its `[RET]`, and the protocol of what keeps it beyond the memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

# A caption's ids, `[RET]` last, and the index of its first label.
Key = tuple[tuple[int, ...], int]


@dataclass(frozen=True)
class CachedCaption:
    """What is kept of a caption of s ids before its `[RET]`.

    Args:
        keys_values: for each layer, keys and values (2, heads, s, width); none with a retrieval prompt.
        states: with a retrieval prompt, the state (width,) at its last word, one per text layer; else none.
        head_input: (labels, h), what the head read before each label; the last one predicts `[RET]`.
        log_normaliser: (labels,), over all columns but `[RET]`'s.
        label_logits: (labels - 1,), of the caption's own tokens.
    """

    keys_values: list[Tensor]
    states: list[Tensor]
    head_input: Tensor
    log_normaliser: Tensor
    label_logits: Tensor

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        likelihoods = self.head_input, self.log_normaliser, self.label_logits
        return sum(tensor.nbytes for tensor in (*self.keys_values, *self.states, *likelihoods))


class PrefixStorage(Protocol):
    """Keeps captions' keys and values beyond the memory of this process; see `prefix_files.PrefixFiles`."""

    def get(self, key: Key) -> CachedCaption | None:
        """Return what was kept, or None."""

    def put(self, fresh: Mapping[Key, CachedCaption]) -> None:
        """Keep these, if there is room."""
