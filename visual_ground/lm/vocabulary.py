"""Which ids are the language model's own, and which are ours."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class VirtualVocabulary:
    """Which ids are the LM's own and which are ours.

    Args:
        num_rows: rows of the LM's input embedding.
        num_columns: columns of its logits.
        num_tokens: one more than the tokenizer's highest id.
        reserved_ids: ids with a meaning of their own (pad, bos, eos, placeholders), never used as the safe id.
        widens: whether columns that are added to what the head gives reach the logits; a few LMs cut them off.
    """

    num_rows: int
    num_columns: int
    num_tokens: int
    reserved_ids: frozenset[int] = frozenset()
    widens: bool = True

    @property
    def ret_is_spare(self) -> bool:
        """Whether `[RET]` takes an id that the LM has and no token uses."""
        return self.num_tokens < min(self.num_rows, self.num_columns)

    @property
    def ret_token_id(self) -> int:
        """The id of `[RET]`."""
        return self.num_tokens if self.ret_is_spare else max(self.num_rows, self.num_columns, self.num_tokens)

    @property
    def first_image_id(self) -> int:
        """The id of the first image row; all ids from here on are image rows."""
        return max(self.num_rows, self.num_columns, self.num_tokens, self.ret_token_id + 1)

    @property
    def safe_id(self) -> int:
        """A real, ordinary id that stands in for ours inside the LM."""
        count = min(self.num_rows, self.num_columns, self.num_tokens)
        return next((i for i in range(count // 2, count) if i not in self.reserved_ids), 0)

    def is_virtual(self, ids: Tensor) -> Tensor:
        """Return the mask, shaped as `ids`, of the ids that are ours."""
        return (ids == self.ret_token_id) | (ids >= self.first_image_id)
