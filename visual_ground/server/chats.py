"""A chat request as jobs for the engine, and their answers as OpenAI's JSON."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator
from functools import partial
from typing import Any

from visual_ground.adapter.attached import AttachedAdapter
from visual_ground.errors import GroundingError
from visual_ground.generation.growing import GrowingAnswer
from visual_ground.generation.options import silent_ids
from visual_ground.generation.output import Part, RetrievedImage
from visual_ground.prompts.encoded import EncodedPrompt
from visual_ground.server.engine import Engine
from visual_ground.server.failures import RequestFailure
from visual_ground.server.jobs import Finished, Job
from visual_ground.server.pictures import Pictures
from visual_ground.server.requests import ChatRequest

Event = tuple[int, Part | Finished]
# The longest tokens that tokenizers have are of so many spaces; where the context's length is unknown, so many tokens
# are the most.
CHARACTERS_PER_TOKEN, MAX_TOKENS = 128, 1_000_000


def encode(engine: Engine, request: ChatRequest, attached: AttachedAdapter | None = None) -> EncodedPrompt:
    """Return a request's prompt, as `attached` reads it, or the active adapter if None.

    Raises:
        RequestFailure: a prompt that the LM cannot read, or has no room to answer.
    """
    processor = engine.model.processor if attached is None else attached.processor
    parts = [part for message in request.messages for part in message["content"]]
    longest = processor.max_length
    # Each part takes a token at least. It would take minutes to count those of the longest requests.
    most, characters = longest or MAX_TOKENS, sum(len(part.get("text", "")) for part in parts)
    if len(parts) > most or characters > most * CHARACTERS_PER_TOKEN:
        raise _too_long(f"The prompt has {len(parts)} parts with {characters} characters", most)
    try:
        # Each part says whether it is a text, so that none is taken for the path of a file on this machine.
        prompt = processor.encode(request.messages if engine.model.tokenizer.chat_template else parts)
        if longest is not None and len(prompt.ids) + request.max_tokens > longest:
            wanted = f"The prompt has {len(prompt.ids)} tokens and the answer may have {request.max_tokens}"
            raise _too_long(wanted, longest)
        processor.check_ids([prompt])
    except GroundingError as error:
        raise RequestFailure(400, str(error)) from error
    return prompt


def _too_long(wanted: str, longest: int) -> RequestFailure:
    message = f"{wanted}; the model's context holds {longest} tokens. Shorten the prompt or lower max_tokens."
    return RequestFailure(400, message, code="context_length_exceeded")


class Chat:
    """The answers to one request, while they are generated.

    Raises:
        RequestFailure: the queue is full.
    """

    def __init__(
        self, engine: Engine, pictures: Pictures, request: ChatRequest, prompt: EncodedPrompt, model_name: str
    ) -> None:
        self.request, self.pictures, self.prompt = request, pictures, prompt
        self.head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": model_name}
        self._events: asyncio.Queue[Event] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()
        silent = silent_ids(engine.model.frozen_lm, engine.model.active)
        deadline = time.monotonic() + engine.limits.timeout
        self.jobs = [
            Job(
                prompt,
                sampling,
                request.max_tokens,
                GrowingAnswer(engine.model.active, pictures.index, sampling.retrieval, silent, request.stop),
                partial(self._take, i),
                deadline,
            )
            for i, sampling in enumerate(request.samplings)
        ]
        engine.submit(self.jobs)

    def _take(self, choice: int, event: Part | Finished) -> None:
        self._loop.call_soon_threadsafe(self._events.put_nowait, (choice, event))

    async def events(self) -> AsyncIterator[Event]:
        """Yield the parts of each answer as they come, until all have ended; leaving early cancels them."""
        left = len(self.jobs)
        try:
            while left:
                choice, event = await self._events.get()
                left -= isinstance(event, Finished)
                yield choice, event
        finally:
            for job in self.jobs:
                job.cancel()

    @property
    def usage(self) -> dict[str, int]:
        """Token counts."""
        written, read = sum(job.tokens for job in self.jobs), len(self.prompt.ids)
        return {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}

    def _part(self, part: Part) -> dict[str, Any]:
        if isinstance(part, str):
            return {"type": "text", "text": part}
        return self.pictures.described(part)

    def _markdown(self, part: RetrievedImage) -> str:
        """Return a picture as Markdown by its address in this server; paths of this machine do not leave it."""
        shown = self._part(part)
        named = ("caption", "credit", "licence", "source")
        safe = RetrievedImage(part.id, part.score, None, {name: shown[name] for name in named if name in shown})
        return safe.to_markdown(shown.get("uri"))

    async def whole(self) -> dict[str, Any]:
        """Return OpenAI's `chat.completion`; RequestFailure if an answer failed or came too late."""
        answers: list[list[Part]] = [[] for _ in self.jobs]
        reasons = [""] * len(self.jobs)
        async for choice, event in self.events():
            if isinstance(event, Finished):
                reasons[choice] = _reason(event)
            elif isinstance(event, str) and answers[choice] and isinstance(answers[choice][-1], str):
                answers[choice][-1] = f"{answers[choice][-1]}{event}"
            else:
                answers[choice].append(event)
        choices = [
            {"index": i, "finish_reason": reason, "logprobs": None, "message": self._message(parts)}
            for i, (parts, reason) in enumerate(zip(answers, reasons, strict=True))
        ]
        return {**self.head, "object": "chat.completion", "choices": choices, "usage": self.usage}

    def _message(self, parts: list[Part]) -> dict[str, Any]:
        blocks = [part if isinstance(part, str) else f"\n\n{self._markdown(part)}\n\n" for part in parts]
        shown = [self._part(part) for part in parts]
        return {"role": "assistant", "content": "".join(blocks), "refusal": None, "parts": shown}

    async def pieces(self) -> AsyncIterator[str]:
        """Yield OpenAI's `chat.completion.chunk`s as server-sent events."""
        for i in range(len(self.jobs)):
            yield self._chunk(i, {"role": "assistant", "content": ""})
        async for choice, event in self.events():
            if isinstance(event, Finished):
                try:
                    yield self._chunk(choice, {}, _reason(event))
                except RequestFailure as failure:
                    yield f"data: {json.dumps(failure.body)}\n\n"
                    return
            elif isinstance(event, str):
                yield self._chunk(choice, {"content": event})
            else:
                content = f"\n\n{self._markdown(event)}\n\n"
                yield self._chunk(choice, {"content": content, "parts": [self._part(event)]})
        if self.request.stream_usage:
            chunk = {**self.head, "object": "chat.completion.chunk", "choices": [], "usage": self.usage}
            yield f"data: {json.dumps(chunk)}\n\n"
        yield "data: [DONE]\n\n"

    def _chunk(self, choice: int, delta: dict[str, Any], reason: str | None = None) -> str:
        choices = [{"index": choice, "delta": delta, "finish_reason": reason, "logprobs": None}]
        return f"data: {json.dumps({**self.head, 'object': 'chat.completion.chunk', 'choices': choices})}\n\n"


def _reason(event: Finished) -> str:
    if event.reason in ("stop", "length"):
        return event.reason
    if event.reason == "timeout":
        raise RequestFailure(504, "The answer took too long.", "server_error", "timeout")
    raise RequestFailure(500, "The answer failed; the server's log says why.", "server_error")
