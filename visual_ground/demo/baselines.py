"""What the adapter is compared with: chance, and bag of words with ridge regression onto the same features."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from visual_ground.evaluation.metrics import RANKS, recall_at
from visual_ground.regression import solve_ridge

# Times the identity, added to the texts' Gram matrix; chosen on held-out pairs.
PENALTIES = (1.0, 10.0, 100.0, 1000.0)


def chance(candidates: int, ranks: Sequence[int] = RANKS) -> dict[str, float]:
    """Return the recalls, in percent, of guessing among so many candidates."""
    return {f"r{k}": 100 * min(k, candidates) / candidates for k in ranks}


def bag_of_words_ridge(
    train_texts: Sequence[str], train_features: Tensor, test_texts: Sequence[str], test_features: Tensor
) -> Tensor:
    """Return the cosines (m, m) of test texts and images, texts mapped to image features by ridge regression.

    A text is its set of words, each weighing its inverse document frequency. The penalty is chosen on the last tenth of
    the training pairs.

    Args:
        train_texts: n texts.
        train_features: (n, f).
        test_texts: m texts.
        test_features: (m, f).
    """
    mean, std = train_features.mean(0), train_features.std(0) + 1e-6
    images, candidates = (train_features - mean) / std, (test_features - mean) / std
    cut = len(train_texts) - len(train_texts) // 10

    tried = _cosines(train_texts[:cut], images[:cut], train_texts[cut:], images[cut:], PENALTIES)
    recalls = [recall_at(cosines)["r10"] for cosines in tried]
    best = PENALTIES[recalls.index(max(recalls))]
    return _cosines(train_texts, images, test_texts, candidates, (best,))[0]


def _cosines(
    texts: Sequence[str], images: Tensor, queries: Sequence[str], candidates: Tensor, penalties: Sequence[float]
) -> list[Tensor]:
    """Return the cosines of queries and candidates for each penalty."""
    word_sets = [_words(text) for text in texts]
    document_counts = Counter(word for words in word_sets for word in words)
    column = {word: i for i, word in enumerate(document_counts)}
    idf = torch.log(len(texts) / torch.tensor([float(count) for count in document_counts.values()]))
    query_bags = _bags([_words(query) for query in queries], column) * idf
    per_text = [penalty / len(texts) for penalty in penalties]
    # Without an intercept: a text of unknown words only is then equally far from all images.
    maps = solve_ridge(_bags(word_sets, column) * idf, images, per_text, fit_intercept=False)
    candidates = F.normalize(candidates, dim=-1)
    return [F.normalize(to_image(query_bags), dim=-1) @ candidates.T for to_image in maps]


def _bags(word_sets: Sequence[set[str]], column: dict[str, int]) -> Tensor:
    bags = torch.zeros(len(word_sets), len(column))
    for bag, words in zip(bags, word_sets, strict=True):
        bag[[column[word] for word in words if word in column]] = 1
    return bags


def _words(text: str) -> set[str]:
    return set(re.findall(r"[a-z0-9']+", text.lower()))
