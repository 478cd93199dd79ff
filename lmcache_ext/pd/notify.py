"""Word to the proxy that a request's chunks are there, or will not be. It never waits for the proxy."""

from __future__ import annotations

from collections.abc import Sequence

import zmq

from lmcache_ext.pd.ports import connect
from lmcache_ext.pd.wire import ProxyNotif, encode


class Notifier:
    """Not thread-safe.

    Args:
        context: of the sockets.
        address: host:port of the proxy's PULL socket.
        rank: ours, which the messages name unless told otherwise.
    """

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], address: str, rank: int) -> None:
        host, _, port = address.rpartition(":")
        self._socket = connect(context, zmq.PUSH, host.strip("[]"), int(port))
        self._rank = rank

    def tell(self, req_id: str, stored: bool, ranks: Sequence[int] = ()) -> bool:
        """Queue one message for each rank. False: the queue is full, because the proxy has not listened for long."""
        try:
            for rank in ranks or (self._rank,):
                self._socket.send(encode(ProxyNotif(req_id, rank, "stored" if stored else "failed")), zmq.NOBLOCK)
        except zmq.ZMQError:
            return False
        return True

    def close(self, linger_s: float) -> None:
        """End; what is queued has `linger_s` seconds to leave."""
        self._socket.close(int(linger_s * 1000))
