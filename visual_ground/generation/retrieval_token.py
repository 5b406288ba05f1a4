"""`[RET]` in generation: the logits processor that steers it, and the images that are retrieved for it."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor

from visual_ground.errors import GroundingValueError
from visual_ground.generation.output import RetrievedImage
from visual_ground.generation.sentences import sentence_ends
from visual_ground.index.base import ManyEntries, RetrievalIndex
from visual_ground.index.remote_images import ImageLink, is_url

EXTRA_HITS = 4  # Images that are looked up in addition, in case some are gone from where they were.


@dataclass(frozen=True)
class RetrievalSettings:
    """When an answer has images, how many, and where it ends.

    Args:
        images_per_ret: images shown at each `[RET]`, at least 1.
        max_images: the most images of an answer, a few by default; None for any number, 0 for none. The last `[RET]`
            shows fewer than `images_per_ret` if no more are left.
        ret_bias: added to `[RET]`'s logit; larger values give more images.
        min_new_tokens_before_ret: the fewest tokens before an answer's first `[RET]`.
        min_new_tokens_between_rets: the fewest tokens between two `[RET]`s; 0 lets one follow another at once.
        only_after_sentences: whether `[RET]` may come only where a sentence of the answer has just ended.
        allow_repeats: whether one answer may show an image twice.
        filter: which entries of the index may be shown, as in `ImageIndex.search`; None: all.
        see_images: whether the LM sees the images of an answer when it continues it.
        complete_sentences: cut an answer that ran out of tokens after its last whole sentence; one that the LM ended
            itself stays as it is.

    Raises:
        GroundingValueError: a number out of its range.
    """

    images_per_ret: int = 1
    # With any number of images at any place, a bias that is too large would give one after another and no word.
    max_images: int | None = 4
    ret_bias: float = 0.0
    min_new_tokens_before_ret: int = 0
    min_new_tokens_between_rets: int = 8
    only_after_sentences: bool = False
    allow_repeats: bool = False
    filter: Any = None
    complete_sentences: bool = False
    see_images: bool = False

    def __post_init__(self) -> None:
        least = {"max_images": 0, "min_new_tokens_before_ret": 0, "min_new_tokens_between_rets": 0}
        for name, smallest in {"images_per_ret": 1, **least}.items():
            value = getattr(self, name)
            if value is None and name == "max_images":
                continue
            if isinstance(value, bool) or not isinstance(value, Integral) or value < smallest:
                raise GroundingValueError(f"{name} must be a whole number of at least {smallest}, got {value!r}.")
        bias = self.ret_bias
        # With infinity nothing else could be sampled, and NaN compares with nothing.
        if isinstance(bias, bool) or not isinstance(bias, Real) or not bias < math.inf:
            raise GroundingValueError(f"ret_bias must be a finite number, got {bias!r}. Use 0.0.")

    @property
    def max_rets(self) -> int | None:
        """The most `[RET]`s of an answer: as many as `max_images` need; None for any number."""
        return None if self.max_images is None else -(-self.max_images // self.images_per_ret)

    @classmethod
    def take_from(cls, options: dict[str, Any]) -> RetrievalSettings:
        """Take these settings out of the options of `generate`; the rest are transformers'."""
        return cls(**{one.name: options.pop(one.name) for one in fields(cls) if one.name in options})


class RetLogitsProcessor(LogitsProcessor):
    """Applies `RetrievalSettings` to `[RET]`'s logit at each step.

    Args:
        ret_token_id: its id.
        prompt_length: ids before the first generated one.
        settings: what to apply.
        places: ids that stand for a `[RET]` too, see `SeenImages`; the set may grow.
        decode: the tokenizer's, which `only_after_sentences` needs.
    """

    def __init__(
        self,
        ret_token_id: int,
        prompt_length: int,
        settings: RetrievalSettings,
        places: Collection[int] = (),
        decode: Callable[[list[int]], str] | None = None,
    ) -> None:
        self.ret_token_id, self.prompt_length = ret_token_id, prompt_length
        self.settings, self.places, self._decode = settings, places, decode

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return scores (b, columns) with the bias added to `[RET]`'s, or -inf in its place if it may not come.

        Scores without a column for `[RET]`, as of an LM whose adapter is disabled, stay as they are.
        """
        if scores.shape[-1] <= self.ret_token_id:
            return scores
        new = input_ids[:, self.prompt_length :]
        rets = new == self.ret_token_id
        if self.places:
            rets |= torch.isin(new, torch.tensor(list(self.places), device=new.device))
        column = scores[:, self.ret_token_id] + self.settings.ret_bias
        if new.shape[1] < self.settings.min_new_tokens_before_ret:
            column = torch.full_like(column, float("-inf"))
        elif self.settings.max_rets is not None:
            column = column.masked_fill(rets.sum(-1) >= self.settings.max_rets, float("-inf"))
        if gap := self.settings.min_new_tokens_between_rets:
            column = column.masked_fill(rets[:, -gap:].any(-1), float("-inf"))
        if self.settings.only_after_sentences:
            column = column.masked_fill(self._within_sentences(new).to(column.device), float("-inf"))
        scores = scores.clone()
        scores[:, self.ret_token_id] = column
        return scores

    def _within_sentences(self, new: Tensor) -> Tensor:
        """Return the mask (b,) of answers (b, n) that have not just ended a sentence."""
        assert self._decode is not None, "only_after_sentences needs it"
        texts = [self._decode([i for i in row if i < self.ret_token_id]).rstrip() for row in new.tolist()]
        return torch.tensor([sentence_ends(text)[-1:] != [len(text)] for text in texts])


def split_at_ret(ids: Sequence[int], ret_token_id: int, tokenizer: Any) -> list[str | None]:
    """Cut generated ids into text, with None for each `[RET]`; empty text is left out.

    At each `[RET]` all ids up to it are decoded again, because a tokenizer that marks where words start would drop the
    space at the beginning of a part that is decoded alone.
    """
    parts: list[str | None] = []
    text_ids: list[int] = []
    text_before = ""
    for token in [*ids, None]:
        if token is not None and token != ret_token_id:
            text_ids.append(token)
            continue
        text = tokenizer.decode(text_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        if len(text) > len(text_before):
            parts.append(text[len(text_before) :])
            text_before = text
        if token is not None:
            parts.append(None)
    return parts


@dataclass
class Shown:
    """The images that one answer has shown: their positions in the index, and how many they are."""

    positions: set[int] = field(default_factory=set)
    count: int = 0

    def room(self, settings: RetrievalSettings) -> int:
        """Return how many images may follow at one `[RET]`."""
        left = settings.images_per_ret if settings.max_images is None else settings.max_images - self.count
        return max(0, min(settings.images_per_ret, left))


def retrieve(
    vectors: Tensor, index: RetrievalIndex | None, settings: RetrievalSettings, shown: Shown | None = None
) -> list[tuple[RetrievedImage, ...]]:
    """Find the images of one answer, or of a part of it.

    Args:
        vectors: (r, q), the retrieval vectors of its `[RET]`s in order.
        index: where to search; None gives one image without id for each `[RET]`.
        settings: how many images, and whether one may come twice.
        shown: what the answer has shown already; these images are added.

    Returns:
        For each `[RET]`, its images, best first; fewer if the index has no more.
    """
    if index is None or not len(vectors):
        return [(RetrievedImage(),) for _ in vectors]
    shown = Shown() if shown is None else shown
    # Enough for each [RET] even if all the ones before it have taken its best images.
    count = settings.images_per_ret * (1 if settings.allow_repeats else len(vectors)) + EXTRA_HITS
    options = {} if settings.filter is None else {"filter": settings.filter}
    results = index.search(vectors, count if settings.allow_repeats else count + len(shown.positions), **options)
    found = [
        list(zip(positions, scores, strict=True))
        for positions, scores in zip(results.positions.tolist(), results.scores.tolist(), strict=True)
    ]
    entries = _Entries(index)
    entries.look_up(_likely(found, settings, shown))
    answers = []
    for hits in found:
        room = shown.room(settings)
        hits = [hit for hit in hits if settings.allow_repeats or hit[0] not in shown.positions]
        answers.append(_readable(entries, hits[: room + EXTRA_HITS], room, shown.positions))
        shown.count += len(answers[-1])
    return answers


class _Entries:
    """Entries of an index that were looked up; several at once if it can do so."""

    def __init__(self, index: RetrievalIndex) -> None:
        self.index, self.known = index, dict[int, tuple[str | int, Any, Mapping[str, Any]]]()

    def look_up(self, positions: Iterable[int]) -> None:
        new = [position for position in dict.fromkeys(positions) if position not in self.known]
        index = self.index
        entries = index.entries(new) if isinstance(index, ManyEntries) else [index.entry(one) for one in new]
        self.known |= zip(new, entries, strict=True)


def _likely(found: list[list[tuple[int, float]]], settings: RetrievalSettings, shown: Shown) -> list[int]:
    """Return the positions that will be shown if every image can be fetched."""
    likely: list[int] = []
    for hits in found:
        known = {*shown.positions, *likely}
        left = [position for position, _ in hits if settings.allow_repeats or position not in known]
        likely += left[: Shown(count=shown.count + len(likely)).room(settings)]
    return likely


def _readable(
    entries: _Entries, hits: list[tuple[int, float]], count: int, shown: set[int]
) -> tuple[RetrievedImage, ...]:
    """Return the first `count` images of some hits; images that could not be fetched only fill up the count."""
    found: dict[int, RetrievedImage] = {}
    failed: dict[int, RetrievedImage] = {}
    for number, (position, score) in enumerate(hits):
        if len(found) == count:
            break
        if position not in entries.known:
            entries.look_up([other for other, _ in hits[number : number + count - len(found)]])
        image_id, image, metadata = entries.known[position]
        is_gone = isinstance(image, str) and not is_url(image) and not os.path.exists(image)
        is_lost = is_gone or (isinstance(image, ImageLink) and image.failed)
        (failed if is_lost else found)[position] = RetrievedImage(image_id, score, image, metadata)
    chosen = dict([*found.items(), *failed.items()][:count])
    # Images that gave way to others are not tried again; if none can be read, the next best are for the next `[RET]`.
    shown.update(chosen, failed if found else ())
    return tuple(chosen.values())
