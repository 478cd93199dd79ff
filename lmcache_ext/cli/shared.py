"""The figures that `report` and `top` show of a shared server, `lmcache-ext server`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass

from lmcache_ext.cli.scrape import Scrape, Window
from lmcache_ext.cli.text import share, size

_MARK = "lmcache_mp_lookups_total"


@dataclass(frozen=True)
class ServerFigures:
    """Counts over the window, gauges at its end. Chunks unless the name says otherwise."""

    lookups: int
    looked_up: int
    found: int
    stored: int
    stored_bytes: int
    leased: int  # for reading
    leased_bytes: int
    evicted: int
    refused: int  # no room, or a salt's share used up
    failed: int  # whose writer failed or died
    chunks: int
    used_bytes: int
    usage: float  # share of the memory that slots in use take
    clients: int
    silent: int
    leases: int
    tiers: dict[str, int]  # name → bytes
    seconds: float | None

    def as_dict(self) -> dict[str, object]:
        """The same for `--json`."""
        return asdict(self)

    def lines(self) -> Iterator[str]:
        """For `report`."""
        since = f"in {self.seconds:.0f} s" if self.seconds else "since the start"
        found = share(self.found, self.looked_up)
        yield f"  {since}: {self.lookups:,} look-ups of {self.looked_up:,} chunks, {found} found"
        read = f"{self.leased:,}, {size(self.leased_bytes)}"
        yield f"  stored: {self.stored:,} chunks, {size(self.stored_bytes)}; read: {read}"
        used = f"{self.chunks:,} chunks, {size(self.used_bytes)}"
        yield f"  memory: {self.usage:.0%} in use, {used}; {self.evicted:,} evicted"
        silent = f", {self.silent} of them silent" if self.silent else ""
        yield f"  clients: {self.clients}{silent}; {self.leases:,} leases"
        yield from (f"  tier {name}: {size(nbytes)}" for name, nbytes in self.tiers.items())
        if self.refused or self.failed:
            yield f"  not stored: {self.refused:,} for want of room or share, {self.failed:,} whose writer failed"


def is_server(last: Scrape) -> bool:
    """Whether a shared server answered."""
    return last.has(_MARK)


def server_figures(window: Window) -> ServerFigures:
    """Read them off."""
    last = window.last

    def grew(name: str) -> int:
        return int(window.increase(f"lmcache_{name}_total"))

    def now(name: str) -> int:
        return int(last.total(f"lmcache_{name}"))

    return ServerFigures(
        lookups=grew("mp_lookups"),
        looked_up=grew("mp_lookup_requested"),
        found=grew("mp_lookup_hit"),
        stored=grew("mp_l1_write"),
        stored_bytes=grew("server_stored_bytes"),
        leased=grew("mp_l1_read"),
        leased_bytes=grew("server_leased_bytes"),
        evicted=grew("mp_l1_evicted"),
        refused=grew("mp_l1_allocation_failure"),
        failed=grew("server_failed_stores"),
        chunks=now("server_l1_chunks"),
        used_bytes=now("mp_l1_memory_usage_bytes"),
        usage=last.total("lmcache_mp_l1_usage_ratio"),
        clients=now("server_clients"),
        silent=now("server_silent_clients"),
        leases=now("server_leases"),
        tiers={
            labels.get("l2_name", "?"): int(value)
            for labels, value in last.samples.get("lmcache_mp_l2_usage_bytes", ())
        },
        seconds=window.seconds,
    )
