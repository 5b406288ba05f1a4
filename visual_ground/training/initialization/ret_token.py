"""`[RET]`'s output embedding, fitted to where captions end, without running the LM in each step.

What the output head reads before `[RET]` and before a caption's tokens depends on nothing trained, and neither does the
normaliser over the LM's own columns. With these kept, the text loss is a convex function of `[RET]`'s output embedding,
and each step of its descent is one product of a matrix and a vector.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from visual_ground.adapter.adapter import Adapter
from visual_ground.training.losses.retrieval import CaptionLikelihoods

# A bound only: L-BFGS stops by itself if the convex loss falls no further.
MAX_STEPS = 100


def fit_ret(adapter: Adapter, likelihoods: CaptionLikelihoods) -> None:
    """Turn `[RET]`'s output embedding to where captions followed by `[RET]` are likeliest, and keep its norm.

    Args:
        adapter: where input and output embedding are tied, the input embedding moves too.
        likelihoods: from `PrefixCache.likelihoods`.
    """
    embedding = adapter.ret_embeddings()[1]
    norm = embedding.detach().norm()
    direction = embedding.detach().clone().requires_grad_()
    optimizer = torch.optim.LBFGS([direction], max_iter=MAX_STEPS, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = likelihoods.loss(norm * F.normalize(direction, dim=0)).mean
        torch.autograd.backward(loss)
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
    with torch.no_grad():
        embedding.copy_(norm * F.normalize(direction, dim=0))
