"""Questions about images: how they are put to the LM, with answered ones before them, and the choice of an answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from visual_ground.errors import GroundingValueError
from visual_ground.evaluation.running.prompts import batch_of, without_features
from visual_ground.generation.growing import joined
from visual_ground.lm.reading import last_positions
from visual_ground.model import GroundedModel
from visual_ground.prompts.encoded import EncodedPrompt

QUESTION, IMAGE = "{question}", "{image}"
CHAT = "chat"
BETWEEN_SHOTS = "\n\n"
AT_ONCE = 64  # choices of several tokens that are read at once


@dataclass(frozen=True)
class Question:
    """A question about an image.

    Args:
        text: in words.
        image: the image's features (f,).
        answer: for those that are shown answered.
    """

    text: str
    image: Tensor
    answer: str = ""


@dataclass(frozen=True)
class QuestionPrompt:
    """How a question is put.

    Args:
        template: a text with {question} and {image}, after which the answer is said after a space; or "chat", a turn
            of the LM's chat template with the image and the question, after which it is said at once.

    Raises:
        GroundingValueError: a template without these, or with one of them twice.

    Example:
        >>> QuestionPrompt("Image of {image}. Question: {question} Answer:").parts(Question("What?", torch.ones(1)))
        ['Image of ', tensor([1.]), '. Question: What? Answer:']
    """

    template: str

    def __post_init__(self) -> None:
        if self.template != CHAT and any(self.template.count(mark) != 1 for mark in (QUESTION, IMAGE)):
            raise GroundingValueError(
                f"prompt must be {CHAT!r}, or a text with {QUESTION} and {IMAGE} once each, got {self.template!r}."
            )

    @property
    def gap(self) -> str:
        """What comes between the prompt and an answer."""
        return "" if self.template == CHAT else " "

    def parts(self, question: Question, shots: Sequence[Question] = ()) -> list[Any]:
        """Return a prompt for `prompts.embed_prompts` and its like: answered questions, then the one to answer."""
        if self.template == CHAT:
            turns: list[Any] = []
            for shot in (*shots, question):
                turns.append({"role": "user", "content": [shot.image, {"type": "text", "text": shot.text}]})
                turns += [{"role": "assistant", "content": shot.answer}] if shot is not question else []
            return turns
        parts: list[Any] = []
        for shot in shots:
            parts += [*self._filled(shot), f" {shot.answer}{BETWEEN_SHOTS}"]
        return [part for part in joined([*parts, *self._filled(question)]) if not isinstance(part, str) or part]

    def _filled(self, question: Question) -> list[Any]:
        # The template is cut before the question goes in, which may itself have braces in it.
        before, after = self.template.split(IMAGE)
        said = [text.replace(QUESTION, question.text) for text in (before, after)]
        return [said[0], question.image, said[1]]


@torch.no_grad()
def likeliest(model: GroundedModel, prompts: Sequence[list[Any]], choices: Sequence[str], gap: str = " ") -> list[int]:
    """Return which choice is likeliest after each prompt, its log-likelihood summed over its tokens; n numbers.

    Each prompt is read once. A choice of several tokens is no likelier than its first one, so it is read only if
    that is likelier than every choice of a single token.

    Args:
        model: the grounded model.
        prompts: n prompts, as in `prompts.embed_prompts`.
        choices: answers, each of at least one token.
        gap: what comes before each.

    Raises:
        GroundingValueError: a choice without tokens, two of the same tokens, or likelihoods that are not numbers.
    """
    processor = model.processor
    read = [without_features(prompt) for prompt in prompts]
    encoded = [processor.encode(prompt) for prompt, _ in read]
    features = [images for _, images in read]
    ids = [tuple(processor.continue_text(gap + choice)) for choice in choices]
    if not all(ids) or len(set(ids)) < len(ids):
        raise GroundingValueError(f"Choices need tokens, each its own, got {list(choices)[:5]}, as ids {ids[:5]}.")
    scores = _first_tokens(model, encoded, features, [one[0] for one in ids])
    single = torch.tensor([len(one) == 1 for one in ids])
    best = scores.masked_fill(~single, float("-inf")).amax(1, keepdim=True)
    open_ones = (scores > best) & ~single
    scores = scores.masked_fill(~(single | open_ones), float("-inf"))
    pairs = open_ones.nonzero().tolist()
    for start in range(0, len(pairs), AT_ONCE):
        part = pairs[start : start + AT_ONCE]
        longer = [EncodedPrompt((*encoded[row].ids, *ids[number]), ()) for row, number in part]
        batch, tokens = batch_of(model, longer, [image for row, _ in part for image in features[row]])
        inputs = batch["input_ids"], batch["attention_mask"], [len(ids[number]) for _, number in part], tokens
        found = model.frozen_lm.log_likelihood(*inputs).float().cpu()
        scores[[row for row, _ in part], [number for _, number in part]] = found
    return [int(number) for number in scores.argmax(1)]


def _first_tokens(
    model: GroundedModel, encoded: Sequence[EncodedPrompt], features: Sequence[Sequence[Tensor]], first: Sequence[int]
) -> Tensor:
    """Return the log-likelihoods of ids right after each prompt, (n, ids), on the CPU."""
    batch, tokens = batch_of(model, encoded, [image for images in features for image in images])
    ids = batch["input_ids"]
    reading = model.frozen_lm.read(ids, batch["attention_mask"], last_positions(ids), tokens)
    scores = torch.log_softmax(reading.logits.float(), -1)[:, list(first)].cpu()
    if bool(scores.isnan().any()):
        raise GroundingValueError(
            f"{int(scores.isnan().any(1).sum())} of {len(encoded)} prompts have answers whose likelihood is not a "
            "number. Look at the adapter's weights and the language model's dtype."
        )
    return scores
