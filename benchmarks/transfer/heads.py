"""What the study compares: text layers fitted to kept states, in closed form or by descent, against image vectors.

All of these read states that were computed once (`states.py`), so none costs a pass through a language model.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from common import OUT, Pairs, recalls
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from visual_ground.training.losses import contrastive_losses
from visual_ground.transfer import fit_states


@dataclass(frozen=True)
class Data:
    """States of one LM with the features of the concepts' pictures.

    Args:
        states: (n, h) of training concepts, scaled to unit mean square.
        features: (n, styles, f) of their pictures.
        test_states: (m, h), of concepts that nothing is ever fitted to.
        test_features: (m, styles, f).
    """

    states: Tensor
    features: Tensor
    test_states: Tensor
    test_features: Tensor

    @classmethod
    def load(cls, name: str, pairs: Pairs) -> Data:
        """Read what `states.py` wrote for an LM."""
        kept = load_file(OUT / f"{name}-states.safetensors")
        states = kept["states"] * torch.rsqrt(kept["states"].square().mean(-1, keepdim=True) + 1e-6)
        test = torch.tensor([pairs.concepts[i].split == "test" for i in kept["numbers"].tolist()])
        features = pairs.features[kept["numbers"]].float()
        return cls(states[~test], features[~test], states[test], features[test])

    def take(self, count: int) -> Data:
        """Keep that many training concepts; they are in random order."""
        return Data(self.states[:count], self.features[:count], self.test_states, self.test_features)


@dataclass(frozen=True)
class Heads:
    """An image side and a text layer.

    Args:
        mean, std: (f,), how features are standardised.
        image: weight (q, f + 1), its last column the bias.
        text: weight (q, h + 1), likewise.
        scale: the logarithm of the inverse temperature.
    """

    mean: Tensor
    std: Tensor
    image: Tensor
    text: Tensor
    scale: Tensor

    def images(self, features: Tensor) -> Tensor:
        """Map features (..., f) to unit vectors."""
        return F.normalize(_affine(self.image, (features - self.mean) / self.std), dim=-1)

    def texts(self, states: Tensor) -> Tensor:
        """Map states (n, h) to unit vectors."""
        return F.normalize(_affine(self.text, states), dim=-1)

    def recall(self, data: Data) -> dict[str, dict[str, float]]:
        """Return the recalls on test concepts, each name with each style of picture."""
        return recalls(self.texts(data.test_states)[None], self.images(data.test_features).transpose(0, 1))


def train(data: Data, start: Heads | None = None, steps: int = 110, rate: float = 1e-3, seed: int = 0) -> Heads:
    """Train by descent on the contrastive loss, batches of 128, as the demo does.

    Args:
        data: what to train on.
        start: heads whose image side is kept as it is and whose text layer goes on; None trains both from scratch.
        steps: optimizer steps.
        rate: the first learning rate, which falls to zero along a cosine.
        seed: of the start values and the order.
    """
    torch.manual_seed(seed)
    heads = start or _fresh(data)
    leaves = [heads.text.clone().requires_grad_(), heads.scale.clone().requires_grad_()]
    image = heads.image.clone().requires_grad_(start is None)
    optimizer = torch.optim.AdamW([*leaves, *([image] if start is None else [])], rate, (0.9, 0.95), weight_decay=0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        rows = torch.randperm(len(data.states))[:128]
        features = data.features[rows, torch.randint(data.features.shape[1], (len(rows),))]
        now = Heads(heads.mean, heads.std, image, *leaves)
        loss = sum(contrastive_losses(leaves[1].exp() * now.texts(data.states[rows]) @ now.images(features).T))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_([leaf for leaf in (*leaves, image) if leaf.requires_grad], 1.0)
        optimizer.step()
        schedule.step()
    return Heads(heads.mean, heads.std, image.detach(), leaves[0].detach(), leaves[1].detach())


def ridge(data: Data, source: Heads, whiten: float = 0.0) -> Heads:
    """Keep an image side and fit the text layer as `transfer` does, to image vectors of each concept's mean picture.

    Args:
        data: the anchors.
        source: whose image side is kept.
        whiten: how far the fitted vectors' own spread is evened out: 0 not at all, 1 wholly (linear discriminants).
    """
    vectors = F.normalize(source.images(data.features).mean(1), dim=-1)
    fitted = fit_states(data.states, vectors, torch.arange(len(vectors)))
    weight = torch.cat([fitted.weight, fitted.bias[:, None]], dim=1)
    if whiten:
        centred = vectors - vectors.mean(0)
        values, axes = torch.linalg.eigh(centred.T @ centred / len(vectors))
        turn = axes @ torch.diag((values + values.mean()) ** -whiten) @ axes.T
        weight = turn @ torch.cat([fitted.weight, (fitted.bias - vectors.mean(0))[:, None]], dim=1)
    return Heads(source.mean, source.std, source.image, weight, source.scale)


def _fresh(data: Data) -> Heads:
    flat = data.features.flatten(0, 1)
    layers = [torch.nn.Linear(width, 256) for width in (flat.shape[1], data.states.shape[1])]
    weights = [torch.cat([layer.weight, layer.bias[:, None]], dim=1).detach() for layer in layers]
    std = flat.std(0, correction=0)
    return Heads(flat.mean(0), std.clamp_min(1e-2 * flat.std(correction=0)), *weights, torch.tensor(1 / 0.07).log())


def _affine(weight: Tensor, inputs: Tensor) -> Tensor:
    return inputs @ weight[:, :-1].T + weight[:, -1]
