"""Which short ways of computing the losses an LM can go: rather than to know all LMs, each is tried and compared."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from visual_ground.model import GroundedModel
from visual_ground.training.losses.cached_retrieval import PrefixCache, PrefixStorage
from visual_ground.training.losses.captioning import CaptioningLoss, ComputePlan
from visual_ground.training.losses.retrieval import plain_retrieval
from visual_ground.training.speedups.cross_entropy import ret_parameters
from visual_ground.training.speedups.packing import dtype_of

logger = logging.getLogger(__name__)

TRIED_ROWS = 8
# Whether captions are packed, and whether what stands before all of them runs once: the quickest way first.
WAYS = ((True, True), (False, True), (True, False), (False, False))


def choose_compute_plan(
    model: GroundedModel, batch: Mapping[str, Tensor], mini_batch_size: int | None = None, at_once: bool = True
) -> ComputePlan:
    """Return the short ways whose captioning loss and gradients, on rows of this batch, are those of the plain way.

    Packing needs position ids and a mask of the caller's own, which not every LM takes; capped and scaled logits are
    no head's output; state spaces keep no keys and values.

    Args:
        model: the grounded model.
        batch: the captioning part of a batch.
        mini_batch_size: as in `ComputePlan`.
        at_once: likewise.
    """
    some = {name: tensor[:TRIED_ROWS] for name, tensor in batch.items()}
    found = ComputePlan(mini_batch_size=mini_batch_size, at_once=at_once)
    plain = _loss_and_gradients(model, some, ComputePlan())
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
        words = batch["input_ids"][:1].clamp_max(model.frozen_lm.vocabulary.safe_id)
        logits = model.frozen_lm.forward(words, torch.ones_like(words), use_cache=False).logits
    finally:
        handle.remove()
    return len(seen) == 1 and seen[0].shape == logits.shape and torch.equal(seen[0].float(), logits.float())


def _loss_and_gradients(model: GroundedModel, batch: Mapping[str, Tensor], plan: ComputePlan) -> list[Tensor]:
    adapter = model.adapter
    n, f = len(batch["input_ids"]) * 2, adapter.feature_dim
    # Images that differ, and no random numbers: those of the training itself must not depend on what is tried here.
    waves = torch.arange(n * f, device=adapter.logit_scale.device).view(n, f).sin()
    with torch.enable_grad():
        loss = CaptioningLoss(model, plan).loss(batch, adapter.feature_mean + adapter.feature_std * waves).mean
        inputs = [t for t in (*ret_parameters(model), *adapter.image_projection.parameters()) if t.requires_grad]
        gradients = torch.autograd.grad(loss, inputs, allow_unused=True) if inputs else ()
    return [loss.detach(), *(gradient for gradient in gradients if gradient is not None)]


def _agree(plain: list[Tensor], quick: list[Tensor], dtype: torch.dtype) -> bool:
    room = 1e-3 if dtype == torch.float32 else 5e-2
    pairs = zip(plain, quick, strict=True)
    return all(bool((a - b).abs().max() <= room * a.abs().max()) for a, b in pairs)


@torch.no_grad()
def choose_prefix_cache(
    model: GroundedModel,
    batch: Mapping[str, Tensor],
    limit_bytes: int,
    packed: bool = False,
    keeper: PrefixStorage | None = None,
) -> PrefixCache | None:
    """Return a `PrefixCache` where, on rows of this batch, it gives what the plain computation gives; else None.

    State spaces keep no keys and values, capped logits cap `[RET]`'s column too, some LMs cannot be padded on the left.

    Args:
        model: the grounded model.
        batch: the retrieval part of a batch.
        limit_bytes: as in `PrefixCache`.
        packed: whether they may be packed.
        keeper: as in `PrefixCache`.
    """
    some = {name: tensor[:TRIED_ROWS] for name, tensor in batch.items()}
    if not head_is_last(model, some):
        logger.info("Captions run as a whole in each step: this LM changes what its head gives.")
        return None
    plain = plain_retrieval(model, some)
    lead = len(model.processor.caption_prefix(image=False)) > 1
    for in_rows, leads in [ways for ways in WAYS if packed >= ways[0] and lead >= ways[1]]:
        try:
            quick = PrefixCache(model, packed=in_rows, leads=leads).run(some)
        except Exception as error:  # as above
            logger.info("Captions run as a whole in each step: %s", error)
            continue
        room = 1e-3 if dtype_of(model) == torch.float32 else 3e-2
        same = torch.allclose(quick.vectors, plain.vectors, atol=room)
        if same and torch.allclose(quick.loss, plain.loss, rtol=room):
            return PrefixCache(model, limit_bytes, in_rows, keeper, leads)
        logger.info("Captions run as a whole in each step: their prefixes give other values in this LM.")
    return None
