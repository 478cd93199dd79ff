"""Mooncake Store: a pool of memory on many machines, kept by a master (`mooncakestore://host:port`).

An object is one value of the store, named `lmcx<schema>:<key, hex>`. Header and parts are gathered into it, and
scattered from it, by Mooncake's own multi-buffer calls: no byte is copied here. The master is the only index.

What Mooncake's client (0.3.13) does, and what follows:

- `setup` and `close` hold the interpreter's lock, `setup` for a minute and more if the master is gone. It is called
  only after the master and the metadata server have just shown that they are alive.
- All other calls let go of the lock. They wait 30 s for a master or a peer that is silent; `transfer_timeout` becomes
  the limit, through environment variables, which are the only way. A master that is gone costs 4.3 s a call, always.
- The client finds a master again that was restarted, and announces its memory anew; it need never be replaced.
- A thread that waits for a transfer keeps a core busy. Hence no more than `transfers` at once.
- A put under a name that is taken does nothing and says 0: `write` removes first, unless `size` has just found nothing.
- Any call on a closed client crashes the process: `close` comes after the last call, or not at all.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import logging
import math
import mmap
import os
import socket
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from lmcache_ext.errors import ConfigError
from lmcache_ext.tiers.base import Parts, address_of
from lmcache_ext.tiers.header import BLOCK, SCHEMA
from lmcache_ext.tiers.medium import MEDIA, Found, Medium
from lmcache_ext.tiers.mooncake_client import Ranges, connect, library, require_answer
from lmcache_ext.tiers.urls import Address

logger = logging.getLogger("lmcache_ext.tiers")

_ABSENT = (-703, -704)  # being written, or not there
_NO_ROOM = -200
_PREFIX = "mooncake_"  # of the setting names in LMCache's extra_config
_DEFAULTS = {
    "metadata_server": "P2PHANDSHAKE",
    "protocol": "tcp",
    "rdma_devices": "",
    "global_segment_size": "3355443200",  # bytes of this process' memory that the pool gets; LMCache's default
    "local_buffer_size": "1073741824",
}
_SAME = {"device_name": "rdma_devices", "master_server_address": "master_server_addr"}
_TURNS = min(4, max(1, (os.cpu_count() or 1) // 4))  # each keeps a core busy while it waits
_OURS = {"transfer_timeout": "1", "transfers": str(_TURNS), "prefer_local_alloc": "0"}
_QUEUE = 10.0  # seconds that a transfer waits for those before it
_MOST = 128  # keys of one look-up, and keys that are remembered as absent


@MEDIA.register("mooncakestore")
class Mooncake(Medium):
    """Objects in the store of one master.

    Args:
        settings: what Mooncake's `setup` gets, as it is; `master_server_addr` and `local_hostname` are required.
        timeout: seconds that a silent master or peer gets; whole seconds for peers.
        transfers: puts and gets at once; a quarter of the cores, 1 to 4, if it is not said.
        prefer_local: put into this process' own part of the pool while there is room.
        connect: makes a client that is set up, from `settings` and `timeout`. Raises OSError, ConfigError.
    """

    shared = True
    bounded = True
    batch = _MOST

    def __init__(
        self,
        settings: Mapping[str, str],
        timeout: float = 1.0,
        transfers: int = _TURNS,
        prefer_local: bool = False,
        connect: Callable[[dict[str, str], float], Any] = connect,
    ) -> None:
        self.settings = dict(settings)
        self.transfers = transfers
        self._timeout = timeout
        self._prefer_local = prefer_local
        self._connect = connect
        self._turns = threading.BoundedSemaphore(transfers)
        self._making = threading.Lock()
        self._client: Any = None  # guarded by _making until it is there, then never changed
        self._how: Any = None  # how objects are placed
        self._ranges = Ranges()
        self._probes = itertools.count()
        self._absent: set[bytes] = set()  # `size` said so, and nothing was written since: saves `write` a call

    @classmethod
    def from_address(cls, address: Address) -> Mooncake:
        """`mooncakestore://host:port?name=value&…`, names with or without LMCache's `mooncake_` before them.

        Names that begin with `mooncake_` and that we do not know are Mooncake's business and go to its `setup`, too.
        Below the parameters lie those of the JSON file `MOONCAKE_CONFIG_PATH`, and below these the defaults.
        """
        host, _, port = address.location.strip("/").rpartition(":")
        if not host or not port.isdecimal():
            raise ConfigError("url", address.shown, "must name the master: mooncakestore://host:port")
        names = {name for name, _ in parse_qsl(urlsplit(address.url).query) if name.startswith(_PREFIX)}
        given = {name: address.text(name) for name in sorted({"local_hostname", *_DEFAULTS, *_SAME, *_OURS} | names)}
        values = {**_DEFAULTS, **_OURS, **_plain(_from_file()), **_plain(given)}
        values["master_server_addr"] = f"{host}:{port}"
        values.setdefault("local_hostname", _own_address(host.strip("[]"), int(port)))
        ours = {name: values.pop(name) for name in _OURS}
        for name in ("global_segment_size", "local_buffer_size"):
            if not values[name].isdecimal():
                raise address.refusal(name, values[name], "must be a number of bytes")
        timeout, transfers = (_positive(address, name, ours[name]) for name in ("transfer_timeout", "transfers"))
        local = ours["prefer_local_alloc"].lower() in ("1", "true", "yes", "on")
        return cls(values, timeout, math.ceil(transfers), local)

    # -- the client -------------------------------------------------------------------------------------------------

    def open(self) -> None:
        library()
        try:
            self.client()
        except OSError as error:
            logger.warning("mooncake at %s: %s; trying again later", self.settings["master_server_addr"], error)

    def close(self) -> None:
        """Takes 1 to 2 seconds, during which no other thread runs Python."""
        if self._client is not None:
            self._ranges.close()
            self._client.close()

    def register(self, memory: memoryview) -> None:
        """Announce memory in which many parts will lie, all of it at once; it stays mapped until `close`.

        Without it, ranges are registered as parts come along that lie in them: right, but slow for `rdma`.
        """
        self._ranges.keep(memory)

    def client(self) -> Any:
        """The client, made now if there is none. Raises OSError."""
        if self._client is not None:
            return self._client
        if not self._making.acquire(timeout=self._timeout):
            raise OSError("the client is being set up")
        try:
            if self._client is None:
                client = self._connect(self.settings, self._timeout)
                self._how = library().ReplicateConfig()
                if self._prefer_local:
                    self._how.preferred_segment = client.get_hostname()
                self._ranges.open(client)
                self._client = client
            return self._client
        finally:
            self._making.release()

    @contextlib.contextmanager
    def _transfer(self, views: Sequence[memoryview]) -> Iterator[tuple[list[list[int]], list[list[int]]]]:
        """A turn, and the addresses and lengths of registered memory, as the multi-buffer calls want them."""
        with self._ranges.using(views):
            arguments = [[address_of(view) for view in views]], [[view.nbytes for view in views]]
            if not self._turns.acquire(timeout=_QUEUE):
                raise OSError(f"{_QUEUE:g} s passed while other transfers were under way")
            try:
                yield arguments
            finally:
                self._turns.release()

    # -- objects ----------------------------------------------------------------------------------------------------

    def write(self, key: bytes, header: memoryview, parts: Parts) -> None:
        client, name = self.client(), name_of(key)
        if key not in self._absent:
            self._remove(client, name)
        self._absent.discard(key)
        with self._transfer(_filled(header, parts)) as (addresses, lengths):
            _require(client.batch_put_from_multi_buffers([name], addresses, lengths, self._how)[0], "put")

    def read(self, key: bytes, header: memoryview, parts: Parts) -> int:
        client, name = self.client(), name_of(key)
        views = _filled(header, parts)
        with self._transfer(views) as (addresses, lengths):
            code = client.batch_get_into_multi_buffers([name], addresses, lengths)[0]
            if code == sum(lengths[0]):
                return int(code)
            if code in _ABSENT:
                raise FileNotFoundError(name)
            size = self._size(client, name)  # a failure, or other bytes than were asked for?
            if size is None:
                raise FileNotFoundError(name)
            if size == sum(lengths[0]):
                _require(code, "get")
                raise OSError(f"mooncake: {code} bytes of {size} came")
            start = [[[min(size, BLOCK)]]]
            got = client.get_into_ranges([address_of(header)], [[name]], [[[0]]], [[[0]]], start)[0][0][0]
            _require(got, "get a header")
            return size

    def size(self, key: bytes) -> int | None:
        size = self._size(self.client(), name_of(key))
        if size is None:
            if len(self._absent) >= _MOST:
                self._absent.clear()
            self._absent.add(key)
        return size

    def sizes(self, keys: Sequence[bytes]) -> list[int | None]:
        """Two calls to the master; each protects the objects for the master's lease time."""
        client, names = self.client(), [name_of(key) for key in keys]
        there = [_require(code, "ask") > 0 for code in client.batch_is_exist(names)]
        asked = [name for name, is_there in zip(names, there, strict=True) if is_there]
        replicas = client.batch_get_replica_desc(asked) if asked else {}
        return [self._size_of(client, name, replicas.get(name)) for name in names]

    def _size_of(self, client: Any, name: str, replicas: Any) -> int | None:
        if not replicas:
            return None
        if not replicas[0].is_memory_replica():
            return self._size(client, name)
        return int(replicas[0].get_memory_descriptor().buffer_descriptor.size)

    def _size(self, client: Any, name: str) -> int | None:
        code = client.get_size(name)
        return None if code in _ABSENT else _require(code, "ask for the size")

    def remove(self, key: bytes) -> None:
        self._remove(self.client(), name_of(key))

    def _remove(self, client: Any, name: str) -> None:
        """By force: a reader's lease would keep it otherwise. A read under way gets other bytes at worst: a miss."""
        code = client.remove(name, True)
        if code not in _ABSENT:
            _require(code, "remove")

    def scan(self, sweep: bool, faults: list[str]) -> Iterator[Found]:
        """Nothing: the client can't list."""
        return iter(())

    def probe(self, write: bool) -> None:
        host, _, port = self.settings["master_server_addr"].rpartition(":")
        require_answer(host.strip("[]"), int(port), self._timeout)  # at once, where a call would take 4.3 s
        client = self.client()
        name = f"{name_of(b'')}probe-{self.settings['local_hostname']}-{os.getpid()}-{next(self._probes)}"
        _require(client.is_exist(name), "ask")
        if write:
            with self._transfer([memoryview(mmap.mmap(-1, BLOCK))]) as (addresses, lengths):  # no local buffer needed
                _require(client.batch_put_from_multi_buffers([name], addresses, lengths, self._how)[0], "put")
            self._remove(client, name)


def name_of(key: bytes) -> str:
    """What an object is called in the store."""
    return f"lmcx{SCHEMA}:{key.hex()}"


def _filled(header: memoryview, parts: Parts) -> list[memoryview]:
    return [header, *(part for part in parts if part.nbytes)]


def _require(code: int, what: str) -> int:
    """`code` if it is no error."""
    if code == _NO_ROOM:
        raise OSError(errno.ENOSPC, "mooncake has no room, or no memory at all")
    if code < 0:
        raise OSError(f"mooncake could not {what}: error {code}")
    return int(code)


def _plain(values: Mapping[str, object]) -> dict[str, str]:
    """By Mooncake's own names, as text; what is empty is left out."""
    short = {name.removeprefix(_PREFIX): str(value) for name, value in values.items() if str(value)}
    return {_SAME.get(name, name): value for name, value in short.items()}


def _from_file() -> dict[str, object]:
    path = os.environ.get("MOONCAKE_CONFIG_PATH")
    if not path:
        return {}
    try:
        values = json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise ConfigError("MOONCAKE_CONFIG_PATH", path, f"can't be read: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError("MOONCAKE_CONFIG_PATH", path, "must hold one JSON object")
    return values


def _own_address(host: str, port: int) -> str:
    """This machine's address on the way to the master. Sends nothing."""
    try:
        family, kind, *_, where = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as way:
            way.connect(where)
            return str(way.getsockname()[0])
    except OSError as error:
        raise ConfigError("local_hostname", "", f"can't be found out ({error}): name it in the URL") from error


def _positive(address: Address, name: str, value: str) -> float:
    try:
        number = float(value)
    except ValueError:
        number = 0.0
    if not 0 < number < math.inf:
        raise address.refusal(name, value, "must be a number greater than 0")
    return number
