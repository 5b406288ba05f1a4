"""Evaluation during training, by all processes together: each runs its share, in step with the others."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from visual_ground.evaluation.retrieval import recall_at
from visual_ground.model import GroundedModel
from visual_ground.prompts.encoded import EncodedPrompt, pad_batch
from visual_ground.training.data.examples import ExampleDataset, image_features


class Validation:
    """The pairs of a dataset in equal shares, so that every process calls the LM as often as any other.

    Args:
        model: the grounded model.
        examples: the pairs.
        size: pairs run at once.
        accelerator: says which process this is.
    """

    def __init__(self, model: GroundedModel, examples: ExampleDataset, size: int, accelerator: Accelerator) -> None:
        self.model, self.examples, self.accelerator = model, examples, accelerator
        self.size = min(size, len(examples))

    def _share(self, batches: Sequence[Sequence[int]]) -> list[Sequence[int]]:
        """Return this process's batches of all, which go round again until every process has as many."""
        world = self.accelerator.num_processes
        rounds = -(-len(batches) // world)
        return [batches[(i * world + self.accelerator.process_index) % len(batches)] for i in range(rounds)]

    def _gathered(self, shares: Sequence[Tensor], count: int) -> Tensor:
        """Return the rows of all processes' shares in the order of the dataset, `count` of them."""
        parts = [self.accelerator.gather(share.contiguous()) for share in shares]
        return torch.cat(parts)[:count]

    @torch.no_grad()
    def recalls(self) -> dict[str, float]:
        """Return recall at k both ways over all pairs, and how often the LM would say `[RET]` after a caption."""
        count, size = len(self.examples), self.size
        starts = range(0, count, size)
        shares = self._share([[i % count for i in range(start, start + size)] for start in starts])
        texts, images, said = [], [], []
        for numbers in shares:
            rows = [self.examples[i] for i in numbers]
            vectors, hits = text_vectors(self.model, [row["caption"] for row in rows])
            texts.append(vectors)
            said.append(hits)
            images.append(self.model.adapter.embed_images(image_features(self.model, rows, self.size)))
        scores = self._gathered(texts, count) @ self._gathered(images, count).T
        found = {f"text_to_image_{rank}": value for rank, value in recall_at(scores).items()}
        found |= {f"image_to_text_{rank}": value for rank, value in recall_at(scores.T).items()}
        return {**found, "ret_rate": float(self._gathered(said, count).mean())}

    def loss(self, cost: Callable[[Sequence[Mapping[str, Any]]], Tensor]) -> float:
        """Return the mean cost of the dataset's whole batches."""
        count = max(1, len(self.examples) // self.size)
        batches = [range(i * self.size, (i + 1) * self.size) for i in range(count)]
        costs = [cost([self.examples[i] for i in numbers]).detach().float()[None] for numbers in self._share(batches)]
        return float(self._gathered(costs, count).mean())


@torch.no_grad()
def text_vectors(model: GroundedModel, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Return the vectors (n, q) at a `[RET]` put after each caption, and whether the LM would say it there (n,).

    Args:
        model: the grounded model.
        captions: n captions.
    """
    encoder, device = model.processor, model.adapter.logit_scale.device
    lead = encoder.caption_prefix(image=False)
    prompts = [EncodedPrompt((*lead, *encoder.encode_caption(text), model.ret_token_id), ()) for text in captions]
    model.processor.check_ids(prompts)
    ids, mask = pad_batch(prompts, model.frozen_lm.vocabulary.first_image_id, model.processor.pad_token_id, "left")
    ends = torch.arange(1, len(ids) + 1) * ids.shape[1] - 1
    # The position before [RET], which predicts it, and its own.
    positions = torch.stack([ends - 1, ends], 1).flatten()
    reading = model.frozen_lm.read(
        ids.to(device), mask.to(device), positions.to(device), layers=model.config.text_layers
    )
    vectors = model.active.embed_states([states[1::2] for states in reading.states])
    return vectors, (reading.logits[0::2].argmax(-1) == model.ret_token_id).float().to(device)
