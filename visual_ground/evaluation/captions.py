"""Captioning: how often the LM finds a caption likelier after its own image than after another one."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence

import torch
from torch import Tensor

from visual_ground.errors import GroundingValueError
from visual_ground.evaluation.pairs import EvaluationPairs, Pairs
from visual_ground.model import GroundedModel
from visual_ground.prompts.encoded import EncodedPrompt


class CaptionPairEvaluator:
    """Caption pair accuracy, in percent; an `Evaluator`.

    Args:
        pairs: images with captions, at least 2.
        name: tells the metrics from another evaluator's.
        wrong_images: other images that each caption's own is compared with.
        batch_size: captions that the LM reads at once.

    Example:
        >>> CaptionPairEvaluator(validation_rows)(model)  # doctest: +SKIP
        {'caption_pair_accuracy': 80.7}
    """

    primary_metric = "caption_pair_accuracy"

    def __init__(
        self, pairs: Pairs | EvaluationPairs, name: str = "captions", wrong_images: int = 4, batch_size: int = 32
    ) -> None:
        self.pairs, self.name = EvaluationPairs.of(pairs), name
        self.wrong_images, self.batch_size = wrong_images, batch_size

    def __call__(self, model: GroundedModel) -> dict[str, float]:
        """Return `caption_pair_accuracy`."""
        captions, features = self.pairs.read(model)
        accuracy = caption_pair_accuracy(
            model, captions, features, self.wrong_images, self.batch_size, groups=self.pairs.groups
        )
        return {self.primary_metric: accuracy}


@torch.no_grad()
def caption_pair_accuracy(
    model: GroundedModel,
    captions: Sequence[str],
    features: Tensor,
    wrong_images: int = 4,
    batch_size: int = 32,
    seed: int = 0,
    groups: Tensor | None = None,
) -> float:
    """Return the percentage of comparisons in which a caption is likelier after its own image than after another's.

    The likelihood is summed over the caption's tokens; `[RET]`, which no caption has, takes no part in it.

    Args:
        model: the grounded model.
        captions: n captions, n at least 2.
        features: (n, f), their images' features.
        wrong_images: images of other captions, drawn at random, that each caption's own is compared with.
        batch_size: captions that the LM reads at once.
        seed: of the draw.
        groups: (n,) numbers, equal if two captions are of one image, which is not wrong then; None: nowhere.

    Raises:
        GroundingValueError: fewer than 2 pairs, not as many captions as images, or one image for all.
    """
    count = len(captions)
    if count != len(features) or count < 2:
        raise GroundingValueError(
            f"At least two pairs are needed, with one image for each caption, got {count} captions and {len(features)} "
            "images."
        )
    groups = torch.arange(count) if groups is None else groups
    if len(set(groups.tolist())) < 2:
        raise GroundingValueError("All captions are of one image, and none is left to compare it with.")
    generator, wins = torch.Generator().manual_seed(seed), []
    right = _caption_scores(model, captions, features, batch_size)
    for _ in range(wrong_images):
        wrong = features[draw_from_other_groups(groups, generator)]
        wins.append(right > _caption_scores(model, captions, wrong, batch_size))
    return 100 * float(torch.stack(wins).double().mean())


def draw_from_other_groups(groups: Tensor, generator: torch.Generator) -> Tensor:
    """Return for each of n pairs the number of another one, (n,), drawn from those of other groups.

    Args:
        groups: (n,) numbers, at least two different ones.
        generator: of the draw.
    """
    count = len(groups)
    # Those of a group stand together, so that every other pair is so many places after the group's last.
    order = torch.argsort(groups, stable=True)
    ordered = groups[order].tolist()
    last = torch.tensor([bisect_right(ordered, group) for group in ordered])
    room = count - last + torch.tensor([bisect_left(ordered, group) for group in ordered])
    drawn = torch.randint(0, count - 1, (count,), generator=generator) % room
    others = torch.empty(count, dtype=torch.long)
    others[order] = order[(last + drawn) % count]
    return others


def _caption_scores(model: GroundedModel, captions: Sequence[str], features: Tensor, batch_size: int) -> Tensor:
    """Return log p(caption | image) of n captions and the features (n, f) of an image for each, in nats, (n,)."""
    prefix = tuple(model.processor.caption_prefix(image=True))
    caption_ids = [tuple(model.processor.encode_caption(caption)) for caption in captions]
    scores = torch.zeros(len(captions))
    # Captions of similar length share a batch, so that one long caption does not pad all others.
    order = sorted(range(len(captions)), key=lambda i: len(caption_ids[i]))
    for start in range(0, len(order), batch_size):
        numbers = order[start : start + batch_size]
        prompts = [EncodedPrompt(prefix + caption_ids[i], ()) for i in numbers]
        lengths = [len(caption_ids[i]) for i in numbers]
        batch = model.processor.batch(prompts).to(model.frozen_lm.device)
        image_tokens = model.active.image_tokens(image_features=features[numbers])
        inputs = batch["input_ids"], batch["attention_mask"]
        scores[numbers] = model.frozen_lm.log_likelihood(*inputs, lengths, image_tokens, without_ret=True).cpu()
    return scores
