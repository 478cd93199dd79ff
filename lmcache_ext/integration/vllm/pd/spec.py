"""Where a prefill's KV shall go: `disagg_spec` in a request's `kv_transfer_params`, as the proxy writes it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lmcache_ext.pd import Geometry, Target
from lmcache_ext.pd.parts import MOST_RANKS, writers_of
from lmcache_ext.pd.wire import MAX_ID

NAME = "disagg_spec"
FIRST_TOKEN = "ret_first_tok"  # asked with True, answered under ANSWER
ANSWER = "first_tok"


@dataclass(frozen=True)
class Spec:
    """One request's hand-over, in upstream's words."""

    req_id: str
    host: str
    init_ports: tuple[int, ...]
    alloc_ports: tuple[int, ...]

    @classmethod
    def of(cls, given: Any) -> Spec:
        """Read it. Raises ValueError that says what is wrong."""
        if not isinstance(given, dict):
            raise ValueError("is no mapping")
        req_id, host = given.get("req_id"), given.get("receiver_host")
        for name, text in (("req_id", req_id), ("receiver_host", host)):
            if not isinstance(text, str) or not 0 < len(text) <= MAX_ID:
                raise ValueError(f"{name} must be a string of 1 to {MAX_ID} characters")
        init, alloc = _ports(given, "receiver_init_port"), _ports(given, "receiver_alloc_port")
        if len(init) != len(alloc):
            raise ValueError("receiver_init_port and receiver_alloc_port must be equally many")
        return cls(str(req_id), str(host), init, alloc)

    def targets(self, geometries: Sequence[Geometry], writers: Sequence[int], ranks: int) -> list[tuple[int, Target]]:
        """(index of a sender, where it writes to) of all that this hand-over takes.

        Args:
            geometries: of the senders, one for each of the `writers`.
            writers: the ranks of this engine's `ranks` that have a pool.

        Raises:
            ValueError: this engine's ranks and the decode engine's can't be divided so.
        """
        count = len(self.init_ports)
        if count == ranks and count > len(writers):  # its other ranks hold the same bytes
            return [(i, self._at(rank, i, len(writers))) for i, rank in enumerate(writers)]
        if not geometries[0].pages and count != len(writers):
            raise ValueError(f"the decode engine has {count} ranks, this one {ranks}")
        if not max((page[2] for page in geometries[0].pages), default=1):  # MLA: one rank of each engine has a pool
            return [(0, self._at(0, 0, 1))]
        return [(sender, self._at(rank, rank, count)) for sender, rank in writers_of(geometries[0], count)]

    def _at(self, port: int, rank: int, ranks: int) -> Target:
        return Target(self.host, self.init_ports[port], self.alloc_ports[port], rank, ranks)


def _ports(given: dict[str, Any], name: str) -> tuple[int, ...]:
    ports = given.get(name)
    ports = [ports] if type(ports) is int else ports
    if not isinstance(ports, (list, tuple)) or not 0 < len(ports) <= MOST_RANKS:
        raise ValueError(f"{name} must be a list of 1 to {MOST_RANKS} ports")
    if not all(type(port) is int and 0 < port < 65536 for port in ports):
        raise ValueError(f"{name} must hold ports, 1 to 65535")
    return tuple(ports)
