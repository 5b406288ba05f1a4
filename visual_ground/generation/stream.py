"""Answers while they are being said: text as it grows, and each image at the moment its `[RET]` is said."""

from __future__ import annotations

import contextvars
import queue
import threading
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import BatchFeature

from visual_ground.adapter.attached import AttachedAdapter
from visual_ground.errors import GroundingValueError
from visual_ground.generation.generate import check_index, generate_ids, heard_by, listen, with_padding
from visual_ground.generation.options import end_ids, silent_ids
from visual_ground.generation.output import Part
from visual_ground.generation.retrieval_token import RetrievalSettings, retrieve
from visual_ground.generation.sentences import GrowingSentences
from visual_ground.index.base import RetrievalIndex
from visual_ground.lm.frozen_lm import FrozenLM


@dataclass(frozen=True)
class Said:
    """A token of an answer.

    Args:
        row: whose answer.
        token: its id.
        vector: (q,), where it is `[RET]`.
    """

    row: int
    token: int
    vector: Tensor | None


class GrowingText:
    """Turns ids into text as they come; a character whose bytes have not all come is held back.

    All ids are decoded again each time, because many tokenizers drop the space at the beginning of what is decoded
    alone.

    Args:
        tokenizer: the LM's.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self._ids: list[int] = []
        self._before = ""

    def add(self, token: int) -> str:
        """Return the text that one more id adds, which may be nothing yet."""
        self._ids.append(token)
        text = self._decode()
        return "" if text.endswith("\ufffd") else self._since(text)

    def flush(self) -> str:
        """Return what was held back."""
        return self._since(self._decode())

    def _decode(self) -> str:
        text = self.tokenizer.decode(self._ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return str(text)

    def _since(self, text: str) -> str:
        if len(text) <= len(self._before):
            return ""
        added, self._before = text[len(self._before) :], text
        return added


class GrowingAnswer:
    """Turns what is said in one answer into texts and images.

    Args:
        attached: the active adapter.
        index: where images are searched.
        settings: how many are shown.
        silent: ids that are no text, though the tokenizer may decode them; see `options.silent_ids`.
    """

    def __init__(
        self,
        attached: AttachedAdapter,
        index: RetrievalIndex | None,
        settings: RetrievalSettings,
        silent: Collection[int] = (),
    ) -> None:
        self.vocabulary, self.ret_token_id = attached.processor.vocabulary, attached.processor.ret_token_id
        self.index, self.settings, self.silent = index, settings, silent
        self._text = GrowingText(attached.processor.tokenizer)
        self._shown: set[int] = set()
        self._sentences = GrowingSentences() if settings.complete_sentences else None

    def add(self, token: int, vector: Tensor | None) -> list[Part]:
        """Return what a token adds; with `complete_sentences`, what ends with it."""
        parts = self._said(token, vector)
        return parts if self._sentences is None else self._sentences.add(parts)

    def _said(self, token: int, vector: Tensor | None) -> list[Part]:
        if token != self.ret_token_id:
            # An LM with more embeddings than its tokenizer has tokens can generate ids that are no text.
            is_text = token < self.vocabulary.num_tokens and token not in self.silent
            text = self._text.add(token) if is_text else ""
            return [text] if text else []
        assert vector is not None, "the listener reads one at each [RET]"
        return [*self._held(), *retrieve(vector[None], self.index, self.settings, self._shown)[0]]

    def end(self, is_whole: bool) -> list[Part]:
        """Return what was held back.

        Args:
            is_whole: whether the LM ended the answer itself; else it may be cut behind its last whole sentence.
        """
        held = self._held()
        return held if self._sentences is None else [*self._sentences.add(held), *self._sentences.end(is_whole)]

    def _held(self) -> list[Part]:
        text = self._text.flush()
        return [text] if text else []


def stream(
    frozen_lm: FrozenLM,
    attached: AttachedAdapter,
    batch: BatchFeature,
    index: RetrievalIndex | None,
    options: dict[str, Any],
) -> Iterator[Part]:
    """Answer one prompt piece by piece; see `GroundedModel.stream`.

    Raises:
        GroundingTypeError: an index that cannot be searched.
        GroundingValueError: an index that does not fit, several prompts, or beam search.
    """
    settings = RetrievalSettings.take_from(options)
    check_index(index, attached)
    if len(batch["input_ids"]) != 1 or (options.get("num_return_sequences") or 1) != 1:
        raise GroundingValueError(
            f"stream gives one answer to one prompt, got {len(batch['input_ids'])} prompts. Call generate for several; "
            "one interleaved prompt is a list within the list."
        )
    answer = GrowingAnswer(attached, index, settings, silent_ids(frozen_lm, attached))
    ends, is_whole = end_ids(frozen_lm, attached, options), False
    for said in said_tokens(frozen_lm, attached, batch, settings, options):
        is_whole |= said.token in ends
        yield from answer.add(said.token, said.vector)
    yield from answer.end(is_whole)


def said_tokens(
    frozen_lm: FrozenLM,
    attached: AttachedAdapter,
    batch: BatchFeature,
    settings: RetrievalSettings,
    options: Mapping[str, Any],
) -> Iterator[Said]:
    """Run transformers' `generate` in a thread; yield each token of each answer when it is said.

    Where the iterator is closed, `generate` ends with the token that it is at. The arguments are those of `generate`.
    """
    events: queue.SimpleQueue[Said | BaseException | None] = queue.SimpleQueue()
    closed = threading.Event()

    def hear(row: int, token: int, vector: Tensor | None) -> bool:
        events.put(Said(row, token, vector))
        return not closed.is_set()

    @torch.no_grad()
    def run() -> None:
        try:
            image_tokens = attached.prompt_tokens(batch.get("pixel_values"))
            image_tokens, padded = with_padding(attached, image_tokens, options)
            listener = listen(frozen_lm, attached, batch, image_tokens, hear)
            generate_ids(frozen_lm, attached, batch, image_tokens, settings, heard_by(listener, padded))
            events.put(_beams() if listener.lost else None)
        except BaseException as error:  # Raised again where the answer is read.
            events.put(error)

    thread = threading.Thread(target=contextvars.copy_context().run, args=(run,), daemon=True)
    thread.start()
    try:
        while (event := events.get()) is not None:
            if isinstance(event, BaseException):
                raise event
            yield event
    finally:
        closed.set()
        thread.join()


def _beams() -> GroundingValueError:
    return GroundingValueError(
        "An answer can be streamed where each token is final when it is said, not with beam search or speculative "
        "decoding. Leave out num_beams and the like, or call generate."
    )
