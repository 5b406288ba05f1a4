"""Start values fitted to the training pairs, before the first step.

Text and image layers of the retrieval space start in closed form. The layer from images to input rows starts by
imitation: an image's row should leave the LM in the state that the caption's own words would leave it in. Both take
seconds, where the losses would take epochs to find as much.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from visual_ground.errors import GroundingStateError
from visual_ground.language import core_of
from visual_ground.model import GroundedModel
from visual_ground.training.examples import ExampleDataset
from visual_ground.training.losses import GroundingObjective
from visual_ground.training.prefixes import plain_states
from visual_ground.training.sequences import KeysValues, fixed_cache, plain_layers
from visual_ground.training.streams import ExampleStream
from visual_ground.training.validation import image_features

PAIRS, IMITATED = 4096, 1024
# How deep the imitated state is, in parts of the LM's layers: deep enough for words to have a meaning that similar
# words share, not so deep that it is only about the next word (benchmarks/start_values.py).
DEPTH = 0.27
STEPS, BATCH = 100, 64
# A step of the optimizer moves a row by about this part of the embedding's spread, whatever the features' width.
STEP = 0.4


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
    start_retrieval(objective, [collate(rows) for rows in batches], features)
    some = slice(None, None, -(-len(pairs) // IMITATED))
    start_rows(objective.model, [row["caption"] for row in pairs[some]], features[some])


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
    model.adapter.start_retrieval(layers, features, torch.cat([batch["groups"] for batch in batches]))


def start_rows(model: GroundedModel, captions: Sequence[str], features: Tensor, seed: int = 0) -> None:
    """Start the layer from images to input rows by imitation of the captions.

    Args:
        model: the grounded model.
        captions: n captions.
        features: (n, f), of their images.
        seed: of the order.
    """
    imitation = Imitation(model)
    texts = [model.encoder.encode_text(" " + caption.strip().rstrip(".!?,;: ")) for caption in captions]
    wanted = torch.cat([imitation.text_states(texts[i : i + BATCH]) for i in range(0, len(texts), BATCH)])
    spread = wanted.std(0, correction=0) + 1e-6
    rate = STEP / model.adapter.feature_dim
    optimizer = torch.optim.AdamW(model.adapter.row_groups(rate), betas=(0.9, 0.95), weight_decay=0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    order = torch.Generator().manual_seed(seed)
    for _ in range(STEPS):
        chosen = torch.randint(len(texts), (min(BATCH, len(texts)),), generator=order)
        loss = ((imitation.image_states(features[chosen]) - wanted[chosen]) / spread).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    optimizer.zero_grad()


class Imitation:
    """The LM's states after a caption's words, and after an image's rows in their place.

    Args:
        model: the grounded model.
    """

    def __init__(self, model: GroundedModel) -> None:
        self.model = model
        self._layer: nn.Module | None = None
        lead = model.encoder.caption_lead(image=True)
        self.before = lead[: next(i for i, token in enumerate(lead) if token < 0)]
        self._layer = self._find_layer()
        self._kept: KeysValues | None = self._keep()

    @torch.no_grad()
    def _find_layer(self) -> nn.Module | None:
        """Return the module whose output is the state at `DEPTH`, so that runs can end there."""
        seen: list[tuple[nn.Module, Any]] = []
        hooks = [
            part.register_forward_hook(lambda module, args, output: seen.append((module, output)))
            for part in core_of(self.model.lm).modules()
        ]
        try:
            states = self._run(torch.tensor([[self.model.pad_id]]), torch.ones(1, 1, dtype=torch.long), None)
        finally:
            for hook in hooks:
                hook.remove()
        return next((module for module, output in seen if _first(output) is states), None)

    @torch.no_grad()
    def _keep(self) -> KeysValues | None:
        """Return the keys and values of what stands before the image, where the LM keeps such."""
        if not self.before:
            return None
        ids = torch.tensor([self.before])
        try:
            with self.model.bind(None, torch.ones_like(ids, dtype=torch.bool)):
                output = self.model.run(ids, torch.ones_like(ids), use_cache=True)
            return plain_layers(output.past_key_values, len(ids[0]))
        except (AttributeError, GroundingStateError):
            return None

    @torch.no_grad()
    def text_states(self, texts: Sequence[Sequence[int]]) -> Tensor:
        """Return the states (b, width) at the last token of each text."""
        lengths = torch.tensor([len(text) for text in texts])
        ids = torch.full((len(texts), int(lengths.max())), self.model.pad_id)
        for row, text in zip(ids, texts, strict=True):
            row[: len(text)] = torch.tensor(text)
        states = self._states(ids, torch.arange(ids.shape[1]) < lengths[:, None], None)
        return states[torch.arange(len(texts)), lengths - 1]

    def image_states(self, features: Tensor) -> Tensor:
        """Return the states (b, width) at the last row of each image."""
        width, first = self.model.config.num_visual_tokens, self.model.facts.vocabulary.first_image_id
        ids = first + torch.arange(len(features) * width).view(len(features), width)
        rows = self.model.image_rows(image_features=features)
        return self._states(ids, torch.ones_like(ids), rows)[:, -1]

    def _states(self, ids: Tensor, mask: Tensor, rows: Tensor | None) -> Tensor:
        """Return the states (b, s, width) at `DEPTH` of ids (b, s) read after what stands before the image."""
        count, past = len(self.before), {}
        mask = torch.nn.functional.pad(mask.long(), (count, 0), value=1)
        if self._kept is None:
            ids = torch.cat([torch.tensor(self.before, dtype=torch.long).expand(len(ids), -1), ids], -1)
        else:
            kept = [[tensor.expand(len(ids), -1, -1, -1) for tensor in layer] for layer in self._kept]
            past = {"past_key_values": fixed_cache(kept)}
        return self._run(ids, mask, rows, use_cache=bool(past), **past)[:, -(mask.shape[1] - count) :].float()

    def _run(self, ids: Tensor, mask: Tensor, rows: Tensor | None, **options: Any) -> Tensor:
        """Return the states (b, s, width) at `DEPTH`; the layers above do not run where that can be helped."""
        device = self.model.adapter.logit_scale.device
        one = torch.zeros_like(ids, dtype=torch.bool)
        one[0, -1] = True
        stop = None if self._layer is None else self._layer.register_forward_hook(_stop)
        try:
            with self.model.bind(rows, one):
                output = self.model.run(ids.to(device), mask.to(device), output_hidden_states=True, **options)
        except _Reached as reached:
            return reached.states
        finally:
            if stop is not None:
                stop.remove()
        return output.hidden_states[round(DEPTH * (len(output.hidden_states) - 1))]


class _Reached(Exception):
    """A run came to the layer that is looked at."""

    def __init__(self, states: Tensor) -> None:
        super().__init__()
        self.states = states


def _stop(module: nn.Module, args: Any, output: Any) -> None:
    raise _Reached(_first(output))


def _first(output: Any) -> Any:
    return output[0] if isinstance(output, tuple) and output else output
