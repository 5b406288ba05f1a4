"""What the hooks read: the data of one call (`HookContext`), and the switch that turns them off (`Switch`)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from visual_ground.lm.key_values import cache_of
from visual_ground.lm.reading import ExtraIds


@dataclass(eq=False)
class HookContext:
    """What the hooks need during one call of the LM, and what they give back to the caller.

    It is kept in a context variable, so each thread sees its own.

    Args:
        owner: the hooks that this context is meant for.
        image_tokens: (n * k, d) input embeddings of the images, or None.
        positions: (r,) long, positions of the flattened (b, s) ids; if given, the output head runs only there and
            logits are (1, r, columns).
        enabled: False makes the LM behave as if nothing were attached.
        suspending: the open `Switch.off` blocks that were entered during this call.
        max_logits: the output head runs only at the first `max_logits` of the positions; `head_input` has them all.
        has_virtual: whether there are virtual ids, if the caller knows; None looks into the ids, which waits for the
            GPU.
        unbound: whether this is a forward outside any `VirtualTokens.bind` block; the context ends with it.
        outer: the context around this one.
        shape: (b, s) of the ids of the latest forward.
        head_input: (b, s, h) or (1, r, h), what the head read in the latest forward.
        virtual, table_index, safe_ids: (b, s) of the latest forward: which ids are virtual, the row of each in the
            table of virtual embeddings, and the ids that the LM was given instead.
        embedded: whether the virtual embeddings were written.
        selected: whether the head ran at the positions only.
        cache: what the LM kept of the latest forward, such as keys and values.
        packed: extra logit rows that hold `[RET]`'s column, for an LM that trims its logits to its own vocabulary.
        extra: ids that the next step of this call's `generate` reads together with its own.
        joined: those that the latest forward has read.
    """

    owner: object
    image_tokens: Tensor | None = None
    positions: Tensor | None = None
    enabled: bool = True
    suspending: set[object] = field(default_factory=set)
    max_logits: int | None = None
    has_virtual: bool | None = None
    unbound: bool = False
    outer: HookContext | None = None
    shape: tuple[int, ...] = ()
    head_input: Tensor | None = None
    virtual: Tensor | None = None
    table_index: Tensor | None = None
    safe_ids: Tensor | None = None
    embedded: bool = False
    selected: bool = False
    cache: object = None
    packed: int = 0
    extra: ExtraIds | None = None
    joined: ExtraIds | None = None

    @property
    def active(self) -> bool:
        """Whether the hooks do anything in this context."""
        return self.enabled and not self.suspending

    def start_forward(self, options: dict[str, Any]) -> dict[str, Any]:
        """Clear what the previous forward left; return the arguments of this one, with `extra` in them."""
        self.virtual, self.embedded, self.head_input, self.packed = None, False, None, 0
        if self.joined is not None:
            self.joined, self.positions, self.max_logits = None, None, None
        extra, self.extra = self.extra, None
        if extra is None or (longer := extra.join(options)) is None:
            return options
        # The head runs at the step's own id only.
        self.joined, self.positions, self.max_logits = extra, torch.arange(extra.ids.shape[1]), 1
        return longer

    def end_forward(self, output: object) -> None:
        """Note what the LM kept, and forget which ids were virtual."""
        self.cache = cache_of(output)
        self.virtual = None
        if self.joined is not None and output is not None:
            self.joined.part(self.head_input)

    def locate(self, seen: Tensor) -> tuple[Tensor, Tensor] | None:
        """Find the virtual ids in what the embedding was given: the same ids, transposed, cut short, or extended.

        They are matched by content, never by shape alone: XLNet transposes to (s, b), XLM leaves out what its cache
        holds already, CPM-Ant puts ids of its own in front, Reformer fills up its last chunk with padding.

        Returns:
            Which of these ids are virtual, and their rows in the table; None if they are not this call's ids.
        """
        safe, virtual, index = self.safe_ids, self.virtual, self.table_index
        assert safe is not None and virtual is not None and index is not None, "they are set together"
        # Many models make a view of the ids that they are given. Comparing numbers would have to wait for a GPU.
        if seen is safe or (seen.device == safe.device and seen.dtype == safe.dtype and seen.is_set_to(safe)):
            return virtual, index
        if seen.dim() != 2 or seen.is_floating_point():
            return None
        safe, marked = safe.to(seen.device), virtual.to(seen.device)
        if seen.shape == safe.shape and (torch.equal(seen, safe) or torch.equal(seen[marked], safe[marked])):
            # Equality at the virtual positions is enough: some models replace their own placeholders elsewhere.
            return virtual, index
        if seen.shape == safe.T.shape and torch.equal(seen, safe.T):
            return virtual.T, index.T
        extra = seen.shape[1] - safe.shape[1]
        if seen.shape[0] == safe.shape[0] and extra < 0 and torch.equal(seen, safe[:, -extra:]):
            return virtual[:, -extra:], index[:, -extra:]
        if seen.shape[0] == safe.shape[0] and extra > 0:
            for part, pads in ((seen[:, extra:], (extra, 0)), (seen[:, :-extra], (0, extra))):
                if torch.equal(part, safe):
                    return pad(virtual, pads), pad(index, pads)
        return None


current: ContextVar[HookContext | None] = ContextVar("visual_ground_hook_context", default=None)


def context_of(owner: object) -> HookContext | None:
    """Return the innermost context that is meant for these hooks."""
    context = current.get()
    while context is not None and context.owner is not owner:
        context = context.outer
    return context


class Switch:
    """A switch that is on, except while any block holds it off.

    A context variable would not do: threads that start inside the block do not see it, and a generator that holds the
    block open may be continued in another context. Each block is an object in a set, whose changes are atomic; so
    blocks may overlap and end in any order.
    """

    def __init__(self) -> None:
        self._blocks: set[object] = set()

    @property
    def is_off(self) -> bool:
        """Whether any block holds it off."""
        return bool(self._blocks)

    @contextlib.contextmanager
    def off(self, call: HookContext | None) -> Iterator[None]:
        """Hold it off until the block ends.

        Args:
            call: the LM call during which the block is entered (for example from a logits processor), or None. This
                call loses its hooks until the block ends; other calls that are already running keep theirs.
        """
        block = object()
        held = [self._blocks] if call is None else [self._blocks, call.suspending]
        for blocks in held:
            blocks.add(block)
        try:
            yield
        finally:
            for blocks in held:
                blocks.discard(block)
