"""When `[RET]` is said: its two embeddings, fitted to answers that the frozen LM gives by itself.

An answer to a request for a picture gets its `[RET]` behind its first sentence; nowhere else, and nowhere in an answer
to anything else, is there one. What the output head reads at these places depends on nothing trained, and was kept when
the answers were generated. So the output embedding is found by a convex fit, and the text around `[RET]` stays the
LM's own.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from visual_ground.model import GroundedModel
from visual_ground.prompts.encoded import EncodedPrompt, pad_batch
from visual_ground.training.initialization.answers import CONTINUATION, fitted_answers, place_of_picture
from visual_ground.training.initialization.greedy import Answer

logger = logging.getLogger(__name__)

# What all places of a picture together weigh, in parts of all other places, and the penalty on the embedding, whose
# inputs have unit mean square: chosen on other wordings (benchmarks/emission.py).
WEIGHT, PENALTY = 0.03, 3e-4
# Answers whose continuation is compared with each input embedding.
NUM_COMPARED = 16
# Text whose embedding may stand for a picture within an answer; the mean embedding is compared too.
STAND_INS = (" ", ".", "\n")
# A bound only: L-BFGS stops by itself.
MAX_STEPS = 200


@dataclass(frozen=True)
class Places:
    """All places of some answers at which `[RET]` could be said.

    Args:
        states: (n, h), what the output head reads there.
        log_normaliser: (n,), of the LM's own columns.
        is_ret: (n,), whether `[RET]` belongs there.
    """

    states: Tensor
    log_normaliser: Tensor
    is_ret: Tensor

    @classmethod
    def joined(cls, parts: Sequence[Places]) -> Places:
        """Return the places of all parts."""
        columns = zip(*((part.states, part.log_normaliser, part.is_ret) for part in parts), strict=True)
        return cls(*(torch.cat(column) for column in columns))


@torch.no_grad()
def fit_emission(
    model: GroundedModel,
    captions: Sequence[str],
    requests: Mapping[str, str] | None = None,
    folder: Path | None = None,
    progress: bool = False,
) -> bool:
    """Fit when `[RET]` is said and what the LM reads in its place; both embeddings are no longer trained then.

    Args:
        model: the grounded model.
        captions: what pictures show.
        requests: what users say to see one, and its caption; without any, the captions are put into requests.
        folder: where the LM's answers are kept; None: nowhere.
        progress: show progress bars.

    Returns:
        Whether it was fitted: not without a chat template, nor with one embedding for both ends, nor if no answer
        to a request has a sentence that ends.
    """
    adapter = model.adapter
    if not getattr(model.tokenizer, "chat_template", None) or adapter.tied or not captions:
        return False
    answers = fitted_answers(model, captions, requests or {}, folder, progress)
    ends = [place_of_picture(model, answer) if answer.wanted else None for answer in answers]
    if all(end is None for end in ends):
        logger.warning("No answer to a request has a whole sentence, so [RET] starts as it does without a chat.")
        return False
    embedding, behind = choose_input_embedding(model, answers, ends)
    adapter.ret_input.copy_(embedding)
    # A few places behind `[RET]` are enough for no other to follow it at once.
    places = [places_of(answers, ends)] if behind is None else [places_of(answers, ends), behind]
    adapter.ret_output.copy_(fit_output_embedding(Places.joined(places)))
    # Scaled back to these norms after each step.
    adapter.ret_norms.copy_(torch.stack([embedding.norm() for embedding in adapter.ret_embeddings()]))
    adapter.keep(["ret_input", "ret_output"])  # The text loss would move them to where captions end.
    return True


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
    sequences: list[tuple[int, ...]] = []
    places: list[range] = []
    for answer, end in pairs[:NUM_COMPARED]:
        before = (*answer.prompt, *answer.ids[:end])
        sequences.append((*before, model.ret_token_id, *answer.ids[end : end + CONTINUATION]))
        places.append(range(len(before), len(sequences[-1]) - 1))
    targets = torch.tensor([row[i + 1] for row, of_row in zip(sequences, places, strict=True) for i in of_row])
    kept, compared = model.adapter.ret_input.clone(), list[tuple[float, Tensor, Places]]()
    for candidate in candidates:
        model.adapter.ret_input.copy_(candidate)
        states = _states(model, sequences, places)
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


def _states(model: GroundedModel, sequences: Sequence[tuple[int, ...]], places: Sequence[range]) -> Tensor:
    """Return what the output head reads at the places of each sequence, (n, h)."""
    vocabulary, pad_id = model.frozen_lm.vocabulary, model.processor.pad_token_id
    ids, mask = pad_batch([EncodedPrompt(row, ()) for row in sequences], vocabulary.first_image_id, pad_id, "right")
    positions = torch.tensor([i * ids.shape[1] + place for i, of_row in enumerate(places) for place in of_row])
    device = model.frozen_lm.device
    return model.frozen_lm.hidden_states(ids.to(device), mask.to(device), positions.to(device))[0]


def _own_logits(model: GroundedModel, states: Tensor) -> Tensor:
    """Return the output head's logits (n, columns) with `[RET]`'s column at -inf."""
    logits = model.frozen_lm.head_logits(states)
    logits[:, model.ret_token_id] = float("-inf")
    return logits


def fit_output_embedding(places: Places, weight: float = WEIGHT, penalty: float = PENALTY) -> Tensor:
    r"""Return the embedding (h,) with which `[RET]` is likely where it belongs, and only there.

    .. math::
        \min_w \sum_i c_i\, \ell(y_i, w \cdot h_i - \log Z_i) + \tfrac{\lambda}{2} \|w\|^2

    :math:`\ell` is the logistic loss, :math:`Z_i` the normaliser of the LM's own logits, and the states are in units of
    their root mean square.

    Args:
        places: where `[RET]` belongs, at one at least, and where not.
        weight: what the places of `[RET]` weigh together, in parts of all others.
        penalty: :math:`\lambda`.
    """
    scale = places.states.square().mean().sqrt()
    states, offset, is_ret = places.states / scale, places.log_normaliser, places.is_ret.float()
    weights = torch.where(places.is_ret, weight * (1 - is_ret).sum() / is_ret.sum(), 1.0)
    weights = weights / weights.sum()
    embedding = torch.zeros(states.shape[1], requires_grad=True)
    optimizer = torch.optim.LBFGS([embedding], max_iter=MAX_STEPS, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        losses = F.binary_cross_entropy_with_logits(states @ embedding - offset, is_ret, weights, reduction="sum")
        loss = losses + penalty * embedding.square().sum() / 2
        torch.autograd.backward(loss)
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
    return embedding.detach() / scale
