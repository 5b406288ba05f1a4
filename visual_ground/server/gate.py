"""What every request passes before a route sees it: its size, its key; and what is counted after it."""

from __future__ import annotations

import asyncio
import hmac
import json
import time
from collections.abc import Awaitable, Callable, MutableMapping
from contextlib import suppress
from typing import Any

from visual_ground.server.failures import RequestFailure, busy
from visual_ground.server.metrics import Metrics

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

# Without a key: whether the server is up, and pictures, whose addresses are signed if there is one.
OPEN = ("/health", "/images/", "/thumbnails/")
# What is read of a refused body: clients read no answer before they have sent theirs, and call a closed connection a
# network error.
MAX_DISCARDED_BYTES = 64_000_000
# Of the largest body: what all requests together may hold in memory.
BODIES_AT_ONCE = 16


class Gate:
    """An ASGI application around another.

    Args:
        app: the application inside.
        metrics: where requests are counted.
        max_bytes: the largest body.
        api_key: what clients must send; None lets everybody in.
        body_seconds: within which a body must have come.
    """

    def __init__(
        self, app: Any, metrics: Metrics, max_bytes: int, api_key: str | None, body_seconds: float = 60.0
    ) -> None:
        self.app, self.metrics, self.max_bytes, self.api_key = app, metrics, max_bytes, api_key
        self.body_seconds, self.held_bytes = body_seconds, 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request pass, or answer it."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started, status, body = time.monotonic(), 500, _Body(self, receive)

        async def counted_send(message: MutableMapping[str, Any]) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            self._check(scope)
            await self.app(scope, body.receive, counted_send)
        except RequestFailure as failure:
            await body.discard()
            await _answer(failure, counted_send)
        finally:
            self.held_bytes -= body.seen
            route = getattr(scope.get("route"), "path", "other")
            self.metrics.count(scope["method"], route, status, time.monotonic() - started)

    def _check(self, scope: Scope) -> None:
        headers = {name.lower(): value for name, value in scope["headers"]}
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length) > self.max_bytes:
            raise self.too_large()
        kind = headers.get(b"content-type", b"").partition(b";")[0].strip().lower()
        # Any web page may make a browser send another kind here, without asking first.
        if scope["method"] == "POST" and kind != b"application/json":
            raise RequestFailure(415, f"Content-Type must be application/json, got {kind.decode('latin-1')[:80]!r}.")
        if self.api_key is None or scope["path"].startswith(OPEN):
            return
        if not hmac.compare_digest(headers.get(b"authorization", b""), f"Bearer {self.api_key}".encode()):
            message = "The API key is missing or wrong. Send it as: Authorization: Bearer KEY."
            raise RequestFailure(401, message, "authentication_error", "invalid_api_key")

    def too_large(self) -> RequestFailure:
        """Return the refusal of a body that is too large."""
        return RequestFailure(413, f"The request is larger than {self.max_bytes} bytes.", code="request_too_large")


class _Body:
    """The body of one request, as it comes."""

    def __init__(self, gate: Gate, receive: Receive) -> None:
        self.gate, self._receive, self.seen, self._more = gate, receive, 0, True
        self._until = time.monotonic() + gate.body_seconds

    async def receive(self) -> MutableMapping[str, Any]:
        """Return the next message of ASGI.

        Raises:
            RequestFailure: it is too large, comes too slowly, or all bodies together are too large.
        """
        if not self._more:  # Whether the client is still there is asked for as long as an answer takes.
            return await self._receive()
        message = await self._next()
        count = len(message.get("body", b""))
        self.seen, self.gate.held_bytes = self.seen + count, self.gate.held_bytes + count
        if self.seen > self.gate.max_bytes:
            await self.discard()
            raise self.gate.too_large()
        if self.gate.held_bytes > BODIES_AT_ONCE * self.gate.max_bytes:
            await self.discard()
            raise busy(1)
        return message

    async def _next(self) -> MutableMapping[str, Any]:
        try:
            message = await asyncio.wait_for(self._receive(), max(0.0, self._until - time.monotonic()))
        except asyncio.TimeoutError as error:
            self._more = False
            late = f"The request did not come within {self.gate.body_seconds:g} seconds."
            raise RequestFailure(408, late, code="request_timeout", headers={"Connection": "close"}) from error
        self._more = message.get("more_body", False)
        return message

    async def discard(self) -> None:
        """Read what is left of a body that is refused."""
        discarded = 0
        with suppress(RequestFailure):
            while self._more and discarded < MAX_DISCARDED_BYTES:
                discarded += len((await self._next()).get("body", b""))


async def _answer(failure: RequestFailure, send: Send) -> None:
    body = json.dumps(failure.body).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    headers += [(name.lower().encode(), value.encode()) for name, value in failure.headers.items()]
    await send({"type": "http.response.start", "status": failure.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
