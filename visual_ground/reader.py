"""`GroundedReader`: a frozen language model that reads text and images; its states, vectors and likelihoods."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import BatchFeature

from visual_ground.assembly import GroundedParts
from visual_ground.errors import GroundingStateError, GroundingValueError
from visual_ground.language_weights import embedding_device
from visual_ground.prompts import EncodedPrompt, as_batch, pad_batch
from visual_ground.virtual_rows import Call


class GroundedReader(GroundedParts):
    """All that a grounded model can do without saying a word; the arguments are those of `GroundedParts`."""

    # Prompts in.

    def prepare(self, prompts: Any, padding_side: str = "left") -> BatchFeature:
        """Turn prompts into a batch for `forward`.

        Args:
            prompts: a list of prompts, each a string, a PIL image, a path to an image, a list mixing them, or a list of
                chat messages; or one string, image or chat alone. One interleaved prompt is a list within the list.
            padding_side: "left" or "right".

        Returns:
            input_ids (b, s), attention_mask (b, s), and, where there are images, pixel_values (n, c, h, w).

        Raises:
            GroundingTypeError, GroundingValueError: a prompt that cannot be read, is empty, or exceeds the context.
        """
        encoded = [self.encoder.encode(prompt) for prompt in as_batch(prompts)]
        return self._collate(encoded, padding_side)

    def _collate(self, encoded: Sequence[EncodedPrompt], side: str) -> BatchFeature:
        self.check_ids(encoded)
        ids, mask = pad_batch(encoded, self.facts.vocabulary.first_image_id, self.pad_id, side)
        batch = BatchFeature({"input_ids": ids, "attention_mask": mask})
        if images := [image for prompt in encoded for image in prompt.images]:
            batch["pixel_values"] = self.vision.preprocess(images)
        return batch.to(embedding_device(self.lm))

    def check_ids(self, encoded: Sequence[EncodedPrompt]) -> None:
        """Raise GroundingValueError where ids exceed the LM's context, or are tokens that the LM has no row for."""
        length = max((len(prompt.ids) for prompt in encoded), default=0)
        limit = getattr(self.lm.config, "max_position_embeddings", None)
        if isinstance(limit, int) and 0 < limit < length:
            raise GroundingValueError(f"A prompt has {length} ids, and the LM's context holds {limit}. Shorten it.")
        rows = self.facts.vocabulary.num_rows
        if lost := {i for prompt in encoded for i in prompt.ids if i >= rows and i != self.ret_token_id}:
            names = self.tokenizer.convert_ids_to_tokens(sorted(lost))
            raise GroundingValueError(
                f"The tokens {names} have ids {sorted(lost)}, and the LM's embedding has {rows} rows. They were added "
                "to the tokenizer and not to the LM; leave them out of the prompts, or load the LM's own tokenizer."
            )

    @property
    def pad_id(self) -> int:
        """The id that fills up a batch: the tokenizer's PAD or EOS where the LM has it; being masked, any does."""
        own, rows = (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id), self.facts.vocabulary.num_rows
        return next((i for i in own if i is not None and i < rows), self.facts.vocabulary.safe_id)

    # Through the LM.

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_features: Tensor | None = None,
        **lm_options: Any,
    ) -> Any:
        """Run the LM over ids that may be virtual.

        Args:
            input_ids: (b, s), as from `prepare`.
            attention_mask: (b, s).
            pixel_values: (n, c, h, w), the images of the whole batch in order.
            image_features: (n, f), instead of pixels.
            lm_options: any other argument of the LM's forward, except labels.

        Returns:
            The LM's own output, with logits (b, s, >= v + 1).

        Raises:
            GroundingIndexError: an image id past this call's images.
            GroundingValueError: labels; losses are in `visual_ground.losses`.
        """
        if "labels" in lm_options:
            raise GroundingValueError(
                "forward takes no labels; losses come from GroundingTrainer or visual_ground.losses."
            )
        with self.bind(self.image_rows(pixel_values, image_features)):
            return self.run(input_ids, attention_mask, **lm_options)

    def image_rows(self, pixel_values: Tensor | None = None, image_features: Tensor | None = None) -> Tensor | None:
        """Return the input rows (n * k, d) of images given as pixels or features, or None where there are none."""
        if image_features is None and pixel_values is not None:
            image_features = self.vision(pixel_values)
        return (
            None
            if image_features is None
            else self.adapter.image_rows(image_features.to(self.adapter.logit_scale.device))
        )

    def bind(self, image_rows: Tensor | None = None, positions: Tensor | None = None):
        """Return the context in which the LM knows these image rows; see `virtual_rows.Call`.

        Raises:
            GroundingStateError: `unground` was called, or images come while the adapter is disabled.
        """
        if not self.rows.attached:
            raise GroundingStateError("This model was ungrounded; ground the LM again.")
        enabled = not self.rows.disabled
        if not enabled and image_rows is not None:
            raise GroundingStateError(
                "The adapter is disabled here, so images cannot be read. Leave disable_adapter()."
            )
        return self.rows.call(image_rows, positions, enabled)

    def run(self, input_ids: Tensor, attention_mask: Tensor | None = None, cache: Any = None, **lm_options: Any) -> Any:
        """Run the LM inside `bind`; left-padded rows get the positions that they have alone.

        Args:
            input_ids: (b, s).
            attention_mask: (b, p + s), or what the LM takes in its place.
            cache: what the LM kept of p earlier positions.
            lm_options: for the LM.
        """
        if cache is not None:
            lm_options[self._cache_name] = cache
        if attention_mask is not None and self._takes_positions and "position_ids" not in lm_options:
            if not bool(attention_mask[:, 0].all()):
                positions = (attention_mask.long().cumsum(-1) - 1).clamp_min(0)
                lm_options["position_ids"] = positions[:, -input_ids.shape[1] :]
        return self.lm(input_ids=input_ids, attention_mask=attention_mask, **lm_options)

    def ret_embeddings(self, call: Call, output: Any, positions: Tensor) -> Tensor:
        """Map the states of a finished run at `positions` (b, s) bool into the retrieval space, (r, q), unit length.

        Args:
            call: the call of the run, bound with the same `positions`.
            output: what the LM returned, with hidden_states where `config.text_layers` asks for them.
            positions: where to read, in row-major order.
        """
        return self.adapter.embed_states(self.ret_states(call, output, positions))

    def ret_states(self, call: Call, output: Any, positions: Tensor) -> list[Tensor]:
        """Return the states of a finished run at `positions`, one (r, width) per text layer; see `ret_embeddings`."""
        assert call.head_input is not None, "the call ran the LM"
        states = []
        for layer in self.config.text_layers:
            state = call.head_input[0] if layer == -1 else output.hidden_states[layer][positions]
            states.append(state.to(self.adapter.logit_scale.device))
        return states

    @property
    def needs_hidden_states(self) -> bool:
        """Whether a run must return hidden states besides what the head reads."""
        return any(layer != -1 for layer in self.config.text_layers)

    # Vectors and likelihoods.

    @torch.no_grad()
    def embed_images(self, images: Any = None, image_features: Tensor | None = None) -> Tensor:
        """Map images, or their features (n, f), to unit vectors (n, q) of the retrieval space.

        Args:
            images: a list of PIL images or paths.
            image_features: instead of images.
        """
        if image_features is None:
            images = [images] if isinstance(images, (str, os.PathLike, Image.Image)) else images
            if not len(images):
                raise GroundingValueError("There are no images to embed; give at least one.")
            image_features = self.vision(self.vision.preprocess(images))
        return self.adapter.embed_images(image_features.to(self.adapter.logit_scale.device))

    @torch.no_grad()
    def embed_text(self, prompts: Any) -> Tensor:
        """Map prompts to unit vectors (n, q): the state at a `[RET]` put after each.

        A plain string stands where a caption stands in training, after the sink token and `config.caption_prompt`;
        any other prompt is taken as it is.
        """
        return self.adapter.embed_states(self.text_states(prompts))

    @torch.no_grad()
    def text_states(self, prompts: Any) -> list[Tensor]:
        """Return the states that `embed_text` maps, one (n, width) per text layer."""
        encoded = []
        for prompt in as_batch(prompts):
            if isinstance(prompt, str):
                ids = [*self.encoder.caption_lead(image=False), *self.encoder.encode_caption(prompt)]
                encoded.append(EncodedPrompt((*ids, self.ret_token_id), ()))
            else:
                whole = self.encoder.encode(prompt)
                encoded.append(EncodedPrompt((*whole.ids, self.ret_token_id), whole.images))
        batch = self._collate(encoded, "left")
        last = torch.zeros_like(batch["input_ids"], dtype=torch.bool)
        last[:, -1] = True
        rows = self.image_rows(batch.get("pixel_values"))
        return self.states_at(batch["input_ids"], batch["attention_mask"], last, rows)

    @torch.no_grad()
    def log_likelihood(self, prompts: Any, continuations: Sequence[str]) -> Tensor:
        """Return log p(continuation | prompt), summed over the continuation's tokens, in nats, (n,).

        Args:
            prompts: n prompts, as in `prepare`.
            continuations: n texts, tokenised on their own and put right after the prompts; `[RET]` may be in them.

        Raises:
            GroundingValueError: another number of continuations than of prompts, or one with no tokens.
        """
        prompts = as_batch(prompts)
        if isinstance(continuations, str) or len(continuations) != len(prompts):
            count = 1 if isinstance(continuations, str) else len(continuations)
            raise GroundingValueError(f"{len(prompts)} prompts need a list of as many continuations, got {count}.")
        tails = [self.encoder.continue_text(text) for text in continuations]
        if empty := [i for i, tail in enumerate(tails) if not tail]:
            raise GroundingValueError(f"Continuations {empty} have no tokens.")
        heads = [self.encoder.encode(prompt) for prompt in prompts]
        whole = [EncodedPrompt((*h.ids, *tail), h.images) for h, tail in zip(heads, tails, strict=True)]
        return self.tail_log_likelihood(whole, [len(tail) for tail in tails])

    @torch.no_grad()
    def tail_log_likelihood(
        self, encoded: Sequence[EncodedPrompt], lengths: Sequence[int], image_features: Tensor | None = None
    ) -> Tensor:
        """Return the log likelihood of each prompt's last `lengths` ids, summed, in nats, (n,).

        Args:
            encoded: n prompts.
            lengths: n counts, at least 1.
            image_features: (images, f), instead of the prompts' own images.
        """
        batch = self._collate(encoded, "left")
        ids, counts = batch["input_ids"], torch.tensor(lengths)
        scored = (torch.arange(ids.shape[1]) >= ids.shape[1] - counts[:, None]).to(ids.device)
        with self.bind(self.image_rows(batch.get("pixel_values"), image_features), scored.roll(-1, 1)):
            logits = self.run(ids, batch["attention_mask"], use_cache=False).logits[0]
        values = torch.log_softmax(logits.float(), -1).gather(-1, ids[scored][:, None].to(logits.device))[:, 0]
        return torch.stack([part.sum() for part in values.split(list(lengths))])

    def embed(self, input_ids: Tensor, mask: Tensor, positions: Tensor, image_rows: Tensor | None = None) -> Tensor:
        """Run the LM and map its states at `positions` (b, s) bool into the retrieval space, (r, q), unit length."""
        return self.adapter.embed_states(self.states_at(input_ids, mask, positions, image_rows))

    def states_at(
        self, input_ids: Tensor, mask: Tensor, positions: Tensor, image_rows: Tensor | None = None
    ) -> list[Tensor]:
        """Run the LM and return its states at `positions` (b, s) bool, one (r, width) per text layer."""
        with self.bind(image_rows, positions) as call:
            output = self.run(input_ids, mask, use_cache=False, output_hidden_states=self.needs_hidden_states)
        return self.ret_states(call, output, positions)
