"""How well a grounded model retrieves and captions: recall at k both ways, and caption pair accuracy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from visual_ground.errors import GroundingValueError
from visual_ground.model import GroundedModel
from visual_ground.prompts.encoded import EncodedPrompt

RANKS = (1, 5, 10)


def recall_at(scores: Tensor, ks: Sequence[int] = RANKS) -> dict[str, float]:
    """Return in how many percent of the queries the right candidate is among the best k.

    Args:
        scores: (queries, candidates); query i's right candidate is i. Ties count against it.
        ks: the ranks.

    Example:
        >>> recall_at(torch.tensor([[0.9, 0.1], [0.8, 0.2]]), ks=(1, 2))
        {'r1': 50.0, 'r2': 100.0}
    """
    own = scores.diagonal().unsqueeze(1)
    better = (scores >= own).sum(1) - 1
    return {f"r{k}": 100 * float((better < k).double().mean()) for k in ks}


def retrieval_recall(model: GroundedModel, texts: Sequence[Any], features: Tensor, batch_size: int = 64) -> dict:
    """Return `{"text_to_image": recalls, "image_to_text": recalls}` of pairs.

    Args:
        model: the grounded model.
        texts: n prompts, as in `embed_text`.
        features: (n, f), their images' features.
        batch_size: prompts run at once.
    """
    if len(texts) != len(features) or not len(texts):
        raise GroundingValueError(f"{len(texts)} texts and {len(features)} images are no pairs; give as many of each.")
    starts = range(0, len(texts), batch_size)
    vectors = torch.cat([model.embed_text(list(texts[i : i + batch_size])) for i in starts])
    scores = vectors @ model.embed_images(image_features=features).T
    return {"text_to_image": recall_at(scores), "image_to_text": recall_at(scores.T)}


@torch.no_grad()
def caption_pair_accuracy(
    model: GroundedModel,
    captions: Sequence[str],
    features: Tensor,
    wrong_images: int = 4,
    batch_size: int = 32,
    seed: int = 0,
) -> float:
    """Return in how many percent of the cases the true image gives a caption a higher likelihood than a wrong one.

    The likelihood is summed over the caption's tokens.

    Args:
        model: the grounded model.
        captions: n captions, n at least 2.
        features: (n, f), their images' features.
        wrong_images: how many of the other captions' images, drawn at random, each caption's own is compared with.
        batch_size: captions run at once.
        seed: of the draw.
    """
    count = len(captions)
    if count != len(features) or count < 2:
        raise GroundingValueError(f"At least two pairs are needed, got {count} captions, {len(features)} images.")
    draw = torch.Generator().manual_seed(seed)
    right = _caption_scores(model, captions, features, batch_size)
    wins = []
    for _ in range(wrong_images):
        others = (torch.arange(count) + torch.randint(1, count, (count,), generator=draw)) % count
        wins.append(right > _caption_scores(model, captions, features[others], batch_size))
    return 100 * float(torch.stack(wins).double().mean())


def _caption_scores(model: GroundedModel, captions: Sequence[str], features: Tensor, batch_size: int) -> Tensor:
    lead = tuple(model.processor.caption_prefix(image=True))
    tails = [tuple(model.processor.encode_caption(caption)) for caption in captions]
    scores = torch.zeros(len(captions))
    # By length, so that one long caption does not pad all others.
    order = sorted(range(len(tails)), key=lambda i: len(tails[i]))
    for start in range(0, len(order), batch_size):
        some = order[start : start + batch_size]
        whole = [EncodedPrompt(lead + tails[i], ()) for i in some]
        lengths = [len(tails[i]) for i in some]
        batch = model.processor.batch(whole).to(model.frozen_lm.device)
        image_tokens = model.active.image_tokens(image_features=features[some])
        inputs = batch["input_ids"], batch["attention_mask"]
        scores[some] = model.frozen_lm.log_likelihood(*inputs, lengths, image_tokens).float().cpu()
    return scores
