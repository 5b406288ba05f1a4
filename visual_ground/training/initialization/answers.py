"""The frozen LM's own answers, greedy and in batches, kept on disk; and where in them a picture belongs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
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
from visual_ground.lm.key_values import cache_of, plain_layers
from visual_ground.model import GroundedModel
from visual_ground.progress import counted
from visual_ground.prompts.chat import ILLUSTRATED
from visual_ground.storage.tensors import write_tensors
from visual_ground.training.initialization.dialogues import Chat, Shown
from visual_ground.training.initialization.greedy import Answer, greedy_answers
from visual_ground.training.initialization.idf import without_sentence_marks

# Long enough for the first sentence of most answers, and a little of what follows it; the rest teaches nothing new.
MAX_NEW_TOKENS, CONTINUATION = 32, 12
# Prompts that are answered at once, at most, and fewer where an LM keeps more than these bytes of them.
BATCH_SIZE, BATCH_BYTES = 160, 2**31
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
    max_new_tokens: int | None = None,
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
        max_new_tokens: the most ids of an answer; None: `MAX_NEW_TOKENS`.

    Returns:
        The answers to `asked`, then to `others`.
    """
    kinds = (asked, True), (others, False)
    starts = [(chat, bool(i % 2), wanted) for chats, wanted in kinds for i, chat in enumerate(chats)]
    answers, illustrated = [_start(model, *one, image_tokens) for one in starts], [own for _, own, _ in starts]
    if not answers:
        return []
    most = max_new_tokens or MAX_NEW_TOKENS
    path = None if folder is None else folder / f"{_key(model, answers, after, most)}.safetensors"
    if (tensors := _kept(path, len(answers))) is not None:
        return _from_tensors(answers, tensors)
    for batch in counted(_batches(model, answers, illustrated), "the LM's own answers", "batches", progress):
        given = greedy_answers(model, [answers[i] for i in batch], most, partial(_enough, model, after))
        for i, answer in zip(batch, given, strict=True):
            answers[i] = answer
    return _keep(path, answers)


def _start(
    model: GroundedModel, chat: Chat, illustrated: bool, wanted: bool, image_tokens: Mapping[str, Tensor] | None
) -> Answer:
    """Return an answer that has no ids yet."""
    return Answer(_prompt(model, chat, illustrated, image_tokens), (), False, wanted, _of_chat(chat, image_tokens))


def _enough(model: GroundedModel, after: int | None, answer: Answer) -> int | None:
    """Return how many ids of an answer are enough: `after` behind its first sentence."""
    end = None if after is None else place_of_picture(model, answer)
    return None if after is None or end is None else end + after


def _batch_size(model: GroundedModel, longest: int) -> int:
    """Return how many prompts, the longest of so many ids, are answered at once."""
    ids = torch.full((1, 1), model.frozen_lm.vocabulary.safe_id, device=model.frozen_lm.device)
    output = model.frozen_lm.forward(ids, torch.ones_like(ids), use_cache=True)
    layers = plain_layers(cache_of(output), 1) or ()
    kept: int = sum(layer.keys.nbytes + layer.values.nbytes for layer in layers) * (longest + MAX_NEW_TOKENS)
    return max(1, min(BATCH_SIZE, BATCH_BYTES // max(kept, 1)))


def _batches(model: GroundedModel, answers: Sequence[Answer], illustrated: Sequence[bool]) -> list[list[int]]:
    """Put prompts (by number) that begin alike, and have about the same length, into batches of about one size."""
    size, batches = _batch_size(model, max(len(answer.prompt) for answer in answers)), []
    for kind in (False, True):
        chosen = [i for i, own in enumerate(illustrated) if own == kind]
        order, count = sorted(chosen, key=lambda i: len(answers[i].prompt)), -(-len(chosen) // size)
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
    before, behind = ([text] if text else [] for text in (turn.sentence, turn.rest))
    if with_picture:
        return [*before, BLANK, *behind]
    return " ".join([*before, without_sentence_marks(turn.caption), *behind])


def _of_chat(chat: Chat, image_tokens: Mapping[str, Tensor] | None) -> list[Tensor]:
    """Return the tokens (k, d) of each picture in a chat."""
    if isinstance(chat, str) or image_tokens is None:
        return []
    return [image_tokens[turn.caption] for turn in chat if isinstance(turn, Shown)]


def _key(model: GroundedModel, answers: Sequence[Answer], after: int | None, most: int) -> str:
    """Return a name for the answers of this LM to these prompts."""
    fingerprint, prompts = model.active.spec.fingerprint, [answer.prompt for answer in answers]
    of_lm = None if fingerprint is None else fingerprint.to_dict()
    key = hashlib.sha256(json.dumps([of_lm, most, after, prompts]).encode())
    for row in chain(*(answer.image_tokens for answer in answers)):
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


def _keep(path: Path | None, answers: list[Answer]) -> list[Answer]:
    """Write answers to disk, if they have a place there, and return them."""
    if path is None:
        return answers
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {
        "ids": torch.tensor([token for answer in answers for token in answer.ids], dtype=torch.long),
        "lengths": torch.tensor([len(answer.ids) for answer in answers]),
        "ended": torch.tensor([int(answer.ended) for answer in answers]),
        "states": torch.cat([answer.states for answer in answers]),
        "log_normaliser": torch.cat([answer.log_normaliser for answer in answers]),
    }
    write_tensors(path, tensors)
    return answers


def _from_tensors(starts: Sequence[Answer], tensors: Mapping[str, Tensor]) -> list[Answer]:
    """Return the answers that were kept, from what they start as."""
    lengths, ended = tensors["lengths"], tensors["ended"]
    ids = torch.split(tensors["ids"], lengths.tolist())
    states, normalisers = (torch.split(tensors[k], (lengths + ended).tolist()) for k in ("states", "log_normaliser"))
    return [
        replace(start, ids=tuple(one.tolist()), ended=bool(end), states=read, log_normaliser=normaliser)
        for start, one, end, read, normaliser in zip(starts, ids, ended, states, normalisers, strict=True)
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
