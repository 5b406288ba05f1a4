"""The retrieval layers in closed form: captions and requests are fitted together to their images."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, TypeAlias

import torch
from torch import Tensor

from visual_ground.adapter.initialization import initialize_retrieval, retrieval_inputs
from visual_ground.evaluation.pairs import image_features
from visual_ground.shared_space.accumulator import MomentAccumulator
from visual_ground.training.data.reading import without_prompt
from visual_ground.training.data.sequences import IGNORE_INDEX, TokenSequence
from visual_ground.training.initialization.idf import without_sentence_marks
from visual_ground.training.initialization.wordings import REQUESTS
from visual_ground.training.losses.objective import GroundingObjective
from visual_ground.training.losses.prompts import Asked

Example: TypeAlias = Mapping[str, Any]
# Makes a batch of examples, as `ExampleCollator` does.
Collate: TypeAlias = Callable[[Sequence[Example]], Mapping[str, Any]]

# Examples in one run of the LM and of the encoder.
BATCH_SIZE = 128
# Captions of a group without requests become requests too. Fitted to captions alone, requests find their images 7
# points less often (docs/recipe.md). Were only some groups' requests fitted, the difference between the states of
# captions and of requests would be taken for one between these groups' images and the others'.
REQUESTS_A_GROUP = 1
WORDINGS = REQUESTS[:4]  # Those that this was measured with.


@torch.no_grad()
def fit_retrieval(
    objective: GroundingObjective, batches: Iterable[Sequence[Example]], collate: Collate, steps_follow: bool = True
) -> MomentAccumulator | None:
    """Fit the retrieval layers to a stream of examples; nothing is kept of these but their second moments.

    Of examples with a prompt, the caption is read: prompts may have images, whose tokens are not fitted yet.

    Args:
        objective: the model, and how its text-retrieval pass is run.
        batches: of examples.
        collate: makes a batch of examples.
        steps_follow: also keep what the steps of training need of the captions, as far as there is room.

    Returns:
        The moments, for `fit_prompts`, if any example has a prompt.

    Raises:
        GroundingValueError: pairs of one group only, features that are all alike or not finite; the layers are then
            as they were.
    """
    model, num_requests, has_prompts = objective.model, Counter[Any](), False
    pairs = MomentAccumulator(fixed_images=model.config.retrieval_space == "encoder")
    for given in batches:
        has_prompts |= any("prompt" in example for example in given)
        batch = [without_prompt(example) for example in given]
        features, groups = image_features(model, batch), [example["group"] for example in batch]
        states = _states(objective, collate(batch), steps_follow)
        pairs.add(*retrieval_inputs(model.adapter, states, features), groups)
        # Encoded once: a caption as a request is about the same image.
        if chosen := _without_requests(batch, num_requests):
            states = _states(objective, collate([as_request(batch[i]) for i in chosen]), steps_follow)
            pairs.add(*retrieval_inputs(model.adapter, states, features[chosen]), [groups[i] for i in chosen])
    initialize_retrieval(model.adapter, pairs.solve(model.config.retrieval_dim))
    return pairs if has_prompts else None


@torch.no_grad()
def fit_prompts(
    objective: GroundingObjective,
    pairs: MomentAccumulator | None,
    batches: Iterable[Sequence[Example]],
    collate: Collate,
) -> None:
    """Fit the retrieval layers to prompts too, after the image tokens that these may hold.

    Args:
        objective: as in `fit_retrieval`.
        pairs: what that returned; None if no example has a prompt, and nothing is done.
        batches: of the examples; only those with a prompt are read.
        collate: makes a batch of examples.

    Raises:
        GroundingValueError: as `fit_retrieval`.
    """
    if pairs is None:
        return
    model = objective.model
    for given in batches:
        if batch := [example for example in given if "prompt" in example]:
            features, groups = image_features(model, batch), [example["group"] for example in batch]
            pairs.add(*retrieval_inputs(model.adapter, _states(objective, collate(batch), False), features), groups)
    initialize_retrieval(model.adapter, pairs.solve(model.config.retrieval_dim))


def _without_requests(batch: Sequence[Example], num_requests: Counter[Any]) -> list[int]:
    """Return the captions to be made requests, in groups that have fewer than `REQUESTS_A_GROUP`; count these."""
    num_requests.update(example["group"] for example in batch if "request" in example)
    chosen = []
    for i, example in enumerate(batch):
        if "request" not in example and num_requests[example["group"]] < REQUESTS_A_GROUP:
            num_requests[example["group"]] += 1
            chosen.append(i)
    return chosen


def _states(objective: GroundingObjective, batch: Mapping[str, Any], steps_follow: bool) -> list[Tensor]:
    sequences, features = batch["retrieval"], batch.get("prompt_features")
    if "prompt_pixels" in batch:
        features = objective.model.vision(batch["prompt_pixels"])
    if not steps_follow:
        # Without labels, the output head does not run at the captions' words.
        sequences = [TokenSequence(s.ids, (*[IGNORE_INDEX] * (len(s.ids) - 1), s.labels[-1])) for s in sequences]
    states = Asked.of(objective.model, sequences, features).states(objective.prefixes)
    return [layer.float() for layer in states]


def as_request(example: Example) -> dict[str, Any]:
    """Return an example with its caption as a request, in one of four wordings."""
    wording = WORDINGS[example["row"] % len(WORDINGS)]
    return {**example, "request": wording.format(it=without_sentence_marks(example["caption"]))}


def batched(examples: Iterable[Example]) -> Iterator[list[Example]]:
    """Yield examples, `BATCH_SIZE` at once."""
    iterator = iter(examples)
    while batch := list(islice(iterator, BATCH_SIZE)):
        yield batch
