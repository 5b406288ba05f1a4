"""Five fixed conversations, and how a grounded model holds them."""

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
    """What the user says.

    Args:
        title: what it shows.
        turns: the user's turns, each a list of texts and of names of pictures, written "<name>".
        options: for `generate`.
        pictures: which of `Biases` makes it show pictures; None asks for none.
        chat: False gives the one turn to the model as it is, without a chat template.
    """

    title: str
    turns: tuple[tuple[str, ...], ...]
    options: Mapping[str, Any]
    pictures: str | None = "request"
    chat: bool = True


@dataclass(frozen=True)
class Exchange:
    """One turn: what the user said and showed, and the answer."""

    said: tuple[Any, ...]
    answer: InterleavedOutput


@dataclass(frozen=True)
class Biases:
    """What is added to `[RET]`'s logit, found on texts that no conversation has.

    Args:
        request: makes nine of ten requests for a picture be answered by one at once.
        story: makes a picture come about as often as every sixteenth token of a story.
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
        asked = model(**model.prepare([[{"role": "user", "content": text}] for text in requests])).logits[:, -1]
        messages = [{"role": "user", "content": OTHER_STORY}]
        told = model.generate(messages, None, max_new_tokens=64, max_images=0, do_sample=False)[0].text
        before, words = model.processor.encode(messages).ids, model.processor.encode_text(told)
        said = model(torch.tensor([[*before, *words]])).logits[0, len(before) - 1 :]
        return cls(_quantile(model, asked, 0.9), _quantile(model, said, 1 / 16))


def _quantile(model: GroundedModel, logits: Tensor, part: float) -> float:
    """Return the bias with which `[RET]` would be the likeliest token in this part of the rows (n, v + 1)."""
    lacking = logits.max(-1).values - logits[:, model.ret_token_id]
    return round(max(0.0, float(torch.quantile(lacking.float(), part))), 2)


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
    """Hold a conversation; the answers, with the pictures that they showed, are context for the next turn.

    Args:
        model: the grounded model, whose tokenizer has a chat template.
        index: what it can show.
        conversation: what the user says.
        pictures: name -> path, of the pictures that the user can show.
        biases: how readily it shows pictures.
    """
    bias = 0.0 if conversation.pictures is None else getattr(biases, conversation.pictures)
    messages: list[dict[str, Any]] = []
    exchanges = []
    for turn in conversation.turns:
        said = tuple(RetrievedImage(p[1:-1], None, pictures[p[1:-1]]) if p.startswith("<") else p for p in turn)
        messages.append({"role": "user", "content": _content(said)})
        # Outside a chat, the prompt opens as captions do in training: with the sink token.
        opening = model.tokenizer.decode(model.processor.sink)
        prompt = messages if conversation.chat else [[opening, *(p if isinstance(p, str) else p.image for p in said)]]
        answer = model.generate(prompt, index, do_sample=False, ret_bias=bias, **conversation.options)[0]
        messages.append({"role": "assistant", "content": _content(answer.parts)})
        exchanges.append(Exchange(said, answer))
    return exchanges


def _content(parts: Sequence[Any]) -> list[dict[str, Any]]:
    """Return chat content for texts and images."""
    return [
        {"type": "text", "text": part} if isinstance(part, str) else {"type": "image", "image": part.image}
        for part in parts
    ]
