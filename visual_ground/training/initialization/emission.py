"""When `[RET]` is said: its two embeddings, fitted to answers that the frozen LM gives by itself.

An answer to a request for a picture gets its `[RET]` behind its first sentence; nowhere else, and nowhere in an answer
to anything else, is there one. What the output head reads at these places does not depend on `[RET]`, and was kept when
the answers were generated. So the output embedding is found by a convex fit, and the text around `[RET]` stays the
LM's own.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from visual_ground.lm.key_values import copy_of
from visual_ground.model import GroundedModel
from visual_ground.training.initialization.answers import CONTINUATION, place_of_picture
from visual_ground.training.initialization.greedy import Answer, padded, read_beginnings
from visual_ground.training.initialization.ret_token import Places, fit_output_embedding
from visual_ground.training.initialization.turns import FirstTurns, first_answers, later_answers

logger = logging.getLogger(__name__)

# Answers whose continuation is compared with each input embedding.
NUM_COMPARED = 16
# Text whose embedding may stand for a picture within an answer; the mean embedding is compared too.
STAND_INS = (" ", ".", "\n")


@dataclass(frozen=True)
class FittedInput:
    """What the fit of the input embedding leaves to that of the output embedding.

    Args:
        first: the first turns.
        behind: the places at and behind `[RET]` in the continuations that were compared, if there are any.
    """

    first: FirstTurns
    behind: Places | None


def start_emission(
    model: GroundedModel, examples: Sequence[Mapping[str, Any]], folder: Path | None, progress: bool = False
) -> FittedInput | None:
    """Fit what the LM reads in `[RET]`'s place, see `fit_ret_input`."""
    if model.config.scaling != "embedding":
        return None
    shortest = {group: examples[i]["caption"] for group, i in _shortest_captions(examples).items()}
    requests = {example["request"]: shortest[example["group"]] for example in examples if "request" in example}
    return fit_ret_input(model, list(shortest.values()), requests, folder, progress)


def finish_emission(
    model: GroundedModel,
    begun: FittedInput | None,
    examples: Sequence[Mapping[str, Any]],
    features: Tensor,
    folder: Path | None,
    progress: bool = False,
) -> None:
    """Fit when `[RET]` is said, after the image tokens, which then stand in chats; see `fit_ret_output`.

    Args:
        model: the grounded model.
        begun: from `start_emission`; None: nothing is done.
        examples: n examples, the same.
        features: (n, f), of their images.
        folder: where the LM's own answers are kept; None: nowhere.
        progress: show a progress bar.
    """
    if begun is not None:
        chosen = _shortest_captions(examples).values()
        fit_ret_output(model, begun, {examples[i]["caption"]: features[i] for i in chosen}, folder, progress)


def _shortest_captions(examples: Sequence[Mapping[str, Any]]) -> dict[Any, int]:
    """Return by group the example with the shortest caption.

    The shortest is most like a name, which fits into what users say: "How long does a candle last?".
    """
    shortest: dict[Any, int] = {}
    for i, example in enumerate(examples):
        own = shortest.setdefault(example["group"], i)
        shortest[example["group"]] = min(own, i, key=lambda n: len(examples[n]["caption"]))
    return shortest


@torch.no_grad()
def fit_ret_input(
    model: GroundedModel,
    captions: Sequence[str],
    requests: Mapping[str, str] | None = None,
    folder: Path | None = None,
    progress: bool = False,
) -> FittedInput | None:
    """Let the LM answer what users say first, and fit what it reads in `[RET]`'s place.

    Args:
        model: the grounded model.
        captions: what pictures show.
        requests: what users say to see one, and its caption; without any, the captions are put into requests.
        folder: where the LM's answers are kept; None: nowhere.
        progress: show a progress bar.

    Returns:
        What `fit_ret_output` needs. None, and nothing is fitted: without a chat template, with one embedding for both
        ends, or if no answer to a request has a sentence that ends.
    """
    if not getattr(model.tokenizer, "chat_template", None) or model.adapter.tied or not captions:
        return None
    first = first_answers(model, captions, requests or {}, folder, progress)
    ends = _ends(model, first.answers)
    if all(end is None for end in ends):
        logger.warning("No answer to a request has a whole sentence, so [RET] starts as it does without a chat.")
        return None
    embedding, behind = choose_input_embedding(model, first.answers, ends)
    model.adapter.ret_input.copy_(embedding)
    return FittedInput(first, behind)


@torch.no_grad()
def fit_ret_output(
    model: GroundedModel,
    begun: FittedInput,
    features: Mapping[str, Tensor] | None = None,
    folder: Path | None = None,
    progress: bool = False,
) -> None:
    """Let the LM answer what users say next, and fit when `[RET]` is said; its embeddings are no longer trained then.

    Args:
        model: the grounded model, whose image tokens have been fitted.
        begun: from `fit_ret_input`.
        features: by caption, (f,), of a picture; None: in chats, captions stand for pictures.
        folder: where the LM's answers are kept; None: nowhere.
        progress: show a progress bar.
    """
    adapter, image_tokens = model.adapter, None
    if features is not None:
        rows = model.active.image_tokens(image_features=torch.stack(list(features.values())))
        assert rows is not None, "there are pictures"
        image_tokens = dict(zip(features, rows.split(model.config.num_visual_tokens), strict=True))
    answers = [*begun.first.answers, *later_answers(model, begun.first, image_tokens, folder, progress)]
    # A few places behind `[RET]` are enough for no other to follow it at once.
    places = [places_of(answers, _ends(model, answers)), *([] if begun.behind is None else [begun.behind])]
    adapter.ret_output.copy_(fit_output_embedding(Places.joined(places)))
    # Scaled back to these norms after each step.
    adapter.ret_norms.copy_(torch.stack([embedding.norm() for embedding in adapter.ret_embeddings()]))
    adapter.keep(["ret_input", "ret_output"])  # The text loss would move them to where captions end.


def _ends(model: GroundedModel, answers: Sequence[Answer]) -> list[int | None]:
    """Return where the picture of each answer belongs, if one does."""
    return [place_of_picture(model, answer) if answer.wanted else None for answer in answers]


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
        logits = _own_logits(model, states)
        behind = Places(states.float().cpu(), logits.logsumexp(-1).cpu(), torch.zeros(len(states), dtype=torch.bool))
        compared.append((float(F.cross_entropy(logits, targets.to(logits.device))), candidate, behind))
    model.adapter.ret_input.copy_(kept)
    _, best, behind = min(compared, key=lambda one: one[0])
    return best, behind


def places_of(answers: Sequence[Answer], ends: Sequence[int | None]) -> Places:
    """Return all places of the answers, as the LM goes on without a picture; with one, it should go on alike.

    Args:
        answers: the LM's own.
        ends: for each, where its picture belongs, or None.
    """
    is_ret = [place == end for answer, end in zip(answers, ends, strict=True) for place in range(answer.num_places)]
    states = torch.cat([answer.states for answer in answers])
    return Places(states, torch.cat([answer.log_normaliser for answer in answers]), torch.tensor(is_ret))


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


def _own_logits(model: GroundedModel, states: Tensor) -> Tensor:
    """Return the output head's logits (n, columns) with `[RET]`'s column at -inf."""
    logits = model.frozen_lm.head_logits(states)
    logits[:, model.ret_token_id] = float("-inf")
    return logits
