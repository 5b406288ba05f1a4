"""Start values fitted to the training pairs, before the first step.

Text and image layers of the retrieval space start in closed form. The layer from images to input rows starts by
imitation: an image's row should leave the LM in the state that the words of its captions would leave it in. Both take
seconds, where the losses would take epochs to find as much.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from visual_ground.adapter.initialization import initialize_retrieval
from visual_ground.errors import GroundingStateError
from visual_ground.lm.layers import find_layers, layer_states
from visual_ground.model import GroundedModel
from visual_ground.training.data.examples import ExampleDataset
from visual_ground.training.data.streams import ExampleStream
from visual_ground.training.initialization.idf import caption_ids, fit_image_tokens_to_words, idf_weights
from visual_ground.training.losses.objective import GroundingObjective
from visual_ground.training.losses.retrieval import plain_states
from visual_ground.training.speedups.packing import KeysValues, SharedPrefixCache, fixed_cache
from visual_ground.training.validation import image_features

logger = logging.getLogger(__name__)

PAIRS = 6144
# How deep the imitated state is, in parts of the LM's layers: deep enough for words to have a meaning that similar
# words share, not so deep that it is only about the next word (benchmarks/fitted_start.py).
DEPTH = 0.27
STEPS, BATCH = 100, 128
# A step of the optimizer moves a row by about this part of the embedding's spread, whatever the features' width.
STEP = 0.2


def fit_start(
    objective: GroundingObjective,
    examples: ExampleDataset | ExampleStream,
    collate: Callable[[Sequence[Mapping[str, Any]]], Mapping[str, Any]],
) -> None:
    """Fit a new adapter's start values.

    Args:
        objective: the model, and how its text-retrieval pass is run.
        examples: the training examples, of which at most `PAIRS` are read.
        collate: makes a batch of examples.
    """
    pairs = _spread_out(examples)
    batches = [pairs[i : i + BATCH] for i in range(0, len(pairs), BATCH)]
    features = torch.cat([image_features(objective.model, rows) for rows in batches])
    if not any("request" in pair for pair in pairs):
        # Requests leave the LM in states of another kind than captions do, and one closed form does not fit both.
        start_retrieval(objective, [collate(rows) for rows in batches], features)
    start_image_tokens(objective.model, pairs, features)


def _spread_out(examples: ExampleDataset | ExampleStream) -> list[dict[str, Any]]:
    """Return evenly spread examples of two epochs, in which a row's several images and captions take turns."""
    if isinstance(examples, ExampleStream):
        return examples.some(PAIRS)
    count = 2 * len(examples)
    return [examples[i] for i in range(0, count, -(-count // PAIRS))]


@torch.no_grad()
def start_retrieval(objective: GroundingObjective, batches: Sequence[Mapping[str, Any]], features: Tensor) -> None:
    """Start the retrieval layers in closed form.

    Args:
        objective: the model, and how its text-retrieval pass is run.
        batches: as from `ExampleCollator`.
        features: (n, f), of their images.
    """
    model, prefixes = objective.model, objective.prefixes
    parts = [batch["retrieval"] for batch in batches]
    states = [plain_states(model, part) if prefixes is None else prefixes.states(part) for part in parts]
    layers = [torch.cat(layer) for layer in zip(*states, strict=True)]
    initialize_retrieval(model.adapter, layers, features, torch.cat([batch["groups"] for batch in batches]))


def start_image_tokens(
    model: GroundedModel, pairs: Sequence[Mapping[str, Any]], features: Tensor, seed: int = 0
) -> None:
    """Start the layer from images to input rows: as the captions' words in closed form, then by imitation of these.

    Args:
        model: the grounded model.
        pairs: n examples; those of one `group` are about the same thing.
        features: (n, f), of their images.
        seed: of the order.
    """
    fit_image_tokens_to_words(model, [pair["caption"] for pair in pairs], features, [pair["group"] for pair in pairs])
    layer = layer_at(model, DEPTH)
    if layer is None:
        logger.info("%s shows no layers, so image rows start as their captions' words.", type(model.lm).__name__)
        return
    imitation = Imitation(model, layer)
    wanted = target_hidden_states(imitation, pairs)
    spread = wanted.std(0, correction=0) + 1e-6
    rate = STEP / model.adapter.feature_dim
    optimizer = torch.optim.AdamW(model.adapter.projector_groups(rate), betas=(0.9, 0.95), weight_decay=0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    order = torch.Generator().manual_seed(seed)
    for _ in range(STEPS):
        chosen = torch.randint(len(pairs), (min(BATCH, len(pairs)),), generator=order)
        loss = ((imitation.image_states(features[chosen]) - wanted[chosen]) / spread).square().mean()
        model.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    model.zero_grad()


def target_hidden_states(imitation: Imitation, pairs: Sequence[Mapping[str, Any]]) -> Tensor:
    """Return for each of n pairs the mean state (n, width) of all words of its group's captions.

    Words weigh as they tell images apart (`idf_weights`). The more words tell of an image, the less the peculiarities
    of one of them are imitated (benchmarks/fitted_start.py).

    Args:
        imitation: gives the states.
        pairs: examples with a `caption` and a `group`.
    """
    said = caption_ids(imitation.model, [pair["caption"] for pair in pairs], [pair["group"] for pair in pairs])
    weight = idf_weights(said)
    texts = sorted(set(chain(*said.values())), key=len)
    weights = [[weight[token] for token in text] for text in texts]
    starts = range(0, len(texts), BATCH)
    sums = torch.cat([imitation.text_states(texts[i : i + BATCH], weights[i : i + BATCH]) for i in starts])
    place = {text: i for i, text in enumerate(texts)}
    means = {}
    for group, own in said.items():
        places = [place[text] for text in own]
        means[group] = sums[places].sum(0) / sum(sum(weights[i]) for i in places)
    return torch.stack([means[pair["group"]] for pair in pairs])


class Imitation:
    """The LM's states after a caption's words, and after an image's rows in their place.

    Args:
        model: the grounded model.
        layer: the layer of the LM whose states are meant; those above it do not run.
    """

    def __init__(self, model: GroundedModel, layer: nn.Module) -> None:
        self.model = model
        lead = model.processor.caption_prefix(image=True)
        self.before = lead[: next(i for i, token in enumerate(lead) if token < 0)]
        self._layer = layer
        self._kept: KeysValues | None = self._keep()

    def _keep(self) -> KeysValues | None:
        """Return the keys and values of what stands before the image, where the LM keeps such."""
        try:
            return SharedPrefixCache(self.model).get(tuple(self.before))
        except GroundingStateError:
            return None

    @torch.no_grad()
    def text_states(self, texts: Sequence[Sequence[int]], weights: Sequence[Sequence[float]]) -> Tensor:
        """Return the sums (b, width) of the states at each text's tokens, each state times its token's weight."""
        length = max(map(len, texts))
        ids = torch.tensor([[*text, *[self.model.processor.pad_token_id] * (length - len(text))] for text in texts])
        weight = torch.tensor([[*some, *[0.0] * (length - len(some))] for some in weights])
        states = self._states(ids, weight > 0, None)
        return torch.einsum("bsd,bs->bd", states, weight.to(states))

    def image_states(self, features: Tensor) -> Tensor:
        """Return the states (b, width) at the last row of each image."""
        width, first = self.model.config.num_visual_tokens, self.model.frozen_lm.vocabulary.first_image_id
        ids = first + torch.arange(len(features) * width).view(len(features), width)
        rows = self.model.active.image_tokens(image_features=features)
        return self._states(ids, torch.ones_like(ids), rows)[:, -1]

    def _states(self, ids: Tensor, mask: Tensor, rows: Tensor | None) -> Tensor:
        """Return the layer's states (b, s, width) of ids (b, s) read after what stands before the image."""
        count, past = len(self.before), {}
        mask = torch.nn.functional.pad(mask.long(), (count, 0), value=1)
        if self._kept is None:
            ids = torch.cat([torch.tensor(self.before, dtype=torch.long).expand(len(ids), -1), ids], -1)
        else:
            shape = (len(ids), -1, -1, -1)
            kept = [(keys.expand(shape), values.expand(shape)) for keys, values in self._kept]
            past = {"cache": fixed_cache(kept)}
        return self._run(ids, mask, rows, use_cache=bool(past), **past)[:, -(mask.shape[1] - count) :].float()

    def _run(self, ids: Tensor, mask: Tensor, image_tokens: Tensor | None, **options: Any) -> Tensor:
        """Return the layer's states (b, s, width)."""
        frozen_lm = self.model.frozen_lm
        ids, mask = ids.to(frozen_lm.device), mask.to(frozen_lm.device)
        return layer_states(frozen_lm, self._layer, ids, mask, image_tokens, **options)


def layer_at(model: GroundedModel, depth: float) -> nn.Module | None:
    """Return the LM's layer that deep, or None where its layers cannot be told from its other parts.

    Args:
        model: the grounded model.
        depth: in parts of the number of layers.
    """
    layers = find_layers(model.frozen_lm)
    return layers[max(0, round(depth * len(layers)) - 1)] if layers else None
