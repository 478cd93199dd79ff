"""The second half: the decoder's answer, passed to the client as it comes."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable

import aiohttp
from aiohttp import web

from dynamo_lmcache.proxy.args import Limits
from dynamo_lmcache.proxy.errors import Broken, EngineFault, Silent, error_event
from dynamo_lmcache.proxy.metrics import Metrics

logger = logging.getLogger(__name__)

_MAX_HELD = 1 << 20
_NOT_PASSED = {
    *("connection", "keep-alive", "transfer-encoding", "trailer", "upgrade", "proxy-authenticate", "content-length"),
    *("server", "date", "set-cookie", "x-request-id"),
}


class Gone(ConnectionError):
    """The client has left, or has to be cut off, after its answer began: there is nothing more to tell it."""


class Events:
    """Cuts a stream where events end, and changes no byte.

    A stream that breaks within an event must not leave half of it at the client, which would stumble over it before it
    sees our error. vLLM writes whole events, so hardly anything is ever held.
    """

    def __init__(self) -> None:
        self._held = b""

    def feed(self, data: bytes) -> bytes:
        """What may be sent now: all up to the end of the last whole event."""
        if not self._held and data.endswith(b"\n\n"):
            return data
        data = self._held + data
        end = max(data.rfind(b"\n\n") + 2, data.rfind(b"\r\n\r\n") + 4 if b"\r\n\r\n" in data else 0)
        if end < 2:
            end = 0
        if len(data) - end > _MAX_HELD:
            end = len(data)
        self._held = data[end:]
        return data[:end]

    def rest(self) -> bytes:
        """What is left at a stream's proper end."""
        held, self._held = self._held, b""
        return held


class Stall:
    """Ends waits on a peer that has gone silent, with one timer for a whole stream rather than one for each chunk."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._until = 0.0
        self._give_up: Callable[[], None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self.fired = False

    def expect(self, seconds: float, give_up: Callable[[], None]) -> None:
        """Call `give_up` unless something else is expected within `seconds`."""
        self._until = self._loop.time() + seconds
        self._give_up = give_up
        if self._timer is None or self._timer.when() > self._until:
            self.stop()
            self._timer = self._loop.call_at(self._until, self._look)

    def stop(self) -> None:
        """Nothing is expected any more."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _look(self) -> None:
        self._timer = None
        if self._loop.time() < self._until:
            self._timer = self._loop.call_at(self._until, self._look)
        elif self._give_up is not None:
            self.fired = True
            self._give_up()


def is_stream(answer: aiohttp.ClientResponse) -> bool:
    """Whether `answer` is a stream of events."""
    return answer.content_type == "text/event-stream"


def pass_headers(answer: aiohttp.ClientResponse, out: web.StreamResponse) -> None:
    """Copy what belongs to the answer and not to the connection."""
    for name, value in answer.headers.items():
        if name.lower() not in _NOT_PASSED:
            out.headers[name] = value


class Relay:
    """Passes streams on. One for the whole proxy."""

    def __init__(self, limits: Limits, metrics: Metrics) -> None:
        self._limits = limits
        self._metrics = metrics

    async def stream(
        self, request: web.Request, answer: aiohttp.ClientResponse, out: web.StreamResponse, first: Callable[[], None]
    ) -> None:
        """Send `answer`'s body to the client of `request` as `out`, chunk by chunk.

        An engine that breaks off, or sends nothing for ``--read-timeout``, ends it with an error event. A client that
        does not read for ``--client-timeout`` is disconnected. The caller closes `answer`, which tells vLLM to stop.

        Args:
            first: called when bytes have come.

        Raises:
            Gone: the client did not get it all.
        """
        stall = Stall()
        try:
            await out.prepare(request)
            fault = await self._pump(request, answer, out, stall, first)
            if fault is not None:
                self._metrics.stream_errors.inc()
                logger.warning("stream of %s: %s", answer.url.origin(), fault)
                stall.expect(self._limits.client_timeout, lambda: hang_up(request))
                await out.write(error_event(fault.status, f"the engine did not finish this answer: {fault}"))
            stall.expect(self._limits.client_timeout, lambda: hang_up(request))
            await out.write_eof()
        except Exception as error:
            if not isinstance(error, OSError):
                logger.exception("a stream failed in the proxy itself")
            raise Gone(str(error)) from error
        finally:
            stall.stop()

    async def _pump(
        self,
        request: web.Request,
        answer: aiohttp.ClientResponse,
        out: web.StreamResponse,
        stall: Stall,
        first: Callable[[], None],
    ) -> EngineFault | None:
        """Pass all on. Returns what went wrong at the engine; a client that is gone is an exception."""
        limit, events = self._limits.answer_timeout, Events()
        while True:
            stall.expect(limit, answer.close)
            try:
                data = await answer.content.readany()
            except (aiohttp.ClientError, OSError) as error:
                if stall.fired or isinstance(error, asyncio.TimeoutError):
                    return Silent(f"nothing came for {limit:g} s")
                return Broken(str(error) or type(error).__name__)
            if not data:
                break
            first()
            limit = self._limits.read_timeout
            stall.expect(self._limits.client_timeout, lambda: hang_up(request))
            if ready := events.feed(data):
                await out.write(ready)
        if rest := events.rest():
            await out.write(rest)
        return None


def hang_up(request: web.Request) -> None:
    """Cut the client's connection, if there still is one."""
    with contextlib.suppress(RuntimeError):
        if request.transport is not None:
            request.transport.abort()
