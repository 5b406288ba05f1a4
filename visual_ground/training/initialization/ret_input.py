"""What the LM reads in `[RET]`'s place: the embedding after which it goes on most nearly as without a picture."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from visual_ground.lm.key_values import copy_of
from visual_ground.model import GroundedModel
from visual_ground.training.initialization.answers import CONTINUATION
from visual_ground.training.initialization.greedy import Answer, padded
from visual_ground.training.initialization.ret_token import Places
from visual_ground.training.speedups.beginnings import read_beginnings

# Answers whose continuation is compared with each input embedding.
NUM_COMPARED = 16
# Text whose embedding may stand for a picture within an answer; the mean embedding is compared too.
STAND_INS = (" ", ".", "\n")


def choose_input_embedding(
    model: GroundedModel, answers: Sequence[Answer], ends: Sequence[int | None]
) -> tuple[Tensor, Places | None]:
    """Return the embedding (d,) after which the LM continues most nearly as it does without a picture.

    Args:
        model: the grounded model.
        answers: the LM's own.
        ends: for each, where its picture belongs, or None.

    Returns:
        It, and the places at and behind it in the continuations that were compared, if there are any.
    """
    candidates = [model.adapter.embedding_mean]
    for text in STAND_INS:
        ids = model.processor.encode_text(text)
        if ids and model.tokenizer.unk_token_id not in ids:
            candidates.insert(-1, model.frozen_lm.embed(torch.tensor(ids)).float().mean(0))
    pairs = [(a, end) for a, end in zip(answers, ends, strict=True) if end is not None and len(a.ids) - end >= 2]
    if not pairs:
        return candidates[0], None
    befores = [(*answer.prompt, *answer.ids[:end]) for answer, end in pairs[:NUM_COMPARED]]
    afters = [answer.ids[end : end + CONTINUATION] for answer, end in pairs[:NUM_COMPARED]]
    read = _reader(model, befores, afters)
    targets = torch.tensor([token for after in afters for token in after])
    kept, compared = model.adapter.ret_input.clone(), list[tuple[float, Tensor, Places]]()
    for candidate in candidates:
        model.adapter.ret_input.copy_(candidate)
        states = read()
        logits = own_logits(model, states)
        is_ret, gate = torch.zeros(len(states), dtype=torch.bool), torch.zeros(len(states))
        behind = Places(states.float().cpu(), logits.logsumexp(-1).cpu(), is_ret, gate)
        compared.append((float(F.cross_entropy(logits, targets.to(logits.device))), candidate, behind))
    model.adapter.ret_input.copy_(kept)
    _, best, behind = min(compared, key=lambda one: one[0])
    return best, behind


def _reader(
    model: GroundedModel, befores: Sequence[tuple[int, ...]], afters: Sequence[tuple[int, ...]]
) -> Callable[[], Tensor]:
    """Return a function that reads `[RET]` and n ids behind each text, and returns what the head reads of it, (n, h).

    The states are those before each of these ids. What stands before `[RET]` is read once, if the LM allows that.
    """
    asked = [(*before, model.ret_token_id) for before in befores]
    ids, mask = padded(model, asked, "left")
    cache = read_beginnings(model, asked, ids, mask, None)
    begins = list(map(len, befores)) if cache is None else [0] * len(afters)
    whole = [
        (*one[len(before) - begin :], *after[:-1])
        for one, before, begin, after in zip(asked, befores, begins, afters, strict=True)
    ]
    ids, own_mask = padded(model, whole, "right")
    places = [
        row * ids.shape[1] + begin + n
        for row, (begin, after) in enumerate(zip(begins, afters, strict=True))
        for n in range(len(after))
    ]
    positions = torch.tensor(places, device=ids.device)
    if cache is None:
        return lambda: model.frozen_lm.hidden_states(ids, own_mask, positions)[0]
    mask = torch.cat([mask[:, :-1], own_mask], 1)
    return lambda: model.frozen_lm.hidden_states(
        ids, mask, positions, cache=copy_of(cache, lambda tensor: tensor), use_cache=True
    )[0]


def own_logits(model: GroundedModel, states: Tensor) -> Tensor:
    """Return the output head's logits (n, columns) with `[RET]`'s column at -inf."""
    logits = model.frozen_lm.head_logits(states)
    logits[:, model.ret_token_id] = float("-inf")
    return logits
