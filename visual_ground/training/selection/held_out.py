"""Groups of the training data that are held out, and the scores of an adapter on them."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from visual_ground.adapter.adapter import Adapter
from visual_ground.evaluation.metrics import mean_reciprocal_ranks
from visual_ground.evaluation.pairs import image_features
from visual_ground.training.data.examples import ExampleCollator, ExampleDataset
from visual_ground.training.losses.cached_retrieval import PrefixCache
from visual_ground.training.losses.objective import GroundingObjective, PreparedBatch
from visual_ground.training.losses.prompts import Asked

logger = logging.getLogger(__name__)

# Groups that are held out at least, as fewer say nothing, and at most, as they are scored several times in a run.
MIN_GROUPS, MAX_GROUPS = 10, 256
# Examples of these groups that are scored at most.
MAX_EXAMPLES = 512
# Memory for the states of their texts, which are the same each time.
CACHE_BYTES = 2**28


def split_off(examples: ExampleDataset, fraction: float, seed: int) -> tuple[ExampleDataset, ExampleDataset | None]:
    """Return the examples to train on, and a held-out fraction of the groups, or None where these are too few."""
    groups = list(dict.fromkeys(examples.groups))
    count = min(MAX_GROUPS, int(fraction * len(groups)))
    if count < MIN_GROUPS:
        if fraction:
            logger.info(
                "Nothing is held out to choose the best state by: %g of %d groups are fewer than %d.",
                *(fraction, len(groups), MIN_GROUPS),
            )
        return examples, None
    order = torch.randperm(len(groups), generator=torch.Generator().manual_seed(seed)).tolist()
    held = {groups[i] for i in order[:count]}
    kept, apart = ([i for i, group in enumerate(examples.groups) if (group in held) == of] for of in (False, True))
    step = -(-len(apart) // MAX_EXAMPLES)
    return examples.select(kept, examples.sample), examples.select(apart[::step], False)


class HeldOut:
    """Scores the adapter on examples that are not trained on; every process does it alike.

    Args:
        objective: how the passes are run.
        examples: the examples.
        collator: makes batches in which every example is captioned by itself.
        batch_size: examples in one of them.
        names: which scores, "retrieval" and "captioning".
    """

    def __init__(
        self,
        objective: GroundingObjective,
        examples: ExampleDataset,
        collator: ExampleCollator,
        batch_size: int,
        names: Sequence[str],
    ) -> None:
        self.objective, self.collator, self.names = objective, collator, tuple(names)
        self.examples, self.batch_size = examples, batch_size
        self._prefixes: PrefixCache | None = None

    @property
    def reads_images_to_retrieve(self) -> bool:
        """Whether a prompt has images, so that retrieval depends on the image tokens."""
        columns, rows = self.examples.columns, self.examples.rows
        return any(columns.prompt_images(rows[i]) for i in range(len(rows)))

    @torch.no_grad()
    def scores(self) -> dict[str, float]:
        """Return the scores, the larger the better.

        "retrieval" is the mean reciprocal rank of texts' images and of images' texts, in percent; "captioning" the mean
        log-likelihood of the captions' tokens, in nats, with a logit of 0 for `[RET]`, so that it depends on nothing
        but the image tokens.
        """
        objective, was_training = self.objective, self.objective.training
        prefixes = objective.prefixes
        if prefixes is not None and self._prefixes is None:
            # Of its own, since a run that resumes does not repeat the scores before it.
            self._prefixes = prefixes.without_memory()
            self._prefixes.limit_bytes = CACHE_BYTES
        objective.eval()
        numbers = range(len(self.examples))
        starts = range(0, len(numbers), self.batch_size)
        # Read anew each time: images whose features are not cached may be large.
        parts = [self._part([self.examples[n] for n in numbers[i : i + self.batch_size]]) for i in starts]
        objective.train(was_training)
        found: dict[str, float] = {}
        if "retrieval" in self.names:
            texts, images = (torch.cat([part[name] for part in parts]) for name in ("texts", "images"))
            groups = torch.tensor([self.examples.groups[n] for n in numbers])
            found["retrieval"] = 50 * sum(mean_reciprocal_ranks(texts, images, groups).values())
        if "captioning" in self.names:
            found["captioning"] = -sum(part["captioning"] for part in parts) / sum(part["labels"] for part in parts)
        return found

    def _part(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        objective, model = self.objective, self.objective.model
        batch, features = self.collator(examples), image_features(model, examples)
        found: dict[str, Any] = {}
        if "retrieval" in self.names:
            asked = Asked.of(model, batch["retrieval"], self._prompt_features(batch))
            found |= {"texts": asked.run(self._prefixes).vectors, "images": model.adapter.embed_images(features)}
        if "captioning" in self.names:
            labels = sum(sequence.num_labels for sequence in batch["captioning"])
            parts = PreparedBatch(batch["captioning"], batch["retrieval"], features, batch["groups"])
            with _silent_ret(model.adapter):
                found |= {"captioning": float(objective.captioning(parts)) * labels, "labels": labels}
        return found

    def _prompt_features(self, batch: Mapping[str, Any]) -> Tensor | None:
        vision, pixels = self.objective.model.vision, batch.get("prompt_pixels")
        return batch.get("prompt_features") if pixels is None else vision(pixels.to(self.objective.model.active.device))


@contextmanager
def _silent_ret(adapter: Adapter) -> Iterator[None]:
    """Inside the block, `[RET]`'s output embedding is 0."""
    embedding = adapter.ret_embeddings()[1]
    kept = embedding.detach().clone()
    embedding.zero_()
    try:
        yield
    finally:
        embedding.copy_(kept)
