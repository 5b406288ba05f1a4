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
BATCH_SIZE = 128
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
    answers = answers_to(model, asked, others, folder, progress, CONTINUATION)
    answered = []
    for text, answer in zip([*asked, *others], answers, strict=True):
        end = place_of_picture(model, answer)
        sentence = model.tokenizer.decode(list(answer.ids[:end])).strip()
        if end and sentence:
            # Image tokens are not fitted yet, and will stand for the words of captions.
            picture = f" {without_sentence_marks(shown[text])}" if answer.wanted else ""
            answered.append((text, sentence + picture))
    try:
        return answers + answers_to(model, *later_turns(captions, asked, answered), folder, progress, CONTINUATION)
    except GroundingValueError as error:  # A chat template for one turn only.
        logger.info("[RET] is fitted to first turns only. %s", error)
        return answers


def answers_to(
    model: GroundedModel,
    asked: Sequence[Chat],
    others: Sequence[Chat],
    folder: Path | None,
    progress: bool = False,
    after: int | None = None,
) -> list[Answer]:
    """Let the LM answer what users say, every second one of each kind after the system message `ILLUSTRATED`.

    Args:
        model: the grounded model, whose tokenizer has a chat template.
        asked: what a user says to see a picture, or the turns of a chat whose last is that.
        others: the same of users who want none.
        folder: where answers are kept; None: nowhere.
        progress: show a progress bar.
        after: the most ids behind an answer's first sentence; None: any number.

    Returns:
        The answers to `asked`, then those to `others`.
    """
    wanted = [True] * len(asked) + [False] * len(others)
    illustrated = [bool(i % 2) for i in (*range(len(asked)), *range(len(others)))]
    prompts = [_prompt(model, chat, own) for chat, own in zip([*asked, *others], illustrated, strict=True)]
    if not prompts:
        return []
    path = None if folder is None else folder / f"{_key(model, prompts, after)}.safetensors"

    if (tensors := _kept(path, len(prompts))) is not None:
        return _from_tensors(prompts, wanted, tensors)

    def enough(answer: Answer) -> int | None:
        end = None if after is None else place_of_picture(model, answer)
        return None if end is None else end + after

    of: dict[int, Answer] = {}
    for batch in counted(_batches(prompts, illustrated), "the LM's own answers", "batches", progress):
        starts = [Answer(prompts[i], (), False, wanted[i]) for i in batch]
        of |= zip(batch, greedy_answers(model, starts, MAX_NEW_TOKENS, enough), strict=True)
    answers = [of[i] for i in range(len(prompts))]
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_tensors(path, _to_tensors(answers))
    return answers


def _batches(prompts: Sequence[tuple[int, ...]], illustrated: Sequence[bool]) -> list[list[int]]:
    """Put prompts (by number) that begin alike, and have about the same length, into batches of about one size."""
    batches = []
    for kind in (False, True):
        chosen = [i for i, own in enumerate(illustrated) if own == kind]
        order, count = sorted(chosen, key=lambda i: len(prompts[i])), -(-len(chosen) // BATCH_SIZE)
        batches += [order[i * len(order) // count : (i + 1) * len(order) // count] for i in range(count)]
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


def _from_tensors(
    prompts: Sequence[tuple[int, ...]], wanted: Sequence[bool], tensors: Mapping[str, Tensor]
) -> list[Answer]:
    """Return the answers to prompts from the tensors that were kept."""
    lengths, ended = tensors["lengths"], tensors["ended"]
    ids = torch.split(tensors["ids"], lengths.tolist())
    states, normalisers = (torch.split(tensors[k], (lengths + ended).tolist()) for k in ("states", "log_normaliser"))
    return [
        Answer(prompt, tuple(one.tolist()), bool(end), for_picture, *read)
        for prompt, for_picture, one, end, *read in zip(prompts, wanted, ids, ended, states, normalisers, strict=True)
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
