"""Word to whoever waits for a request's KV: "stored", or "failed". Upstream's request telemetry, and its variables.

LMCACHE_REQUEST_TELEMETRY_TYPE      noop (default) or fastapi, which is HTTP
LMCACHE_REQUEST_TELEMETRY_ENDPOINT  where reports are posted
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from typing import Protocol
from urllib.parse import urlsplit

from lmcache_ext.errors import ConfigError
from lmcache_ext.metrics import Recorder
from lmcache_ext.telemetry.stores import Stores

__all__ = ["DEFAULT_ENDPOINT", "ENDPOINT", "TYPE", "Silent", "Stores", "Telemetry", "endpoint", "open_telemetry"]

logger = logging.getLogger("lmcache_ext.telemetry")

TYPE = "LMCACHE_REQUEST_TELEMETRY_TYPE"
ENDPOINT = "LMCACHE_REQUEST_TELEMETRY_ENDPOINT"
DEFAULT_ENDPOINT = "http://localhost:5768/api/v1/telemetry"


class Telemetry(Protocol):
    """Takes reports. For one thread, the scheduler's: no method but `close` waits for anything, and none raises."""

    def report(self, request_id: str, stored: bool) -> None:
        """`request_id`, vLLM's internal one, is over, and every rank is done with its stores."""

    def measure(self, recorder: Recorder) -> None:
        """Count what became of reports since the last call."""

    def close(self, seconds: float = 1.0) -> None:
        """Send what waits, for so long at most; then no more."""


class Silent:
    """Says nothing to anybody."""

    def report(self, request_id: str, stored: bool) -> None:
        """Nothing."""

    def measure(self, recorder: Recorder) -> None:
        """Nothing."""

    def close(self, seconds: float = 1.0) -> None:
        """Nothing."""


def endpoint(environ: Mapping[str, str] | None = None) -> str | None:
    """Where reports go; None: nowhere.

    Raises:
        ConfigError: a variable holds something else than what would do.
    """
    env = os.environ if environ is None else environ
    kind = env.get(TYPE, "").strip()
    url = env.get(ENDPOINT, "").strip()
    if kind.lower() in ("", "noop"):
        if url:
            logger.warning("%s=%s has no effect without %s=fastapi", ENDPOINT, url, TYPE)
        return None
    if kind.lower() != "fastapi":
        raise ConfigError(TYPE, kind, "must be fastapi, or noop for no reports")
    return _checked(url or DEFAULT_ENDPOINT)


def _checked(url: str) -> str:
    example = f"must be a URL like {DEFAULT_ENDPOINT}"
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise ConfigError(ENDPOINT, url, f"{error}; {example}") from None
    if parts.scheme not in ("http", "https") or not parts.hostname or port == 0:
        raise ConfigError(ENDPOINT, url, example)
    return url


def open_telemetry(model_name: str, ranks: int, environ: Mapping[str, str] | None = None) -> Telemetry:
    """What the environment asks for.

    Args:
        model_name: said in each report.
        ranks: workers of the engine, likewise.

    Raises:
        ConfigError: a variable is wrong, or aiohttp is not installed.
    """
    url = endpoint(environ)
    if url is None:
        return Silent()
    try:
        from lmcache_ext.telemetry.sender import Sender  # aiohttp is vLLM's dependency, not ours
    except ImportError as error:
        raise ConfigError(TYPE, "fastapi", f"{error}; pip install aiohttp") from None
    logger.info("requests whose stores are done are reported to %s", url)
    return Sender(url, model_name, ranks)
