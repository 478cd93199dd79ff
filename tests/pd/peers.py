"""Senders and receivers in processes of their own, forked from one that has imported NIXL, which takes seconds.

Tests make no agent in their own process: one that has used UCX ends with a crash in the destructors of NIXL 1.5.1's
libraries where the system has libnl-route, too. Processes here end without destructors.
"""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from blake3 import blake3

from lmcache_ext.engine.directory import Directory
from lmcache_ext.pd import (
    Agent,
    DirectoryStore,
    Ended,
    Geometry,
    Memory,
    Receiver,
    ReceiverOptions,
    Released,
    Sender,
    SenderOptions,
    Target,
    identity,
    sums,
)
from lmcache_ext.pd.agent import State
from lmcache_ext.pd.links import Links
from lmcache_ext.pd.options import Sums
from lmcache_ext.pd.parts import Runs, at
from lmcache_ext.pd.shards import Page, Pieces, Rank, chunk_pieces
from lmcache_ext.policies import POLICIES
from lmcache_ext.transfer.pool import HostPool, Shape
from tests.processes import send

os.environ.setdefault("UCX_NET_DEVICES", "lo")
os.environ.setdefault("NIXL_LOG_LEVEL", "WARN")
with contextlib.suppress(ImportError):  # tests skip without it
    import nixl._api  # noqa: F401 - here, so that it is imported before a fork

CHUNK = 256  # tokens
ROWS = 16  # blocks of a slot
ROW = 4096  # bytes
_forks = multiprocessing.get_context("forkserver")
_forks.set_forkserver_preload(["pytest", "tests.pd.peers"])


def key(name: object) -> bytes:
    """A chunk's key."""
    return blake3(repr(name).encode()).digest()


def keys(name: object, count: int) -> list[bytes]:
    """Of a request."""
    return [key((name, i)) for i in range(count)]


def content(of: bytes, nbytes: int) -> np.ndarray:
    """What a chunk holds: bytes that differ everywhere and follow from its key."""
    words = np.arange(-(-nbytes // 8), dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    return (words ^ np.frombuffer(of[:8], np.uint64)).view(np.uint8)[:nbytes]


def part_of(of: bytes, tokens: int, geometry: Geometry) -> np.ndarray:
    """What one rank has of a chunk's content."""
    if not geometry.pages:
        return content(of, geometry.nbytes(tokens))
    whole = at(geometry, 0, 1)
    everything, part = content(of, whole.nbytes(tokens)), np.zeros(geometry.nbytes(tokens), np.uint8)
    pages = [Page(*page) for layers, *page in geometry.pages for _ in range(layers)]
    rows = whole.nbytes(tokens) // whole.row_bytes
    for source, target, nbytes in chunk_pieces(pages, rows, Rank(0, 1), Rank(geometry.rank, geometry.ranks)):
        part[target : target + nbytes] = everything[source : source + nbytes]
    return part


def until(condition: Callable[[], Any], seconds: float = 10.0, what: str = "") -> Any:
    """Wait for a condition, and return what it says."""
    deadline = time.monotonic() + seconds
    while True:
        value = condition()
        if value:
            return value
        assert time.monotonic() < deadline, what or "it did not come"
        time.sleep(0.005)


def pool_of(slots: int, row: int = ROW) -> HostPool:
    """A pool."""
    return HostPool.create(Shape(slots, ROWS, row), "lmcache-test-pd")


def flips(pool: HostPool) -> Sums:
    """A sum after which a byte of every third slot changes."""
    size, honest = pool.shape.slot_bytes, sums.of_pool(pool)

    def take(asked: Sequence[tuple[int, Runs]]) -> Iterator[bytes]:
        for (slot, runs), total in zip(asked, honest(asked), strict=True):
            if slot % 3 == 2:
                offset, nbytes = runs[-1]
                pool.bytes[slot * size + offset + int(total[0]) * nbytes // 256] ^= 1
            yield total

    return take


class Served:
    """What a process of its own answers."""

    def cpu_s(self) -> float:
        """Processor time of the process so far."""
        return time.process_time()


class Decode(Served):
    """A decode engine's rank."""

    def __init__(
        self, slots: int, row: int = ROW, ttl_s: float = 60.0, layout: str = "", far: bool = False,
        part: dict[str, Any] | None = None, **options: Any,
    ) -> None:  # fmt: skip
        self.pool = pool_of(slots, row)
        self.directory = Directory(POLICIES.get("LRU")())
        self.directory.grow(slots)
        self.lock = threading.Lock()
        if far:  # as if every peer were on another machine
            identity.same_machine = lambda peer: False  # type: ignore[assignment]
        self.store = DirectoryStore(self.directory, self.lock, ttl_s)
        self.geometry = Geometry.of(self.pool.shape, CHUNK, layout, **(part or {}))
        self.receiver = Receiver(
            Memory.of(self.pool), sums.of_pool(self.pool), self.geometry, self.store, ReceiverOptions(**options)
        )

    def target(self) -> Target:
        """Where it listens."""
        part = self.geometry
        return Target("127.0.0.1", self.receiver.init_port, self.receiver.alloc_port, part.rank, part.ranks)

    def wrong(self) -> list[str]:
        """What is visible and is not what its key says, and what the directory finds wrong with itself."""
        with self.lock:
            faults = self.directory.check()
            for chunk in self.directory.chunks():
                nbytes = self.geometry.nbytes(chunk.tokens)
                start = chunk.slot * self.pool.shape.slot_bytes
                wanted = part_of(chunk.key, chunk.tokens, self.geometry)
                if not np.array_equal(self.pool.bytes[start : start + nbytes], wanted):
                    faults.append(f"slot {chunk.slot} has other bytes")
            return faults

    def match(self, names: Sequence[bytes]) -> int:
        """How many leading keys are there."""
        with self.lock:
            return self.directory.match(names)

    def state(self) -> dict[str, Any]:
        """Numbers."""
        with self.lock:
            now = {"used": self.directory.used, "leases": self.directory.leases, "ready": len(self.directory)}
        return {**now, "holds": self.store.holds, "open": self.receiver.open, **self.receiver.counts}

    def claim(self, req_id: str) -> None:
        """The decode request came."""
        self.store.claim(req_id)

    def close(self) -> None:
        """End."""
        assert self.receiver.close(10)


class Prefill(Served):
    """A prefill engine's rank: fills slots, hands them over, frees them."""

    def __init__(
        self, slots: int, row: int = ROW, pace_s: float = 0.0, layout: str = "", flip: bool = False,
        part: dict[str, Any] | None = None, loses: bool = False, **options: Any,
    ) -> None:  # fmt: skip
        self.pool = pool_of(slots, row)
        self.geometry = Geometry.of(self.pool.shape, CHUNK, layout, **(part or {}))
        if loses:  # its word that nothing is in flight any more, as with a connection that breaks
            cancel = Links._cancel
            Links._cancel = lambda self, handover, quiet: quiet or cancel(self, handover, quiet)  # type: ignore
        take = flips(self.pool) if flip else sums.of_pool(self.pool)
        self.sender = Sender(Memory.of(self.pool), take, self.geometry, SenderOptions(**options))
        self.free = list(range(slots))
        self.ended: dict[str, Ended] = {}
        self.due: list[tuple[str, Target, int, bytes, int]] = []  # chunks that are not ready yet
        self.pace_s = pace_s
        self.stop = threading.Event()
        self.slots = slots
        threading.Thread(target=self._run, daemon=True).start()

    def begin(self, req_id: str, target: Target, names: Sequence[bytes], last: int = CHUNK) -> None:
        """Start a request whose chunks come one after the other."""
        self.sender.begin(req_id, target, names, last)
        tokens = [CHUNK] * (len(names) - 1) + [last]
        self.due.extend((req_id, target, i, name, n) for i, (name, n) in enumerate(zip(names, tokens, strict=True)))

    def begin_only(self, req_id: str, target: Target, names: Sequence[bytes]) -> None:
        """Start a request of which nothing becomes ready."""
        self.sender.begin(req_id, target, names)

    def _run(self) -> None:
        while not self.stop.is_set():
            for event in self.sender.poll():
                if isinstance(event, Released):
                    self.free.append(event.slot)
                else:
                    assert event.req_id not in self.ended
                    self.ended[event.req_id] = event
            if self.due and self.free:
                req_id, target, index, name, tokens = self.due.pop(0)
                slot, nbytes = self.free.pop(0), self.geometry.nbytes(tokens)
                start = slot * self.pool.shape.slot_bytes
                self.pool.bytes[start : start + nbytes] = part_of(name, tokens, self.geometry)
                self.sender.ready(req_id, target, index, slot)
                time.sleep(self.pace_s)
            else:
                time.sleep(0.001)

    def cancel(self, req_id: str, target: Target) -> None:
        """Cancel."""
        self.sender.cancel(req_id, target)

    def outcomes(self) -> dict[str, str]:
        """Of all that have ended."""
        return {req_id: event.outcome.value for req_id, event in self.ended.items()}

    def texts(self) -> list[str]:
        """Why they ended so."""
        return [event.text for event in self.ended.values()]

    def quiet(self) -> bool:
        """Whether all slots are back."""
        return not self.due and len(self.free) == self.slots

    def state(self) -> dict[str, Any]:
        """Numbers."""
        return {"free": len(self.free), "due": len(self.due), **self.sender.counts}

    def close(self) -> None:
        """End."""
        assert self.sender.close(10)
        self.stop.set()


class Parts(Served):
    """Two agents without a protocol: one slot of each of several senders, one of a receiver."""

    def meet(self, sources: list[np.ndarray], cuts: list[Pieces], nbytes: int) -> np.ndarray:
        """Write what `cuts` say of each source into one slot, and return that slot."""
        target = pool_of(2, nbytes // ROWS)
        receiver = Agent(Memory.of(target), receives=True)
        for source, pieces in zip(sources, cuts, strict=True):
            pool = pool_of(2, len(source) // ROWS)
            pool.bytes[len(source) :] = source  # slot 1
            sender = Agent(Memory.of(pool), receives=False)
            remote = sender.connect(receiver.metadata(), Memory.of(target))
            transfer = sender.write_pieces(remote, 1, 1, pieces)
            until(lambda one=transfer: one.state() is not State.PROC)
            assert transfer.state() is State.DONE and transfer.nbytes == pieces[:, 2].sum()
            sender.drop(remote)
            sender.close()
        receiver.close()
        assert not target.bytes[:nbytes].any(), "written beside the slot"
        return target.bytes[nbytes:].copy()

    def close(self) -> None:
        """Nothing is open."""


def _serve(pipe: Any, kind: type[Served], arguments: dict[str, Any]) -> None:
    """A process' life: answers calls of methods, one after the other."""
    os.environ.update(arguments.pop("env", {}))
    logging.disable(logging.WARNING)
    try:
        served = kind(**arguments)
        while True:
            name, given = pipe.recv()
            pipe.send((True, getattr(served, name)(*given)))
            if name == "close":
                break
    except EOFError:
        pass  # the test has ended
    except BaseException:
        pipe.send((False, traceback.format_exc()))
    os._exit(0)


class Peer:
    """A `Decode` or `Prefill` in a process of its own."""

    def __init__(self, kind: type[Served], **arguments: Any) -> None:
        self._pipe, theirs = _forks.Pipe()
        self.process = _forks.Process(target=_serve, args=(theirs, kind, arguments), daemon=True)
        self.process.start()
        theirs.close()

    def __call__(self, method: str, *given: Any) -> Any:
        """Call a method there."""
        self._pipe.send((method, given))
        assert self._pipe.poll(30), f"no answer to {method}"
        good, answer = self._pipe.recv()
        assert good, answer
        return answer

    def signal(self, number: signal.Signals) -> None:
        """SIGSTOP, SIGCONT, SIGKILL."""
        assert self.process.pid is not None
        send(self.process.pid, number)

    def kill(self) -> None:
        """End it at once, if it still runs."""
        if self._pipe.closed:
            return
        if self.process.is_alive():
            self.signal(signal.SIGKILL)
        self.process.join(10)
        self._pipe.close()
        self.process.close()

    def close(self) -> None:
        """End it in order."""
        self("close")
        self.process.join(10)
        assert self.process.exitcode == 0
        self._pipe.close()
        self.process.close()
