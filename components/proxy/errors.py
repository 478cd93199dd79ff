"""What a client is told when something fails, in the form that vLLM and the OpenAI clients use.

Refusal            becomes an HTTP answer with an error body
EngineRefusal      likewise, in an engine's own words
EngineFault        one call of one engine failed
├── Unreachable    nothing of the request has reached it
├── Broken         it was reached, and the connection broke or made no sense
└── Silent         it was reached, and did not answer in time
"""

from __future__ import annotations

import json
from http import HTTPStatus

_TYPES = {
    400: "BadRequestError",
    404: "NotFoundError",
    429: "RateLimitError",
    500: "InternalServerError",
    502: "BadGatewayError",
    503: "ServiceUnavailableError",
    504: "GatewayTimeoutError",
}


_MAX_TEXT = 500


class Refusal(Exception):
    """This request gets no answer from an engine; the client is told `status` and `message`.

    Args:
        retry_after: whole seconds after which another try may do, for the header Retry-After.
    """

    def __init__(self, status: int, message: str, *, retry_after: int | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.retry_after = retry_after


class EngineRefusal(Exception):
    """An engine answered with an error that the client shall see as it is.

    Args:
        body: what it said; what is not JSON is put into an error body.
        retry_after: its header of that name.
    """

    def __init__(self, status: int, body: bytes, content_type: str, retry_after: str | None = None) -> None:
        super().__init__(f"status {status}")
        self.status = status
        self.body = body
        if content_type != "application/json":
            self.body = error_body(status, body[:_MAX_TEXT].decode(errors="replace"))
        self.retry_after = retry_after


class EngineFault(Exception):
    """A call of an engine failed; the text names the engine."""

    status = 502


class Unreachable(EngineFault):
    """No connection: it is safe to ask another engine."""

    status = 503


class Broken(EngineFault):
    """The connection ended, or what came is not HTTP."""


class Silent(EngineFault):
    """No byte within the time allowed."""

    status = 504


def error_body(status: int, message: str) -> bytes:
    """The JSON body of an error: ``{"error": {"message", "type", "param", "code"}}``."""
    kind = _TYPES.get(status) or HTTPStatus(status).phrase.replace(" ", "")
    error = {"message": message, "type": kind, "param": None, "code": status}
    return json.dumps({"error": error}).encode()


def error_event(status: int, message: str) -> bytes:
    """The error as an event for a stream whose status line has long been sent, and the stream's end."""
    return b"data: " + error_body(status, message) + b"\n\ndata: [DONE]\n\n"
