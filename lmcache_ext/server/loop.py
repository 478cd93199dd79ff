"""The server's one thread with a socket: requests to the service, replies back, and whatever other threads want done.

HTTP lives in another thread and asks through `call`, so that the service needs no lock.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

import zmq

from lmcache_ext.errors import ConfigError
from lmcache_ext.server import protocol
from lmcache_ext.server.service import Service

logger = logging.getLogger("lmcache_ext.server")

_AT_ONCE = 64  # requests that are answered before anything else is looked at
_IDLE_MS, _BUSY_MS = 50, 2
T = TypeVar("T")


class Loop:
    """Serves `service` at `address` (tcp://127.0.0.1:5555) from `start` to `stop`.

    Raises:
        ConfigError: the address can't be bound.
    """

    def __init__(self, service: Service, address: str) -> None:
        self.service = service
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.linger = 0
        self._socket.setsockopt(zmq.MAXMSGSIZE, protocol.MAX_FRAME)
        self._socket.setsockopt(zmq.ROUTER_HANDOVER, 1)
        try:
            self._socket.bind(address)
        except zmq.ZMQError as error:
            self._socket.close()
            self._context.term()
            raise ConfigError("--port", address, f"can't be bound: {error.strerror}") from None
        self.address: str = self._socket.getsockopt_string(zmq.LAST_ENDPOINT)
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._calls: deque[Callable[[], None]] = deque()
        self._ending = threading.Event()
        self.failed: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="lmcache-server", daemon=True)

    def start(self) -> None:
        """Begin to serve."""
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether requests are being answered."""
        return self._thread.is_alive()

    def call(self, work: Callable[[], T]) -> Future[T]:
        """Have `work` done in the service's thread, between two requests, in the order of calls. It must not block.

        Whoever waits may give up: work that has not begun by then is not done (`Future.cancel`).
        """
        future: Future[T] = Future()

        def run() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                made = work()
            except Exception as error:
                future.set_exception(error)
            else:
                future.set_result(made)

        self._calls.append(run)
        os.eventfd_write(self._wake, 1)
        return future

    def stop(self, timeout: float) -> bool:
        """Stop serving, and close the service. Returns whether that was done within `timeout` seconds."""
        self._ending.set()
        os.eventfd_write(self._wake, 1)
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def _run(self) -> None:
        poller = zmq.Poller()
        poller.register(self._socket, zmq.POLLIN)
        poller.register(self._wake, zmq.POLLIN)
        try:
            while not self._ending.is_set():
                poller.poll(_BUSY_MS if self.service.busy else _IDLE_MS)
                self._answer()
                self._called()
                self.service.tick()
        except BaseException as error:
            self.failed = error
            logger.exception("the server's thread ends")
        finally:
            self.service.close()
            self._socket.close()
            self._context.term()

    def _answer(self) -> None:
        for _ in range(_AT_ONCE):
            try:
                peer, *frames = self._socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            # A peer that is gone, or reads nothing, loses its reply: nobody else waits for it.
            with contextlib.suppress(zmq.ZMQError):
                self._socket.send_multipart([peer, *self.service.handle(frames)], zmq.NOBLOCK)

    def _called(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._wake)
        for _ in range(len(self._calls)):
            self._calls.popleft()()
