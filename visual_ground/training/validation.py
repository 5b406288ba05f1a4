"""Evaluation on the trainer's own dataset, shared among the processes of a distributed run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from visual_ground.errors import GroundingValueError
from visual_ground.evaluation.metrics import retrieval_recalls
from visual_ground.evaluation.pairs import image_features
from visual_ground.lm.reading import last_positions
from visual_ground.model import GroundedModel
from visual_ground.processes import Processes
from visual_ground.progress import counted
from visual_ground.prompts.encoded import EncodedPrompt, pad_batch
from visual_ground.training.data.examples import ExampleCollator, ExampleDataset
from visual_ground.training.data.prompts import PromptIds


class Validation:
    """Splits a dataset's examples equally, since a sharded LM must be called equally often by every process.

    Args:
        model: the grounded model.
        examples: image-caption pairs.
        batch_size: examples run at once by each process.
        accelerator: gathers what the other processes computed.
        progress: show progress bars.
    """

    def __init__(
        self,
        model: GroundedModel,
        examples: ExampleDataset,
        batch_size: int,
        accelerator: Accelerator,
        progress: bool = False,
    ) -> None:
        self.model, self.examples, self.accelerator = model, examples, accelerator
        self.batch_size, self.progress = min(batch_size, len(examples)), progress

    def _gathered(self, shares: Sequence[Tensor], count: int) -> Tensor:
        """Return the first `count` entries of all processes' shares, in the order of the dataset."""
        parts = [self.accelerator.gather(share.contiguous()) for share in shares]
        return torch.cat(parts)[:count]

    @torch.no_grad()
    def recalls(self) -> dict[str, float]:
        """Return recall at k both ways over all pairs, in percent, and `ret_rate`.

        That is the part of the captions after which `[RET]` is the LM's likeliest next token.
        """
        count, batch_size = len(self.examples), self.batch_size
        starts = range(0, count, batch_size)
        # The last batch is filled up from the start of the dataset, so that all processes gather equal shapes.
        shares = Processes.launched().share([[i % count for i in range(start, start + batch_size)] for start in starts])
        texts, images, predicts_ret, groups = [], [], [], []
        for numbers in counted(shares, "evaluation: recall", "batches", self.progress, leave=False):
            batch = [self.examples[i] for i in numbers]
            vectors, hits = embed_texts(self.model, batch)
            texts.append(vectors)
            predicts_ret.append(hits)
            images.append(self.model.adapter.embed_images(image_features(self.model, batch, batch_size)))
            groups.append(torch.tensor([example["group"] for example in batch], device=vectors.device))
        gathered = (self._gathered(part, count) for part in (texts, images, groups))
        metrics = {
            f"{way}_{rank}": value
            for way, values in retrieval_recalls(*gathered).items()
            for rank, value in values.items()
        }
        return {**metrics, "ret_rate": float(self._gathered(predicts_ret, count).mean())}

    def loss(self, loss_of: Callable[[Sequence[Mapping[str, Any]]], Tensor]) -> float:
        """Return the mean loss of the dataset's full batches; raise if that of a batch is not finite."""
        size, count = self.batch_size, max(1, len(self.examples) // self.batch_size)
        batches = [range(i * size, (i + 1) * size) for i in range(count)]
        shares = counted(Processes.launched().share(batches), "evaluation: loss", "batches", self.progress, leave=False)
        values = [loss_of([self.examples[i] for i in numbers]).detach().float()[None] for numbers in shares]
        losses = self._gathered(values, count)
        if not bool(losses.isfinite().all()):
            number = int(losses.isfinite().long().argmin())
            raise GroundingValueError(
                f"The evaluation loss became {float(losses[number])} in the batch of examples {list(batches[number])}. "
                "Lower the learning rate, or look at these examples."
            )
        return float(losses.mean())


@torch.no_grad()
def embed_texts(model: GroundedModel, examples: Sequence[Mapping[str, Any]]) -> tuple[Tensor, Tensor]:
    """Return the vectors read after each example's caption, or its prompt, and whether the LM predicts `[RET]` there.

    Returns:
        Unit vectors (n, q), and 1 or 0 (n,).
    """
    processor, device = model.processor, model.active.device
    said = [PromptIds.of(processor, example.get("prompt", example["caption"])).ids for example in examples]
    suffixes = [processor.retrieval_suffix(ids) for ids in said]
    prompts = [EncodedPrompt((*ids, *suffix), ()) for ids, suffix in zip(said, suffixes, strict=True)]
    processor.check_ids(prompts)
    ids, mask = pad_batch(prompts, model.frozen_lm.vocabulary.first_image_id, processor.pad_token_id, "left")
    images = ExampleCollator(model).prompt_images(examples)
    tokens = model.active.image_tokens(images.get("prompt_pixels"), images.get("prompt_features"))
    # Padded on the left, every sequence is read in the last column; positions count through the whole batch.
    ends = last_positions(ids)
    # The position at the caption's end, whose logits predict `[RET]`, and that whose hidden states are embedded.
    positions = torch.stack([ends - torch.tensor([len(suffix) for suffix in suffixes]), ends], 1).flatten()
    reading = model.frozen_lm.read(
        ids.to(device), mask.to(device), positions.to(device), tokens, layers=model.config.text_layers
    )
    vectors = model.active.embed_states([states[1::2] for states in reading.states])
    return vectors, (reading.logits[0::2].argmax(-1) == model.ret_token_id).float().to(device)
