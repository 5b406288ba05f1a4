"""`VirtualVocabulary`: which ids are the language model's own, and which are virtual."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from visual_ground.errors import GroundingStateError


@dataclass(frozen=True)
class VirtualVocabulary:
    """Which ids are the LM's own and which are virtual.

    Args:
        num_rows: rows of the LM's input embedding.
        num_columns: columns of its logits.
        num_tokens: one more than the tokenizer's highest id.
        reserved_ids: ids with a special meaning (pad, bos, eos, placeholders), never used as the safe id.
        widens: whether columns that are added to the head's output reach the logits; a few LMs cut them off.
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
        """The id of the first image token; all ids from here on are image tokens."""
        return max(self.num_rows, self.num_columns, self.num_tokens, self.ret_token_id + 1)

    @property
    def safe_id(self) -> int:
        """An ordinary id of the LM's own, which replaces virtual ids inside it."""
        count = min(self.num_rows, self.num_columns, self.num_tokens)
        # From the middle of the vocabulary, because special tokens are at its ends.
        return next((i for i in range(count // 2, count) if i not in self.reserved_ids), 0)

    def is_token(self, id: int) -> bool:
        """Return whether an id is a token, which has a text; an LM with more embeddings can generate others."""
        return id < self.num_tokens

    def is_virtual(self, ids: Tensor) -> Tensor:
        """Return the mask, shaped as `ids`, of the virtual ids."""
        return (ids == self.ret_token_id) | (ids >= self.first_image_id)

    def refuse_virtual(self, ids: Tensor) -> None:
        """Raise GroundingStateError if ids are virtual: with its hooks off, the LM would take them for its own."""
        if bool(self.is_virtual(ids).any()):
            raise GroundingStateError(
                "The adapter is disabled here, so neither images nor [RET] can be read. Leave disable_adapter()."
            )

    def add_columns(self, logits: Tensor, ret_column: Tensor, num_image_tokens: int, mask_spare: bool) -> Tensor:
        """Put the columns of virtual ids into the LM's logits; those of image tokens are -inf.

        Args:
            logits: (b, s, v), the LM's own.
            ret_column: (b, s), the logits of `[RET]`.
            num_image_tokens: n * k of this call.
            mask_spare: whether columns of ids that no token uses become -inf.

        Returns:
            (b, s, columns): the LM's own and `[RET]`'s, which may be a spare one of these, and those of image tokens.
        """
        ret_column = ret_column.unsqueeze(-1)
        own, width = logits.shape[-1], self.first_image_id + num_image_tokens
        if self.ret_is_spare:
            spare = logits[..., self.ret_token_id + 1 :]
            after = _forbidden(logits, spare.shape[-1]) if mask_spare else spare
            parts = [logits[..., : self.ret_token_id], ret_column, after, _forbidden(logits, width - own)]
            return torch.cat(parts, dim=-1)
        if mask_spare and self.num_tokens < own:
            logits = torch.cat([logits[..., : self.num_tokens], _forbidden(logits, own - self.num_tokens)], dim=-1)
        before, after = _forbidden(logits, self.ret_token_id - own), _forbidden(logits, width - self.ret_token_id - 1)
        return torch.cat([logits, before, ret_column, after], dim=-1)

    def forbidden_columns(self, mask_spare: bool) -> list[slice]:
        """Return the columns that `add_columns` sets to -inf, some of which may be empty."""
        start = min(self.num_tokens, self.num_columns) if mask_spare else self.num_columns
        return [slice(start, self.ret_token_id), slice(max(start, self.ret_token_id + 1), None)]

    def forbids(self, logits: Tensor, mask_spare: bool) -> bool:
        """Return whether the forbidden columns of logits (b, s, columns) are -inf, judged by its first position."""
        columns = (logits[0, 0, part] for part in self.forbidden_columns(mask_spare))
        return all(not column.numel() or bool(column[0] == float("-inf")) for column in columns)

    def forbid(self, logits: Tensor, mask_spare: bool) -> Tensor:
        """Return logits (..., columns) whose forbidden columns are -inf; written in place if nothing is trained."""
        logits = logits.clone() if logits.requires_grad else logits
        for part in self.forbidden_columns(mask_spare):
            logits[..., part] = float("-inf")
        return logits


def _forbidden(logits: Tensor, count: int) -> Tensor:
    return logits.new_full((*logits.shape[:-1], count), float("-inf"))
