"""What the adapter is compared with: chance, and bag of words with ridge regression onto the same features."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from visual_ground.evaluation.metrics import RANKS, recall_at

ALPHAS = (1.0, 10.0, 100.0, 1000.0)


def chance(candidates: int, ks: Sequence[int] = RANKS) -> dict[str, float]:
    """Return the recalls, in percent, of guessing among so many candidates."""
    return {f"r{k}": 100 * min(k, candidates) / candidates for k in ks}


def bag_of_words_ridge(
    train_texts: Sequence[str], train_features: Tensor, test_texts: Sequence[str], test_features: Tensor
) -> Tensor:
    """Return the cosines (m, m) of test texts and images, texts mapped to image features by ridge regression.

    The penalty is chosen on the last tenth of the training pairs.

    Args:
        train_texts: n texts.
        train_features: (n, f).
        test_texts: m texts.
        test_features: (m, f).
    """
    mean, std = train_features.mean(0), train_features.std(0) + 1e-6
    images, candidates = (train_features - mean) / std, (test_features - mean) / std
    cut = len(train_texts) - len(train_texts) // 10

    def score(alpha: float) -> float:
        scores = _fit(train_texts[:cut], images[:cut], train_texts[cut:], images[cut:], alpha)
        return recall_at(scores)["r10"]

    best = max(ALPHAS, key=score)
    return _fit(train_texts, images, test_texts, candidates, best)


def _fit(texts: Sequence[str], images: Tensor, queries: Sequence[str], candidates: Tensor, alpha: float) -> Tensor:
    counted = [_words(text) for text in texts]
    seen = Counter(word for words in counted for word in words)
    number = {word: i for i, word in enumerate(seen)}
    weight = torch.log(len(texts) / torch.tensor([float(seen[word]) for word in number]))
    bags = _bags(counted, number) * weight
    # The dual form: as many equations as texts, however many words there are.
    dual = torch.linalg.solve(bags @ bags.T + alpha * torch.eye(len(bags)), images)
    mapped = _bags([_words(text) for text in queries], number) * weight @ bags.T @ dual
    normalise = torch.nn.functional.normalize
    return normalise(mapped, dim=-1) @ normalise(candidates, dim=-1).T


def _bags(texts: Sequence[set[str]], number: dict[str, int]) -> Tensor:
    bags = torch.zeros(len(texts), len(number))
    for row, words in zip(bags, texts, strict=True):
        row[[number[word] for word in words if word in number]] = 1
    return bags


def _words(text: str) -> set[str]:
    return set(re.findall(r"[a-z0-9']+", text.lower()))
