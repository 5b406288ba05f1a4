"""The frozen LM's own answers, greedy and in batches, kept on disk; and where in them a picture belongs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from visual_ground.errors import GroundingValueError
from visual_ground.generation.sentences import sentence_ends
from visual_ground.model import GroundedModel
from visual_ground.progress import counted
from visual_ground.prompts.chat import ILLUSTRATED
from visual_ground.storage.tensors import write_tensors
from visual_ground.training.initialization.dialogues import Chat, Shown
from visual_ground.training.initialization.greedy import Answer, greedy_answers
from visual_ground.training.initialization.idf import without_sentence_marks

# Long enough for the first sentence of most answers, and a little of what follows it; the rest teaches nothing new.
MAX_NEW_TOKENS, CONTINUATION = 32, 12
BATCH_SIZE = 128
# Stands in a chat for a picture, whose tokens are known without it.
BLANK = Image.new("RGB", (1, 1))


def answers_to(
    model: GroundedModel,
    asked: Sequence[Chat],
    others: Sequence[Chat],
    folder: Path | None,
    progress: bool = False,
    after: int | None = None,
    image_tokens: Mapping[str, Tensor] | None = None,
) -> list[Answer]:
    """Let the LM answer what users say, every second one of each kind after the system message `ILLUSTRATED`.

    Args:
        model: the grounded model, whose tokenizer has a chat template.
        asked: what a user says to see a picture, or the turns of a chat whose last is that.
        others: the same of users who want none.
        folder: where answers are kept; None: nowhere.
        progress: show a progress bar.
        after: the most ids behind an answer's first sentence; None: any number.
        image_tokens: by caption, (k, d), of the pictures in chats; None: captions stand for them.

    Returns:
        The answers to `asked`, then those to `others`.
    """
    chats, wanted = [*asked, *others], [True] * len(asked) + [False] * len(others)
    if not chats:
        return []
    illustrated = [bool(i % 2) for i in (*range(len(asked)), *range(len(others)))]
    prompts = [_prompt(model, chat, own, image_tokens) for chat, own in zip(chats, illustrated, strict=True)]
    of_each = [_of_chat(chat, image_tokens) for chat in chats]
    path = None if folder is None else folder / f"{_key(model, prompts, of_each, after)}.safetensors"
    if (tensors := _kept(path, len(prompts))) is not None:
        return _from_tensors(prompts, wanted, tensors)
    answers = [Answer(prompt, (), False, own) for prompt, own in zip(prompts, wanted, strict=True)]
    for batch in counted(_batches(prompts, illustrated), "the LM's own answers", "batches", progress):
        _answer(model, answers, batch, of_each, after)
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_tensors(path, _to_tensors(answers))
    return answers


def _answer(
    model: GroundedModel,
    answers: list[Answer],
    batch: Sequence[int],
    of_each: Sequence[Sequence[Tensor]],
    after: int | None,
) -> None:
    """Put whole answers into the places of a batch."""

    def enough(answer: Answer) -> int | None:
        end = None if after is None else place_of_picture(model, answer)
        return None if end is None else end + after

    seen = [row for i in batch for row in of_each[i]]
    whole = greedy_answers(model, [answers[i] for i in batch], MAX_NEW_TOKENS, enough, seen)
    for i, answer in zip(batch, whole, strict=True):
        answers[i] = answer


def _batches(prompts: Sequence[tuple[int, ...]], illustrated: Sequence[bool]) -> list[list[int]]:
    """Put prompts (by number) that begin alike, and have about the same length, into batches of about one size."""
    batches = []
    for kind in (False, True):
        chosen = [i for i, own in enumerate(illustrated) if own == kind]
        order, count = sorted(chosen, key=lambda i: len(prompts[i])), -(-len(chosen) // BATCH_SIZE)
        batches += [order[i * len(order) // count : (i + 1) * len(order) // count] for i in range(count)]
    return batches


def _prompt(
    model: GroundedModel, chat: Chat, illustrated: bool, image_tokens: Mapping[str, Tensor] | None
) -> tuple[int, ...]:
    """Return the ids of a chat, as in `EncodedPrompt`; some templates refuse system messages, and have none then."""
    messages = [
        {"role": "assistant" if i % 2 else "user", "content": _content(turn, image_tokens is not None)}
        for i, turn in enumerate((chat,) if isinstance(chat, str) else chat)
    ]
    if illustrated:
        try:
            return model.processor.encode([{"role": "system", "content": ILLUSTRATED}, *messages]).ids
        except GroundingValueError:
            pass
    return model.processor.encode(messages).ids


def _content(turn: str | Shown, with_picture: bool) -> Any:
    if isinstance(turn, str):
        return turn
    rest = [turn.rest] if turn.rest else []
    if with_picture:
        return [turn.sentence, BLANK, *rest]
    return " ".join([turn.sentence, without_sentence_marks(turn.caption), *rest])


def _of_chat(chat: Chat, image_tokens: Mapping[str, Tensor] | None) -> list[Tensor]:
    """Return the tokens (k, d) of each picture in a chat."""
    if isinstance(chat, str) or image_tokens is None:
        return []
    return [image_tokens[turn.caption] for turn in chat if isinstance(turn, Shown)]


def _key(
    model: GroundedModel, prompts: Sequence[tuple[int, ...]], of_each: Sequence[Sequence[Tensor]], after: int | None
) -> str:
    """Return a name for the answers of this LM to these prompts."""
    fingerprint = model.active.spec.fingerprint
    of_lm = None if fingerprint is None else fingerprint.to_dict()
    key = hashlib.sha256(json.dumps([of_lm, MAX_NEW_TOKENS, after, prompts]).encode())
    for row in chain(*of_each):
        key.update(row.float().cpu().numpy().tobytes())
    return key.hexdigest()[:32]


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
