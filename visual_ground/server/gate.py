"""What every request passes before a route sees it: its size, its key; and what is counted after it."""

from __future__ import annotations

import hmac
import json
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from visual_ground.server.failures import RequestFailure
from visual_ground.server.metrics import Metrics

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

# Without a key: whether the server is up, and pictures, whose addresses are signed if there is one.
OPEN = ("/health", "/images/", "/thumbnails/")
# What is read of a refused body: clients read no answer before they have sent theirs, and call a closed connection a
# network error.
MAX_DISCARDED_BYTES = 64_000_000


class Gate:
    """An ASGI application around another.

    Args:
        app: the application inside.
        metrics: where requests are counted.
        max_bytes: the largest body.
        api_key: what clients must send; None lets everybody in.
    """

    def __init__(self, app: Any, metrics: Metrics, max_bytes: int, api_key: str | None) -> None:
        self.app, self.metrics, self.max_bytes, self.api_key = app, metrics, max_bytes, api_key

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request pass, or answer it."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started, status, seen, more = time.monotonic(), 500, 0, True

        async def counted_send(message: MutableMapping[str, Any]) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        async def limited_receive() -> MutableMapping[str, Any]:
            nonlocal seen, more
            message = await receive()
            more = message.get("more_body", False)
            seen += len(message.get("body", b""))
            if seen > self.max_bytes:
                raise self._too_large()
            return message

        try:
            self._check(scope)
            await self.app(scope, limited_receive, counted_send)
        except RequestFailure as failure:
            if more:
                await _discard_body(receive)
            await _answer(failure, counted_send)
        finally:
            route = getattr(scope.get("route"), "path", "other")
            self.metrics.count(scope["method"], route, status, time.monotonic() - started)

    def _check(self, scope: Scope) -> None:
        headers = {name.lower(): value for name, value in scope["headers"]}
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length) > self.max_bytes:
            raise self._too_large()
        if self.api_key is None or scope["path"].startswith(OPEN):
            return
        if not hmac.compare_digest(headers.get(b"authorization", b""), f"Bearer {self.api_key}".encode()):
            message = "The API key is missing or wrong. Send it as: Authorization: Bearer KEY."
            raise RequestFailure(401, message, "authentication_error", "invalid_api_key")

    def _too_large(self) -> RequestFailure:
        return RequestFailure(413, f"The request is larger than {self.max_bytes} bytes.", code="request_too_large")


async def _discard_body(receive: Receive) -> None:
    discarded = 0
    while discarded < MAX_DISCARDED_BYTES:
        message = await receive()
        discarded += len(message.get("body", b""))
        if not message.get("more_body", False):
            return


async def _answer(failure: RequestFailure, send: Send) -> None:
    body = json.dumps(failure.body).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": failure.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
