"""Extra vocabulary rows for a frozen language model, attached with hooks at its two ends.

Ids that the frozen embedding does not have travel through the LM's own forward and `generate`:

    id                               enters as                          leaves as
    ret_token_id                     the adapter's [RET] input row      one logit, head input . [RET] output row
    first_image_id + i, i < n * k    row i of this call's image rows    -inf

Before anything inside the LM sees them, a hook swaps those ids for a real one; a hook on the input embedding then
writes our rows over those positions; a hook on the output head adds the columns. Nothing in the LM is resized,
copied or written. What one call needs (its image rows, what it wants to read back) lives in a context variable, so
that two threads never see each other's.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from visual_ground.errors import GroundingIndexError, GroundingStateError
from visual_ground.vocabulary import VirtualVocabulary


@dataclass(eq=False)
class Call:
    """What one call binds for the hooks, and what they hand back.

    Args:
        owner: the hooks that this call is meant for.
        image_rows: (n * k, d) input rows, or None.
        positions: (b, s) bool; where given, the output head runs only there and logits are (1, positions.sum(), v+1).
        enabled: False makes the LM behave as if nothing were attached.
        head_rows: the output head runs at no more than so many of the positions; `head_input` has all of them.
        unbound: a forward outside any `VirtualRows.call` block; the call ends with it.
        head_input: (b, s, h) or (1, positions.sum(), h), what the head read in the latest forward.
    """

    owner: object
    image_rows: Tensor | None = None
    positions: Tensor | None = None
    enabled: bool = True
    head_rows: int | None = None
    unbound: bool = False
    head_input: Tensor | None = None
    outer: Call | None = None
    virtual: Tensor | None = None
    table_index: Tensor | None = None
    safe_ids: Tensor | None = None
    written: bool = False
    selected: bool = False
    packed: int = 0


_calls: ContextVar[Call | None] = ContextVar("visual_ground_call", default=None)


class VirtualRows:
    """The hooks that give a frozen LM its extra rows and columns.

    Args:
        lm: a causal LM with `get_input_embeddings` and `get_output_embeddings`.
        vocabulary: whose ids are whose.
        ret_rows: returns `[RET]`'s input row (d,) and output row (h,), read anew in each forward.
        mask_spare_columns: set the logits of ids that no token has to -inf.
    """

    def __init__(
        self,
        lm: nn.Module,
        vocabulary: VirtualVocabulary,
        ret_rows: Callable[[], tuple[Tensor, Tensor]],
        mask_spare_columns: bool = False,
    ) -> None:
        self.lm, self.vocabulary, self.ret_rows = lm, vocabulary, ret_rows
        self.mask_spare_columns = mask_spare_columns
        self._parameters = list(inspect.signature(lm.forward).parameters)
        self._handles: list[RemovableHandle] = []

    def attach(self) -> None:
        """Put the hooks on the LM."""
        if self._handles:
            raise GroundingStateError("These rows are attached already; call detach() first.")
        embedding, head = self.lm.get_input_embeddings(), self.lm.get_output_embeddings()
        self._handles = [
            self.lm.register_forward_pre_hook(self._swap_ids, with_kwargs=True, prepend=True),
            self.lm.register_forward_hook(self._finish, always_call=True),
            embedding.register_forward_hook(self._write_rows, with_kwargs=True),
            head.register_forward_pre_hook(self._select_positions),
            head.register_forward_hook(self._add_columns),
        ]

    def detach(self) -> None:
        """Take the hooks off; the LM is what it was."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    @property
    def attached(self) -> bool:
        """Whether the hooks are on the LM."""
        return bool(self._handles)

    @property
    def disabled(self) -> bool:
        """Whether this runs inside a call with `enabled=False`."""
        call = self._current()
        return call is not None and not call.enabled

    @contextlib.contextmanager
    def call(
        self, image_rows: Tensor | None = None, positions: Tensor | None = None, enabled: bool = True
    ) -> Iterator[Call]:
        """Bind what the forwards inside the block need; the arguments are those of `Call`."""
        call = Call(self, image_rows, positions, enabled, outer=_calls.get())
        token = _calls.set(call)
        try:
            yield call
        finally:
            _calls.reset(token)

    def _current(self) -> Call | None:
        call = _calls.get()
        while call is not None and call.owner is not self:
            call = call.outer
        return call

    def _table_index(self, ids: Tensor, num_image_rows: int) -> Tensor:
        """Map virtual ids to rows of [RET, image rows...]; the LM's own ids map to 0."""
        if bool((ids >= self.vocabulary.first_image_id + num_image_rows).any()):
            raise GroundingIndexError(
                f"Token id {int(ids.max())} points past this call's {num_image_rows} image rows, whose ids start at "
                f"{self.vocabulary.first_image_id}. Pass the images that the ids were prepared with."
            )
        return (ids - (self.vocabulary.first_image_id - 1)).clamp_min(0)

    def _swap_ids(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        bound = self._current()
        if bound is not None and not bound.enabled:
            return None
        call = bound or Call(self, unbound=True, outer=_calls.get())
        call.virtual, call.written, call.head_input, call.packed = None, False, None, 0
        if call.unbound:
            _calls.set(call)
        slot = self._parameters.index("input_ids") if "input_ids" in self._parameters else 0
        ids = args[slot] if len(args) > slot else kwargs.get("input_ids")
        if ids is None:
            return None
        virtual = self.vocabulary.is_virtual(ids)
        if not bool(virtual.any()):
            return None
        call.virtual = virtual
        call.table_index = self._table_index(ids, 0 if call.image_rows is None else len(call.image_rows))
        call.safe_ids = torch.where(virtual, torch.full_like(ids, self.vocabulary.safe_id), ids)
        if len(args) > slot:
            return (*args[:slot], call.safe_ids, *args[slot + 1 :]), kwargs
        return args, {**kwargs, "input_ids": call.safe_ids}

    def _finish(self, module: nn.Module, args: tuple, output: Any) -> Any:
        call = self._current()
        if call is None or not call.enabled:
            return None
        if call.unbound:
            _calls.set(call.outer)
        if call.virtual is not None and not call.written and output is not None:
            raise GroundingStateError(
                f"{type(self.lm).__name__} did not pass its input ids to the module that get_input_embeddings() "
                "returns, so image and [RET] rows could not be written. Please report this architecture."
            )
        call.virtual = None
        if call.packed and hasattr(output, "logits"):
            own, ours = output.logits[:, : -call.packed], output.logits[:, -call.packed :].flatten(1)
            output.logits = self._with_ours(own, ours[:, : own.shape[1]], call)
        if call.positions is not None and not call.selected and call.head_input is not None:
            output.logits = output.logits[call.positions].unsqueeze(0)
            call.head_input = call.head_input[call.positions].unsqueeze(0)
        return self._forbid_columns(output)

    def _forbid_columns(self, output: Any) -> Any:
        """Put -inf back into the columns that no one may say, where the LM capped or scaled its logits."""
        if not hasattr(output, "logits"):
            return None
        columns = [slice(self.vocabulary.first_image_id, None)]
        if self.mask_spare_columns:
            words = self.vocabulary
            columns.append(slice(words.ret_token_id + 1 if words.ret_is_spare else words.num_tokens, words.num_columns))
        logits = output.logits
        lost = [part for part in columns if logits[..., part].numel() and logits[0, 0, part][0] != float("-inf")]
        if not lost:
            return None
        logits = logits.clone() if logits.requires_grad else logits
        for part in lost:
            logits[..., part] = float("-inf")
        output.logits = logits
        return output

    def _write_rows(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Tensor) -> Tensor | None:
        call = self._current()
        if call is None or not call.enabled or call.virtual is None:
            return None
        seen = args[0] if args else next(iter(kwargs.values()))
        placed = _place(seen, call)
        if placed is None:
            return None
        virtual, index = placed
        call.written = True
        table = self.ret_rows()[0].unsqueeze(0)
        if call.image_rows is not None:
            table = torch.cat([table, call.image_rows.to(table)])
        rows = table.to(output.device, output.dtype)[index.to(output.device)]
        return torch.where(virtual.to(output.device).unsqueeze(-1), rows, output)

    def _select_positions(self, module: nn.Module, args: tuple) -> tuple | None:
        call = self._current()
        if call is None or not call.enabled:
            return None
        hidden = args[0]
        call.selected = False
        if call.positions is not None and hidden.shape[:-1] == call.positions.shape:
            hidden, call.selected = hidden[call.positions.to(hidden.device)].unsqueeze(0), True
        # Heads that predict several tokens ahead read (b, g, s, h); the first of the g is the next token's.
        call.head_input = hidden if hidden.dim() == 3 else hidden[:, 0]
        return (hidden if call.head_rows is None else hidden[..., : call.head_rows, :], *args[1:])

    def _add_columns(self, module: nn.Module, args: tuple, logits: Tensor) -> Tensor | None:
        call = self._current()
        if call is None or not call.enabled:
            return None
        row, width = self.ret_rows()[1], self.vocabulary.num_columns
        largest = torch.finfo(logits.dtype).max
        column = (args[0].to(row) @ row.to(args[0].device)).clamp(-largest, largest).to(logits)
        if self.vocabulary.widens:
            return self._with_ours(logits, column, call)
        # The LM will cut its logits to `width` columns, so [RET]'s travels through the rest of it as further positions.
        call.packed = -(-column.shape[1] // width)
        room = nn.functional.pad(column, (0, call.packed * width - column.shape[1])).unflatten(1, (call.packed, width))
        return torch.cat([logits, nn.functional.pad(room, (0, logits.shape[-1] - width))], dim=1)

    def _with_ours(self, logits: Tensor, column: Tensor, call: Call) -> Tensor:
        """Put `[RET]`'s column (b, s) and those of images, which no one may say, into logits (b, s, v)."""
        words, column = self.vocabulary, column.unsqueeze(-1)
        own, width = logits.shape[-1], words.first_image_id
        width += 0 if call.image_rows is None else len(call.image_rows)
        gap = lambda count: logits.new_full((*logits.shape[:-1], count), float("-inf"))  # noqa: E731
        if words.ret_is_spare:
            spare = logits[..., words.ret_token_id + 1 :]
            after = gap(spare.shape[-1]) if self.mask_spare_columns else spare
            return torch.cat([logits[..., : words.ret_token_id], column, after, gap(width - own)], dim=-1)
        if self.mask_spare_columns and words.num_tokens < own:
            logits = torch.cat([logits[..., : words.num_tokens], gap(own - words.num_tokens)], dim=-1)
        before, after = gap(words.ret_token_id - own), gap(width - words.ret_token_id - 1)
        return torch.cat([logits, before, column, after], dim=-1)


def is_attached(lm: nn.Module) -> bool:
    """Return whether some `VirtualRows` is on this LM's input embedding."""
    hooks = lm.get_input_embeddings()._forward_hooks.values()
    return any(isinstance(getattr(hook, "__self__", None), VirtualRows) for hook in hooks)


def _place(seen: Tensor, call: Call) -> tuple[Tensor, Tensor] | None:
    """Find this call's positions in the ids that the embedding was given: as they are, transposed, fewer, or more.

    Matched by content, never by shape alone: XLNet transposes to (s, b), XLM leaves out what its cache holds already,
    CPM-Ant puts ids of its own in front, Reformer fills up its last chunk with pads.
    """
    safe, virtual, index = call.safe_ids, call.virtual, call.table_index
    assert safe is not None and virtual is not None and index is not None, "_swap_ids sets them together"
    if seen is safe:
        return virtual, index
    if seen.dim() != 2 or seen.is_floating_point():
        return None
    safe, marked = safe.to(seen.device), virtual.to(seen.device)
    if seen.shape == safe.shape and (torch.equal(seen, safe) or torch.equal(seen[marked], safe[marked])):
        # Equal at our positions is enough: some models replace their own placeholder ids by pad elsewhere.
        return virtual, index
    if seen.shape == safe.T.shape and torch.equal(seen, safe.T):
        return virtual.T, index.T
    extra = seen.shape[1] - safe.shape[1]
    if seen.shape[0] == safe.shape[0] and extra < 0 and torch.equal(seen, safe[:, -extra:]):
        return virtual[:, -extra:], index[:, -extra:]
    if seen.shape[0] == safe.shape[0] and extra > 0:
        for part, pads in ((seen[:, extra:], (extra, 0)), (seen[:, :-extra], (0, extra))):
            if torch.equal(part, safe):
                return nn.functional.pad(virtual, pads), nn.functional.pad(index, pads)
    return None
