"""The engines of one role: calls that end, who is up, who has least to do."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import io
import logging
import math
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import aiohttp

from dynamo_lmcache.proxy.args import Backend, Limits
from dynamo_lmcache.proxy.errors import Broken, EngineFault, Refusal, Silent, Unreachable
from dynamo_lmcache.proxy.metrics import Metrics

logger = logging.getLogger(__name__)

_KEEPALIVE_S = 3.0  # below the 5 s after which vLLM closes idle connections, or a request meets the closing
_SILENT_PROBES = 3  # vLLM's server may be busy for seconds with a long prompt; refused connections count at once
_PROBE_DOWN_S = 1.0
_PIECES = 1 << 18


class Engine:
    """One ``vllm serve``. One event loop only."""

    def __init__(self, role: str, backend: Backend, http: aiohttp.ClientSession, limits: Limits) -> None:
        self.role = role
        self.backend = backend
        self.url = backend.url
        self.up = True
        self.fault = ""  # the last one, for people
        self.tokens = 0  # under way, as estimated
        self.requests = 0
        self.used = 0.0  # monotonic; for turns among equals
        self.unheard = 0  # waits for its notifications that ended with nothing, in a row
        self._http = http
        self._limits = limits
        self._silent = 0
        self._suspect = asyncio.Event()
        self._lost = asyncio.Event()

    @contextlib.contextmanager
    def carrying(self, tokens: int) -> Iterator[None]:
        """Count a request of so many tokens for the length of a with block."""
        self.tokens += tokens
        self.requests += 1
        self.used = time.monotonic()
        try:
            yield
        finally:
            self.tokens -= tokens
            self.requests -= 1

    async def call(
        self,
        method: str,
        path: str,
        *,
        headers: Mapping[str, str],
        data: bytes | None = None,
        limit_s: float | None = None,
    ) -> aiohttp.ClientResponse:
        """Send a request; the answer when its head is there. The caller closes it.

        Args:
            limit_s: seconds without a byte, before the answer and within it; ``--answer-timeout`` when None.

        Raises:
            EngineFault: see errors.py. An engine that can't be reached is marked as down.
        """
        timeout = aiohttp.ClientTimeout(
            connect=self._limits.connect_timeout, sock_read=limit_s or self._limits.answer_timeout
        )
        try:
            return await self._http.request(
                method, self.url + path, data=_payload(data), headers=headers, timeout=timeout, allow_redirects=False
            )
        except (aiohttp.ClientError, OSError) as error:
            raise self._translated(error) from None

    async def ask(self, path: str, *, headers: Mapping[str, str], data: bytes) -> tuple[aiohttp.ClientResponse, bytes]:
        """Post, and all of the answer, which is closed; given up as soon as the engine counts as down.

        Raises:
            EngineFault: see errors.py.
        """

        async def ask() -> tuple[aiohttp.ClientResponse, bytes]:
            answer = await self.call("POST", path, headers=headers, data=data)
            return answer, await self.read(answer)

        asked, lost = asyncio.ensure_future(ask()), asyncio.ensure_future(self._lost.wait())  # no deadline: `call` has
        try:
            await asyncio.wait((asked, lost), return_when=asyncio.FIRST_COMPLETED)
            if not asked.done():
                raise Silent(f"{self.role} {self.url} is down: {self.fault}")
            return await asked
        finally:
            for task in (asked, lost):
                task.cancel()
            await asyncio.gather(asked, lost, return_exceptions=True)

    async def read(self, answer: aiohttp.ClientResponse) -> bytes:
        """All of an answer's body, and the answer closed. Raises EngineFault."""
        try:
            return await answer.read()
        except (aiohttp.ClientError, OSError) as error:
            raise self._translated(error) from None
        finally:
            answer.close()

    def _translated(self, error: Exception) -> EngineFault:
        what = f"{self.role} {self.url}: {error or type(error).__name__}"
        if isinstance(error, aiohttp.ClientConnectorError | aiohttp.ConnectionTimeoutError):
            self.mark_down(str(error))
            self.suspect()
            return Unreachable(what)
        self.suspect()
        return Silent(what) if isinstance(error, asyncio.TimeoutError) else Broken(what)

    def mark_down(self, fault: str) -> None:
        """Send it nothing until a probe succeeds."""
        if self.up:
            logger.warning("%s %s is down: %s", self.role, self.url, fault)
        self.up, self.fault = False, fault
        self._lost.set()

    def suspect(self) -> None:
        """Something is odd: probe soon."""
        self._suspect.set()

    async def probe(self) -> None:
        """Ask its ``/health`` once, and mark it."""
        timeout = aiohttp.ClientTimeout(total=self._limits.connect_timeout)
        try:
            async with self._http.get(self.url + "/health", timeout=timeout, allow_redirects=False) as answer:
                fault = None if answer.status == 200 else f"/health answers {answer.status}"
        except asyncio.TimeoutError:
            self._silent += 1
            if self._silent >= _SILENT_PROBES or not self.up:
                self.mark_down(f"no answer to {self._silent} probes of {self._limits.connect_timeout:g} s")
            return
        except (aiohttp.ClientError, OSError) as error:
            fault = str(error) or type(error).__name__
        self._silent = 0
        if fault is not None:
            self.mark_down(fault)
        elif not self.up:
            logger.warning("%s %s is up", self.role, self.url)
            self.up, self.fault = True, ""
            self._lost.clear()

    async def watch(self) -> None:
        """Probe for ever: now and then, sooner after a fault or while it is down."""
        while True:
            every = self._limits.probe_interval if self.up else min(_PROBE_DOWN_S, self._limits.probe_interval)
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._suspect.wait(), every)
                await asyncio.sleep(every / 10)  # many faults at once are one reason to look
            self._suspect.clear()
            await self.probe()

    def state(self) -> dict[str, Any]:
        """What ``/health`` says about it."""
        return {"url": self.url, "up": self.up, "fault": self.fault, "requests": self.requests, "tokens": self.tokens}


class Pool:
    """All engines of one role."""

    def __init__(self, role: str, engines: Sequence[Engine], limits: Limits, metrics: Metrics) -> None:
        self.role = role
        self.engines = tuple(engines)
        self.retry_after = math.ceil(limits.probe_interval)
        for engine in engines:
            _show(engine, metrics)

    @property
    def up(self) -> list[Engine]:
        """Those that requests may be sent to."""
        return [engine for engine in self.engines if engine.up]

    def choose(self, session: str | None = None, without: Collection[Engine] = ()) -> Engine | None:
        """The one with the fewest tokens under way, or the session's own; None if there is none.

        Args:
            session: requests of one session go to one engine as long as it is up, whatever its load. Where engines
                come or go, only the sessions of those move (rendezvous hashing).
            without: engines that have been tried.
        """
        able = [engine for engine in self.engines if engine.up and engine not in without]
        if not able:
            return None
        if session is not None:
            return max(able, key=lambda engine: hashlib.blake2b(f"{session}\0{engine.url}".encode()).digest())
        return min(able, key=lambda engine: (engine.tokens, engine.requests, engine.used))

    def none_up(self) -> Refusal:
        """What to tell a client when `choose` finds none."""
        faults = "; ".join(f"{engine.url}: {engine.fault or 'failed just now'}" for engine in self.engines)
        return Refusal(503, f"no {self.role} is up ({faults})", retry_after=self.retry_after)


def _payload(data: bytes | None) -> io.BytesIO | bytes | None:
    # aiohttp hands bytes to the transport in one go, and warns; a file it sends piece by piece.
    return io.BytesIO(data) if data is not None and len(data) > _PIECES else data


def _show(engine: Engine, metrics: Metrics) -> None:
    metrics.engine_up.labels(engine.role, engine.url).set_function(lambda: float(engine.up))
    metrics.engine_tokens.labels(engine.role, engine.url).set_function(lambda: float(engine.tokens))


def open_session() -> aiohttp.ClientSession:
    """The client for all engines: no proxy from the environment, no cookies, bodies as they come."""
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=_KEEPALIVE_S),
        cookie_jar=aiohttp.DummyCookieJar(),
        auto_decompress=False,
        skip_auto_headers=("User-Agent", "Accept-Encoding"),
        read_bufsize=2**18,
    )
