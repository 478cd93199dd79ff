"""Two harness engines, one that prefills and one that decodes, and a proxy that only listens."""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import msgspec
import zmq

from lmcache_ext.pd.wire import ProxyNotif
from lmcache_ext.ports import free_port
from tests.integration.harness import Engine, Setup


def until(true: Callable[[], Any], seconds: float = 10.0) -> None:
    """Wait for it; a failure after so many seconds."""
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, f"not true within {seconds} s"
        time.sleep(0.002)


class Apart:
    """A prefill engine, a decode engine, and what the proxy was told."""

    def __init__(self, prefill: Setup, decode: Setup, ttl_s: float = 60.0) -> None:
        count = decode.ranks
        ports = [free_port() for _ in range(2 * count + 1)]
        self.init, self.alloc = ports[:count], ports[count : 2 * count]
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.PULL)
        self._socket.bind(f"tcp://127.0.0.1:{ports[-1]}")
        self.told: dict[str, set[tuple[int | None, str | None]]] = {}
        self._numbers = itertools.count()
        prefill.role, decode.role = "kv_producer", "kv_consumer"
        prefill.extra = {
            "lmcache.enable_pd": True, "lmcache.pd_role": "sender", "lmcache.pd_proxy_host": "127.0.0.1",
            "lmcache.pd_proxy_port": ports[-1], "lmcache.pd_allocation_timeout_sec": 1, **prefill.extra,
        }  # fmt: skip
        decode.extra = {
            "lmcache.enable_pd": True, "lmcache.pd_role": "receiver", "lmcache.pd_peer_host": "localhost",
            "lmcache.pd_peer_init_port": self.init, "lmcache.pd_peer_alloc_port": self.alloc,
            "skip_last_n_tokens": 1, "lmcache.pd_allocation_timeout_sec": 1, **decode.extra,
        }  # fmt: skip
        self.prefill = Engine(prefill)
        self.decode = Engine(decode)
        self.store = self.decode.side._pd._store
        self.store._ttl_s = ttl_s

    def spec(self, req_id: str, **other: Any) -> dict[str, Any]:
        """What the proxy sends with a prefill."""
        return {
            "ret_first_tok": True,
            "disagg_spec": {
                "req_id": req_id, "receiver_host": "127.0.0.1", "receiver_init_port": self.init,
                "receiver_alloc_port": self.alloc, **other,
            },
        }  # fmt: skip

    def begin(self, tokens: Sequence[int], req_id: str = "", **other: Any) -> tuple[str, str]:
        """Queue a prefill. Returns (the proxy's id, vLLM's)."""
        req_id = req_id or f"p{next(self._numbers)}"
        return req_id, self.prefill.add(list(tokens), kv_transfer_params=self.spec(req_id, **other))

    def listen(self) -> None:
        """Take what the proxy was sent."""
        with contextlib.suppress(zmq.ZMQError):
            while True:
                told = msgspec.msgpack.decode(self._socket.recv(zmq.NOBLOCK), type=ProxyNotif)
                self.told.setdefault(told.req_id, set()).add((told.rank, told.status))

    def outcome(self, req_id: str, ranks: int | None = None, seconds: float = 10.0) -> str:
        """What the proxy was told of it, by all ranks: "stored" or "failed"."""
        ranks = ranks or self.decode.setup.ranks

        def heard() -> bool:
            self.listen()
            told = self.told.get(req_id, set())
            return any(status == "failed" for _, status in told) or len(told) == ranks

        until(heard, seconds)
        return "failed" if any(status == "failed" for _, status in self.told[req_id]) else "stored"

    def hand_over(self, tokens: Sequence[int], **other: Any) -> str:
        """A prefill to its end, and what the proxy was told of it."""
        req_id, request = self.begin(tokens, **other)
        self.prefill.run(request)
        self.prefill.drain()
        return self.outcome(req_id)

    def settled(self) -> bool:
        """Whether no lease is held at either side, and no slot without bytes."""
        self.prefill.side._pd.poll()
        directories = [self.prefill.side.directory, self.decode.side.directory]
        return all(d.leases == 0 and d.used == len(d) for d in directories)

    def close(self) -> None:
        """Every invariant holds at both."""
        self.prefill.drain()
        self.decode.drain()
        until(self.settled)
        assert not self.prefill.side._pd._going
        self.prefill.close()
        self.decode.close()

    def shut_down(self) -> None:
        """End all threads and sockets."""
        for engine in (self.prefill, self.decode):
            engine.connector.shutdown()
        self._context.destroy(0)


@contextlib.contextmanager
def apart(prefill: Setup | None = None, decode: Setup | None = None, ttl_s: float = 60.0) -> Iterator[Apart]:
    """Both engines; when the with block ends without a fault, everything must be given back."""
    made = Apart(prefill or Setup(), decode or Setup(), ttl_s)
    try:
        yield made
        made.close()
    finally:
        made.shut_down()
