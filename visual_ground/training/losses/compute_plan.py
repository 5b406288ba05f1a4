"""Which fast ways of computing the losses an LM allows: no list of LMs, each way is tried and compared instead."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from visual_ground.model import GroundedModel
from visual_ground.training.data.sequences import TokenSequence
from visual_ground.training.losses.cached_caption import PrefixStorage
from visual_ground.training.losses.cached_retrieval import PrefixCache
from visual_ground.training.losses.captioning import CaptioningLoss, ComputePlan
from visual_ground.training.losses.retrieval import plain_retrieval
from visual_ground.training.speedups.cross_entropy import ret_parameters
from visual_ground.training.speedups.packing import pad_in_order

logger = logging.getLogger(__name__)

# Sequences that the ways are tried on: enough for several lengths, few enough to cost less than a step.
NUM_TRIED = 8
# Whether captions are packed, and whether their prompt prefix runs once: the fastest way first.
RETRIEVAL_WAYS = ((True, True), (False, True), (True, False), (False, False))


def choose_compute_plan(
    model: GroundedModel,
    sequences: Sequence[TokenSequence],
    mini_batch_size: int | None = None,
    gradients_in_forward: bool = True,
) -> ComputePlan:
    """Return the plan whose captioning loss and gradients, on these sequences, are those of the plain computation.

    Packing needs an LM that takes position ids and a four-dimensional mask; an LM that caps or scales its logits needs
    its own run of the head; a state space has no keys and values of a prefix.

    Args:
        model: the grounded model.
        sequences: the captioning part of a batch.
        mini_batch_size: as in `ComputePlan`.
        gradients_in_forward: likewise.
    """
    tried = sequences[:NUM_TRIED]
    plan = ComputePlan(mini_batch_size=mini_batch_size, gradients_in_forward=gradients_in_forward)
    plain = _loss_and_gradients(model, tried, ComputePlan())
    names = ("direct_head", "shared_prefix", "packed") if head_is_last(model, tried) else ("shared_prefix", "packed")
    for name in names:
        faster = replace(plan, **{name: True})
        try:
            same = _agree(plain, _loss_and_gradients(model, tried, faster), model.frozen_lm.dtype)
        except Exception as error:  # whatever an unknown LM raises here means that it does not allow this way
            same = False
            logger.info("Trying %s raised %s: %s", name, type(error).__name__, error)
        plan = faster if same else plan
        logger.info("The captioning loss is computed with %s=%s.", name, same)
    return plan


@torch.no_grad()
def head_is_last(model: GroundedModel, sequences: Sequence[TokenSequence]) -> bool:
    """Return whether the LM's logits are what its output head gave, neither capped nor scaled; one sequence is run."""
    outputs: list[Tensor] = []
    head = model.lm.get_output_embeddings()
    handle = head.register_forward_hook(lambda module, args, output: outputs.append(output))
    try:
        ids = pad_in_order(model, sequences[:1]).ids.clamp_max(model.frozen_lm.vocabulary.safe_id)
        logits = model.frozen_lm.forward(ids, torch.ones_like(ids), use_cache=False).logits
    finally:
        handle.remove()
    return len(outputs) == 1 and outputs[0].shape == logits.shape and torch.equal(outputs[0].float(), logits.float())


def _loss_and_gradients(model: GroundedModel, sequences: Sequence[TokenSequence], plan: ComputePlan) -> list[Tensor]:
    adapter = model.adapter
    # A sequence may have several images, if captions were concatenated.
    n, f = len(sequences) * 2, adapter.feature_dim
    # Images that differ, without random numbers: those of the training must not depend on what is tried here.
    waves = torch.arange(n * f, device=adapter.logit_scale.device).view(n, f).sin()
    with torch.enable_grad():
        loss = CaptioningLoss(model, plan).loss(sequences, adapter.feature_mean + adapter.feature_std * waves).mean
        inputs = [t for t in (*ret_parameters(model), *adapter.image_projection.parameters()) if t.requires_grad]
        gradients = torch.autograd.grad(loss, inputs, allow_unused=True) if inputs else ()
    return [loss.detach(), *(gradient for gradient in gradients if gradient is not None)]


def _agree(plain: list[Tensor], faster: list[Tensor], dtype: torch.dtype) -> bool:
    # Ways may round differently: in bfloat16 by up to 7 % of a gradient's norm in SmolLM2-135M. Wrong positions or a
    # wrong mask change it there by 46 % at least, in either type.
    tolerance = 1e-3 if dtype == torch.float32 else 0.2
    pairs = zip(plain, faster, strict=True)
    return all(bool((a - b).norm() <= tolerance * a.norm()) for a, b in pairs)


@torch.no_grad()
def choose_prefix_cache(
    model: GroundedModel,
    sequences: Sequence[TokenSequence],
    limit_bytes: int,
    packed: bool = False,
    storage: PrefixStorage | None = None,
) -> PrefixCache | None:
    """Return a `PrefixCache` if, on these sequences, it gives what the plain computation gives; else None.

    State spaces keep no keys and values, capped logits cap `[RET]`'s column too, and some LMs cannot be padded on the
    left.

    Args:
        model: the grounded model.
        sequences: the retrieval part of a batch.
        limit_bytes: as in `PrefixCache`.
        packed: whether they may be packed.
        storage: as in `PrefixCache`.
    """
    tried = sequences[:NUM_TRIED]
    if not head_is_last(model, tried):
        logger.info("Captions run as a whole in each step: this LM changes what its output head gives.")
        return None
    plain = plain_retrieval(model, tried)
    has_prompt = len(model.processor.caption_prefix(image=False)) > 1
    for is_packed, shares_prefix in RETRIEVAL_WAYS:
        if (is_packed and not packed) or (shares_prefix and not has_prompt):
            continue
        try:
            output = PrefixCache(model, packed=is_packed, shared_prefix=shares_prefix).run(tried)
        except Exception as error:  # as above
            logger.info("Trying packed=%s, shared_prefix=%s raised: %s", is_packed, shares_prefix, error)
            continue
        tolerance = 1e-3 if model.frozen_lm.dtype == torch.float32 else 3e-2
        same_vectors = torch.allclose(output.vectors.double(), plain.vectors.double(), atol=tolerance)
        if same_vectors and torch.allclose(output.loss.double(), plain.loss.double(), rtol=tolerance):
            return PrefixCache(model, limit_bytes, is_packed, storage, shares_prefix)
        logger.info("packed=%s, shared_prefix=%s gives other values in this LM.", is_packed, shares_prefix)
    logger.info("Captions run as a whole in each step: this LM cannot go on after the keys and values of a prefix.")
    return None
