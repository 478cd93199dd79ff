"""From what vLLM raises to what an HTTP client sees."""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

from dynamo.llm.exceptions import HttpError, InvalidArgument
from vllm.exceptions import VLLMClientError, VLLMNotFoundError

logger = logging.getLogger(__name__)

Chunk = dict[str, Any]


class RequestError(Exception):
    """A request that this worker refuses; ``status`` is the HTTP status of the answer."""

    def __init__(self, message: str, *, status: int = 400) -> None:
        super().__init__(message)
        self.status = status


def http_status(error: Exception) -> int | None:
    """Return the status a client error deserves, or None for an error of ours."""
    if isinstance(error, RequestError):
        return error.status
    if isinstance(error, VLLMNotFoundError):
        return 404
    if isinstance(error, VLLMClientError | ValueError | TypeError):
        # vLLM's validation still raises bare ValueError and TypeError in places.
        return 400
    return None


async def as_http_errors(chunks: AsyncIterator[Chunk]) -> AsyncGenerator[Chunk, None]:
    """Pass chunks on, and raise client errors as those of Dynamo's that keep the status.

    Errors of ours pass unchanged: Dynamo reports them as 5xx and may retry elsewhere.
    """
    try:
        async for chunk in chunks:
            yield chunk
    except Exception as error:
        status = http_status(error)
        if status is None:
            raise
        logger.info("request refused with %d: %s", status, error)
        # The frontend shows the text of InvalidArgument (always 400) and hides that of HttpError.
        raise (HttpError(404, str(error)) if status == 404 else InvalidArgument(str(error))) from None
