"""Posts reports from a thread of its own."""

from __future__ import annotations

import asyncio
import json
import logging
import math
import queue
import threading
import time
from dataclasses import dataclass

import aiohttp

from lmcache_ext.metrics import Recorder

logger = logging.getLogger("lmcache_ext.telemetry")

EVENT = "request_store_finished"
STORED, FAILED = "stored", "failed"
_MAX_ANSWER = 1 << 16


@dataclass(frozen=True)
class Limits:
    """How much, and how long; times in seconds."""

    waiting: int = 4096  # reports that wait; more are dropped
    together: int = 256  # ids in one POST
    post: float = 2.0  # one POST, with its answer
    tries: int = 3  # of one POST
    pause: float = 0.1  # before the second try; doubles
    age: float = 10.0  # of a report that is still worth sending: the proxy waits no longer
    faults: int = 2  # POSTs given up in a row until the breaker opens
    cooldown: float = 1.0  # until it is tried again; doubles
    longest: float = 30.0  # cooldown


@dataclass(frozen=True)
class _Word:
    request_id: str
    status: str
    born: float  # monotonic


class Sender:
    """See `Telemetry`.

    One report a request, for all ranks together: `kv_rank` 0 of `world_size` 1, so that a reader who waits for as many
    ranks as a report names waits for one. `ranks` is how many there are.

    Args:
        url: where to post.
        model_name, ranks: said in each report.
        limits: for tests.
    """

    def __init__(self, url: str, model_name: str, ranks: int, limits: Limits | None = None) -> None:
        self._url = url
        self._facts = {"model_name": model_name, "world_size": 1, "kv_rank": 0, "ranks": ranks}
        self._limits = limits or Limits()
        self._queue: queue.SimpleQueue[_Word | None] = queue.SimpleQueue()  # its put never waits
        self._until = math.inf  # monotonic: when to end at the latest
        self._told = False  # there will be no more reports
        self._faults = 0
        self._cooldown = self._limits.cooldown
        self._retry_at: float | None = None  # monotonic; None: the breaker is closed
        self.sent = self.failed = self.stale = 0  # reports; written by our thread. Stale ones were not sent any more
        self.dropped = 0  # reports that the queue had no room for; written by the caller
        self._measured = (0, 0)
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._run, name="lmcache-telemetry", daemon=True)
        self._thread.start()

    # -- the scheduler's thread --------------------------------------------------------------------------------------

    def report(self, request_id: str, stored: bool) -> None:
        """Queue a report, or drop it. Never waits, never raises."""
        if self._ending.is_set() or self._queue.qsize() >= self._limits.waiting:
            self.dropped += 1
            return
        self._queue.put(_Word(request_id, STORED if stored else FAILED, time.monotonic()))

    @property
    def lost(self) -> int:
        """Reports that nobody got."""
        return self.failed + self.dropped + self.stale

    def measure(self, recorder: Recorder) -> None:
        """Count what became of reports since the last call."""
        now = (self.sent, self.lost)
        names = ("num_telemetry_reports", "num_lost_telemetry_reports")
        for name, new, old in zip(names, now, self._measured, strict=True):
            if new > old:
                recorder.count(name, new - old)
        self._measured = now

    def close(self, seconds: float = 1.0) -> None:
        """Send what waits, for `seconds` at most."""
        self._until = time.monotonic() + seconds
        self._ending.set()
        self._queue.put(None)
        self._thread.join(timeout=seconds + 0.5)

    # -- our thread --------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        loop = asyncio.new_event_loop()
        try:
            http = loop.run_until_complete(_session())
            while batch := self._take():
                for status in dict.fromkeys(word.status for word in batch):
                    words = [word for word in batch if word.status == status]
                    loop.run_until_complete(self._deliver(http, status, words))
            loop.run_until_complete(http.close())
        except Exception:  # e.g. at the interpreter's end
            logger.exception("telemetry has ended; nothing is reported from now on")
        finally:
            self._ending.set()
            loop.close()

    def _take(self) -> list[_Word]:
        """Wait for reports, and take what there is. Empty: that was all."""
        batch: list[_Word] = []
        while not self._told and len(batch) < self._limits.together:
            if batch and self._queue.empty():
                break
            word = self._queue.get()  # no deadline: idle until there is one, and `close` puts one
            if word is None:
                self._told = True
            else:
                batch.append(word)
        return batch

    async def _deliver(self, http: aiohttp.ClientSession, status: str, words: list[_Word]) -> None:
        if self._retry_at is not None:
            await self._pause(self._retry_at - time.monotonic())
        oldest = time.monotonic() - self._limits.age
        fresh = [word.request_id for word in words if word.born >= oldest]
        self.stale += len(words) - len(fresh)
        if not fresh:
            return
        text = json.dumps({"event": EVENT, "request_ids_set": fresh, **self._facts, "status": status}).encode()
        fault = await self._try(http, text)
        if fault:
            self.failed += len(fresh)
            self._failed(fault)
        else:
            self.sent += len(fresh)
            self._went_well()

    async def _try(self, http: aiohttp.ClientSession, text: bytes) -> str:
        """Post, a few times if need be. What went wrong; "": nothing."""
        fault, again = "there was no time left", True
        for number in range(1 if self._retry_at is not None else self._limits.tries):
            if number:
                await self._pause(self._limits.pause * 2 ** (number - 1))
            left = min(self._limits.post, self._until - time.monotonic())
            if left > 0 and again:
                fault, again = await _post(http, self._url, text, left)
                if not fault:
                    break
        return fault

    async def _pause(self, seconds: float) -> None:
        """Sleep, but not beyond the end."""
        end = time.monotonic() + seconds
        while not self._ending.is_set() and (left := end - time.monotonic()) > 0:
            await asyncio.sleep(min(left, 0.1))

    # -- the breaker -------------------------------------------------------------------------------------------------

    def _failed(self, fault: str) -> None:
        self._faults += 1
        if self._faults < self._limits.faults:
            return
        if self._retry_at is None:
            text = "reports to %s fail (%s): requests go on, and whoever waits for word of them waits in vain"
            logger.warning(text, self._url, fault)
        self._retry_at = time.monotonic() + self._cooldown
        self._cooldown = min(self._limits.longest, self._cooldown * 2)

    def _went_well(self) -> None:
        if self._retry_at is not None:
            logger.warning("reports to %s arrive again; %d were lost", self._url, self.lost)
        self._faults, self._retry_at, self._cooldown = 0, None, self._limits.cooldown


async def _session() -> aiohttp.ClientSession:
    return aiohttp.ClientSession(cookie_jar=aiohttp.DummyCookieJar(), headers={"Content-Type": "application/json"})


async def _post(http: aiohttp.ClientSession, url: str, text: bytes, seconds: float) -> tuple[str, bool]:
    """Post once. (what went wrong, or ""; whether another try may help)."""
    try:
        timeout = aiohttp.ClientTimeout(total=seconds)
        async with http.post(url, data=text, timeout=timeout, allow_redirects=False) as answer:
            await answer.content.read(_MAX_ANSWER)
    except asyncio.TimeoutError:
        return f"no answer within {seconds:.1f} s", True
    except (aiohttp.ClientError, OSError, ValueError) as error:
        return str(error) or type(error).__name__, True
    ok = 200 <= answer.status < 300
    return "" if ok else f"answer {answer.status}", answer.status >= 500 or answer.status == 429
