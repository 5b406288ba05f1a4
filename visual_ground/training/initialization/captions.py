"""Image tokens after which the LM goes on as captions do: the last of the start values, by the captioning loss itself.

Imitation makes a picture stand for its caption's words, and the LM then says of them what it likes ("The original
sentence is: ..."). Two things are moved here: the bias, which all pictures share, and which asks for a caption; and the
part of the weights that reads what the retrieval space knows of a picture. All of the weights would learn the training
pictures by heart (docs/recipe.md).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from visual_ground.adapter.adapter import Adapter
from visual_ground.progress import counted
from visual_ground.training.data.reading import without_prompt
from visual_ground.training.initialization.retrieval import Collate
from visual_ground.training.losses.captioning import CaptioningLoss
from visual_ground.training.losses.objective import GroundingObjective

NUM_STEPS, BATCH_SIZE = 10, 16
# A step of the optimizer moves an image token by about these parts of the embeddings' standard deviation.
BIAS_STEP, WEIGHT_STEP = 0.06, 0.08


def start_captions(
    objective: GroundingObjective,
    examples: Sequence[Mapping[str, Any]],
    features: Tensor,
    collate: Collate,
    seed: int = 0,
    progress: bool = False,
) -> None:
    """Lower the captioning loss of an image projection that has its start values, as has the retrieval space.

    Args:
        objective: the model, and how its captioning pass is run.
        examples: n examples.
        features: (n, f), of their images.
        collate: makes a batch of examples.
        seed: of the order.
        progress: show a progress bar.
    """
    model, adapter = objective.model, objective.model.adapter
    projection, captioning = adapter.image_projection, CaptioningLoss(objective.model, objective.plan)
    read, start = _retrieval_map(adapter, features), projection.weight.detach().clone()
    correction = torch.zeros(len(start), len(read), device=start.device)
    groups: list[dict[str, Any]] = [{"params": [projection.bias], "lr": BIAS_STEP}]
    groups += [{"params": [correction], "lr": WEIGHT_STEP / len(read)}] if len(read) else []
    optimizer = torch.optim.Adam(groups, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, NUM_STEPS)
    order = torch.Generator().manual_seed(seed)
    for _ in counted(range(NUM_STEPS), "start values: captions", "steps", progress):
        chosen = torch.randint(len(examples), (min(BATCH_SIZE, len(examples)),), generator=order).tolist()
        # With their features, so that no image is encoded or preprocessed again.
        batch = collate([{**without_prompt(examples[i]), "image_features": features[i]} for i in chosen])
        model.zero_grad()
        torch.autograd.backward(captioning.loss(batch["captioning"], features[chosen]).mean)
        if len(read):
            correction.grad = projection.weight.grad @ read.T
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            projection.weight.copy_(start + correction @ read)
    model.zero_grad()


@torch.no_grad()
def _retrieval_map(adapter: Adapter, features: Tensor) -> Tensor:
    """Return the map (q, f) from standardised features to the retrieval space, to numbers with a mean square of 1.

    Where image tokens read something else (patches), or the retrieval space is the encoder's own and leaves nothing
    out, q is 0.
    """
    layer = adapter.image_retrieval_projection
    if adapter.config.num_patch_tokens or not isinstance(layer, nn.Linear):
        return layer.weight.new_zeros(0, adapter.image_projection.in_features)
    vectors = F.linear(adapter.standardize(features.to(layer.weight.device)), layer.weight)
    return layer.weight.detach() / vectors.square().mean().sqrt().clamp_min(1e-12)
