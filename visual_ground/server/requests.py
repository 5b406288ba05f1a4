"""Requests of chats, checked field by field before anything is run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from visual_ground.generation.retrieval_token import RetrievalSettings
from visual_ground.index.remote_images import LinkRules
from visual_ground.prompts.chat import typed_message
from visual_ground.server.failures import RequestFailure
from visual_ground.server.pictures import Given, Pictures
from visual_ground.server.sampling import Sampling

MAX_CHOICES = 8
MAX_STOPS, MAX_STOP_LENGTH = 4, 1000
# Settings of `RetrievalSettings` that are true or false.
FLAGS = ("only_after_sentences", "allow_repeats", "complete_sentences", "see_images")
# What other servers can do and this one cannot, with the values that ask for nothing. Leaving such a field unread would
# give another answer than was asked for.
REFUSED: dict[str, tuple[Any, ...]] = {
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "logit_bias": ({},),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "repetition_penalty": (1,),
    "top_k": (-1, 0),
    "min_p": (0,),
    "modalities": (["text"],),
    "audio": (),
    "web_search_options": (),
}
ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}


@dataclass(frozen=True)
class ChatRequest:
    """A request of `/v1/chat/completions`.

    Args:
        messages: chat messages with their images.
        samplings: one for each of the answers that are asked for.
        max_tokens: the most tokens of an answer.
        stop: strings that end an answer.
        stream: whether it is sent piece by piece.
        stream_usage: whether the token counts come at the end of it.
    """

    messages: list[dict[str, Any]]
    samplings: list[Sampling]
    max_tokens: int
    stop: tuple[str, ...]
    stream: bool
    stream_usage: bool


def number(body: Mapping[str, Any], name: str, default: Any, low: float, high: float, whole: bool = False) -> Any:
    """Return a number of a request, or its default if it is left out or null."""
    value = body.get(name)
    if value is None:
        return default
    kind = int if whole else (int, float)
    # Whole numbers of JSON may be too large for a float; NaN is in no range.
    if isinstance(value, bool) or not isinstance(value, kind) or not low <= value <= high:
        wanted = "a whole number" if whole else "a number"
        raise RequestFailure(400, f"{name} must be {wanted} from {low:g} to {high:g}, got {str(value)[:40]!r}.")
    return value


def flag(body: Mapping[str, Any], name: str) -> bool:
    """Return a yes or no of a request; no if it is left out or null."""
    value = body.get(name)
    if value is not None and not isinstance(value, bool):
        raise RequestFailure(400, f"{name} must be true or false, got {str(value)[:40]!r}.")
    return bool(value)


def refuse_unread(body: Mapping[str, Any], refused: Mapping[str, tuple[Any, ...]]) -> None:
    """Raise RequestFailure where a request asks for something that this server cannot do.

    Args:
        body: the request's JSON.
        refused: names of fields, with the values that ask for nothing; null always does.
    """
    for name, harmless in refused.items():
        value = body.get(name)
        if value is not None and value not in harmless:
            message = f"This server cannot do what {name} asks for: {str(value)[:40]!r}. Leave {name} out."
            raise RequestFailure(400, message, code="unsupported_parameter")


def chat_request(
    body: Mapping[str, Any], pictures: Pictures, rules: LinkRules, default_tokens: int, default_images: int | None
) -> ChatRequest:
    """Return a checked request.

    Args:
        body: the request's JSON.
        pictures: the index's.
        rules: where its images may be fetched from.
        default_tokens: the length of an answer, if the request gives none.
        default_images: the most images of an answer, if the request gives none; None for any number.

    Raises:
        RequestFailure: a field that is missing or out of its range.
    """
    refuse_unread(body, REFUSED)
    stop = body.get("stop") or ()
    stop = (stop,) if isinstance(stop, str) else stop
    is_list = isinstance(stop, (list, tuple)) and len(stop) <= MAX_STOPS
    if not is_list or not all(isinstance(one, str) and len(one) <= MAX_STOP_LENGTH for one in stop):
        allowed = f"at most {MAX_STOPS}, each of at most {MAX_STOP_LENGTH} characters"
        raise RequestFailure(400, f"stop must be a string or a list of {allowed}.")
    tokens = number(body, "max_completion_tokens", None, 1, 1e6, whole=True)
    tokens = tokens or number(body, "max_tokens", default_tokens, 1, 1e6, whole=True)
    options, given = body.get("stream_options"), Given(rules)
    if options is not None and not isinstance(options, Mapping):
        raise RequestFailure(400, f"stream_options must be an object, got {str(options)[:40]!r}.")
    return ChatRequest(
        [_message(message, pictures, given) for message in _list(body, "messages")],
        _samplings(body, default_images),
        tokens,
        tuple(stop),
        flag(body, "stream"),
        flag(options or {}, "include_usage"),
    )


def _samplings(body: Mapping[str, Any], default_images: int | None) -> list[Sampling]:
    seed = number(body, "seed", None, -(2**63), 2**63 - 1, whole=True)
    usual = RetrievalSettings()
    retrieval = RetrievalSettings(
        images_per_ret=number(body, "images_per_ret", usual.images_per_ret, 1, 16, whole=True),
        max_images=number(body, "max_images", default_images, 0, 1000, whole=True),
        ret_bias=number(body, "ret_bias", usual.ret_bias, -1e6, 1e6),
        min_new_tokens_before_ret=number(body, "min_new_tokens_before_ret", 0, 0, 1e6, whole=True),
        min_new_tokens_between_rets=number(
            body, "min_new_tokens_between_rets", usual.min_new_tokens_between_rets, 0, 1e6, whole=True
        ),
        **{name: flag(body, name) for name in FLAGS},
    )
    temperature, top_p = number(body, "temperature", 1.0, 0, 2), number(body, "top_p", 1.0, 0, 1)
    seeds = (None if seed is None else seed + i for i in range(number(body, "n", 1, 1, MAX_CHOICES, whole=True)))
    return [Sampling(float(temperature), float(top_p), one, retrieval) for one in seeds]


def _list(body: Mapping[str, Any], name: str) -> Sequence[Any]:
    value = body.get(name)
    if not isinstance(value, list) or not value:
        raise RequestFailure(400, f"{name} must be a list with at least one entry.")
    return value


def _message(message: Any, pictures: Pictures, images: Given) -> dict[str, Any]:
    role = ROLES.get(str(message.get("role"))) if isinstance(message, Mapping) else None
    if role is None:
        raise RequestFailure(400, f"Each message must have a role, one of {', '.join(ROLES)}.")
    refuse_unread(message, {"tool_calls": ([],), "function_call": ()})
    content = message.get("content")
    parts: list[Any] = []
    given = [{"type": "text", "text": content}] if isinstance(content, str) else content
    for part in given if isinstance(given, list) else []:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind == "text" and isinstance(part.get("text"), str):
            # What this server has answered goes back in as it was: with the pictures.
            parts += pictures.restore(part["text"], images) if role == "assistant" else [part["text"]]
        elif kind == "image_url":
            parts.append(images.read(part.get("image_url")))
        else:
            raise RequestFailure(400, 'A part of a message must be {"type": "text"} or {"type": "image_url"}.')
    if not parts:
        raise RequestFailure(400, "A message has no content; give a text or parts.")
    return typed_message(role, parts)
