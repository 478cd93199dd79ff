"""Files written and read through NIXL's storage plugins: `nixl://posix/a/`, `nixl://gds_mt/a/`.

The disk tier's folder, files and promises; only the bytes take another way. An object's header goes by ordinary calls,
being host memory and small; each part is one transfer of the plugin between memory and the open file.

One transfer has one descriptor, so that a transfer that failed has nothing in flight that could still write into its
buffers. The POSIX plugin has one queue for each agent, where (NIXL 1.5.1 with `use_posix_aio`) one transfer's error is
that of all others, too, and of those that follow: so each object has an agent for itself meanwhile, and an agent that
saw an error is thrown away. Agents have no progress thread, which would burn a core, and cost nothing while idle.

The GDS plugins keep the state of each transfer apart. They share one agent, because memory that cuFile knows should be
registered once; where the driver has no nvidia-fs, cuFile runs in its compatibility mode.
"""

from __future__ import annotations

import contextlib
import itertools
import mmap
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lmcache_ext.errors import ConfigError
from lmcache_ext.tiers.base import Parts, address_of
from lmcache_ext.tiers.disk import Disk
from lmcache_ext.tiers.header import BLOCK
from lmcache_ext.tiers.medium import MEDIA
from lmcache_ext.tiers.urls import Address

PLUGINS = ("POSIX", "GDS_MT", "GDS")
_ALONE = ("POSIX",)  # plugins whose agents serve one object at a time
_RANGES = 4096  # registered ranges that an agent keeps: a pool's, or all slots' of a small one
_NAPS = (0.0001, 0.001)  # seconds between two looks at a transfer: the first, and what it grows to

Range = tuple[int, int]  # address and bytes
_numbers = itertools.count(1)


@MEDIA.register("nixl")
class NixlStorage(Disk):
    """`Disk` with NIXL's `plugin` as the way of the payload.

    Args:
        plugin: one of `PLUGINS`.
        backend_params: the plugin's own, such as `{"use_uring": "true"}` (POSIX) or `{"thread_count": "4"}` (GDS_MT).
        folders, odirect, fsync, shared: as for `Disk`.
    """

    def __init__(
        self,
        plugin: str,
        folders: Sequence[Path],
        odirect: bool = True,
        fsync: bool = False,
        shared: bool = False,
        backend_params: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(folders, odirect, fsync, shared)
        self._plugin = plugin
        self._params = dict(backend_params or {})
        self._sample = memoryview(mmap.mmap(-1, BLOCK))  # what the plugin is tried with
        self._lock = threading.Lock()
        self._idle: list[_Agent] = []  # guarded by _lock

    @classmethod
    def from_address(cls, address: Address) -> NixlStorage:
        """`nixl://posix/folder/,/folder/?odirect=1&fsync=0&shared=0&backend_params=use_uring:true,kernel_queue_size:64`"""
        name, _, path = address.location.partition("/")
        plugin = name.upper()
        if plugin not in PLUGINS:
            known = ", ".join(each.lower() for each in PLUGINS)
            raise ConfigError("url", address.shown, f"must be nixl://PLUGIN/folder with {known}; for buckets: s3://")
        folders = [Path(part) for part in f"/{path}".split(",") if part] if path else []
        if not folders or not all(folder.is_absolute() for folder in folders):
            raise ConfigError("url", address.shown, "must name absolute folders: nixl://posix/a/,/b/")
        odirect, fsync, shared = (address.flag(*flag) for flag in (("odirect", True), ("fsync",), ("shared",)))
        given = address.text("backend_params")
        pairs = [pair.partition(":") for pair in given.split(",") if pair]
        if not all(key and value for key, _, value in pairs):
            raise address.refusal("backend_params", given, "must be name:value,name:value")
        params = {key: value for key, _, value in pairs}
        return cls(plugin, folders, odirect, fsync, shared, params)

    def open(self) -> None:
        super().open()
        self._idle.append(self._agent())
        for folder in self.folders:
            try:
                super()._try_write(folder)
            except OSError:
                continue  # nothing can be written there by anybody: the breaker's business
            try:
                self._try_plugin(folder)
            except Exception as error:
                raise ConfigError("plugin", self._plugin, f"can't write to {folder}: {error}") from None

    def close(self) -> None:
        for agent in self._idle:
            agent.close()
        self._idle.clear()

    def _agent(self) -> _Agent:
        try:
            return _Agent(self._plugin, self._params)
        except ImportError as error:
            raise ConfigError("plugin", self._plugin, f"needs nixl, pip install nixl: {error}") from None
        except Exception as error:
            raise ConfigError("plugin", self._plugin, f"NIXL can't start it: {error}") from None

    @contextlib.contextmanager
    def _borrowed(self) -> Iterator[_Agent]:
        """An agent for one object, or the one there is for all."""
        if self._plugin not in _ALONE:
            yield self._idle[0]
            return
        with self._lock:
            agent = self._idle.pop() if self._idle else None
        agent = agent or self._agent()
        try:
            yield agent
        except BaseException:
            agent.close()
            raise
        with self._lock:
            self._idle.append(agent)

    def _try_write(self, folder: Path) -> None:
        super()._try_write(folder)
        self._try_plugin(folder)

    def _try_plugin(self, folder: Path) -> None:
        """One block on the plugin's way: cuFile refuses file systems that it can't find out about."""
        with self._scratch(folder, os.O_RDWR) as fd:
            self._move("WRITE", fd, 0, [self._sample])

    def _put(self, fd: int, header: memoryview, parts: Parts) -> None:
        super()._put(fd, header, ())
        self._move("WRITE", fd, header.nbytes, parts)
        written, wanted = os.fstat(fd).st_size, header.nbytes + sum(part.nbytes for part in parts)
        if written != wanted:
            raise OSError(f"{written} bytes were written, not {wanted}")

    def _get(self, fd: int, header: memoryview, parts: Parts) -> int:
        got = super()._get(fd, header, ())
        if got < header.nbytes:
            return got
        self._move("READ", fd, got, parts)
        return got + sum(part.nbytes for part in parts)

    def _move(self, verb: str, fd: int, at: int, parts: Parts) -> None:
        """Each part to or from its place in the file, one behind the other from `at` on."""
        ranges = [(address_of(part), part.nbytes) for part in parts if part.nbytes]
        if ranges:
            with self._borrowed() as agent, agent.file(fd, at + sum(nbytes for _, nbytes in ranges)):
                for address, nbytes in ranges:
                    agent.transfer(verb, (address, nbytes), fd, at)
                    at += nbytes


class _Agent:
    """One NIXL agent with one plugin. Thread-safe: every call into NIXL is short and made under a lock.

    Raises whatever NIXL raises; ImportError without NIXL.
    """

    def __init__(self, plugin: str, params: Mapping[str, str]) -> None:
        from nixl import _api as nixl

        self._name = f"lmcache-ext-tier-{os.getpid()}-{next(_numbers)}"
        self._nixl = nixl.nixl_agent(self._name, nixl.nixl_agent_config(enable_prog_thread=False, backends=[]))
        self._nixl.create_backend(plugin, dict(params))
        self._plugin = [plugin]
        self._lock = threading.Lock()
        self._ranges: OrderedDict[Range, Any] = OrderedDict()  # registered memory, guarded by _lock, as below
        self._busy: dict[Range, int] = {}  # how many transfers use it

    def close(self) -> None:
        """Deregister all memory. No transfer is under way, or the only one failed."""
        with self._lock, contextlib.suppress(Exception):
            while self._ranges:
                self._nixl.deregister_memory(self._ranges.popitem()[1], backends=self._plugin)

    @contextlib.contextmanager
    def file(self, fd: int, nbytes: int) -> Iterator[None]:
        """While an open file is known to the plugin."""
        with self._lock:
            known = self._nixl.register_memory([(0, nbytes, fd, "")], "FILE", backends=self._plugin)
        try:
            yield
        finally:
            with self._lock:
                self._nixl.deregister_memory(known, backends=self._plugin)

    def transfer(self, verb: str, memory: Range, fd: int, at: int) -> None:
        """Move one range; returns when nothing is in flight any more, which no deadline can hasten."""
        with self._registered(memory):
            address, nbytes = memory
            with self._lock:
                there = self._nixl.get_xfer_descs([(address, nbytes, 0)], "DRAM")
                file = self._nixl.get_xfer_descs([(at, nbytes, fd)], "FILE")
                handle = self._nixl.initialize_xfer(verb, there, file, self._name, backends=self._plugin)
                state = self._nixl.transfer(handle)
            try:
                self._finish(state, lambda: self._nixl.check_xfer_state(handle))
            finally:
                with self._lock:
                    self._nixl.release_xfer_handle(handle)

    def _finish(self, state: str, look: Callable[[], str]) -> None:
        nap, longest = _NAPS
        while state == "PROC":
            time.sleep(nap)
            nap = min(longest, nap * 1.5)
            with self._lock:
                state = look()
        if state != "DONE":
            raise OSError(f"NIXL's {self._plugin[0]} plugin ended a transfer with {state}")

    @contextlib.contextmanager
    def _registered(self, memory: Range) -> Iterator[None]:
        """While a range is known to the plugin; it stays known until others need its place."""
        with self._lock:
            if memory not in self._ranges:
                self._make_room()
                self._ranges[memory] = self._nixl.register_memory([(*memory, 0, "")], "DRAM", backends=self._plugin)
            self._ranges.move_to_end(memory)
            self._busy[memory] = self._busy.get(memory, 0) + 1
        try:
            yield
        finally:
            with self._lock:
                self._busy[memory] -= 1
                if not self._busy[memory]:
                    del self._busy[memory]

    def _make_room(self) -> None:
        while len(self._ranges) >= _RANGES:
            idle = next((each for each in self._ranges if each not in self._busy), None)
            if idle is None:
                return
            self._nixl.deregister_memory(self._ranges.pop(idle), backends=self._plugin)
