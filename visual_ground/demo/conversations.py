"""Five fixed conversations, and how a grounded model holds them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from visual_ground.index import ImageIndex
from visual_ground.model import GroundedModel
from visual_ground.output import InterleavedOutput, RetrievedImage


@dataclass(frozen=True)
class Conversation:
    """What the user says.

    Args:
        title: what it shows.
        turns: the user's turns, each a list of texts and of names of pictures, written "<name>".
        options: for `generate`.
        chat: False gives the one turn to the model as it is, without a chat template.
    """

    title: str
    turns: tuple[tuple[str, ...], ...]
    options: Mapping[str, Any]
    chat: bool = True


@dataclass(frozen=True)
class Exchange:
    """One turn: what the user said and showed, and the answer."""

    said: tuple[Any, ...]
    answer: InterleavedOutput


SHORT = {"max_new_tokens": 24, "max_images": 1, "ret_bias": 6.0}
CONVERSATIONS = (
    Conversation("Text to picture", (("Show me a penguin.",),), SHORT),
    Conversation("Picture to caption", (("Image of", "<tiger>", ":"),), {"max_new_tokens": 16, "max_images": 0}, False),
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
            "ret_bias": 8.0,
        },
    ),
    Conversation(
        "A chat of several turns",
        (("Can I see a car?",), ("And a horse, please.",), ("Now show me something to eat.",)),
        SHORT,
    ),
)


def converse(
    model: GroundedModel, index: ImageIndex, conversation: Conversation, pictures: Mapping[str, Any]
) -> list[Exchange]:
    """Hold a conversation; the answers, with the pictures that they showed, are context for the next turn.

    Args:
        model: the grounded model, whose tokenizer has a chat template.
        index: what it can show.
        conversation: what the user says.
        pictures: name -> path, of the pictures that the user can show.
    """
    messages: list[dict[str, Any]] = []
    exchanges = []
    for turn in conversation.turns:
        said = tuple(RetrievedImage(p[1:-1], None, pictures[p[1:-1]]) if p.startswith("<") else p for p in turn)
        messages.append({"role": "user", "content": _content(said)})
        # Outside a chat, the prompt opens as captions do in training: with the sink token.
        opening = model.tokenizer.decode(model.encoder.sink)
        prompt = messages if conversation.chat else [[opening, *(p if isinstance(p, str) else p.image for p in said)]]
        answer = model.generate(prompt, index, do_sample=False, **conversation.options)[0]
        messages.append({"role": "assistant", "content": _content(answer.parts)})
        exchanges.append(Exchange(said, answer))
    return exchanges


def _content(parts: Sequence[Any]) -> list[dict[str, Any]]:
    """Return chat content for texts and images."""
    return [
        {"type": "text", "text": part} if isinstance(part, str) else {"type": "image", "image": part.image}
        for part in parts
    ]
