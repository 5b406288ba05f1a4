"""Nine fixed conversations with a grounded model, and many single requests, of which each is right or wrong."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from visual_ground.demo.emoji import Concept, stable_number
from visual_ground.demo.templates import UNFITTED_REQUESTS
from visual_ground.generation.output import InterleavedOutput, RetrievedImage
from visual_ground.index.image_index import ImageIndex
from visual_ground.model import GroundedModel
from visual_ground.prompts.chat import ILLUSTRATED, typed_message
from visual_ground.prompts.types import ImagePart

SEEN, UNSEEN = "seen", "unseen"
SYSTEM: dict[str, Any] = {"role": "system", "content": ILLUSTRATED}
# Single requests are answered so many at once.
BATCH_SIZE = 10


@dataclass(frozen=True)
class Conversation:
    """The user's side of a conversation.

    Args:
        title: what it demonstrates.
        part: `SEEN` if its pictures were fitted on, else `UNSEEN`.
        turns: the user's turns, each a list of texts and of names of pictures, written "<name>".
        options: for `generate`.
        is_story: whether pictures are to come more readily, see `story_bias`.
    """

    title: str
    part: str
    turns: tuple[tuple[str, ...], ...]
    options: Mapping[str, Any] = field(default_factory=dict)
    is_story: bool = False


@dataclass(frozen=True)
class Exchange:
    """One turn: what the user said and showed, and the answer."""

    message: tuple[Any, ...]
    answer: InterleavedOutput


@dataclass(frozen=True)
class Request:
    """One request for a picture of something seen, and the answer.

    Args:
        text: what the user said.
        wanted: the name of what was asked for.
        answer: what came.
    """

    text: str
    wanted: str
    answer: InterleavedOutput

    @property
    def is_right(self) -> bool:
        """Whether the answer's first picture is the one that was asked for."""
        return bool(self.answer.images) and self.answer.images[0].id == self.wanted


# No answer breaks off within a sentence, and no picture stands within one.
COMMON: dict[str, Any] = {"do_sample": False, "complete_sentences": True, "only_after_sentences": True}
ANSWER = {"max_new_tokens": 48, "max_images": 1}
READ = {"max_new_tokens": 24, "max_images": 0}
STORY = {
    "max_new_tokens": 120,
    "max_images": 4,
    "min_new_tokens_before_ret": 12,
    "min_new_tokens_between_rets": 16,
}
CONVERSATIONS = (
    Conversation("A request", SEEN, (("Show me a penguin.",),)),
    Conversation("A request in other words", SEEN, (("My daughter wants to know how a violin looks.",),)),
    Conversation(
        "A chat that refers back to a picture",
        SEEN,
        (("Can I see an elephant?",), ("And a butterfly, please.",), ("Which of the two is heavier?",)),
    ),
    Conversation(
        "A story with pictures",
        SEEN,
        (("Tell me a very short story about a dog, a house and a fish.",),),
        STORY,
        True,
    ),
    Conversation("A question that needs no picture", SEEN, (("What is the capital of France?",),)),
    Conversation("A picture is read", SEEN, (("<tiger>", "What is in this picture?"),), READ),
    Conversation("A picture and a wish", SEEN, (("<strawberry>", "Show me a cake with this."),)),
    Conversation(
        "Requests for what nobody showed it", UNSEEN, (("Show me a rocket.",), ("Do you have a picture of a dolphin?",))
    ),
    Conversation("A picture of what nobody showed it", UNSEEN, (("<poodle>", "What is in this picture?"),), READ),
)
OTHER_STORY = "Tell me a short story about a cat, a boat and a cake."


@torch.no_grad()
def story_bias(model: GroundedModel) -> float:
    """Return the bias with which about every sixteenth token of a story is `[RET]`, measured on another story."""
    messages = [SYSTEM, {"role": "user", "content": OTHER_STORY}]
    story = model.generate(messages, None, max_new_tokens=64, max_images=0, do_sample=False)[0].text
    prompt_ids, story_ids = model.processor.encode(messages).ids, model.processor.encode_text(story)
    ids = torch.tensor([[*prompt_ids, *story_ids]])
    reading = model.frozen_lm.read(ids, torch.ones_like(ids), torch.arange(len(prompt_ids) - 1, ids.shape[1]))
    gate = model.adapter.ret_gate(reading.head_input[:1])
    gap = reading.logits.max(-1).values - reading.logits[:, model.ret_token_id] - gate
    return round(max(0.0, float(torch.quantile(gap.float(), 1 / 16))), 2)


def converse(
    model: GroundedModel, index: ImageIndex, conversation: Conversation, pictures: Mapping[str, Any], bias: float
) -> list[Exchange]:
    """Hold a conversation; every answer, with the pictures in it, is context for the next turn.

    Args:
        model: the grounded model, whose tokenizer has a chat template.
        index: the pictures that it can show.
        conversation: the user's side.
        pictures: paths by name, of the pictures that the user can show.
        bias: how much more readily a story shows pictures.
    """
    options = {**COMMON, **ANSWER, **conversation.options, "ret_bias": bias if conversation.is_story else 0.0}
    messages: list[dict[str, Any]] = [SYSTEM]
    exchanges = []
    for turn in conversation.turns:
        message = tuple(RetrievedImage(p[1:-1], None, pictures[p[1:-1]]) if p.startswith("<") else p for p in turn)
        messages.append(_typed("user", message))
        answer = model.generate(messages, index, **options)[0]
        messages.append(_typed("assistant", answer.parts))
        exchanges.append(Exchange(message, answer))
    return exchanges


def request_all(model: GroundedModel, index: ImageIndex, concepts: Sequence[Concept]) -> list[Request]:
    """Ask for each concept in words that were not fitted on."""
    texts = [c.fill(UNFITTED_REQUESTS[stable_number(c.code) % len(UNFITTED_REQUESTS)]) for c in concepts]
    chats = [[SYSTEM, {"role": "user", "content": text}] for text in texts]
    answers = []
    for start in range(0, len(chats), BATCH_SIZE):
        answers += model.generate(chats[start : start + BATCH_SIZE], index, **COMMON, **ANSWER)
    return [Request(text, c.name, answer) for text, c, answer in zip(texts, concepts, answers, strict=True)]


def _typed(role: str, parts: Sequence[Any]) -> dict[str, Any]:
    return typed_message(role, [part if isinstance(part, str) else ImagePart(part.image) for part in parts])
