"""When `[RET]` is said: its two embeddings, fitted to answers that the frozen LM gives by itself.

An answer to a request for a picture gets its `[RET]` behind its first sentence; nowhere else, and nowhere in an answer
to anything else, is there one. What the output head reads at these places does not depend on `[RET]`, and was kept when
the answers were generated. So the output embedding is found by a convex fit, and the text around `[RET]` stays the
LM's own. Whether an answer may have pictures at all is read where it begins (`Adapter.ret_gate`).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from visual_ground.adapter.adapter import Adapter
from visual_ground.model import GroundedModel
from visual_ground.training.initialization.answers import place_of_picture
from visual_ground.training.initialization.greedy import Answer
from visual_ground.training.initialization.ret_input import choose_input_embedding
from visual_ground.training.initialization.ret_token import Places, fit_gate, fit_output_embedding
from visual_ground.training.initialization.turns import FirstTurns, first_answers, later_answers

logger = logging.getLogger(__name__)


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
    later, later_begun = later_answers(model, begun.first, image_tokens, folder, progress)
    answers = [*begun.first.answers, *later]
    gate = _fit_gate(adapter, [*answers, *begun.first.begun, *later_begun])[: len(answers)]
    # A few places behind `[RET]` are enough for no other to follow it at once.
    places = [places_of(answers, _ends(model, answers), gate), *([] if begun.behind is None else [begun.behind])]
    adapter.ret_output.copy_(fit_output_embedding(Places.joined(places)))
    # Scaled back to these norms after each step.
    adapter.ret_norms.copy_(torch.stack([embedding.norm() for embedding in adapter.ret_embeddings()]))
    adapter.keep(["ret_input", "ret_output"])  # The text loss would move them to where captions end.


def _fit_gate(adapter: Adapter, answers: Sequence[Answer]) -> Tensor:
    """Fit the gate to where answers begin; return what it adds to `[RET]`'s logit in each, (n,), on the CPU."""
    openings = torch.stack([answer.states[0] for answer in answers])
    weight, bias = fit_gate(openings, torch.tensor([answer.wanted for answer in answers]))
    adapter.ret_gate_weight.copy_(weight)
    adapter.ret_gate_bias.copy_(bias)
    return adapter.ret_gate(openings.to(adapter.ret_gate_weight.device)).cpu()


def _ends(model: GroundedModel, answers: Sequence[Answer]) -> list[int | None]:
    """Return where the picture of each answer belongs, if one does."""
    return [place_of_picture(model, answer) if answer.wanted else None for answer in answers]


def places_of(answers: Sequence[Answer], ends: Sequence[int | None], gate: Tensor) -> Places:
    """Return all places of n answers, as the LM goes on without a picture; with one, it should go on alike.

    Args:
        answers: the LM's own.
        ends: for each, where its picture belongs, or None.
        gate: (n,), what the gate adds to `[RET]`'s logit in each.
    """
    is_ret = [place == end for answer, end in zip(answers, ends, strict=True) for place in range(answer.num_places)]
    states = torch.cat([answer.states for answer in answers])
    log_normaliser = torch.cat([answer.log_normaliser for answer in answers])
    counts = torch.tensor([answer.num_places for answer in answers])
    return Places(states, log_normaliser, torch.tensor(is_ret), gate.repeat_interleave(counts))
