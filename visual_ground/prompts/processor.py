"""`GroundingProcessor`: interleaved text and images, or chat messages, become token ids and pixels."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

from PIL import Image
from torch import Tensor
from transformers import BatchFeature

from visual_ground.config import GroundingConfig
from visual_ground.errors import GroundingTypeError, GroundingValueError
from visual_ground.lm.base.vocabulary import VirtualVocabulary
from visual_ground.prompts.chat import as_batch, is_chat, render_chat
from visual_ground.prompts.checks import check_ids, check_text, check_tokenizer
from visual_ground.prompts.encoded import EncodedPrompt, pad_batch
from visual_ground.prompts.parts import read_part
from visual_ground.prompts.types import Prompt, Prompts
from visual_ground.vision.images import to_rgb
from visual_ground.vision.link_rules import LinkRules

_EARLIER_SENTENCES = re.compile(r".*[.!?;]\s+", re.DOTALL)


class GroundingProcessor:
    """Turns prompts into what a grounded model reads, as transformers' processors do.

    Args:
        tokenizer: a transformers tokenizer, never written to.
        config: which tokens stand for `[RET]` and in front of captions, and k, the ids per image.
        vocabulary: which ids are the LM's and which are virtual.
        preprocess: maps a list of images to pixels (n, c, h, w).
        max_length: how many ids the LM's context holds; None if that is unknown.

    `link_rules` says which hosts the images of prompts may be fetched from: none, unless the user sets other rules.
    """

    def __init__(
        self,
        tokenizer: Any,
        config: GroundingConfig,
        vocabulary: VirtualVocabulary,
        preprocess: Callable[[Sequence[Any]], Tensor],
        max_length: int | None = None,
    ) -> None:
        self.tokenizer, self.config, self.vocabulary = tokenizer, config, vocabulary
        self.preprocess, self.max_length = preprocess, max_length
        self._num_tokens, self.link_rules = len(tokenizer), LinkRules()

    def __call__(self, prompts: Prompts, padding_side: str = "left") -> BatchFeature:
        """Turn prompts into a batch on the CPU; see `GroundedModel.prepare`."""
        return self.batch([self.encode(prompt) for prompt in as_batch(prompts)], padding_side)

    def batch(self, encoded: Sequence[EncodedPrompt], padding_side: str = "left") -> BatchFeature:
        """Pad encoded prompts into input_ids and attention_mask (b, s), with pixel_values if there are images."""
        self.check_ids(encoded)
        ids, mask = pad_batch(encoded, self.vocabulary.first_image_id, self.pad_token_id, padding_side)
        batch = BatchFeature({"input_ids": ids, "attention_mask": mask})
        if images := [image for prompt in encoded for image in prompt.images]:
            batch["pixel_values"] = self.preprocess(images)
        return batch

    def check_ids(self, encoded: Sequence[EncodedPrompt]) -> None:
        """Raise if the LM cannot read these ids, or the tokenizer has grown; see `checks`."""
        if len(self.tokenizer) != self._num_tokens:  # Reading a whole vocabulary at each call would take long.
            check_tokenizer(self.tokenizer, self.vocabulary, self.config.ret_token)
        check_ids(encoded, self.tokenizer, self.vocabulary, self.max_length)

    @property
    def ret_token_id(self) -> int:
        """The id of `[RET]`."""
        return self.vocabulary.ret_token_id

    @property
    def pad_token_id(self) -> int:
        """The id that fills up a batch: the tokenizer's PAD or EOS, else any that the LM has, as it is masked."""
        return next(iter(self._named_padding), self.vocabulary.safe_id)

    @property
    def names_padding(self) -> bool:
        """Whether the tokenizer has a PAD or EOS that the LM knows; else a word of the LM's has to fill up batches."""
        return bool(self._named_padding)

    @property
    def _named_padding(self) -> list[int]:
        candidates = self.tokenizer.pad_token_id, self.tokenizer.eos_token_id
        return [i for i in candidates if i is not None and i < self.vocabulary.num_rows]

    def encode(self, prompt: Prompt) -> EncodedPrompt:
        """Encode one prompt.

        Args:
            prompt: a string, an image, a list mixing them, or a list of chat messages; see `read_part`.

        Raises:
            GroundingTypeError, GroundingValueError: a part that cannot be read, a template that loses one, or nothing.
        """
        given: Sequence[Any] = prompt if isinstance(prompt, (list, tuple)) else [prompt]
        chat = is_chat(given)  # A chat template writes the opening ids itself.
        parts = render_chat(self.tokenizer, given) if chat else [one for part in given for one in read_part(part)]
        ids, images, has_text = list[int](), list[Image.Image](), False
        for part in parts:
            if isinstance(part, str):
                opens = not (chat or has_text) and (self.config.image_first or not images)
                ids += self._opening if opens else ()
                ids += self.continue_text(part) if ids else self.encode_text(part)
                has_text = True
            else:
                # An LM's first position is its attention sink, which an image must not become.
                sink = () if chat or ids or self.config.image_first else self.sink
                ids += [*sink, *self._marks(len(images))]
                images.append(self._open(part.image))
        if not ids:
            raise GroundingValueError("The prompt is empty: it has neither text nor images. Give at least one token.")
        return EncodedPrompt(tuple(ids), tuple(images))

    def encode_queries(self, prompts: Prompts) -> list[EncodedPrompt]:
        """Encode prompts with what `retrieval_suffix` puts after each; a plain string is encoded as a caption is."""
        queries = []
        for prompt in as_batch(prompts):
            if isinstance(prompt, str):
                encoded = EncodedPrompt((*self.caption_prefix(image=False), *self.encode_caption(prompt)), ())
            else:
                encoded = self.encode(prompt)
            queries.append(EncodedPrompt((*encoded.ids, *self.retrieval_suffix(encoded.ids)), encoded.images))
        return queries

    def retrieval_suffix(self, ids: Sequence[int]) -> list[int]:
        """Return the ids of the retrieval prompt, or `[RET]`'s if that is empty, put after these ids."""
        prompt = self.config.retrieval_prompt.strip()
        if not prompt:
            return [self.ret_token_id]
        return self.encode_text(prompt) if self.opens_turn(ids) else self.continue_text(" " + prompt)

    def opens_turn(self, ids: Sequence[int]) -> bool:
        """Return whether ids, at least one, end with white space or a special token, as chat templates do."""
        is_text = 0 <= ids[-1] < self.vocabulary.num_rows and ids[-1] != self.ret_token_id
        return is_text and (ids[-1] in self._special_ids or self.tokenizer.decode([ids[-1]])[-1:].isspace())

    def encode_continuations(
        self, prompts: Prompts, continuations: Sequence[str]
    ) -> tuple[list[EncodedPrompt], list[int]]:
        """Encode prompts with a text, of some tokens, put after each; return them with the texts' numbers of ids."""
        prompts = as_batch(prompts)
        if isinstance(continuations, str) or len(continuations) != len(prompts):
            count = 1 if isinstance(continuations, str) else len(continuations)
            raise GroundingValueError(f"{len(prompts)} prompts need a list of as many continuations, got {count}.")
        texts = [self.continue_text(text) for text in continuations]
        if empty := [i for i, ids in enumerate(texts) if not ids]:
            raise GroundingValueError(f"Continuations {empty} have no tokens; give each at least one.")
        encoded = [self.encode(prompt) for prompt in prompts]
        joined = [EncodedPrompt((*one.ids, *ids), one.images) for one, ids in zip(encoded, texts, strict=True)]
        return joined, [len(ids) for ids in texts]

    def encode_text(self, text: str) -> list[int]:
        """Return the ids of a text without special tokens in front; `[RET]` in it becomes its id; see `check_text`."""
        check_text(text)
        ids: list[int] = []
        for i, part in enumerate(text.split(self.config.ret_token)):
            ids += [self.ret_token_id] if i else []
            ids += self.tokenizer(part, add_special_tokens=False)["input_ids"] if part else []
        return ids

    def continue_text(self, text: str) -> list[int]:
        """Return the ids of a text that comes after other ids.

        A tokenizer that puts a space before every text is not given a second one.
        """
        return self.encode_text(text[1:] if self._adds_space and text[:1] == " " and text[1:] else text)

    def encode_caption(self, caption: str) -> list[int]:
        """Return the ids of a caption that comes after `caption_prefix`; the losses are computed on these.

        Raises:
            GroundingTypeError: not a string.
            GroundingValueError: a caption with no tokens.
        """
        if not isinstance(caption, str):
            raise GroundingTypeError(f"A caption must be a string, got {type(caption).__name__}.")
        text = caption.strip()
        ids = self.continue_text(" " + text) if self.config.caption_prompt else self.encode_text(text)
        if not ids or not caption.strip():
            raise GroundingValueError(f"The caption {caption!r} has no tokens. Leave the example out.")
        return [*self.sink, *ids] if self.config.image_first else ids

    def caption_prefix(self, image: bool, follows_caption: bool = False) -> list[int]:
        """Return the ids before a caption: the sink token and the prompt, which holds the image if `image` is True.

        With `image_first` the sink token belongs to the caption: it comes after the image, and is predicted from it.
        Behind another image and its caption, the prompt is only the sentence with the image: no example is given twice.
        """
        sink = [] if self.config.image_first else list(self.sink)
        prompt = self.config.image_prompt if image else self.config.caption_prompt
        before, _, after = prompt.partition("{image}")
        if follows_caption:
            before = _EARLIER_SENTENCES.sub("", before)
        marks = self._marks(0) if image else []
        return [*sink, *self.encode_text(before), *marks, *self.continue_text(after)]

    def _open(self, image: Any) -> Image.Image:
        try:
            return to_rgb(image, self.link_rules)
        except GroundingValueError as error:
            if not isinstance(image, str):
                raise
            advice = 'To say a path in words, write {"type": "text", "text": ...}.'
            raise GroundingValueError(f"{error} {advice}") from error

    def _marks(self, image: int) -> list[int]:
        return [-1 - image] * self.config.num_visual_tokens

    @cached_property
    def _adds_space(self) -> bool:
        """Whether the tokenizer puts a space before every text."""
        # SentencePiece writes a space as U+2581, and byte-level BPE as U+0120.
        first = self.tokenizer("a", add_special_tokens=False)["input_ids"][:1]
        return any(token[:1] in ("\u2581", "\u0120") for token in self.tokenizer.convert_ids_to_tokens(first))

    @cached_property
    def _special_ids(self) -> frozenset[int]:
        return frozenset(self.tokenizer.all_special_ids)

    @cached_property
    def _opening(self) -> tuple[int, ...]:
        """The special ids that the tokenizer puts in front of a text by itself."""
        plain = self.tokenizer("a", add_special_tokens=False)["input_ids"]
        ids = self.tokenizer("a")["input_ids"]
        return tuple(next((ids[:i] for i in range(len(ids)) if ids[i : i + len(plain)] == plain), []))

    @cached_property
    def sink(self) -> tuple[int, ...]:
        """The ids that open a sequence: the configured sink token, or the tokenizer's own opening, BOS or EOS."""
        if self.config.sink_token is not None:
            return tuple(self.tokenizer(self.config.sink_token, add_special_tokens=False)["input_ids"])
        candidates = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        return self._opening or tuple(token for token in candidates if token is not None)[:1]
