"""The last turn of a chat, alone: what is asked for now, without what was talked about before."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from visual_ground.prompts.processor import GroundingProcessor

_USER, _ASSISTANT = "userturn", "assistantturn"


def last_turn(processor: GroundingProcessor, ids: Sequence[int]) -> list[int] | None:
    """Return a chat's ids, which end where the answer begins, as if its last user message were its first and only one.

    A system message of the caller's is left out. None if the chat has only one user message, or if it cannot be found
    where the next one begins.
    """
    opening, header = user_headers(processor.tokenizer)
    count = len(header)
    places = [i for i in range(len(ids) - count + 1) if list(ids[i : i + count]) == header] if header else []
    return [*opening, *ids[places[-1] :]] if len(places) > 1 else None


def user_headers(tokenizer: Any) -> tuple[list[int], list[int]]:
    """Return the ids with which a chat template opens a chat, and those that it puts before what a user says.

    Both are empty without a template, or with one from which they cannot be told.
    """
    for content in (lambda text: text, lambda text: [{"type": "text", "text": text}]):
        chat = [
            {"role": role, "content": content(text)}
            for role, text in (("user", _USER), ("assistant", _ASSISTANT), ("user", _USER))
        ]
        try:
            asked, answered, whole = (
                str(tokenizer.apply_chat_template(chat[:count], tokenize=False, add_generation_prompt=False))
                for count in (1, 2, 3)
            )
        except Exception:  # No template, or one that reads contents in the other form.
            continue
        if _USER in asked and _ASSISTANT in whole:
            return _told_from(tokenizer, asked, answered, whole)
    return [], []


def _told_from(tokenizer: Any, asked: str, answered: str, whole: str) -> tuple[list[int], list[int]]:
    """Return the ids that open a chat and a user's message, from chats of one, two and three messages."""
    end = answered.rpartition(_ASSISTANT)[2]
    between = whole.rpartition(_ASSISTANT)[2].partition(_USER)[0]
    header, before = between[len(end) :].strip(), asked.partition(_USER)[0].rstrip()
    if not (header and between.startswith(end) and before.endswith(header)):
        return [], []
    texts = before[: len(before) - len(header)], header
    opening, user = (list(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts)
    return opening, user
