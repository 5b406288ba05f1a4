"""The routes of the server."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from visual_ground.errors import GroundingError, GroundingStateError
from visual_ground.generation.generate import check_index
from visual_ground.generation.retrieval_token import RetrievalSettings
from visual_ground.index.remote_images import LinkRules
from visual_ground.model import GroundedModel
from visual_ground.server.chats import Chat, encode
from visual_ground.server.engine import Engine, EngineLimits
from visual_ground.server.failures import RequestFailure
from visual_ground.server.gate import Gate
from visual_ground.server.metrics import Metrics
from visual_ground.server.pictures import Pictures, ShownIndex
from visual_ground.server.requests import chat_request, number
from visual_ground.server.vectors import embeddings, search

try:
    from fastapi import FastAPI, Request
    from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
    from starlette.exceptions import HTTPException
    from starlette.middleware.cors import CORSMiddleware
    from starlette.requests import ClientDisconnect
except ImportError as error:
    message = "The server needs fastapi and uvicorn; install them with: pip install 'visual-ground[serve]'"
    raise GroundingStateError(message) from error

# Pictures come from strangers: a browser must take them for nothing but pictures.
PICTURE_HEADERS = {"X-Content-Type-Options": "nosniff", "Content-Security-Policy": "default-src 'none'; sandbox"}


@dataclass(frozen=True)
class ServerSettings:
    """What a server allows.

    Args:
        model_name: what clients call the model.
        api_key: what clients must send; None lets everybody in.
        rules: where images of requests may be fetched from; nowhere by default.
        max_bytes: the largest body of a request.
        body_seconds: within which a body must have come.
        max_tokens: the length of answers if a request gives none.
        max_images: the most images of an answer, if a request gives none.
        origins: of web pages that may call the server; none by default.
        limits: the engine's.
    """

    model_name: str = "visual-ground"
    api_key: str | None = None
    rules: LinkRules = LinkRules()
    max_bytes: int = 20_000_000
    body_seconds: float = 60.0
    max_tokens: int = 64
    max_images: int | None = RetrievalSettings().max_images
    origins: Sequence[str] = ()
    limits: EngineLimits = EngineLimits()


class Routes:
    """What the server answers.

    Args:
        model: the grounded model.
        index: the pictures that it can show, or None.
        settings: what is allowed.

    Raises:
        GroundingValueError: an index that does not fit the model.
    """

    def __init__(self, model: GroundedModel, index: ShownIndex | None, settings: ServerSettings) -> None:
        check_index(index, model.active)
        self.model, self.settings = model, settings
        self.pictures, self.metrics = Pictures(index, settings.api_key), Metrics()
        self.engine = Engine(model, settings.limits)
        self._vectors = asyncio.Semaphore(1)
        created = int(time.time())
        self._entry = {"id": settings.model_name, "object": "model", "created": created, "owned_by": "you"}

    async def chat(self, request: Request) -> Response:
        """`/v1/chat/completions`."""
        body = await self._body(request)
        settings = self.settings
        with self.engine.expecting():
            usual = settings.max_tokens, settings.max_images
            asked = await asyncio.to_thread(chat_request, body, self.pictures, settings.rules, *usual)
            prompt = await asyncio.to_thread(encode, self.engine, asked)
            chat = Chat(self.engine, self.pictures, asked, prompt, settings.model_name)
        if asked.stream:
            return StreamingResponse(chat.pieces(), media_type="text/event-stream")
        answer = asyncio.ensure_future(chat.whole())
        while not (await asyncio.wait([answer], timeout=0.5))[0]:
            if await request.is_disconnected():
                answer.cancel()  # Ends its jobs with the tokens that they are at.
                return Response(status_code=499)
        return JSONResponse(answer.result())

    async def _body(self, request: Request) -> dict[str, Any]:
        try:
            text = (await request.body()).decode()
            body = json.loads(text)
            if "\\ud" in text.lower():  # Half a character, which no tokenizer takes, can only come in this form.
                json.dumps(body, ensure_ascii=False).encode()
        except ClientDisconnect as error:
            raise RequestFailure(499, "The body ended before it was whole.") from error
        except (ValueError, RecursionError) as error:
            message = "The body is not valid JSON in UTF-8."
            raise RequestFailure(400, message, code="invalid_json") from error
        if not isinstance(body, dict):
            raise RequestFailure(400, "The body must be a JSON object.")
        asked = body.get("model")
        if asked is not None and asked != self.settings.model_name:
            raise self._no_model(asked)
        return body

    async def embed(self, request: Request) -> Response:
        """`/v1/embeddings`."""
        body, settings = await self._body(request), self.settings
        async with self._vectors:
            given = self.model, body, settings.rules, settings.model_name
            return JSONResponse(await asyncio.to_thread(embeddings, *given))

    async def search(self, request: Request) -> Response:
        """`/v1/images/search`."""
        body = await self._body(request)
        count = number(body, "n", 5, 1, 100, whole=True)
        async with self._vectors:
            given = self.model, body, self.pictures, self.settings.rules, count
            return JSONResponse(await asyncio.to_thread(search, *given))

    async def models(self) -> dict[str, Any]:
        """`/v1/models`."""
        return {"object": "list", "data": [self._entry]}

    async def one_model(self, name: str) -> dict[str, Any]:
        """`/v1/models/NAME`."""
        if name != self.settings.model_name:
            raise self._no_model(name)
        return self._entry

    def _no_model(self, name: Any) -> RequestFailure:
        message = f"There is no model {str(name)[:80]!r}; this server has {self.settings.model_name!r}."
        return RequestFailure(404, message, code="model_not_found")

    async def health(self) -> dict[str, Any]:
        """`/health`."""
        return {"status": "ok", "waiting": self.engine.waiting}

    async def numbers(self) -> Response:
        """`/metrics`."""
        return PlainTextResponse(self.metrics.text(self.engine.waiting, *self.engine.batches))

    async def image(self, name: str, signature: str = "") -> Response:
        """`/images/ID`."""
        self.pictures.check(name, signature)
        data, media_type = await asyncio.to_thread(self.pictures.read, name)
        return Response(data, media_type=media_type, headers=PICTURE_HEADERS)

    async def thumbnail(self, name: str, signature: str = "") -> Response:
        """`/thumbnails/ID`."""
        self.pictures.check(name, signature)
        data = await asyncio.to_thread(self.pictures.thumbnail, name)
        return Response(data, media_type="image/png", headers=PICTURE_HEADERS)


def create_app(
    model: GroundedModel, index: ShownIndex | None = None, settings: ServerSettings | None = None
) -> FastAPI:
    """Return the server as an ASGI application.

    Args:
        model: the grounded model, which nothing else should use meanwhile.
        index: the pictures that it can show.
        settings: what is allowed.
    """
    settings = ServerSettings() if settings is None else settings
    routes = Routes(model, index, settings)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(routes.engine.close)

    app = FastAPI(title="visual_ground", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    app.post("/v1/chat/completions", response_model=None)(routes.chat)
    app.post("/v1/embeddings", response_model=None)(routes.embed)
    app.post("/v1/images/search", response_model=None)(routes.search)
    app.get("/v1/models")(routes.models)
    app.get("/v1/models/{name:path}")(routes.one_model)
    app.get("/health")(routes.health)
    app.get("/metrics", response_model=None)(routes.numbers)
    app.get("/images/{name:path}", response_model=None)(routes.image)
    app.get("/thumbnails/{name:path}", response_model=None)(routes.thumbnail)
    for kind in (RequestFailure, GroundingError, HTTPException, Exception):
        app.add_exception_handler(kind, _refuse)
    if settings.origins:
        app.add_middleware(CORSMiddleware, allow_origins=[*settings.origins], allow_methods=["*"], allow_headers=["*"])
    app.add_middleware(
        Gate,
        metrics=routes.metrics,
        max_bytes=settings.max_bytes,
        api_key=settings.api_key,
        body_seconds=settings.body_seconds,
    )
    return app


async def _refuse(request: Request, error: Exception) -> Response:
    if isinstance(error, HTTPException):
        failure = RequestFailure(error.status_code, str(error.detail))
    elif isinstance(error, RequestFailure):
        failure = error
    elif isinstance(error, GroundingError):
        failure = RequestFailure(400, str(error))
    else:  # A mistake of this server; whoever runs it finds it in the log.
        failure = RequestFailure(500, "The request failed; the server's log says why.", "server_error")
    return JSONResponse(failure.body, failure.status, failure.headers)
