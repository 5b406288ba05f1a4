"""The frozen LM's own answers, greedy and in batches, kept on disk; and where in them a picture belongs."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import torch
from transformers import BatchFeature

from visual_ground.errors import GroundingValueError
from visual_ground.generation.generate import generate_ids
from visual_ground.generation.options import end_ids
from visual_ground.generation.retrieval_token import RetrievalSettings
from visual_ground.generation.sentences import sentence_ends
from visual_ground.model import GroundedModel
from visual_ground.progress import counted
from visual_ground.prompts.chat import ILLUSTRATED
from visual_ground.storage.atomic import replacing
from visual_ground.training.initialization.dialogues import evenly, later_turns, others_about, requests_of
from visual_ground.training.initialization.idf import without_sentence_marks

logger = logging.getLogger(__name__)

# Long enough for the first sentence of most answers; the rest of an answer teaches nothing new.
MAX_NEW_TOKENS = 32
BATCH_SIZE = 32
# Requests that the LM answers at most; its answers to them are cached, but the first run has to wait for them.
MAX_REQUESTS = 160
# What the user says, or the turns of the user and of the assistant, whose first and last are the user's.
Chat: TypeAlias = str | Sequence[str]


@dataclass(frozen=True)
class Answer:
    """What the LM answers by itself.

    Args:
        prompt: the ids before the answer.
        ids: the answer's, without the one that ends it.
        ended: whether the LM ended it; else it ran out of tokens.
        wanted: whether a picture was asked for.
    """

    prompt: tuple[int, ...]
    ids: tuple[int, ...]
    ended: bool
    wanted: bool

    @property
    def num_places(self) -> int:
        """At how many places `[RET]` could have come: before each id, and before the end."""
        return len(self.ids) + self.ended


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
    answers = answers_to(model, asked, True, folder, progress)
    answers += answers_to(model, others, False, folder, progress)
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
        later = answers_to(model, asked_next, True, folder, progress)
        return answers + later + answers_to(model, others_next, False, folder, progress)
    except GroundingValueError as error:  # A chat template for one turn only.
        logger.info("[RET] is fitted to first turns only. %s", error)
        return answers


def answers_to(
    model: GroundedModel, chats: Sequence[Chat], wanted: bool, folder: Path | None, progress: bool = False
) -> list[Answer]:
    """Let the LM answer what a user says, every second time after the system message `ILLUSTRATED`.

    Args:
        model: the grounded model, whose tokenizer has a chat template.
        chats: what the user says, or the turns of a chat whose last is the user's.
        wanted: whether the user asks for a picture last.
        folder: where answers are kept; None: nowhere.
        progress: show a progress bar.
    """
    prompts = [_prompt(model, chat, illustrated=bool(i % 2)) for i, chat in enumerate(chats)]
    path = None if folder is None else folder / f"{_key(model, prompts)}.json"
    said = _kept(path, len(prompts))
    if said is None:
        # Prompts of a length share a batch, so that little of it is padding.
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        starts = counted(range(0, len(order), BATCH_SIZE), "the LM's own answers", "batches", progress)
        in_order = [one for i in starts for one in _generated(model, [prompts[j] for j in order[i : i + BATCH_SIZE]])]
        of = dict(zip(order, in_order, strict=True))
        said = [of[i] for i in range(len(prompts))]
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(path) as temporary:
                temporary.write_text(json.dumps(said), encoding="utf-8")
    return [Answer(prompt, tuple(ids), end, wanted) for prompt, (ids, end) in zip(prompts, said, strict=True)]


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


@torch.no_grad()
def _generated(model: GroundedModel, prompts: Sequence[tuple[int, ...]]) -> list[tuple[list[int], bool]]:
    """Return for each prompt the ids of its greedy answer, and whether the LM ended it."""
    length = max(map(len, prompts))
    pad = model.processor.pad_token_id
    ids = torch.tensor([[*[pad] * (length - len(prompt)), *prompt] for prompt in prompts])
    mask = torch.tensor([[*[0] * (length - len(prompt)), *[1] * len(prompt)] for prompt in prompts])
    batch = BatchFeature({"input_ids": ids, "attention_mask": mask}).to(model.frozen_lm.device)
    options = {"max_new_tokens": MAX_NEW_TOKENS, "do_sample": False}
    without = RetrievalSettings(max_images=0)
    sequences = generate_ids(model.frozen_lm, model.active, batch, None, without, options)
    stops, answers = end_ids(model.frozen_lm, model.active, options), []
    for row in sequences[:, length:].tolist():
        end = next((i for i, token in enumerate(row) if token in stops), None)
        answers.append((row[:end], end is not None))
    return answers


def _key(model: GroundedModel, prompts: Sequence[tuple[int, ...]]) -> str:
    """Return a name for the answers of this LM to these prompts."""
    fingerprint = model.active.spec.fingerprint
    of_lm = None if fingerprint is None else fingerprint.to_dict()
    return hashlib.sha256(json.dumps([of_lm, MAX_NEW_TOKENS, prompts]).encode()).hexdigest()[:32]


def _kept(path: Path | None, count: int) -> list[tuple[list[int], bool]] | None:
    """Return the answers on disk, or None if there are none or they are damaged."""
    if path is None or not path.is_file():
        return None
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
        return [([int(i) for i in ids], bool(end)) for ids, end in said] if len(said) == count else None
    except (ValueError, TypeError):
        return None


def place_of_picture(model: GroundedModel, answer: Answer) -> int | None:
    """Return after how many ids of an answer its first sentence has ended, or None if none has."""
    decode = model.tokenizer.decode
    options = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
    whole = decode(list(answer.ids), **options)
    # At the end of an answer that was cut off, what looks like a sentence's end may be the point in "3.5".
    ends = [end for end in sentence_ends(whole) if answer.ended or end < len(whole.rstrip())]
    ended = [
        n for n in range(1, len(answer.ids) + 1) if ends and len(decode(list(answer.ids[:n]), **options)) >= ends[0]
    ]
    if ended:
        return ended[0]
    return len(answer.ids) if answer.ended and answer.ids else None
