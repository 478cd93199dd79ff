"""Sockets of both sides: none of them ever blocks, and each bounds what it takes."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator

import zmq

from lmcache_ext.pd.wire import MAX_MESSAGE

_AT_ONCE = 256  # messages of one socket before others have their turn
_QUEUED = 10_000  # messages that wait in a socket


def url(host: str, port: int) -> str:
    """A TCP address as ZMQ writes it."""
    return f"tcp://[{host}]:{port}" if ":" in host else f"tcp://{host}:{port}"


def _set_up(socket: zmq.Socket[bytes], host: str) -> None:
    socket.setsockopt(zmq.LINGER, 0)
    socket.setsockopt(zmq.MAXMSGSIZE, MAX_MESSAGE)  # libzmq cuts whoever sends more off
    socket.setsockopt(zmq.SNDHWM, _QUEUED)
    socket.setsockopt(zmq.RCVHWM, _QUEUED)
    socket.setsockopt(zmq.IPV6, ":" in host)


def bind(context: zmq.Context[zmq.Socket[bytes]], host: str, port: int) -> tuple[zmq.Socket[bytes], int]:
    """A ROUTER and its port; `port` 0: a free one. Raises zmq.ZMQError if it can't be bound."""
    socket = context.socket(zmq.ROUTER)
    _set_up(socket, host)
    socket.setsockopt(zmq.ROUTER_MANDATORY, 1)  # a send to a connection that is gone fails
    socket.setsockopt(zmq.ROUTER_HANDOVER, 1)  # a sender that reconnects keeps its name
    if port:
        socket.bind(url(host, port))
        return socket, port
    return socket, int(socket.bind_to_random_port(url(host, 0).rsplit(":", 1)[0]))


def connect(context: zmq.Context[zmq.Socket[bytes]], kind: int, host: str, port: int) -> zmq.Socket[bytes]:
    """A DEALER or PUSH that connects in the background, again and again.

    Raises:
        zmq.ZMQError: `host` is none.
    """
    socket = context.socket(kind)
    _set_up(socket, host)
    if kind == zmq.DEALER:
        socket.setsockopt(zmq.ROUTING_ID, b"s" + os.urandom(16))
    socket.setsockopt(zmq.RECONNECT_IVL, 50)  # ms
    socket.setsockopt(zmq.RECONNECT_IVL_MAX, 1000)
    try:
        socket.connect(url(host, port))
    except zmq.ZMQError:
        socket.close(0)
        raise
    return socket


def receive(socket: zmq.Socket[bytes]) -> Iterator[list[bytes]]:
    """What has come, up to a bound."""
    for _ in range(_AT_ONCE):
        try:
            yield socket.recv_multipart(zmq.NOBLOCK)
        except zmq.ZMQError:
            return


class Waker:
    """Makes a thread's poll return. `wake` from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._woken = False  # and not cleared since: saves the system call
        self.fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)  # guarded by _lock where it is closed

    def wake(self) -> None:
        """Now, or with the next poll. What the thread shall find is in its place before."""
        if self._woken:
            return
        self._woken = True
        with self._lock:
            if self.fd >= 0:
                os.eventfd_write(self.fd, 1)

    def clear(self) -> None:
        """Before the thread looks for what it shall find."""
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self.fd)
        self._woken = False

    def close(self) -> None:
        """End; later wakes do nothing."""
        with self._lock:
            if self.fd >= 0:
                os.close(self.fd)
            self.fd = -1
