"""Virtual tokens: vocabulary entries that a frozen language model gets from hooks at its two ends.

Ids that are not tokens of the LM (`[RET]` may take one of its unused rows) travel through its own forward and
`generate`:

    id                               enters as                          leaves as
    ret_token_id                     the adapter's [RET] embedding      one logit, head input . [RET] output embedding
    first_image_id + i, i < n * k    embedding i of this call's images  -inf

Before anything inside the LM sees them, a hook replaces those ids by a real one; a hook on the input embedding then
writes the virtual embeddings at their positions; a hook on the output head adds the columns. Nothing in the LM is
resized, copied or written. What one call needs is in its `HookContext`.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from visual_ground.errors import GroundingIndexError, GroundingStateError
from visual_ground.lm.base.freezing import FreezeGuard
from visual_ground.lm.base.vocabulary import VirtualVocabulary
from visual_ground.lm.base.weights import LMEnds
from visual_ground.lm.hook_context import HookContext, Switch, context_of, current

Args: TypeAlias = tuple[Any, ...]
Kwargs: TypeAlias = dict[str, Any]


class VirtualTokens:
    """The hooks that give a frozen LM its virtual tokens.

    Args:
        lm: a causal LM with `get_input_embeddings` and `get_output_embeddings`.
        vocabulary: which ids are the LM's and which are virtual.
        ret_embeddings: returns `[RET]`'s input (d,) and output embedding (h,), read anew in each forward.
        masks_spare_columns: returns whether ids that no token uses get the logit -inf; read anew in each forward.
    """

    _ends: LMEnds  # As `attach` found them.

    def __init__(
        self,
        lm: nn.Module,
        vocabulary: VirtualVocabulary,
        ret_embeddings: Callable[[], tuple[Tensor, Tensor]],
        masks_spare_columns: Callable[[], bool] = lambda: False,
    ) -> None:
        self.lm, self.vocabulary, self.ret_embeddings = lm, vocabulary, ret_embeddings
        self.masks_spare_columns = masks_spare_columns
        self._parameters = list(inspect.signature(lm.forward).parameters)
        self._handles: list[RemovableHandle] = []
        self._frozen: FreezeGuard | None = None
        # Who takes these hooks off in the end, as a weak reference; see `visual_ground.lm.attachment`.
        self.holder: Callable[[], Any] | None = None
        self.switch = Switch()  # Turns the hooks off for calls that begin from then on, in all threads.
        # Whether -inf in the logits survives the rest of the LM, which may cap or scale them.
        self._keeps_infinity: bool | None = None

    def attach(self, frozen: FreezeGuard | None = None) -> None:
        """Put the hooks on the LM; what is `frozen` is restored when they are taken off."""
        if self._handles:
            raise GroundingStateError("The hooks are attached already; call detach() first.")
        self._ends, self._frozen = LMEnds(self.lm), frozen
        self._handles = [
            self.lm.register_forward_pre_hook(self._swap_ids, with_kwargs=True, prepend=True),
            self.lm.register_forward_hook(self._finish, always_call=True),
            self._ends.embedding.register_forward_hook(self._write_embeddings, with_kwargs=True),
            self._ends.head.register_forward_pre_hook(self._select_positions),
            self._ends.head.register_forward_hook(self._add_columns),
        ]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "holder": None}  # The copy's own `FrozenLM` sets it.

    def detach(self) -> None:
        """Take the hooks off; the LM is as it was."""
        for handle in self._handles:
            handle.remove()
        if self._frozen is not None:
            self._frozen.restore()
        self._handles, self._frozen = [], None

    @property
    def attached(self) -> bool:
        """Whether the hooks are on the LM."""
        return bool(self._handles)

    @property
    def disabled(self) -> bool:
        """Whether a call that begins now runs without the hooks; a call inside another follows the outer one."""
        context = self.context
        return self.switch.is_off if context is None else not context.active

    @property
    def context(self) -> HookContext | None:
        """What the current call of the LM has bound, such as a `generate` that is running; None outside of calls."""
        return context_of(self)

    @contextlib.contextmanager
    def bind(self, **settings: Any) -> Iterator[HookContext]:
        """Bind what the forwards inside the block need: settings of the `HookContext`."""
        context = HookContext(self, outer=current.get(), **settings)
        token = current.set(context)
        try:
            yield context
        finally:
            current.reset(token)

    def _enabled_context(self) -> HookContext | None:
        context = self.context
        return context if context is not None and context.active else None

    def _swap_ids(self, module: nn.Module, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs] | None:
        if self.disabled:
            return None
        self._ends.check(self.lm)
        bound = self.context
        context = bound or HookContext(self, unbound=True, outer=current.get())
        kwargs = context.start_forward(kwargs)
        if context.unbound:
            current.set(context)
        slot = self._parameters.index("input_ids") if "input_ids" in self._parameters else 0
        ids = args[slot] if len(args) > slot else kwargs.get("input_ids")
        if ids is None:
            return None
        context.shape = ids.shape
        if not self._find_virtual(context, ids):
            return args, kwargs
        if len(args) > slot:
            return (*args[:slot], context.safe_ids, *args[slot + 1 :]), kwargs
        return args, {**kwargs, "input_ids": context.safe_ids}

    def _find_virtual(self, context: HookContext, ids: Tensor) -> bool:
        """Record which ids are virtual; return whether any is."""
        if context.has_virtual is False:
            return False
        virtual = self.vocabulary.is_virtual(ids)
        if context.has_virtual is None and not bool(virtual.any()):
            return False
        context.virtual = virtual
        context.table_index = self._table_index(ids, context)
        context.safe_ids = torch.where(virtual, torch.full_like(ids, self.vocabulary.safe_id), ids)
        return True

    def _table_index(self, ids: Tensor, context: HookContext) -> Tensor:
        """Map virtual ids to rows of the table [RET, image tokens...]; the LM's own ids map to 0."""
        count = 0 if context.image_tokens is None else len(context.image_tokens)
        if context.has_virtual is None and bool((ids >= self.vocabulary.first_image_id + count).any()):
            raise GroundingIndexError(
                f"Token id {int(ids.max())} points past this call's {count} image tokens, whose ids start at "
                f"{self.vocabulary.first_image_id}. Pass the images that the ids were prepared with."
            )
        return (ids - (self.vocabulary.first_image_id - 1)).clamp_min(0)

    def _write_embeddings(self, module: nn.Module, args: Args, kwargs: Kwargs, output: Tensor) -> Tensor | None:
        context = self._enabled_context()
        if context is None or context.virtual is None:
            return None
        located = context.locate(args[0] if args else next(iter(kwargs.values())))
        if located is None:
            return None
        virtual, index = located
        context.embedded = True
        table = self.ret_embeddings()[0].unsqueeze(0)
        if context.image_tokens is not None:
            table = torch.cat([table, context.image_tokens.to(table)])
        embeddings = table.to(output.device, output.dtype)[index.to(output.device)]
        return torch.where(virtual.to(output.device).unsqueeze(-1), embeddings, output)

    def _select_positions(self, module: nn.Module, args: Args) -> Args | None:
        context = self._enabled_context()
        if context is None:
            return None
        hidden = args[0]
        context.selected = False
        if context.positions is not None and hidden.shape[:-1] == context.shape:
            hidden, context.selected = _at(hidden, context.positions), True
        # Heads that predict several tokens ahead read (b, g, s, h); the first of the g is the next token's.
        context.head_input = hidden if hidden.dim() == 3 else hidden[:, 0]
        cut = context.selected and context.max_logits is not None
        return (hidden[:, : context.max_logits] if cut else hidden, *args[1:])

    def _add_columns(self, module: nn.Module, args: Args, logits: Tensor) -> Tensor | None:
        context = self._enabled_context()
        if context is None:
            return None
        embedding, width = self.ret_embeddings()[1], self.vocabulary.num_columns
        # In float16 the logit could overflow to inf, and always win.
        largest = min(torch.finfo(values.dtype).max for values in (logits, embedding))
        column = (args[0].to(embedding) @ embedding.to(args[0].device)).clamp(-largest, largest).to(logits)
        if self.vocabulary.widens:
            return self._widen(logits, column, context)
        # The LM will cut its logits to `width` columns, so [RET]'s column (b, s) is written in rows of that width and
        # passes the rest of the LM as further positions; `_finish` turns them back into a column.
        context.packed = -(-column.shape[1] // width)
        packed = nn.functional.pad(column, (0, context.packed * width - column.shape[1]))
        packed = torch.unflatten(packed, 1, (context.packed, width))
        return torch.cat([logits, nn.functional.pad(packed, (0, logits.shape[-1] - width))], dim=1)

    def _widen(self, logits: Tensor, column: Tensor, context: HookContext) -> Tensor:
        num_image_tokens = 0 if context.image_tokens is None else len(context.image_tokens)
        return self.vocabulary.add_columns(logits, column, num_image_tokens, self.masks_spare_columns())

    def _finish(self, module: nn.Module, args: Args, output: Any) -> Any:
        context = self._enabled_context()
        if context is None:
            return None
        if context.unbound:
            current.set(context.outer)
        if context.virtual is not None and not context.embedded and output is not None:
            raise GroundingStateError(
                f"{type(self.lm).__name__} did not pass its input ids to the module that get_input_embeddings() "
                "returns, so the embeddings of images and [RET] could not be written. Please report this architecture."
            )
        context.end_forward(output)
        if context.packed and hasattr(output, "logits"):
            logits, column = output.logits[:, : -context.packed], output.logits[:, -context.packed :].flatten(1)
            output.logits = self._widen(logits, column[:, : logits.shape[1]], context)
        if context.positions is not None and not context.selected and context.head_input is not None:
            output.logits = _at(output.logits, context.positions)[:, : context.max_logits]
            context.head_input = _at(context.head_input, context.positions)
        return self._forbid_columns(output, context)

    def _forbid_columns(self, output: Any, context: HookContext) -> Any:
        """Set columns of ids that must not be generated to -inf again, if the LM capped or scaled its logits."""
        if not hasattr(output, "logits") or not output.logits.shape[1]:
            return None
        # Looking has to wait for the GPU; so if the caller set `has_virtual` (training), the last result is reused.
        if self._keeps_infinity is None or context.has_virtual is None:
            self._keeps_infinity = self.vocabulary.forbids(output.logits, self.masks_spare_columns())
        if self._keeps_infinity:
            return None
        output.logits = self.vocabulary.forbid(output.logits, self.masks_spare_columns())
        return output


def _at(values: Tensor, positions: Tensor) -> Tensor:
    """Return values (b, s, ...) at flat positions (r,), as (1, r, ...)."""
    return values.flatten(0, 1).index_select(0, positions.to(values.device)).unsqueeze(0)
