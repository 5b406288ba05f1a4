"""An answer that grows: ids become texts and images as they come."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Any

from torch import Tensor

from visual_ground.adapter.attached import AttachedAdapter
from visual_ground.generation.output import Part
from visual_ground.generation.retrieval_token import RetrievalSettings, Shown, retrieve
from visual_ground.generation.sentences import GrowingSentences
from visual_ground.index.base import RetrievalIndex


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


class StopText:
    """Cuts an answer before the first of some strings, and holds back what may become one.

    Args:
        stops: the strings.

    Attributes:
        has_come: whether one of them has; nothing more comes then.

    Example:
        >>> text = StopText(["END"])
        >>> text.cut("The E"), text.cut("el. EN"), text.cut("D of"), text.has_come
        (['The '], ['Eel. '], [], True)
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self.stops, self.has_come = [stop for stop in stops if stop], False
        self._held = ""

    def cut(self, part: Part) -> list[Part]:
        """Return what may be shown of the answer with one more part; no stop string continues after an image."""
        if self.has_come:
            return []
        if not isinstance(part, str):
            return [*self.flush(), part]
        text, self._held = self._held + part, ""
        places = [place for stop in self.stops if (place := text.find(stop)) >= 0]
        self.has_come = bool(places)
        room = min(places) if places else len(text) - self._begun(text)
        if not places:
            self._held = text[room:]
        return [text[:room]] if room else []

    def _begun(self, text: str) -> int:
        """Return how many characters at the end of a text may become a stop string."""
        begun = (n for stop in self.stops for n in range(1, min(len(stop), len(text) + 1)) if text.endswith(stop[:n]))
        return max(begun, default=0)

    def flush(self) -> list[Part]:
        """Return what was held back."""
        held, self._held = self._held, ""
        return [held] if held else []


class GrowingAnswer:
    """Turns the tokens of one answer into texts and images.

    Args:
        attached: the active adapter.
        index: where images are searched.
        settings: how many are shown.
        silent: ids that are no text, though the tokenizer may decode them; see `options.silent_ids`.
        stops: the answer is cut before the first of these, which are looked for also in what is still held back.

    Attributes:
        latest: the parts of the latest `[RET]`, even if they are not released yet.
    """

    def __init__(
        self,
        attached: AttachedAdapter,
        index: RetrievalIndex | None,
        settings: RetrievalSettings,
        silent: Collection[int] = (),
        stops: Sequence[str] = (),
    ) -> None:
        self.vocabulary, self.ret_token_id = attached.processor.vocabulary, attached.processor.ret_token_id
        self.index, self.settings, self.silent = index, settings, silent
        self._text = GrowingText(attached.processor.tokenizer)
        self._stop, self._shown = StopText(stops), Shown()
        self.latest: list[Part] = []
        self._sentences = GrowingSentences() if settings.complete_sentences else None

    @property
    def stopped(self) -> bool:
        """Whether a stop string has come."""
        return self._stop.has_come

    def add(self, token: int, vector: Tensor | None) -> list[Part]:
        """Return what a token adds; with `complete_sentences`, the sentences that it completes."""
        return self._released(self._up_to_stop(self._parts_of(token, vector)))

    def _up_to_stop(self, parts: Iterable[Part]) -> list[Part]:
        return [one for part in parts for one in self._stop.cut(part)]

    def _released(self, parts: list[Part]) -> list[Part]:
        return parts if self._sentences is None else self._sentences.add(parts)

    def _parts_of(self, token: int, vector: Tensor | None) -> list[Part]:
        if token != self.ret_token_id:
            is_text = self.vocabulary.is_token(token) and token not in self.silent
            text = self._text.add(token) if is_text else ""
            return [text] if text else []
        assert vector is not None, "the listener reads one at each [RET]"
        self.latest = [*self._held(), *retrieve(vector[None], self.index, self.settings, self._shown)[0]]
        return self.latest

    def end(self, is_whole: bool) -> list[Part]:
        """Return what was held back.

        Args:
            is_whole: whether the LM ended the answer itself; else it may be cut after its last whole sentence. One
                that came to a stop is whole.
        """
        held = self._up_to_stop(self._held())
        released = self._released([*held, *self._stop.flush()])
        return released if self._sentences is None else [*released, *self._sentences.end(is_whole or self.stopped)]

    def _held(self) -> list[Part]:
        text = self._text.flush()
        return [text] if text else []


def joined(parts: Iterable[Part]) -> tuple[Part, ...]:
    """Return parts with the pieces of a text made one.

    Example:
        >>> joined(["A c", "at.", ""])
        ('A cat.',)
    """
    whole: list[Part] = []
    for part in parts:
        last = whole[-1] if whole else None
        if isinstance(part, str) and isinstance(last, str):
            whole[-1] = last + part
        else:
            whole.append(part)
    return tuple(whole)
