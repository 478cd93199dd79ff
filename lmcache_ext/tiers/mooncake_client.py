"""Mooncake's client: found, set up without stopping the process, and told which memory it may touch."""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import importlib.util
import math
import os
import re
import socket
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from lmcache_ext.errors import ConfigError
from lmcache_ext.tiers.base import address_of

_GREETING = b"GET / HTTP/1.0\r\nHost: localhost\r\n\r\n"
_REMEMBERED = 64  # idle ranges
_PORTS = {"http": 80, "https": 443, "etcd": 2379, "redis": 6379}


def library() -> Any:
    """The module `mooncake.store`. Raises ConfigError that says what to install.

    Its builds want one CUDA runtime or another, also `non-cuda` 0.3.13 (CUDA 12's): one from PyPI does, without a GPU.
    """
    try:
        return importlib.import_module("mooncake.store")
    except ImportError as error:
        wanted = re.search(r"libcudart\.so\.\d+", str(error))
        if wanted is None:
            why = f"needs a package mooncake-transfer-engine ({error}) and libibverbs1, librdmacm1, libnuma1, libcurl4"
            raise ConfigError("url", "mooncakestore://", why) from error
        runtime = wanted.group()
    spec = importlib.util.find_spec("nvidia")
    for folder in spec.submodule_search_locations or () if spec else ():
        for path in Path(folder).glob(f"*/lib/{runtime}"):
            ctypes.CDLL(str(path), ctypes.RTLD_GLOBAL)
            return importlib.import_module("mooncake.store")
    why = f"this build of Mooncake needs {runtime}: pip install nvidia-cuda-runtime-cu{runtime.rpartition('.')[2]}"
    raise ConfigError("url", "mooncakestore://", why)


def connect(settings: dict[str, str], timeout: float) -> Any:
    """A client that is set up, in milliseconds; other threads stand still meanwhile.

    Raises:
        OSError: master or metadata server do not answer within `timeout` seconds each.
        ConfigError: they do, and Mooncake refuses the settings all the same.
    """
    store = library()
    _limit(timeout)
    host, _, port = settings["master_server_addr"].rpartition(":")
    require_answer(host.strip("[]"), int(port), timeout)
    metadata = urlsplit(settings["metadata_server"])
    if metadata.hostname:
        require_answer(metadata.hostname, metadata.port or _PORTS.get(metadata.scheme, 0), timeout)
    client = store.MooncakeDistributedStore()
    code = client.setup(dict(settings))
    if code:
        why = f"was refused with error {code}; Mooncake says why on the standard error"
        raise ConfigError("mooncake setup", settings["master_server_addr"], why)
    return client


def _limit(timeout: float) -> None:
    """How long Mooncake waits. It reads the environment only, at the process' first client; what is set there stays."""
    ms, seconds = str(math.ceil(timeout * 1000)), str(math.ceil(timeout))
    limits = {
        "MC_RPC_TIMEOUT_MS": ms,  # a silent master
        "MC_RPC_CONNECT_TIMEOUT_MS": ms,
        "MC_TCP_PROGRESS_TIMEOUT_SEC": seconds,  # a peer that takes or sends nothing
        "MC_TCP_STATUS_TIMEOUT_SEC": seconds,
        "MC_TCP_ADMISSION_TIMEOUT_MS": ms,
        "MC_STORE_CLIENT_SETUP_RETRIES": "2",  # of 20: each lasts a second, and nothing else runs
        "MC_LOG_LEVEL": "WARNING",
    }
    for name, value in limits.items():
        os.environ.setdefault(name, value)


def require_answer(host: str, port: int, timeout: float) -> None:
    """Whether a server lives: it answers nonsense, or hangs up. One that is stopped accepts, and says nothing.

    Raises:
        OSError: nothing came within `timeout` seconds.
    """
    try:
        with socket.create_connection((host, port), timeout=timeout) as link, contextlib.suppress(ConnectionResetError):
            link.sendall(_GREETING)
            link.recv(1)
    except OSError as error:
        raise OSError(f"no answer from {host}:{port}: {error}") from error


@dataclass(eq=False)
class _Range:
    start: int
    nbytes: int
    memory: memoryview  # keeps it mapped, if somebody owns it
    forget: bool  # as soon as nobody uses it
    users: int = 0

    def holds(self, start: int, nbytes: int) -> bool:
        return self.start <= start and start + nbytes <= self.start + self.nbytes

    def meets(self, other: _Range) -> bool:
        return self.start < other.start + other.nbytes and other.start < self.start + self.nbytes


class Ranges:
    """Memory that the client knows. Thread-safe.

    A part that lies in memory known already costs a look. Else all of its owner's memory is registered, and kept from
    being unmapped, until `_REMEMBERED` others were used after it. Memory whose owner can't be held on to (`view_at`) is
    registered part by part, and only while it is used: other memory may lie there later.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._client: Any = None  # guarded by _lock, as all below
        self._kept: list[_Range] = []
        self._known: list[_Range] = []  # the last one used comes last

    def open(self, client: Any) -> None:
        """Register what was to be kept. Raises OSError."""
        with self._lock:
            for known in self._kept:
                _register(client, known)
            self._client = client

    def close(self) -> None:
        """Let go of all memory. Nothing is used any more."""
        with self._lock:
            for known in [*self._known, *self._kept]:
                self._client.unregister_buffer(known.start)
            self._known, self._kept = [], []

    def keep(self, memory: memoryview) -> None:
        """Register `memory` from now on, or once there is a client, until `close`. Raises OSError."""
        known = _Range(address_of(memory), memory.nbytes, memory, forget=False)
        with self._lock:
            if self._client is not None:
                self._make_room_for(known)
                _register(self._client, known)
            self._kept.append(known)

    @contextlib.contextmanager
    def using(self, views: Sequence[memoryview]) -> Iterator[None]:
        """All `views`, none of them empty, are registered inside. Raises OSError."""
        taken: list[_Range] = []
        try:
            with self._lock:
                for view in views:
                    taken.append(self._take(view))  # noqa: PERF401 - those before one that fails are taken
            yield
        finally:
            with self._lock:
                for known in taken:
                    known.users -= 1
                self._trim()

    def _take(self, view: memoryview) -> _Range:
        start = address_of(view)
        known = next((each for each in (*self._kept, *self._known) if each.holds(start, view.nbytes)), None)
        if known is None:
            known = _whole(view)
            self._make_room_for(known)
            _register(self._client, known)
        elif known in self._known:
            self._known.remove(known)
        if known not in self._kept:
            self._known.append(known)
        known.users += 1
        return known

    def _make_room_for(self, new: _Range) -> None:
        """Mooncake takes no range that meets another."""
        for known in [each for each in self._known if not each.users and each.meets(new)]:
            self._drop(known)

    def _trim(self) -> None:
        idle = [known for known in self._known if not known.users]
        spare = [known for known in idle if known.forget]
        old = [known for known in idle if not known.forget][:-_REMEMBERED]
        for known in (*spare, *old):
            self._drop(known)

    def _drop(self, known: _Range) -> None:
        self._client.unregister_buffer(known.start)
        self._known.remove(known)


def _whole(view: memoryview) -> _Range:
    """All of the memory that `view` is a part of, or only that part if it belongs to nobody."""
    if not isinstance(view.obj, ctypes.Array):
        memory = memoryview(view.obj)
        if memory.contiguous and memory.nbytes >= view.nbytes:
            return _Range(address_of(memory), memory.nbytes, memory, forget=False)
    return _Range(address_of(view), view.nbytes, view, forget=True)


def _register(client: Any, known: _Range) -> None:
    code = client.register_buffer(known.start, known.nbytes)
    if code:
        raise OSError(f"mooncake could not register {known.nbytes} bytes of memory: error {code}")
