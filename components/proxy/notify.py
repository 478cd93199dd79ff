"""Who waits for which prefill, and the two ways to hear that its KV is stored: HTTP (telemetry) and ZMQ.

Both take upstream's messages. Ours may add how it went, `status`: "stored" or "failed"; and a ProxyNotif its `rank`.
Messages are input from outside: what is malformed, too large or about nobody's request is counted and dropped.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import logging
import re
from collections.abc import Iterator
from typing import Any

import msgspec
import zmq
import zmq.asyncio
from aiohttp import web

from dynamo_lmcache.proxy.metrics import Metrics

logger = logging.getLogger(__name__)

MAX_NOTIFICATION = 64 * 1024
MAX_REPORT = 4 * 1024 * 1024  # many ids in one
_MAX_RANKS = 65536

# What vLLM makes of our X-Request-Id: cmpl-<id>-<prompt> or chatcmpl-<id>, and then 8 random hex digits.
_ENGINE_ID = re.compile(r"(?:(?:chat)?cmpl-)?([0-9a-f]{32}(?:\.\d{1,9})?)(?:-\d{1,5})?(?:-[0-9a-f]{8})?")

_UNREADABLE = (msgspec.MsgspecError, ValueError, RecursionError)


class Outcome(enum.Enum):
    """How the wait for one prefill's KV ended."""

    STORED = "stored"
    FAILED = "failed"  # a rank says that it could not
    TIMEOUT = "timeout"


class Wait:
    """One prefill that somebody waits for."""

    def __init__(self, ranks: int | None) -> None:
        self._needed = ranks
        self._ranks: set[int] = set()
        self._nameless = 0
        self._told: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()

    @property
    def heard(self) -> bool:
        """Whether anything has come."""
        return bool(self._ranks or self._nameless or self._told.done())

    def tell(self, ok: bool, rank: int | None, ranks: int | None) -> None:
        """One rank is done. `rank` None: it does not say which; `ranks` None: nor how many there are."""
        if self._told.done():
            return
        if not ok:
            self._told.set_result(Outcome.FAILED)
            return
        if rank is None:
            self._nameless += 1
        else:
            self._ranks.add(rank)
        needed = self._needed or ranks or 1
        if len(self._ranks) + self._nameless >= needed:
            self._told.set_result(Outcome.STORED)

    async def outcome(self, timeout_s: float) -> Outcome:
        """Wait until all ranks are done, one has failed, or `timeout_s` have passed."""
        try:
            return await asyncio.wait_for(asyncio.shield(self._told), timeout_s)
        except asyncio.TimeoutError:
            return Outcome.TIMEOUT


class Waits:
    """All prefills that are waited for, by their exact ids. One event loop only; holds nothing about anybody else."""

    def __init__(self, metrics: Metrics) -> None:
        self._waits: dict[str, Wait] = {}
        self._metrics = metrics
        metrics.waiting.set_function(lambda: float(len(self._waits)))

    def __len__(self) -> int:
        return len(self._waits)

    @contextlib.contextmanager
    def open(self, request_id: str, ranks: int | None = None) -> Iterator[Wait]:
        """Listen for `request_id` in a with block, which begins before the prefill is sent: word may come early.

        Args:
            ranks: how many are to report; None if each says how many there are.
        """
        assert request_id not in self._waits, request_id
        wait = self._waits[request_id] = Wait(ranks)
        try:
            yield wait
        finally:
            del self._waits[request_id]

    def tell(self, request_id: str, ok: bool, rank: int | None = None, ranks: int | None = None) -> bool:
        """Pass on what a rank says. False if nobody waits for that."""
        wait = self._waits.get(request_id)
        self.count("unknown" if wait is None else "known")
        if wait is None:
            return False
        wait.tell(ok, rank, ranks)
        return True

    def count(self, kind: str) -> None:
        """Count a message or an id in it."""
        self._metrics.notifications.labels(kind).inc()


def _ok(status: str | None) -> bool:
    return status in (None, "stored", "ok")


class ProxyNotif(msgspec.Struct, tag=True):
    """One rank has pushed all of `req_id`; upstream's message, and two fields that upstream's readers skip."""

    req_id: str
    rank: int | None = None
    status: str | None = None


class Report(msgspec.Struct):
    """Upstream's telemetry of one rank, and our `status`."""

    event: str
    request_ids_set: list[str]
    world_size: int = 1
    kv_rank: int | None = None
    status: str | None = None


_decode_notif = msgspec.msgpack.Decoder(ProxyNotif).decode
_decode_report = msgspec.json.Decoder(Report).decode


def own_id(engine_id: str) -> str | None:
    """Our id in the one that vLLM made of it, or None if it is not one of ours."""
    found = _ENGINE_ID.fullmatch(engine_id)
    return found[1] if found else None


def take_notification(frames: list[bytes], waits: Waits) -> None:
    """Handle one ZMQ message."""
    try:
        if len(frames) != 1:
            raise ValueError(f"{len(frames)} frames")
        notif = _decode_notif(frames[0])
    except _UNREADABLE as error:
        waits.count("malformed")
        logger.debug("malformed notification: %s", error)
        return
    waits.tell(notif.req_id, _ok(notif.status), notif.rank)


async def receive_notifications(socket: zmq.asyncio.Socket, waits: Waits) -> None:
    """Handle what comes on a PULL socket, until cancelled."""
    while True:
        try:
            take_notification(await socket.recv_multipart(), waits)
        except zmq.ZMQError as error:
            logger.warning("notifications: %s", error)
            await asyncio.sleep(0.1)  # never a busy loop


def bind_notifications(context: zmq.asyncio.Context, host: str, port: int) -> zmq.asyncio.Socket:
    """A PULL socket as upstream's senders expect it. Raises zmq.ZMQError if it can't be bound."""
    socket = context.socket(zmq.PULL)
    socket.setsockopt(zmq.LINGER, 0)
    socket.setsockopt(zmq.MAXMSGSIZE, MAX_NOTIFICATION)  # libzmq cuts whoever sends more off
    if ":" in host:
        socket.setsockopt(zmq.IPV6, 1)
        host = f"[{host}]"
    try:
        socket.bind(f"tcp://{host}:{port}")
    except zmq.ZMQError:
        socket.close()
        raise
    return socket


def take_report(text: bytes, waits: Waits) -> dict[str, Any] | None:
    """Handle one telemetry report; the answer to it, or None if it is malformed."""
    try:
        report = _decode_report(text)
        if not 1 <= report.world_size <= _MAX_RANKS:
            raise ValueError(f"world_size {report.world_size}")
    except _UNREADABLE as error:
        waits.count("malformed")
        logger.debug("malformed report: %s", error)
        return None
    told = 0
    if report.event == "request_store_finished":
        for engine_id in report.request_ids_set:
            request_id = own_id(engine_id) or ""
            told += waits.tell(request_id, _ok(report.status), report.kv_rank, report.world_size)
    return {"status": "ok", "notified": told, "total": len(report.request_ids_set)}


def telemetry_app(waits: Waits) -> web.Application:
    """The server that prefillers' LMCACHE_REQUEST_TELEMETRY_ENDPOINT points at."""

    async def report(request: web.Request) -> web.Response:
        answer = take_report(await asyncio.wait_for(request.read(), 30), waits)
        if answer is None:
            return web.json_response({"status": "error", "message": "not a telemetry report"}, status=400)
        return web.json_response(answer)

    app = web.Application(client_max_size=MAX_REPORT)
    app.router.add_post("/api/v1/telemetry", report)
    return app
