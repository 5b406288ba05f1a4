"""What users say in the dialogues that `[RET]` is fitted to, turn by turn, and what the LM answers by itself."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from torch import Tensor

from visual_ground.errors import GroundingValueError
from visual_ground.model import GroundedModel
from visual_ground.training.initialization.answers import CONTINUATION, answers_to, place_of_picture
from visual_ground.training.initialization.dialogues import (
    Chat,
    Shown,
    evenly,
    later_turns,
    others_about,
    pictured_turns,
    requests_of,
)
from visual_ground.training.initialization.greedy import Answer

logger = logging.getLogger(__name__)

ChatT = TypeVar("ChatT", bound=Chat)

# Requests that are used at most; the LM's answers to them are cached, but the first run has to wait for them.
MAX_REQUESTS = 160
# Where the data has requests, as many are made of captions too: in more different words than most data has.
NUM_MADE_REQUESTS = 120
# Of what users say first and next, how many requests and how many others the LM answers. Of the rest, only what it
# reads where an answer would begin is used, which takes a small part of the time.
ANSWERED_FIRST, ANSWERED_NEXT = (96, 48), (40, 16)


@dataclass(frozen=True)
class FirstTurns:
    """What users say first, and what the LM answers by itself.

    Args:
        captions: what pictures show.
        shown: the caption of what a request asks for.
        requests: how users ask for pictures.
        answered: what the LM has answered, requests first.
        answers: to these.
        begun: the LM's answers to everything else, of which only the beginning was read.
    """

    captions: Sequence[str]
    shown: Mapping[str, str]
    requests: Sequence[str]
    answered: Sequence[str]
    answers: Sequence[Answer]
    begun: Sequence[Answer]


def first_answers(
    model: GroundedModel,
    captions: Sequence[str],
    captions_of: Mapping[str, str],
    folder: Path | None,
    progress: bool = False,
) -> FirstTurns:
    """Let the LM answer what users say first.

    Args:
        model: the grounded model, whose tokenizer has a chat template.
        captions: what pictures show.
        captions_of: what users say to see a picture, and its caption; without any, the captions are put into requests.
        folder: where answers are kept; None: nowhere.
        progress: show a progress bar.
    """
    shown = dict(captions_of or zip(requests_of(captions), captions, strict=True))
    requests = evenly(list(shown), MAX_REQUESTS)
    asked, asked_begun = _divided(requests, ANSWERED_FIRST[0])
    made = requests_of(evenly(captions, NUM_MADE_REQUESTS)) if captions_of else []
    others, others_begun = _divided(others_about(captions), ANSWERED_FIRST[1])
    answers = answers_to(model, asked, others, folder, progress, CONTINUATION)
    begun = answers_to(model, [*asked_begun, *made], others_begun, folder, progress, max_new_tokens=1)
    return FirstTurns(captions, shown, [*requests, *made], [*asked, *others], answers, begun)


def later_answers(
    model: GroundedModel,
    first: FirstTurns,
    image_tokens: Mapping[str, Tensor] | None,
    folder: Path | None,
    progress: bool = False,
) -> tuple[list[Answer], list[Answer]]:
    """Let the LM answer what users say next.

    Args:
        model: as in `first_answers`.
        first: the turns before.
        image_tokens: by caption, (k, d), of pictures that the assistant has shown; None: captions stand for them.
        folder: where answers are kept; None: nowhere.
        progress: show a progress bar.

    Returns:
        Its answers, and those of which only the beginning was read.
    """
    answered = list[tuple[str, str | Shown]]()
    for text, answer in zip(first.answered, first.answers, strict=True):
        end = place_of_picture(model, answer)
        sentence, rest = (model.tokenizer.decode(list(part)).strip() for part in (answer.ids[:end], answer.ids[end:]))
        if end and sentence:
            # Every second answer with a picture goes on behind it.
            shown = Shown(sentence, first.shown.get(text, ""), rest if len(answered) % 2 else "")
            answered.append((text, shown if answer.wanted else sentence))
    requests, unasked = later_turns(first.captions, first.requests, answered)
    asked, asked_begun = _divided(requests, ANSWERED_NEXT[0])
    others, others_begun = _divided(unasked, ANSWERED_NEXT[1])
    try:
        answers = answers_to(model, asked, others, folder, progress, CONTINUATION, image_tokens)
        begun = answers_to(model, asked_begun, others_begun, folder, progress, None, image_tokens, max_new_tokens=1)
        pictured = pictured_turns(first.captions)
        return answers, begun + answers_to(model, *pictured, folder, progress, None, image_tokens, max_new_tokens=1)
    except GroundingValueError as error:  # A chat template for one turn only.
        logger.info("[RET] is fitted to first turns only. %s", error)
        return [], []


def _divided(chats: Sequence[ChatT], count: int) -> tuple[list[ChatT], list[ChatT]]:
    """Return so many chats, at even distances, and the rest."""
    chosen = set(evenly(range(len(chats)), count))
    return [chats[i] for i in sorted(chosen)], [chat for i, chat in enumerate(chats) if i not in chosen]
