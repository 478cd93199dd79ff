"""Bounds and deadlines of both sides. All times are seconds."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields

from lmcache_ext.errors import ConfigError
from lmcache_ext.pd.parts import Runs

Sums = Callable[[Sequence[tuple[int, Runs]]], Iterable[bytes]]
"""[(slot, runs)] → 16 bytes for each, in their order: the sum of these bytes of a slot, one run behind the other."""


class _Checked:
    def __post_init__(self) -> None:
        for each in fields(self):  # type: ignore[arg-type]
            value = getattr(self, each.name)
            if isinstance(value, (int, float)) and value <= 0 and each.name not in _MAY_BE_ZERO:
                raise ConfigError(each.name, value, "must be more than 0")


_MAY_BE_ZERO = ("init_port", "alloc_port")


@dataclass(frozen=True)
class ReceiverOptions(_Checked):
    """Of a `Receiver`."""

    host: str = "127.0.0.1"
    """the address that both ports are on"""
    init_port: int = 0
    """0: one that is free, see `Receiver.init_port`"""
    alloc_port: int = 0
    alloc_wait_s: float = 10.0
    """the most that a request waits for slots"""
    beat_s: float = 1.0
    """between two questions whether a sender is alive"""
    silence_s: float = 5.0
    """without any word, after which a sender's chunks are given up"""
    stall_s: float = 60.0
    """without any chunk, after which a request is given up"""
    quarantine_s: float = 30.0
    """of silence, after which a sender on another machine is shut out by a new agent"""
    drain_s: float = 1.0
    """from a sender's end until what its sockets left behind has surely arrived"""
    sessions: int = 1024
    """at once"""
    waiting: int = 1024
    """requests that wait for slots at once"""
    backends: tuple[str, ...] = ("UCX",)
    """NIXL's names of what moves bytes"""


@dataclass(frozen=True)
class SenderOptions(_Checked):
    """Of a `Sender`."""

    proxy: str | None = None
    """host:port that is told of every request's end; None: nobody"""
    connect_s: float = 3.0
    """for a receiver's answer to a new session"""
    alloc_wait_s: float = 10.0
    """for slots"""
    answer_s: float = 5.0
    """for any other answer, and for slots beyond `alloc_wait_s`"""
    transfer_s: float = 10.0
    """for one transfer"""
    silence_s: float = 5.0
    """without any word, after which a receiver counts as dead"""
    stall_s: float = 60.0
    """without anything happening, after which a request is given up"""
    retry_s: float = 5.0
    """after which a dead receiver is tried again, by one request; doubles up to a minute"""
    inflight_bytes: int = 256 * 1024 * 1024
    """to one receiver at once; one transfer may be larger"""
    post_bytes: int = 8 * 1024 * 1024
    """of one transfer; one chunk may be larger"""
    links: int = 256
    """receivers at once; the one that was idle longest goes"""
    backends: tuple[str, ...] = ("UCX",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.proxy is not None and not self.proxy.rpartition(":")[2].isdecimal():
            raise ConfigError("pd_proxy_host", self.proxy, "must be host:port")
