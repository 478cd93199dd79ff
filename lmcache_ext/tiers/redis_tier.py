"""Redis and Valkey: one string for each object, under `<prefix>:<schema>:<key, hex>`, by default `kvc:1:…`.

    redis://[user:password@]host[:port][/db]        valkey:// is the same
    rediss://…                                      with TLS; valkeys:// is the same
    unix://[user:password@]/path/of/socket
    redis-sentinel://[user:password@]host[:port],…  of the sentinels; user and password are the server's
    redis-cluster://[user:password@]host[:port],…   some of the nodes

The server is shared and bounded by its `maxmemory`; it drops what it likes, and what has expired. Nothing of what it
holds is known here unless a capacity is given. One connection for each of the runner's threads and server.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import SplitResult, unquote, urlsplit

from lmcache_ext.errors import ConfigError
from lmcache_ext.tiers.base import KEY_BYTES, Parts
from lmcache_ext.tiers.header import BLOCK, SCHEMA, Header, decode
from lmcache_ext.tiers.medium import MEDIA, Found, Medium
from lmcache_ext.tiers.urls import Address

if TYPE_CHECKING:
    from lmcache_ext.tiers.redis_link import Site

_KINDS = {"redis-sentinel": "sentinel", "redis-cluster": "cluster", "unix": "unix"}
_PORTS = {"sentinel": 26379}
_SECURE = {"rediss", "valkeys"}
_PROBES = 4  # keys of a cluster that a probe tries: one node that works is enough


@MEDIA.register("redis")
@MEDIA.register("rediss")
@MEDIA.register("unix")
@MEDIA.register("redis-sentinel")
@MEDIA.register("redis-cluster")
@MEDIA.register("valkey")
@MEDIA.register("valkeys")
class Redis(Medium):
    """Objects on the servers of `site`, with names that begin with `prefix`."""

    lasting = True
    shared = True
    bounded = True
    batch = 256

    def __init__(self, site: Site, prefix: str = "kvc") -> None:
        self._site = site
        self._prefix = prefix
        self._made: Any = None
        self._making = threading.Lock()

    @classmethod
    def from_address(cls, address: Address) -> Redis:
        """See the module for URLs, docs/tiers.md for parameters."""
        prefix = address.text("prefix", "kvc")
        if not re.fullmatch(r"[\w.-]+", prefix, re.ASCII):
            raise address.refusal("prefix", prefix, "must be letters, digits, _, . and -")
        return cls(_site_of(address), prefix)

    def open(self) -> None:
        """Does not connect: a server that is not there yet is a fault like later ones."""
        for name in ("tls_ca", "tls_cert", "tls_key"):
            file = getattr(self._site, name)
            if file and not Path(file).is_file():
                raise ConfigError(name, file, "must be a file in PEM format")

    def close(self) -> None:
        if self._made is None:
            return
        if self._site.kind == "cluster":
            self._made.disconnect_connection_pools()
        else:
            self._made.connection_pool.disconnect()

    @property
    def client(self) -> Any:
        """redis-py's client, with connections of redis_link.py. Raises what the library does, OSError among it."""
        if self._made is not None:
            return self._made
        if not self._making.acquire(timeout=self._site.timeout):
            raise TimeoutError("another thread still waits for the cluster")
        try:
            if self._made is None:
                from lmcache_ext.tiers.redis_link import connect

                self._made = connect(self._site)
            return self._made
        finally:
            self._making.release()

    # -- objects ----------------------------------------------------------------------------------------------------

    def name(self, key: bytes) -> str:
        """What the server knows `key` as."""
        return f"{self._prefix}:{SCHEMA}:{key.hex()}"

    def write(self, key: bytes, header: memoryview, parts: Parts) -> None:
        from lmcache_ext.tiers.redis_link import Value

        said = decode(header)
        expires = said.expires if isinstance(said, Header) else 0
        # A duration, because the server's clock may differ from ours.
        ttl = ("PX", max(1, round((expires - time.time()) * 1000))) if expires else ()
        self.client.execute_command("SET", self.name(key), Value([header, *parts]), *ttl)

    def read(self, key: bytes, header: memoryview, parts: Parts) -> int:
        from lmcache_ext.tiers.redis_link import Into

        nbytes = self.client.execute_command("GET", self.name(key), Into([header, *parts]))
        if nbytes is None:
            raise FileNotFoundError(self.name(key))
        return int(nbytes)

    def size(self, key: bytes) -> int | None:
        return self.sizes([key])[0]

    def sizes(self, keys: Sequence[bytes]) -> list[int | None]:
        """One round trip to each server. STRLEN also counts as a use, EXISTS would not."""
        from lmcache_ext.tiers.redis_link import Each

        names = [self.name(key) for key in keys]
        if self._site.kind != "cluster":
            found = self.client.execute_command("STRLEN", Each(names))
        else:
            pipe = self.client.pipeline()
            for name in names:
                pipe.strlen(name)
            found = pipe.execute()
        return [nbytes or None for nbytes in found]

    def remove(self, key: bytes) -> None:
        self.client.delete(self.name(key))

    # -- housekeeping -----------------------------------------------------------------------------------------------

    def scan(self, sweep: bool, faults: list[str]) -> Iterator[Found]:
        """The server does not tell when an object was last used: all count as used now."""
        start = f"{self._prefix}:{SCHEMA}:"
        names = self.client.scan_iter(match=f"{start}*", count=1000)
        while some := list(islice(names, self.batch)):
            keys = [_key_of(name[len(start) :]) for name in some]
            faults += [f"{name!r} is not ours" for name, key in zip(some, keys, strict=True) if key is None]
            known = [key for key in keys if key is not None]
            for key, nbytes in zip(known, self.sizes(known) if known else [], strict=True):
                if nbytes is None:
                    continue  # it left meanwhile
                if nbytes >= BLOCK:
                    yield Found(key, nbytes, time.time())
                    continue
                faults.append(f"{self.name(key)} is cut off within its header")
                if sweep:
                    self.remove(key)

    def probe(self, write: bool) -> None:
        """By new connections, in case the name leads to another server now."""
        cluster = self._site.kind == "cluster"
        if not cluster:
            self.client.connection_pool.disconnect(inuse_connections=False)
        for i in range(_PROBES if cluster else 1):
            name = f"{self._prefix}:probe{i}"
            try:
                if write:
                    self.client.set(name, b"?", px=1000)
                else:
                    self.client.strlen(name)
                return
            except Exception:
                if not cluster or i == _PROBES - 1:
                    raise


def _key_of(name: bytes) -> bytes | None:
    try:
        key = bytes.fromhex(name.decode())
    except ValueError:
        return None
    return key if len(key) == KEY_BYTES and key.hex().encode() == name else None


def _site_of(address: Address) -> Site:
    """Raises ConfigError; no message has user or password in it."""
    try:
        from lmcache_ext.tiers.redis_link import Site
    except ImportError as error:
        raise ConfigError("url", address.shown, f"needs redis-py, pip install redis: {error}") from None
    parts = urlsplit(address.url)
    kind = _KINDS.get(address.scheme.removeprefix("fault+"), "server")
    user, _, hosts = parts.netloc.rpartition("@")
    username, _, password = user.partition(":")
    timeout, connect_timeout = address.number("timeout", 5), address.number("connect_timeout", 1)
    if not (timeout > 0 and connect_timeout > 0):
        raise address.refusal("timeout", f"{timeout}, {connect_timeout}", "must be greater than 0")
    return Site(
        kind=kind,
        hosts=() if kind == "unix" else _hosts_of(address, hosts, kind),
        path=unquote(parts.path) if kind == "unix" else "",
        db=_db_of(address, parts, kind),
        username=unquote(username) or None,
        password=unquote(password) or None,
        service=address.text("service", "mymaster") if kind == "sentinel" else "",
        sentinel_password=address.text("sentinel_password") or None if kind == "sentinel" else None,
        tls=kind != "unix" and address.flag("tls", address.scheme.removeprefix("fault+") in _SECURE),
        tls_verify=address.flag("tls_verify", True),
        tls_ca=address.text("tls_ca") or None,
        tls_cert=address.text("tls_cert") or None,
        tls_key=address.text("tls_key") or None,
        timeout=timeout,
        connect_timeout=connect_timeout,
    )


def _hosts_of(address: Address, hosts: str, kind: str) -> tuple[tuple[str, int], ...]:
    several = kind in ("sentinel", "cluster")
    form = f"{address.scheme}://[user:password@]host[:port]{',…' if several else '[/db]'}"
    found = []
    try:
        for each in hosts.split(","):
            host = urlsplit(f"//{each}")
            found.append((host.hostname or "", host.port or _PORTS.get(kind, 6379)))
    except ValueError:
        found.append(("", 0))
    if not all(name for name, _ in found) or (len(found) > 1 and not several):
        raise ConfigError("url", address.shown, f"must be {form}")
    return tuple(found)


def _db_of(address: Address, parts: SplitResult, kind: str) -> int:
    given = address.text("db", parts.path.strip("/") if kind != "unix" else "") or "0"
    if not given.isdecimal() or (kind == "cluster" and given != "0"):
        raise ConfigError("url", address.shown, "has no number of a database, or one of a cluster, which has none")
    return int(given)
