"""The dialogues that `[RET]` is fitted to: how a user asks for a picture, and those in which no picture belongs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from visual_ground.training.initialization.idf import without_sentence_marks
from visual_ground.training.initialization.wordings import (
    NEXT_OTHERS,
    NEXT_REQUESTS,
    OTHERS,
    PICTURED_OTHERS,
    PICTURED_REQUESTS,
    REQUESTS,
)

# Chats of two turns that end with a request, and those that end with something else. Without them, `[RET]` is less
# precise in later turns, which are about two things, and more often missing (docs/recipe.md).
NUM_NEXT_REQUESTS, NUM_NEXT_OTHERS = 160, 280
# What users say behind a picture of their own, the same two kinds.
NUM_PICTURED_REQUESTS, NUM_PICTURED_OTHERS = 44, 60
# The next chat is behind the first turn that is this part of all further on, so that first turns and wordings mix.
GOLDEN = (5**0.5 - 1) / 2


@dataclass(frozen=True)
class Shown:
    """What was said, the caption of the picture that was shown then, and what was said behind it."""

    sentence: str
    caption: str
    rest: str = ""


# What the user says, or the turns of the user and of the assistant, whose first and last are the user's.
Chat: TypeAlias = str | Sequence[str | Shown]


def requests_of(captions: Sequence[str]) -> list[str]:
    """Return a request for each caption, in different words."""
    return [
        REQUESTS[i % len(REQUESTS)].format(it=without_sentence_marks(caption)) for i, caption in enumerate(captions)
    ]


def others_about(captions: Sequence[str]) -> list[str]:
    """Return the dialogues without pictures; those about something, with one of the shorter captions."""
    things = sorted({without_sentence_marks(caption) for caption in captions}, key=lambda text: (len(text), text))
    things = things[: max(1, len(things) // 2)] or ["it"]
    step = max(1, len(things) // len(OTHERS))
    return [other.replace("{it}", things[i * step % len(things)]) for i, other in enumerate(OTHERS)]


def later_turns(
    captions: Sequence[str], requests: Sequence[str], answered: Sequence[tuple[str, str | Shown]]
) -> tuple[list[Chat], list[Chat]]:
    """Return chats of two turns: those whose second turn asks for a picture, and those whose second does not.

    Args:
        captions: what pictures show.
        requests: how users ask for pictures; every second of the next requests is one of these.
        answered: what the user said first, and the first sentence of the answer, with its picture if it has one.
    """
    if not answered:
        return [], []
    things = evenly([without_sentence_marks(caption) for caption in captions], NUM_NEXT_OTHERS)
    asked = [
        requests[i * len(requests) // NUM_NEXT_REQUESTS]
        if i % 2
        else NEXT_REQUESTS[i // 2 % len(NEXT_REQUESTS)].format(it=things[-1 - i % len(things)])
        for i in range(NUM_NEXT_REQUESTS)
    ]
    others = [
        NEXT_OTHERS[i % len(NEXT_OTHERS)].replace("{it}", things[i % len(things)]) for i in range(NUM_NEXT_OTHERS)
    ]
    return _behind(answered, asked), _behind(answered, others)


def pictured_turns(captions: Sequence[str]) -> tuple[list[Chat], list[Chat]]:
    """Return chats that a user begins with a picture: those in which another one is asked for, and the others."""
    return (
        _with_pictures(PICTURED_REQUESTS, captions, NUM_PICTURED_REQUESTS),
        _with_pictures(PICTURED_OTHERS, captions, NUM_PICTURED_OTHERS),
    )


def _with_pictures(wordings: Sequence[str], captions: Sequence[str], count: int) -> list[Chat]:
    """Put so many texts behind pictures at even distances; the thing that a text names is another one."""
    chats = list[Chat]()
    for i in range(count):
        n = i * len(captions) // count
        text = wordings[i % len(wordings)].replace("{it}", without_sentence_marks(captions[-1 - n]))
        chats.append((Shown("", captions[n], text),))
    return chats


def _behind(answered: Sequence[tuple[str, str | Shown]], texts: Sequence[str]) -> list[Chat]:
    """Put each text behind a first turn and its answer."""
    return [(*answered[int(i * GOLDEN % 1 * len(answered))], text) for i, text in enumerate(texts)]


def evenly(texts: Sequence[Any], count: int) -> list[Any]:
    """Return so many at even distances, or all if there are not more."""
    return [texts[i * len(texts) // count] for i in range(count)] if len(texts) > count else list(texts)
