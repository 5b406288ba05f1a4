"""Data-dependent initialization: a new adapter's start values are fitted to the training pairs, before the first step.

The retrieval projections start in closed form (`initialization.retrieval`). The image projection starts by imitation:
an image's tokens should leave the LM in the hidden state in which the words of its captions would leave it. Both take
seconds, where the losses would take epochs to find as much.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from visual_ground.errors import GroundingStateError, GroundingValueError
from visual_ground.evaluation.pairs import image_features
from visual_ground.lm.layers import find_layers, layer_states
from visual_ground.model import GroundedModel
from visual_ground.progress import counted
from visual_ground.training.data.examples import ExampleDataset
from visual_ground.training.data.streams import ExampleStream
from visual_ground.training.initialization.captions import start_captions
from visual_ground.training.initialization.emission import finish_emission, start_emission
from visual_ground.training.initialization.idf import caption_ids, fit_image_tokens_to_words, idf_weights
from visual_ground.training.initialization.retrieval import BATCH_SIZE, Collate, batched, fit_prompts, fit_retrieval
from visual_ground.training.losses.objective import GroundingObjective
from visual_ground.training.speedups.attention import short_attention
from visual_ground.training.speedups.kv_cache import KeysValues, SharedPrefixCache, expanded, fixed_cache

logger = logging.getLogger(__name__)

# Examples that the start values are fitted to at most, so that the start takes seconds with any dataset.
MAX_EXAMPLES = 6144
# How deep the imitated state is, in parts of the LM's layers: deep enough for words to have a meaning that similar
# words share, not so deep that it is only about the next word (benchmarks/data_dependent_init.py).
DEPTH = 0.27
# Steps of imitation: seconds, and the closed form before it leaves little to do. Each is of a quarter of the examples
# where these are few: of 200 pairs, it tells as many unseen ones as steps of 128 do, in half the time.
NUM_STEPS = 100
# A step of the optimizer moves an image token by about this part of the embeddings' standard deviation, whatever the
# features' width.
STEP_SIZE = 0.2


def initialize_from_data(
    objective: GroundingObjective,
    examples: ExampleDataset | ExampleStream,
    collate: Collate,
    folder: Path | None = None,
    progress: bool = False,
) -> None:
    """Fit a new adapter's start values.

    Args:
        objective: the model, and how its text-retrieval pass is run.
        examples: the training examples, of which at most `MAX_EXAMPLES` are read.
        collate: makes a batch of examples.
        folder: where the LM's own answers are kept, see `emission.fit_ret_output`; None: nowhere.
        progress: show progress bars.
    """
    sampled = evenly_sampled(examples)
    # First, because without a retrieval prompt states are read at `[RET]`, whose input embedding is chosen here.
    begun = start_emission(objective.model, sampled, folder, progress)
    batches = counted(list(batched(sampled)), "start values: images", "batches", progress)
    features = torch.cat([image_features(objective.model, batch) for batch in batches])
    # With their features, so that neither the fit nor its batches encode or preprocess the images again.
    encoded = [{**example, "image_features": row} for example, row in zip(sampled, features, strict=True)]
    pairs = None
    shown = counted(list(batched(encoded)), "start values: texts", "batches", progress)
    try:
        pairs = fit_retrieval(objective, shown, collate)
    except GroundingValueError as error:
        logger.warning("The retrieval layers start from random values. %s", error)
    start_image_tokens(objective.model, sampled, features, progress=progress)
    start_captions(objective, sampled, features, collate, progress=progress)
    finish_emission(objective.model, begun, sampled, features, folder, progress)
    fit_prompts(objective, pairs, batched(encoded), collate)


def evenly_sampled(examples: ExampleDataset | ExampleStream) -> list[dict[str, Any]]:
    """Return examples at even distances over two epochs, in which a row's several images and captions take turns."""
    if isinstance(examples, ExampleStream):
        return examples.take(MAX_EXAMPLES)
    count = 2 * len(examples)
    return [examples[i] for i in range(0, count, -(-count // MAX_EXAMPLES))]


def start_image_tokens(
    model: GroundedModel,
    examples: Sequence[Mapping[str, Any]],
    features: Tensor,
    seed: int = 0,
    progress: bool = False,
) -> None:
    """Start the image projection: from the captions' words in closed form, then by imitation of these.

    Args:
        model: the grounded model.
        examples: n examples; those of one `group` are about the same thing.
        features: (n, f), of their images.
        seed: of the order.
        progress: show progress bars.
    """
    captions, groups = [example["caption"] for example in examples], [example["group"] for example in examples]
    fit_image_tokens_to_words(model, captions, features, groups)
    layer = layer_at(model, DEPTH)
    if layer is None:
        logger.info("%s shows no layers, so image tokens start as their captions' words.", type(model.lm).__name__)
        return
    imitation = Imitation(model, layer)
    targets = target_hidden_states(imitation, examples, progress)
    std = targets.std(0, correction=0) + 1e-6
    rate = STEP_SIZE / model.adapter.feature_dim
    optimizer = torch.optim.AdamW(model.adapter.projector_groups(rate), betas=(0.9, 0.95), weight_decay=0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, NUM_STEPS)
    order, count = torch.Generator().manual_seed(seed), min(len(examples), BATCH_SIZE, max(16, len(examples) // 4))
    for _ in counted(range(NUM_STEPS), "start values: image tokens", "steps", progress):
        chosen = torch.randint(len(examples), (count,), generator=order)
        error = (imitation.image_states(features[chosen]) - targets[chosen]) / std
        model.zero_grad()
        torch.autograd.backward(mean_distance(error))
        optimizer.step()
        schedule.step()
    model.zero_grad()


def mean_distance(error: Tensor) -> Tensor:
    """Return the mean over images of the root mean square of an image's errors (b, width).

    Not the mean square: a few images leave the LM in states ten times as far off as all others, and would decide the
    steps for all (docs/recipe.md).
    """
    return (error.square().mean(-1) + 1e-6).sqrt().mean()


def target_hidden_states(imitation: Imitation, examples: Sequence[Mapping[str, Any]], progress: bool = False) -> Tensor:
    """Return for each of n examples the idf-weighted mean state (n, width) over all tokens of its group's captions.

    The more captions of a group are averaged, the less the peculiarities of one of them are imitated
    (benchmarks/data_dependent_init.py).

    Args:
        imitation: gives the states.
        examples: with a `caption` and a `group`.
        progress: show a progress bar.
    """
    captions, groups = [example["caption"] for example in examples], [example["group"] for example in examples]
    ids_of = caption_ids(imitation.model, captions, groups)
    weight = idf_weights(ids_of)
    texts = sorted(set(chain(*ids_of.values())), key=len)
    weights = [[weight[token] for token in text] for text in texts]
    starts = counted(range(0, len(texts), BATCH_SIZE), "start values: words", "batches", progress)
    sums = torch.cat([imitation.text_states(texts[i : i + BATCH_SIZE], weights[i : i + BATCH_SIZE]) for i in starts])
    index = {text: i for i, text in enumerate(texts)}
    means = {}
    for group, of_group in ids_of.items():
        indices = [index[text] for text in of_group]
        means[group] = sums[indices].sum(0) / sum(sum(weights[i]) for i in indices)
    return torch.stack([means[group] for group in groups])


class Imitation:
    """The LM's states after a caption's words, and after an image's tokens in their place.

    Args:
        model: the grounded model.
        layer: the layer of the LM whose states are compared; those above it do not run.
    """

    def __init__(self, model: GroundedModel, layer: nn.Module) -> None:
        self.model = model
        prompt = model.processor.caption_prefix(image=True)
        self.prefix = prompt[: next(i for i, token in enumerate(prompt) if token < 0)]
        self._layer = layer
        self._keys_values = self._run_prefix()

    def _run_prefix(self) -> KeysValues | None:
        """Return the keys and values of the prompt before the image, or None if the LM keeps none."""
        try:
            return SharedPrefixCache(self.model).get(tuple(self.prefix))
        except GroundingStateError:
            return None

    @torch.no_grad()
    def text_states(self, texts: Sequence[Sequence[int]], weights: Sequence[Sequence[float]]) -> Tensor:
        """Return the sums (b, width) of the states at each text's tokens, each state times its token's weight."""
        length, pad_id = max(map(len, texts)), self.model.processor.pad_token_id
        ids = torch.tensor([[*text, *[pad_id] * (length - len(text))] for text in texts])
        weight = torch.tensor([[*of_text, *[0.0] * (length - len(of_text))] for of_text in weights])
        states = self._states(ids, weight > 0, None)
        return torch.einsum("bsd,bs->bd", states, weight.to(states))

    def image_states(self, features: Tensor) -> Tensor:
        """Return the states (b, width) at the last token of each image, from features (b, f)."""
        width, first = self.model.config.num_visual_tokens, self.model.frozen_lm.vocabulary.first_image_id
        ids = first + torch.arange(len(features) * width).view(len(features), width)
        image_tokens = self.model.active.image_tokens(image_features=features)
        return self._states(ids, torch.ones_like(ids), image_tokens)[:, -1]

    def _states(self, ids: Tensor, mask: Tensor, image_tokens: Tensor | None) -> Tensor:
        """Return the layer's states (b, s, width) of ids (b, s) read after the prompt before the image."""
        frozen_lm, n, length = self.model.frozen_lm, len(self.prefix), ids.shape[1]
        mask, options = pad(mask.long(), (n, 0), value=1), {}
        if self._keys_values is None:
            ids = torch.cat([torch.tensor(self.prefix, dtype=torch.long).expand(len(ids), -1), ids], -1)
        else:
            options = {"cache": fixed_cache(expanded(self._keys_values, len(ids)))}
        ids, mask = ids.to(frozen_lm.device), mask.to(frozen_lm.device)
        with short_attention(frozen_lm.device, mask.shape[1]):
            states = layer_states(frozen_lm, self._layer, ids, mask, image_tokens, use_cache=bool(options), **options)
        return states[:, -length:].float()


def layer_at(model: GroundedModel, depth: float) -> nn.Module | None:
    """Return the LM's layer at a depth, or None if its layers cannot be told from its other parts.

    Args:
        model: the grounded model.
        depth: in parts of the number of layers, from 0 to 1.
    """
    layers = find_layers(model.frozen_lm)
    return layers[max(0, round(depth * len(layers)) - 1)] if layers else None
