"""Five fixed conversations with a grounded model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from visual_ground.generation.output import InterleavedOutput, RetrievedImage
from visual_ground.index.image_index import ImageIndex
from visual_ground.model import GroundedModel


@dataclass(frozen=True)
class Conversation:
    """The user's side of a conversation.

    Args:
        title: what it demonstrates.
        turns: the user's turns, each a list of texts and of names of pictures, written "<name>".
        options: for `generate`.
        pictures: the field of `Biases` with which pictures are shown; None: no pictures are asked for.
        chat: False passes the only turn to the model as it is, without a chat template.
    """

    title: str
    turns: tuple[tuple[str, ...], ...]
    options: Mapping[str, Any]
    pictures: str | None = "request"
    chat: bool = True


@dataclass(frozen=True)
class Exchange:
    """One turn: what the user said and showed, and the answer."""

    message: tuple[Any, ...]
    answer: InterleavedOutput


@dataclass(frozen=True)
class Biases:
    """What is added to `[RET]`'s logit, chosen on texts that are in none of the conversations.

    Args:
        request: with it, nine of ten requests for a picture are answered by a picture at once.
        story: with it, about every sixteenth token of a story is a picture.
    """

    request: float
    story: float

    @classmethod
    @torch.no_grad()
    def of(cls, model: GroundedModel, requests: Sequence[str]) -> Biases:
        """Measure both.

        Args:
            model: the grounded model.
            requests: requests for pictures, of the validation split.
        """
        after_request = model(**model.prepare([[{"role": "user", "content": text}] for text in requests])).logits[:, -1]
        messages = [{"role": "user", "content": OTHER_STORY}]
        story = model.generate(messages, None, max_new_tokens=64, max_images=0, do_sample=False)[0].text
        prompt_ids, story_ids = model.processor.encode(messages).ids, model.processor.encode_text(story)
        in_story = model(torch.tensor([[*prompt_ids, *story_ids]])).logits[0, len(prompt_ids) - 1 :]
        return cls(_quantile(model, after_request, 0.9), _quantile(model, in_story, 1 / 16))


def _quantile(model: GroundedModel, logits: Tensor, fraction: float) -> float:
    """Return the bias with which `[RET]` would be the likeliest token at this fraction of the positions (n, v + 1)."""
    gap = logits.max(-1).values - logits[:, model.ret_token_id]
    return round(max(0.0, float(torch.quantile(gap.float(), fraction))), 2)


OTHER_STORY = "Tell me a short story about a cat, a house and a cake."
SHORT = {"max_new_tokens": 24, "max_images": 1}
CAPTION = {"max_new_tokens": 16, "max_images": 0}
CONVERSATIONS = (
    Conversation("Text to picture", (("Show me a penguin.",),), SHORT),
    Conversation("Picture to caption", (("Image of", "<tiger>", ":"),), CAPTION, None, False),
    Conversation("Picture and instruction to another picture", (("<honeybee>", "Show me a flower for it."),), SHORT),
    Conversation(
        "A story with pictures",
        (("Tell me a very short story about a dog, a boat and a fish.",),),
        {
            "max_new_tokens": 100,
            "min_new_tokens": 80,
            "max_images": 4,
            "min_new_tokens_before_ret": 12,
            "min_new_tokens_between_rets": 16,
        },
        "story",
    ),
    Conversation(
        "A chat of several turns",
        (("Can I see a car?",), ("And a horse, please.",), ("Now show me something to eat.",)),
        SHORT,
    ),
)


def converse(
    model: GroundedModel, index: ImageIndex, conversation: Conversation, pictures: Mapping[str, Any], biases: Biases
) -> list[Exchange]:
    """Hold a conversation; every answer, with the pictures in it, is context for the next turn.

    Args:
        model: the grounded model, whose tokenizer has a chat template.
        index: the pictures that it can show.
        conversation: the user's side.
        pictures: paths by name, of the pictures that the user can show.
        biases: how readily the model shows pictures.
    """
    bias = 0.0 if conversation.pictures is None else getattr(biases, conversation.pictures)
    messages: list[dict[str, Any]] = []
    exchanges = []
    for turn in conversation.turns:
        message = tuple(RetrievedImage(p[1:-1], None, pictures[p[1:-1]]) if p.startswith("<") else p for p in turn)
        messages.append({"role": "user", "content": _content(message)})
        # Outside a chat, the prompt opens as captions do in training: with the sink token.
        opening = model.tokenizer.decode(model.processor.sink)
        prompt = (
            messages if conversation.chat else [[opening, *(p if isinstance(p, str) else p.image for p in message)]]
        )
        answer = model.generate(prompt, index, do_sample=False, ret_bias=bias, **conversation.options)[0]
        messages.append({"role": "assistant", "content": _content(answer.parts)})
        exchanges.append(Exchange(message, answer))
    return exchanges


def _content(parts: Sequence[Any]) -> list[dict[str, Any]]:
    """Return chat content for texts and images."""
    return [
        {"type": "text", "text": part} if isinstance(part, str) else {"type": "image", "image": part.image}
        for part in parts
    ]
