"""Which short ways of computing the losses an LM can go: rather than to know all LMs, each is tried and compared."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from visual_ground.model import GroundedModel
from visual_ground.training.captions import CaptionPass, Shortcuts
from visual_ground.training.cross_entropy import ret_parameters
from visual_ground.training.prefixes import PrefixKeeper, PrefixStore
from visual_ground.training.retrieval import plain_retrieval
from visual_ground.training.sequences import dtype_of

logger = logging.getLogger(__name__)

TRIED_ROWS = 8
# Whether captions are packed, and whether what stands before all of them runs once: the quickest way first.
WAYS = ((True, True), (False, True), (True, False), (False, False))


def find_shortcuts(
    model: GroundedModel, batch: Mapping[str, Tensor], rows_at_once: int | None = None, at_once: bool = True
) -> Shortcuts:
    """Return the short ways whose captioning loss and gradients, on rows of this batch, are those of the plain way.

    Packing needs position ids and a mask of the caller's own, which not every LM takes; capped and scaled logits are
    no head's output; state spaces keep no keys and values.

    Args:
        model: the grounded model.
        batch: the captioning part of a batch.
        rows_at_once: as in `Shortcuts`.
        at_once: likewise.
    """
    some = {name: tensor[:TRIED_ROWS] for name, tensor in batch.items()}
    found = Shortcuts(rows_at_once=rows_at_once, at_once=at_once)
    plain = _loss_and_gradients(model, some, Shortcuts())
    ways = ("direct_head", "leads", "packed") if head_is_last(model, some) else ("leads", "packed")
    for way in ways:
        tried = replace(found, **{way: True})
        try:
            same = _agree(plain, _loss_and_gradients(model, some, tried), dtype_of(model))
        except Exception as error:  # whatever an unknown LM raises here means that it does not go this way
            same = False
            logger.info("Trying %s raised %s: %s", way, type(error).__name__, error)
        found = tried if same else found
        logger.info("Captions %s %s.", "take" if same else "do not take", way)
    return found


@torch.no_grad()
def head_is_last(model: GroundedModel, batch: Mapping[str, Tensor]) -> bool:
    """Return whether the LM's logits are what its head gave, neither capped nor scaled.

    Args:
        model: the grounded model.
        batch: input_ids (b, s).
    """
    seen: list[Tensor] = []
    head = model.lm.get_output_embeddings()
    handle = head.register_forward_hook(lambda module, args, output: seen.append(output))
    try:
        words = batch["input_ids"][:1].clamp_max(model.facts.vocabulary.safe_id)
        with model.bind():
            logits = model.run(words, torch.ones_like(words), use_cache=False).logits
    finally:
        handle.remove()
    return len(seen) == 1 and seen[0].shape == logits.shape and torch.equal(seen[0].float(), logits.float())


def _loss_and_gradients(model: GroundedModel, batch: Mapping[str, Tensor], shortcuts: Shortcuts) -> list[Tensor]:
    adapter = model.adapter
    n, f = len(batch["input_ids"]) * 2, adapter.feature_dim
    # Images that differ, and no random numbers: those of the training itself must not depend on what is tried here.
    waves = torch.arange(n * f, device=adapter.logit_scale.device).view(n, f).sin()
    with torch.enable_grad():
        loss = CaptionPass(model, shortcuts).loss(batch, adapter.feature_mean + adapter.feature_std * waves).mean
        inputs = [t for t in (*ret_parameters(model), *adapter.image_to_rows.parameters()) if t.requires_grad]
        gradients = torch.autograd.grad(loss, inputs, allow_unused=True) if inputs else ()
    return [loss.detach(), *(gradient for gradient in gradients if gradient is not None)]


def _agree(plain: list[Tensor], quick: list[Tensor], dtype: torch.dtype) -> bool:
    room = 1e-3 if dtype == torch.float32 else 5e-2
    pairs = zip(plain, quick, strict=True)
    return all(bool((a - b).abs().max() <= room * a.abs().max()) for a, b in pairs)


@torch.no_grad()
def choose_prefixes(
    model: GroundedModel,
    batch: Mapping[str, Tensor],
    limit_bytes: int,
    packed: bool = False,
    keeper: PrefixKeeper | None = None,
) -> PrefixStore | None:
    """Return a `PrefixStore` where, on rows of this batch, it gives what the plain computation gives; else None.

    State spaces keep no keys and values, capped logits cap `[RET]`'s column too, some LMs cannot be padded on the left.

    Args:
        model: the grounded model.
        batch: the retrieval part of a batch.
        limit_bytes: as in `PrefixStore`.
        packed: whether they may be packed.
        keeper: as in `PrefixStore`.
    """
    some = {name: tensor[:TRIED_ROWS] for name, tensor in batch.items()}
    if not head_is_last(model, some):
        logger.info("Captions run as a whole in each step: this LM changes what its head gives.")
        return None
    plain = plain_retrieval(model, some)
    lead = len(model.encoder.caption_lead(image=False)) > 1
    for in_rows, leads in [ways for ways in WAYS if packed >= ways[0] and lead >= ways[1]]:
        try:
            quick = PrefixStore(model, packed=in_rows, leads=leads).run(some)
        except Exception as error:  # as above
            logger.info("Captions run as a whole in each step: %s", error)
            continue
        room = 1e-3 if dtype_of(model) == torch.float32 else 3e-2
        same = torch.allclose(quick.vectors, plain.vectors, atol=room)
        if same and torch.allclose(quick.loss, plain.loss, rtol=room):
            return PrefixStore(model, limit_bytes, in_rows, keeper, leads)
        logger.info("Captions run as a whole in each step: their prefixes give other values in this LM.")
    return None
