"""SIGTERM: leave discovery, let requests in flight finish, stop the engine, then the runtime."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import Any

from dynamo_lmcache.vllm.settings import RUNTIME_ENDED

logger = logging.getLogger(__name__)

# Frontends learn of a departure within this time; Dynamo's own variable and default.
_GRACE_VARIABLE = "DYN_GRACEFUL_SHUTDOWN_GRACE_PERIOD_SECS"
_GRACE_S = 5.0
_UNREGISTER_S = 5.0
_STOP_S = 30.0


class RuntimeLost(Exception):
    """Dynamo's runtime ended, and nobody had told this worker to."""


class InFlight:
    """Counts requests and tells when there are none. One event loop only."""

    def __init__(self) -> None:
        self._count = 0
        self._idle = asyncio.Event()
        self._idle.set()

    def __len__(self) -> int:
        return self._count

    @contextlib.contextmanager
    def track(self) -> Iterator[None]:
        """Count one request for the length of a with block."""
        self._count += 1
        self._idle.clear()
        try:
            yield
        finally:
            self._count -= 1
            if not self._count:
                self._idle.set()

    async def drained(self, timeout_s: float) -> bool:
        """Wait until nothing is in flight. Returns False if that takes longer than ``timeout_s``."""
        if self._idle.is_set():
            return True
        try:
            await asyncio.wait_for(self._idle.wait(), timeout=timeout_s)
        except asyncio.TimeoutError:
            return False
        return True


class Shutdown:
    """The way out. A second signal cuts it short."""

    def __init__(
        self, runtime: Any, in_flight: InFlight, *, drain_timeout_s: float, stop_engine: Callable[[], Awaitable[None]]
    ) -> None:
        self._runtime = runtime
        self._in_flight = in_flight
        self._drain_timeout_s = drain_timeout_s
        self._stop_engine = stop_engine
        self._endpoints: list[Any] = []
        self._task: asyncio.Task[None] | None = None

    @property
    def started(self) -> bool:
        """Whether the worker is on its way out: an engine that ends now has not died."""
        return self._task is not None

    def require_told(self) -> None:
        """The endpoints are no longer served: raises RuntimeLost unless that is this shutdown's doing."""
        if not self.started:
            raise RuntimeLost(RUNTIME_ENDED)

    def watch(self, endpoints: Sequence[Any]) -> None:
        """Take SIGTERM and SIGINT from now on. ``endpoints`` leave discovery first."""
        self._endpoints = list(endpoints)
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal)

    def _on_signal(self) -> None:
        if self._task is not None:
            logger.warning("second signal: leaving at once, %d requests are cut", len(self._in_flight))
            os._exit(130)
        self._task = asyncio.get_running_loop().create_task(self.run())

    async def run(self) -> None:
        """Go through the steps; none can hold up the next for longer than its deadline."""
        logger.info("shutting down: leaving discovery, %d requests in flight", len(self._in_flight))
        leaving = asyncio.gather(*(_leave(endpoint) for endpoint in self._endpoints), return_exceptions=True)
        await _within(leaving, _UNREGISTER_S, "leaving discovery")
        await asyncio.sleep(grace_period_s())
        if not await self._in_flight.drained(self._drain_timeout_s):
            logger.warning("%d requests are cut after %.0f s", len(self._in_flight), self._drain_timeout_s)
        await _within(self._stop_engine(), _STOP_S, "stopping the engine")
        self._runtime.shutdown()


def grace_period_s() -> float:
    """Return the seconds between leaving discovery and draining."""
    try:
        return max(0.0, float(os.environ.get(_GRACE_VARIABLE) or _GRACE_S))
    except ValueError:
        logger.warning(
            "%s=%r is not a number of seconds; using %.0f", _GRACE_VARIABLE, os.environ[_GRACE_VARIABLE], _GRACE_S
        )
        return _GRACE_S


async def _leave(endpoint: Any) -> None:
    await endpoint.unregister_endpoint_instance()


async def _within(step: Awaitable[Any], seconds: float, what: str) -> None:
    try:
        await asyncio.wait_for(step, timeout=seconds)
    except asyncio.TimeoutError:
        logger.warning("%s took longer than %.0f s; going on", what, seconds)
    except Exception:
        logger.exception("%s failed; going on", what)
