"""The frozen LM's own answers, greedy and in batches, kept on disk; and where in them a picture belongs."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from visual_ground.errors import GroundingValueError
from visual_ground.generation.sentences import sentence_ends
from visual_ground.model import GroundedModel
from visual_ground.progress import counted
from visual_ground.prompts.chat import ILLUSTRATED
from visual_ground.storage.tensors import write_tensors
from visual_ground.training.initialization.dialogues import evenly, later_turns, others_about, requests_of
from visual_ground.training.initialization.greedy import Answer, greedy_answers
from visual_ground.training.initialization.idf import without_sentence_marks

logger = logging.getLogger(__name__)

# Long enough for the first sentence of most answers, and a little of what follows it; the rest teaches nothing new.
MAX_NEW_TOKENS, CONTINUATION = 32, 12
BATCH_SIZE = 64
# Requests that the LM answers at most; its answers to them are cached, but the first run has to wait for them.
MAX_REQUESTS = 160
# What the user says, or the turns of the user and of the assistant, whose first and last are the user's.
Chat: TypeAlias = str | Sequence[str]


def fitted_answers(
    model: GroundedModel,
    captions: Sequence[str],
    requests: Mapping[str, str],
    folder: Path | None,
    progress: bool = False,
) -> list[Answer]:
    """Return the LM's answers that `[RET]` is fitted to: to requests and to others, in first turns and in later ones.

    Args:
        model: the grounded model, whose tokenizer has a chat template.
        captions: what pictures show.
        requests: what users say to see a picture, and its caption; without any, the captions are put into requests.
        folder: where answers are kept; None: nowhere.
        progress: show progress bars.
    """
    shown = dict(requests or zip(requests_of(captions), captions, strict=True))
    asked, others = evenly(list(shown), MAX_REQUESTS), others_about(captions)
    answers = answers_to(model, asked, True, folder, progress, CONTINUATION)
    answers += answers_to(model, others, False, folder, progress, CONTINUATION)
    answered = []
    for text, answer in zip([*asked, *others], answers, strict=True):
        end = place_of_picture(model, answer)
        sentence = model.tokenizer.decode(list(answer.ids[:end])).strip()
        if end and sentence:
            # Image tokens are not fitted yet, and will stand for the words of captions.
            picture = f" {without_sentence_marks(shown[text])}" if answer.wanted else ""
            answered.append((text, sentence + picture))
    asked_next, others_next = later_turns(captions, asked, answered)
    try:
        later = answers_to(model, asked_next, True, folder, progress, CONTINUATION)
        return answers + later + answers_to(model, others_next, False, folder, progress, CONTINUATION)
    except GroundingValueError as error:  # A chat template for one turn only.
        logger.info("[RET] is fitted to first turns only. %s", error)
        return answers


def answers_to(
    model: GroundedModel,
    chats: Sequence[Chat],
    wanted: bool,
    folder: Path | None,
    progress: bool = False,
    after: int | None = None,
) -> list[Answer]:
    """Let the LM answer what a user says, every second time after the system message `ILLUSTRATED`.

    Args:
        model: the grounded model, whose tokenizer has a chat template.
        chats: what the user says, or the turns of a chat whose last is the user's.
        wanted: whether the user asks for a picture last.
        folder: where answers are kept; None: nowhere.
        progress: show a progress bar.
        after: the most ids behind an answer's first sentence; None: any number.
    """
    prompts = [_prompt(model, chat, illustrated=bool(i % 2)) for i, chat in enumerate(chats)]
    if not prompts:
        return []
    path = None if folder is None else folder / f"{_key(model, prompts, after)}.safetensors"

    if (tensors := _kept(path, len(prompts))) is not None:
        return _from_tensors(prompts, wanted, tensors)

    def enough(answer: Answer) -> int | None:
        end = None if after is None else place_of_picture(model, answer)
        return None if end is None else end + after

    of: dict[int, Answer] = {}
    for batch in counted(_batches(prompts), "the LM's own answers", "batches", progress):
        asked = [prompts[i] for i in batch]
        of |= zip(batch, greedy_answers(model, asked, wanted, MAX_NEW_TOKENS, enough), strict=True)
    answers = [of[i] for i in range(len(prompts))]
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_tensors(path, _to_tensors(answers))
    return answers


def _batches(prompts: Sequence[tuple[int, ...]]) -> list[list[int]]:
    """Put prompts (by number) that begin alike, and have about the same length, into batches."""
    batches = []
    for first in (0, 1):  # Without the system message and with it.
        order = sorted(range(first, len(prompts), 2), key=lambda i: len(prompts[i]))
        batches += [order[i : i + BATCH_SIZE] for i in range(0, len(order), BATCH_SIZE)]
    return batches


def _prompt(model: GroundedModel, chat: Chat, illustrated: bool) -> tuple[int, ...]:
    """Return the ids of a chat; some templates refuse system messages, and have none then."""
    turns = (chat,) if isinstance(chat, str) else chat
    messages = [{"role": "assistant" if i % 2 else "user", "content": turn} for i, turn in enumerate(turns)]
    if illustrated:
        try:
            return model.processor.encode([{"role": "system", "content": ILLUSTRATED}, *messages]).ids
        except GroundingValueError:
            pass
    return model.processor.encode(messages).ids


def _key(model: GroundedModel, prompts: Sequence[tuple[int, ...]], after: int | None) -> str:
    """Return a name for the answers of this LM to these prompts."""
    fingerprint = model.active.spec.fingerprint
    of_lm = None if fingerprint is None else fingerprint.to_dict()
    return hashlib.sha256(json.dumps([of_lm, MAX_NEW_TOKENS, after, prompts]).encode()).hexdigest()[:32]


def _kept(path: Path | None, count: int) -> dict[str, Tensor] | None:
    """Return so many answers as they are on disk, or None if there are none or they are damaged."""
    if path is None or not path.is_file():
        return None
    try:
        tensors = load_file(path)
        lengths, ended = tensors["lengths"], tensors["ended"]
        places = len(tensors["states"]), len(tensors["log_normaliser"])
        whole = len(lengths) == len(ended) == count and int(lengths.sum()) == len(tensors["ids"])
    except (SafetensorError, OSError, KeyError):
        path.unlink(missing_ok=True)
        return None
    return tensors if whole and set(places) == {int((lengths + ended).sum())} else None


def _to_tensors(answers: Sequence[Answer]) -> dict[str, Tensor]:
    """Return answers as they are kept on disk."""
    return {
        "ids": torch.tensor([token for answer in answers for token in answer.ids], dtype=torch.long),
        "lengths": torch.tensor([len(answer.ids) for answer in answers]),
        "ended": torch.tensor([int(answer.ended) for answer in answers]),
        "states": torch.cat([answer.states for answer in answers]),
        "log_normaliser": torch.cat([answer.log_normaliser for answer in answers]),
    }


def _from_tensors(prompts: Sequence[tuple[int, ...]], wanted: bool, tensors: Mapping[str, Tensor]) -> list[Answer]:
    """Return the answers to prompts from the tensors that were kept."""
    lengths, ended = tensors["lengths"], tensors["ended"]
    ids = torch.split(tensors["ids"], lengths.tolist())
    states, normalisers = (torch.split(tensors[k], (lengths + ended).tolist()) for k in ("states", "log_normaliser"))
    return [
        Answer(prompt, tuple(one.tolist()), bool(end), wanted, *read)
        for prompt, one, end, *read in zip(prompts, ids, ended, states, normalisers, strict=True)
    ]


def place_of_picture(model: GroundedModel, answer: Answer) -> int | None:
    """Return after how many ids of an answer its first sentence has ended, or None if none has."""
    decode = model.tokenizer.decode
    options = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
    whole = decode(list(answer.ids), **options)
    # At the end of an answer that was cut off, what looks like a sentence's end may be the point in "3.5".
    ends = [end for end in sentence_ends(whole) if answer.ended or end < len(whole.rstrip())]
    for n in range(1, len(answer.ids) + 1) if ends else ():
        if len(decode(list(answer.ids[:n]), **options)) >= ends[0]:
            return n
    return len(answer.ids) if answer.ended and answer.ids else None
