"""What users say in the dialogues that `[RET]` is fitted to, turn by turn, and what the LM answers by itself."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from visual_ground.errors import GroundingValueError
from visual_ground.model import GroundedModel
from visual_ground.training.initialization.answers import CONTINUATION, answers_to, place_of_picture
from visual_ground.training.initialization.dialogues import Shown, evenly, later_turns, others_about, requests_of
from visual_ground.training.initialization.greedy import Answer

logger = logging.getLogger(__name__)

# Requests that the LM answers at most; its answers to them are cached, but the first run has to wait for them.
MAX_REQUESTS = 160


@dataclass(frozen=True)
class FirstTurns:
    """What users say first, and what the LM answers by itself.

    Args:
        captions: what pictures show.
        shown: the caption of what a request asks for.
        asked: the requests among what users say.
        others: what users say who want no picture.
        answers: to `asked`, then to `others`.
    """

    captions: Sequence[str]
    shown: Mapping[str, str]
    asked: Sequence[str]
    others: Sequence[str]
    answers: Sequence[Answer]


def first_answers(
    model: GroundedModel,
    captions: Sequence[str],
    requests: Mapping[str, str],
    folder: Path | None,
    progress: bool = False,
) -> FirstTurns:
    """Let the LM answer what users say first.

    Args:
        model: the grounded model, whose tokenizer has a chat template.
        captions: what pictures show.
        requests: what users say to see a picture, and its caption; without any, the captions are put into requests.
        folder: where answers are kept; None: nowhere.
        progress: show a progress bar.
    """
    shown = dict(requests or zip(requests_of(captions), captions, strict=True))
    asked, others = evenly(list(shown), MAX_REQUESTS), others_about(captions)
    answers = answers_to(model, asked, others, folder, progress, CONTINUATION)
    return FirstTurns(captions, shown, asked, others, answers)


def later_answers(
    model: GroundedModel,
    first: FirstTurns,
    image_tokens: Mapping[str, Tensor] | None,
    folder: Path | None,
    progress: bool = False,
) -> list[Answer]:
    """Let the LM answer what users say next.

    Args:
        model: as in `first_answers`.
        first: the turns before.
        image_tokens: by caption, (k, d), of pictures that the assistant has shown; None: captions stand for them.
        folder: where answers are kept; None: nowhere.
        progress: show a progress bar.
    """
    answered = list[tuple[str, str | Shown]]()
    for text, answer in zip([*first.asked, *first.others], first.answers, strict=True):
        end = place_of_picture(model, answer)
        sentence, rest = (model.tokenizer.decode(list(part)).strip() for part in (answer.ids[:end], answer.ids[end:]))
        if end and sentence:
            # Every second answer with a picture goes on behind it.
            shown = Shown(sentence, first.shown.get(text, ""), rest if len(answered) % 2 else "")
            answered.append((text, shown if answer.wanted else sentence))
    asked, others = later_turns(first.captions, first.asked, answered)
    try:
        return answers_to(model, asked, others, folder, progress, CONTINUATION, image_tokens)
    except GroundingValueError as error:  # A chat template for one turn only.
        logger.info("[RET] is fitted to first turns only. %s", error)
        return []
