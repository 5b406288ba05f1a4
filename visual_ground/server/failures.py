"""What can go wrong with a request, in the form in which OpenAI's clients read it."""

from __future__ import annotations

from typing import Any


class RequestFailure(Exception):
    """A request that is refused.

    Args:
        status: of HTTP.
        message: what came, what was expected, what to do.
        kind: OpenAI's type of the error.
        code: a short name, or None.
        headers: sent with the answer.
    """

    def __init__(
        self,
        status: int,
        message: str,
        kind: str = "invalid_request_error",
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.kind, self.code, self.headers = status, message, kind, code, headers or {}

    @property
    def body(self) -> dict[str, Any]:
        """The answer's JSON."""
        return {"error": {"message": self.message, "type": self.kind, "param": None, "code": self.code}}


def busy(seconds: int) -> RequestFailure:
    """Return the refusal of a request when the queue is full."""
    message = "Too many requests are waiting. Try again later."
    return RequestFailure(429, message, "rate_limit_error", "queue_full", {"Retry-After": str(seconds)})
