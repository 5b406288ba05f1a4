"""When to say `[RET]`, found without running the LM: its row is the only thing that is not known yet.

What the output head reads before `[RET]` and before a caption's own words depends on nothing trained, and so does the
normaliser of the LM's own logits. With these kept, the text loss is a convex function of `[RET]`'s output row, and a
step of its descent is one product of matrix and vector.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from visual_ground.adapter.adapter import Adapter
from visual_ground.training.losses.retrieval import CaptionLikelihoods

STEPS = 100


def fit_ret(adapter: Adapter, likelihoods: CaptionLikelihoods) -> None:
    """Turn `[RET]`'s output row to where captions that end with `[RET]` are likeliest; its norm stays as it is.

    Args:
        adapter: its row is set; where input and output row are tied, the input row is the same.
        likelihoods: from `PrefixCache.likelihoods`.
    """
    row = adapter.ret_embeddings()[1]
    norm = row.detach().norm()
    direction = row.detach().clone().requires_grad_()
    optimizer = torch.optim.LBFGS([direction], max_iter=STEPS, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = likelihoods.loss(norm * F.normalize(direction, dim=0)).mean
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
    with torch.no_grad():
        row.copy_(norm * F.normalize(direction, dim=0))
