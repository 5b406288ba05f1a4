"""`GroundedSpeaker`: answers in text and pictures, with transformers' own `generate`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import BatchFeature, LogitsProcessorList

from visual_ground.errors import GroundingTypeError, GroundingValueError
from visual_ground.generation import RetLogitsProcessor, RetrievalSettings, retrieve, split_at_ret
from visual_ground.index import ImageIndex
from visual_ground.output import InterleavedOutput
from visual_ground.switching import SwitchingReader


class GroundedSpeaker(SwitchingReader):
    """A `SwitchingReader` that answers."""

    @torch.no_grad()
    def generate(
        self,
        prompts: Any,
        index: ImageIndex | None = None,
        max_new_tokens: int = 64,
        images_per_ret: int = 1,
        max_images: int | None = None,
        **options: Any,
    ) -> list[InterleavedOutput]:
        """Answer prompts with text and retrieved images.

        Args:
            prompts: as in `prepare`.
            index: where `[RET]`'s images are searched; with None the parts say that an image was meant.
            max_new_tokens: at most so many, `[RET]`s included.
            images_per_ret: images shown at each `[RET]`.
            max_images: `[RET]`s per answer, None for any number.
            options: `ret_bias`, added to `[RET]`'s logit; `min_new_tokens_before_ret` and
                `min_new_tokens_between_rets`; `allow_repeats`; and any
                argument of transformers' `generate`.

        Returns:
            One output per prompt, or `num_return_sequences` for each, in order.

        Raises:
            GroundingTypeError, GroundingValueError: a prompt, setting or index that cannot be used.

        Example:
            >>> model.generate("Show me a cat.", index)[0].parts  # doctest: +SKIP
            ('Here is a cat.', RetrievedImage(id='cat', ...))
        """
        own = {name: options.pop(name) for name in RetrievalSettings.OPTIONS if name in options}
        settings = RetrievalSettings(images_per_ret, max_images, **own)
        self._check_index(index)
        batch = self.prepare(prompts)
        image_rows = self.image_rows(batch.get("pixel_values"))
        with self.bind(image_rows):
            sequences = self._say(batch, settings, max_new_tokens, options)
        mask = batch["attention_mask"].repeat_interleave(len(sequences) // len(batch["attention_mask"]), 0)
        start = batch["input_ids"].shape[1]
        vectors = self._ret_vectors(sequences, mask, start, image_rows)
        return [
            self._interleave(row[start:].tolist(), found, index, settings)
            for row, found in zip(sequences, vectors, strict=True)
        ]

    def _say(
        self, batch: BatchFeature, settings: RetrievalSettings, max_new_tokens: int, options: dict[str, Any]
    ) -> Tensor:
        """Run transformers' `generate`; return ids (b * num_return_sequences, s)."""
        ids = batch["input_ids"]
        steer = RetLogitsProcessor(self.ret_token_id, ids.shape[1], settings)
        processors = LogitsProcessorList([steer, *(options.pop("logits_processor", None) or [])])
        if "stop_strings" in options:
            options.setdefault("tokenizer", self.tokenizer)
        options.setdefault("pad_token_id", self.pad_id)
        output = self.lm.generate(
            input_ids=ids,
            attention_mask=batch["attention_mask"],
            max_new_tokens=max_new_tokens,
            logits_processor=processors,
            **options,
        )
        return output if isinstance(output, Tensor) else output.sequences

    def _ret_vectors(self, sequences: Tensor, mask: Tensor, start: int, image_rows: Tensor | None) -> list[Tensor]:
        """Return, for each sequence, the retrieval vectors (r, q) of the `[RET]`s said from `start` on.

        One forward over the finished sequences reads them, so that beams, sampling and any cache give the same.
        """
        said = sequences == self.ret_token_id
        said[:, :start] = False
        if not bool(said.any()):
            return [torch.empty(0, self.config.retrieval_dim) for _ in sequences]
        asked = said.any(-1)
        stop = int(said.any(0).nonzero().max()) + 1
        ids, positions = sequences[asked, :stop], said[asked, :stop]
        mask = nn.functional.pad(mask[asked], (0, stop - start), value=1)
        vectors = self.embed(ids, mask, positions, image_rows)
        return list(vectors.cpu().split(said.sum(-1).tolist()))

    def _interleave(
        self, ids: list[int], vectors: Tensor, index: ImageIndex | None, settings: RetrievalSettings
    ) -> InterleavedOutput:
        images = iter(retrieve(vectors, index, settings))
        parts: list[Any] = []
        # An LM with more rows than its tokenizer has tokens can say ids that are no text.
        ids = [i for i in ids if i < self.facts.vocabulary.num_tokens or i == self.ret_token_id]
        for piece in split_at_ret(ids, self.ret_token_id, self.tokenizer):
            parts += next(images) if piece is None else [piece]
        return InterleavedOutput(tuple(parts))

    def _check_index(self, index: ImageIndex | None) -> None:
        if index is None:
            return
        if not callable(getattr(index, "search", None)):
            raise GroundingTypeError(f"index must be an ImageIndex or None, got {type(index).__name__}.")
        if index.vectors.shape[1] != self.config.retrieval_dim:
            raise GroundingValueError(
                f"The index holds vectors of width {index.vectors.shape[1]}, this model's retrieval space has width "
                f"{self.config.retrieval_dim}. Build the index with this model."
            )
