"""redis-py's clients with connections that move large values without copying them. Imports redis-py: import it late.

Everything is the library's: addresses, passwords, TLS, sentinels, slots and redirections of a cluster, pools. Three
things are not, because the library would join the parts of a value, copies what it reads several times, and takes long
for each command of a pipeline (benchmarks/results/tiers_redis.md): a `Value` is sent from where it lies, the reply to
a command that ends in an `Into` is received where it shall lie, and one that ends in `Each` is sent once for each of
many keys. All use the connection's socket, between two commands, when the library has nothing buffered.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from redis import Redis, RedisCluster
from redis import exceptions as errors
from redis.backoff import NoBackoff
from redis.cluster import ClusterNode
from redis.connection import (
    AbstractConnection,
    Connection,
    ConnectionPool,
    SSLConnection,
    UnixDomainSocketConnection,
)
from redis.retry import Retry
from redis.sentinel import Sentinel, SentinelManagedConnection, SentinelManagedSSLConnection

_PIECE = 1 << 20  # bytes for which there is one timeout
_LINE = 64  # bytes read at once where a reply begins: a length, or the start of an error
_LONGEST = 4096  # bytes of an error
_MANY = 1 << 16  # bytes read at once of many replies


@dataclass(frozen=True)
class Site:
    """Where servers are and how to talk to them."""

    kind: str  # "server", "unix", "sentinel" or "cluster"
    hosts: tuple[tuple[str, int], ...] = ()
    path: str = ""  # of a socket
    db: int = 0
    username: str | None = None
    password: str | None = field(default=None, repr=False)
    service: str = ""  # that sentinels watch over
    sentinel_password: str | None = field(default=None, repr=False)
    tls: bool = False
    tls_verify: bool = True
    tls_ca: str | None = None
    tls_cert: str | None = None
    tls_key: str | None = None
    timeout: float = 5.0  # seconds until a reply begins, and for each MiB of a value
    connect_timeout: float = 1.0


@dataclass(frozen=True)
class Value:
    """An argument of a command, in several parts."""

    views: Sequence[memoryview]


@dataclass(frozen=True)
class Into:
    """Last argument of a command that is not sent: where the reply's bytes go. The reply is then their number."""

    views: Sequence[memoryview]


@dataclass(frozen=True)
class Each:
    """Last argument of a command that is sent once for each of these keys. The reply is a list of numbers.

    Not for a cluster, whose client would send all to one node.
    """

    keys: Sequence[str]


class Direct(AbstractConnection):
    """Mixed into the library's connections. `Value`, `Into` and `Each` pass through a client's `execute_command`."""

    _take: Callable[[], Any] | None = None  # how to read the next reply, if not as the library does
    _sock: Any

    def send_command(self, *args: Any, **kwargs: Any) -> None:
        """As the library's, also with a `Value`, an `Into` or an `Each` among `args`."""
        self._take = None
        take: Callable[[], Any] | None = None
        *most, last = args
        if isinstance(last, Each):
            take = partial(self._numbers, len(last.keys))
            self._send([self._repeated(most, last.keys)], kwargs)
        elif isinstance(last, Into):
            take = partial(self._receive, last.views)
            self._send(self._packed(most), kwargs)
        elif any(isinstance(arg, Value) for arg in args):
            self._send(self._packed(args), kwargs)
        else:
            super().send_command(*args, **kwargs)  # type: ignore[no-untyped-call]
        self._take = take

    def _send(self, pieces: list[bytes | memoryview], options: dict[str, Any]) -> None:
        self.send_packed_command(pieces, check_health=options.get("check_health", True))  # type: ignore[no-untyped-call]

    def _packed(self, args: Sequence[Any]) -> list[bytes | memoryview]:
        pieces: list[bytes | memoryview] = []
        text = b"*%d\r\n" % len(args)
        for arg in args:
            if isinstance(arg, Value):
                pieces.append(text + b"$%d\r\n" % sum(view.nbytes for view in arg.views))
                pieces += [piece for view in arg.views for piece in _pieces(view)]
                text = b"\r\n"
            else:
                raw = self.encoder.encode(arg)  # type: ignore[no-untyped-call]
                text += b"$%d\r\n%b\r\n" % (len(raw), raw)
        return [*pieces, text]

    def _repeated(self, most: Sequence[Any], keys: Sequence[str]) -> bytes:
        alike = b"".join(self._packed([*most, ""])).removesuffix(b"$0\r\n\r\n")
        return b"".join([b"%b$%d\r\n%b\r\n" % (alike, len(raw), raw) for raw in map(str.encode, keys)])

    def read_response(self, *args: Any, **kwargs: Any) -> Any:
        """As the library's; after an `Into`, how many bytes the value has, or None; after an `Each`, the numbers."""
        take, self._take = self._take, None
        if take is None:
            return super().read_response(*args, **kwargs)
        try:
            reply = take()
        except BaseException as error:
            self.disconnect()  # type: ignore[no-untyped-call]
            if isinstance(error, TimeoutError):
                raise errors.TimeoutError(f"no whole reply in time: {error}") from error
            if isinstance(error, OSError):
                raise errors.ConnectionError(str(error)) from error
            raise
        if isinstance(reply, Exception):
            raise reply
        return reply

    def _receive(self, views: Sequence[memoryview]) -> int | Exception | None:
        line, rest = self._line()
        if line[:1] == b"-":
            return self._parser.parse_error(line[1:].decode(errors="replace"))  # type: ignore[no-any-return]
        if line[:1] != b"$":
            raise errors.InvalidResponse(f"a value begins with {line[:20]!r}")
        nbytes = int(line[1:])
        if nbytes < 0:
            return None
        fits = nbytes == sum(view.nbytes for view in views)
        for view in [*views, memoryview(bytearray(2))] if fits else [views[0].cast("B")[:nbytes]]:
            for piece in _pieces(view):
                rest = self._fill(piece, rest)
        if not fits:
            self.disconnect()  # type: ignore[no-untyped-call]  # the rest of it is on its way
        return nbytes

    def _numbers(self, count: int) -> list[int] | Exception:
        read = b""
        while read.count(b"\r\n") < count:
            read += self._some(_MANY)
        lines = read.split(b"\r\n")[:count]
        for line in lines:
            if line[:1] != b":":
                self.disconnect()  # type: ignore[no-untyped-call]
                return self._parser.parse_error(line[1:].decode(errors="replace"))  # type: ignore[no-any-return]
        return [int(line[1:]) for line in lines]

    def _some(self, most: int) -> bytes:
        read: bytes = self._sock.recv(most)
        if not read:
            raise ConnectionError("the server closed the connection")
        return read

    def _line(self) -> tuple[bytes, bytes]:
        """The first line of a reply, and what was read behind it."""
        read = b""
        while b"\r\n" not in read:
            read += self._some(_LINE)
            if len(read) > _LONGEST:
                raise ConnectionError("a line without an end")
        line, _, rest = read.partition(b"\r\n")
        return line, rest

    def _fill(self, view: memoryview, rest: bytes) -> bytes:
        """Fill `view` with `rest` and what comes then; returns what is left of `rest`."""
        until = time.monotonic() + float(self.socket_timeout or 0)
        have = min(len(rest), view.nbytes)
        view[:have] = rest[:have]
        at = have
        while at < view.nbytes:
            moved = self._sock.recv_into(view[at:])
            if not moved:
                raise ConnectionError("the server closed the connection within a value")
            if time.monotonic() > until:
                raise TimeoutError("the value came too slowly")
            at += moved
        return rest[have:]


def _pieces(view: memoryview) -> list[memoryview]:
    flat = view.cast("B")
    return [flat[at : at + _PIECE] for at in range(0, flat.nbytes, _PIECE)]


class DirectServer(Direct, Connection):
    """TCP."""


class DirectTLS(Direct, SSLConnection):
    """TCP with TLS."""


class DirectUnix(Direct, UnixDomainSocketConnection):
    """A Unix socket."""


class DirectSentinel(Direct, SentinelManagedConnection):
    """TCP, to where sentinels say."""


class DirectSentinelTLS(Direct, SentinelManagedSSLConnection):
    """The same with TLS."""


def connect(site: Site) -> Any:
    """A client, `Redis` or `RedisCluster`. Only that of a cluster talks to a server at once; raises what redis-py does.

    Nothing is tried again, that is the breaker's business; but redirections within a cluster are followed, and after
    a fault its client asks who has the slots now.
    """
    common: dict[str, Any] = {
        "username": site.username,
        "password": site.password,
        "socket_timeout": site.timeout,
        "socket_connect_timeout": site.connect_timeout,
        "protocol": 2,  # replies of version 3 may come with messages in between, which nobody here reads
    }
    retry = Retry(NoBackoff(), 0)
    if site.kind == "unix":
        return _client(DirectUnix, path=site.path, db=site.db, retry=retry, **common)
    common |= {"socket_keepalive": True, **(_tls(site) if site.tls else {})}
    if site.kind == "cluster":
        host, port = site.hosts[0]
        return RedisCluster(
            url=f"redis://{f'[{host}]' if ':' in host else host}:{port}",  # with a url, our connections are taken
            startup_nodes=[ClusterNode(*each) for each in site.hosts],  # type: ignore[no-untyped-call]
            connection_pool_class=partial(ConnectionPool, connection_class=DirectTLS if site.tls else DirectServer),
            retry=retry,
            **common,
        )
    if site.kind == "sentinel":
        own = {**common, "username": None, "password": site.sentinel_password, "retry": retry}
        sentinel = Sentinel(site.hosts, sentinel_kwargs=own | ({"ssl": True} if site.tls else {}))  # type: ignore[no-untyped-call]
        managed = DirectSentinelTLS if site.tls else DirectSentinel
        return sentinel.master_for(site.service, connection_class=managed, db=site.db, retry=retry, **common)  # type: ignore[no-untyped-call]
    host, port = site.hosts[0]
    return _client(DirectTLS if site.tls else DirectServer, host=host, port=port, db=site.db, retry=retry, **common)


def _client(kind: Any, **kwargs: Any) -> Redis:
    return Redis(connection_pool=ConnectionPool(connection_class=kind, **kwargs))


def _tls(site: Site) -> dict[str, Any]:
    return {
        "ssl_cert_reqs": "required" if site.tls_verify else "none",
        "ssl_check_hostname": site.tls_verify,
        "ssl_ca_certs": site.tls_ca,
        "ssl_certfile": site.tls_cert,
        "ssl_keyfile": site.tls_key,
    }
