"""The thin layer over NIXL: one agent, one registered range of memory, writes into a peer's slots.

A sender's agent has no progress thread: its transfers go on while their state is asked for, and it costs nothing while
idle. A receiver's has one, because over TCP the target's side moves the bytes, and it must sleep between polls: NIXL's
own Python API fixes the delay at 0, which is a whole core for as long as the agent lives.

UCX chooses how bytes travel (`UCX_TLS`; on one host the kernel copies from process to process) and at which devices it
listens (`UCX_NET_DEVICES`, all by default; `lo` for one host). Both come from the environment, once for each process.

With UCX, a transfer that is DONE is complete at the target: NIXL flushes first. One that is not is never released
unless its peer was dropped before: then UCX neither reads our memory nor writes the peer's any more, but for what the
kernel's sockets hold.
"""

from __future__ import annotations

import contextlib
import enum
import itertools
import logging
import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lmcache_ext.errors import ConfigError, TransferError
from lmcache_ext.pd.shards import Pieces
from lmcache_ext.sleepy import sleepy
from lmcache_ext.transfer.pool import HostPool, Shape

logger = logging.getLogger("lmcache_ext.pd")

PROGRESS_SLEEP_US = 1000  # an idle agent costs 3 % of a core; a message waits this much longer at most
_KINDS = {"cpu": "DRAM", "cuda": "VRAM"}
_numbers = itertools.count(1)
_making = threading.Lock()  # the class of the agent's configuration is swapped while one is made


def _nothing() -> None:
    """Host memory can be used by any thread."""


class State(enum.Enum):
    """Of a transfer."""

    PROC = "in flight"
    DONE = "complete at the target"
    ERR = "failed; nothing is in flight"


@dataclass(frozen=True)
class Memory:
    """A range that slots lie in, one behind the other."""

    address: int
    nbytes: int
    slot_bytes: int
    device: str = "cpu"  # or "cuda"
    device_id: int = 0
    enter: Callable[[], None] = field(default=_nothing, compare=False)
    """what a thread calls before it uses a GPU's memory"""

    @classmethod
    def of(cls, pool: HostPool) -> Memory:
        """A host pool's slots."""
        return cls(pool.address, pool.shape.nbytes, pool.shape.slot_bytes)

    @classmethod
    def on_gpu(cls, address: int, shape: Shape, device: int) -> Memory:
        """Slots in a GPU's memory, whose context the calling thread has. Raises TransferError: it has none."""
        from lmcache_ext.transfer.driver import Driver

        return cls(address, shape.nbytes, shape.slot_bytes, "cuda", device, Driver().enter)

    @property
    def slots(self) -> int:
        """How many there are."""
        return self.nbytes // self.slot_bytes

    @property
    def kind(self) -> str:
        """NIXL's name for it."""
        return _KINDS[self.device]


class Remote:
    """A peer's slots, as one agent knows them. Owned by that agent."""

    def __init__(self, name: str, memory: Memory, slots: Any) -> None:
        self.name = name
        self.memory = memory
        self.slots = slots
        self.dropped = False


class Transfer:
    """One write. Owned by its agent, and asked from the agent's thread only."""

    def __init__(self, agent: Any, handle: Any, remote: Remote, nbytes: int) -> None:
        self._agent = agent
        self._handle = handle
        self._remote = remote
        self._state = State.PROC
        self.nbytes = nbytes
        self._look(lambda: agent.transfer(handle))

    def state(self) -> State:
        """How it is; asking moves it on."""
        if self._state is State.PROC:
            if self._remote.dropped:
                self._state = State.ERR
                self._release()
            else:
                self._look(lambda: self._agent.check_xfer_state(self._handle))
        return self._state

    def _look(self, ask: Any) -> None:
        try:
            self._state = State[ask()]
        except Exception as error:  # nixl's own, one class for each of its codes
            logger.debug("transfer to %s: %s", self._remote.name, error)
            self._state = State.ERR
        if self._state is not State.PROC:
            self._release()

    def _release(self) -> None:
        try:
            self._handle.release()
        except Exception as error:
            logger.warning("NIXL keeps a transfer to %s: %s", self._remote.name, error)


class Agent:
    """Not thread-safe: one thread owns it. No method waits, but a write on one host may be carried out within `write`.

    Args:
        memory: registered whole, once.
        receives: whether others write into it: it gets a progress thread.
        backends: NIXL's names of what moves bytes.

    Raises:
        ConfigError: NIXL is missing, or can't start or register the memory.
    """

    def __init__(self, memory: Memory, receives: bool, backends: Sequence[str] = ("UCX",)) -> None:
        if memory.device not in _KINDS:
            raise ConfigError("pd_buffer_device", memory.device, f"must be one of {', '.join(_KINDS)}")
        self.memory = memory
        self._backends = list(backends)
        memory.enter()
        self.name = f"lmcache-ext-pd-{os.getpid()}-{next(_numbers)}"
        try:
            self._nixl: Any = _sleepy_agent(self.name, receives)
            for backend in backends:
                self._nixl.create_backend(backend, {})
            place = [(memory.address, memory.nbytes, memory.device_id, "")]
            self._known = self._nixl.register_memory(place, memory.kind, backends=self._backends)
        except ImportError:
            raise ConfigError("pd_role", "sender or receiver", "needs nixl: pip install nixl") from None
        except Exception as error:
            raise ConfigError("nixl_backends", ",".join(backends), f"NIXL can't start it: {error}") from None
        self._slots = self._list("NIXL_INIT_AGENT", memory)

    def _list(self, name: str, memory: Memory) -> Any:
        """All slots as a prepared list, which NIXL keeps as one strided entry."""
        spaced = [[memory.address, memory.slot_bytes, memory.device_id, memory.slot_bytes, memory.slots]]
        return self._nixl.prep_xfer_dlist(name, np.array(spaced, np.uint64), memory.kind, backends=self._backends)

    def metadata(self) -> bytes:
        """What a sender's `connect` needs."""
        return bytes(self._nixl.get_agent_metadata())

    def connect(self, metadata: bytes, memory: Memory) -> Remote:
        """Know a peer. Raises TransferError if what it sent is no metadata, or does not cover `memory`."""
        try:
            name = self._nixl.add_remote_agent(metadata)
            name = name.decode() if isinstance(name, bytes) else str(name)
            return Remote(name, memory, self._list(name, memory))
        except Exception as error:
            raise TransferError(f"NIXL does not take the receiver's metadata: {error}") from None

    def write(self, remote: Remote, slots: Sequence[int], into: Sequence[int]) -> Transfer:
        """Write whole slots. Raises TransferError if NIXL refuses; a failed transfer is a state, not an exception."""
        try:
            handle = self._nixl.make_prepped_xfer(
                "WRITE", self._slots, list(slots), remote.slots, list(into), b"", backends=self._backends
            )
        except Exception as error:
            raise TransferError(f"NIXL refuses a write to {remote.name}: {error}") from None
        return Transfer(self._nixl, handle, remote, len(slots) * self.memory.slot_bytes)

    def write_pieces(self, remote: Remote, slot: int, into: int, pieces: Pieces) -> Transfer:
        """Write parts of one slot: a partial chunk, or what a rank of another TP size has of it (`shards.py`).

        Args:
            pieces: [n, 3] offset in `slot`, offset in `into`, bytes.
        """
        mine = self.memory.address + slot * self.memory.slot_bytes + pieces[:, 0]
        theirs = remote.memory.address + into * remote.memory.slot_bytes + pieces[:, 1]
        try:
            handle = self._nixl.initialize_xfer(
                "WRITE",
                self._nixl.get_xfer_descs(_rows(mine, pieces, self.memory), self.memory.kind),
                self._nixl.get_xfer_descs(_rows(theirs, pieces, remote.memory), remote.memory.kind),
                remote.name,
                b"",
                backends=self._backends,
            )
        except Exception as error:
            raise TransferError(f"NIXL refuses a write to {remote.name}: {error}") from None
        return Transfer(self._nixl, handle, remote, int(pieces[:, 2].sum()))

    def drop(self, remote: Remote) -> None:
        """Cut the connection. Transfers that were in flight fail with the next look at them."""
        if remote.dropped:
            return
        remote.dropped = True
        with contextlib.suppress(Exception):
            remote.slots.release()
        with contextlib.suppress(Exception):  # it was disconnected already
            self._nixl.remove_remote_agent(remote.name)

    def close(self) -> None:
        """Forget the memory and end; nobody can write to it through this agent any more. Peers were dropped before."""
        if self._nixl is None:
            return
        with contextlib.suppress(Exception):
            self._slots.release()
        with contextlib.suppress(Exception):
            self._nixl.deregister_memory(self._known, backends=self._backends)
        self._nixl = self._slots = self._known = None  # the last reference ends its thread


def _rows(addresses: Any, pieces: Pieces, memory: Memory) -> Any:
    device = np.full(len(pieces), memory.device_id)
    return np.stack([addresses, pieces[:, 2], device], axis=1).astype(np.uint64)


def _sleepy_agent(name: str, progress: bool) -> Any:
    """An agent whose progress thread sleeps between two polls."""
    from nixl import _api as api

    with _making:
        original: Any = api.nixlBind.nixlAgentConfig
        api.nixlBind.nixlAgentConfig = sleepy(original, PROGRESS_SLEEP_US)
        try:
            return api.nixl_agent(name, api.nixl_agent_config(enable_prog_thread=progress, backends=[]))
        finally:
            api.nixlBind.nixlAgentConfig = original
