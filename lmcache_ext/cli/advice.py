"""What to set next, and why: one rule a function, each from figures that `report` shows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from lmcache_ext.cli.figures import Figures

_FEW_REQUESTS = 20  # shares of fewer say nothing
_MANY_REQUESTS = 500
_FEW_CHUNKS = 50
_SHORT = 64  # tokens; prompts of fewer on average are mostly Dynamo's health probes, of one token each
_NOTICEABLE = 0.01
_FULL, _SPACIOUS = 0.95, 0.25
_GIB = 1 << 30
_SETTINGS = {"disk": "LMCACHE_LOCAL_DISK", "gds": "LMCACHE_GDS_PATH", "remote": "LMCACHE_REMOTE_URL"}
_UNIT = "GB; with several ranks, divided by their number"


@dataclass(frozen=True)
class Advice:
    """`do`: a setting with its value, or where to look. `why`: the figures behind it."""

    do: str
    why: str

    def as_dict(self) -> dict[str, str]:
        """The same for `--json`."""
        return {"do": self.do, "why": self.why}


def advise(now: Figures) -> list[Advice]:
    """All that applies, the most urgent first."""
    return [advice for rule in RULES for advice in rule(now)]


def _broken(now: Figures) -> Iterator[Advice]:
    if not now.healthy:
        yield Advice("look for lmcache_ext errors in the worker's log, then restart it", "the cache was switched off")
    if now.faults:
        yield Advice("look for lmcache_ext errors in the worker's log", f"{now.faults:,} faults became misses")


def _failed_loads(now: Figures) -> Iterator[Advice]:
    asked = now.host + now.failed
    if asked and now.failed / asked > _NOTICEABLE:
        why = f"{now.failed:,} of {asked:,} tokens were found, but their load failed and they were computed"
        yield Advice("raise LMCACHE_LOAD_TIMEOUT_SECS if the log says that loads are given up", why)


def _failed_stores(now: Figures) -> Iterator[Advice]:
    if now.stores and now.failed_stores / now.stores > _NOTICEABLE:
        why = f"{now.failed_stores:,} of {now.stores:,} stores failed or were given up"
        yield Advice("raise LMCACHE_STORE_TIMEOUT_SECS if the log says that stores are given up", why)


def _pool_too_small(now: Figures) -> Iterator[Advice]:
    if now.occupancy < _FULL or not now.evicted_chunks:
        return
    turns = now.evicted_chunks / now.capacity_chunks
    why = f"the pool is full and was exchanged {turns:.1f} times over: what has left can't be found"
    size = now.capacity_bytes
    value = f"={_round(2 * size / _GIB)}" if size else " twice as high"
    yield Advice(f"LMCACHE_MAX_LOCAL_CPU_SIZE{value} ({_UNIT}), if the host has it", why)
    if _missed(now) > 0.5:
        why = f"of {_missed(now):.0%} of the requests nothing was found, and what they store pushes the others' out"
        yield Advice("LMCACHE_CACHE_POLICY=LFU, or S3-FIFO if long prompts are read once", why)


def _skipped_stores(now: Figures) -> Iterator[Advice]:
    offered = now.stored + now.skipped
    if now.skipped and now.skipped / offered > 0.1:
        why = f"{now.skipped:,} of {offered:,} tokens were not stored: no slot, or no GPU blocks to spare"
        yield Advice("raise LMCACHE_MAX_PINNED_FRACTION, or LMCACHE_MAX_LOCAL_CPU_SIZE if the pool is full", why)


def _loads_slower(now: Figures) -> Iterator[Advice]:
    if now.saved_s is not None and now.loads and now.saved_s < 0:
        tokens = now.host // now.loads
        why = f"loads took {-now.saved_s:.1f} s longer than computing their tokens would have"
        yield Advice(f"LMCACHE_MIN_RETRIEVE_TOKENS={2 * tokens}, or ENABLE_LMCACHE=0 for so small a model", why)


def _nothing_shared(now: Figures) -> Iterator[Advice]:
    if _missed(now) > 0.9 and now.occupancy < _FULL:
        why = (
            f"{now.missed_requests:,} of {now.requests:,} requests shared no chunk with an earlier one, though the "
            f"pool has room; their mean length is {now.prompt // now.requests:,} tokens"
        )
        yield Advice("a smaller LMCACHE_CHUNK_SIZE, if the beginnings that prompts share are shorter than a chunk", why)


def _pool_too_large(now: Figures) -> Iterator[Advice]:
    size = now.capacity_bytes
    if now.requests >= _MANY_REQUESTS and now.occupancy < _SPACIOUS and not now.evicted_chunks and size:
        value = _round(2 * now.pool_bytes / _GIB)
        why = f"after {now.requests:,} requests {now.occupancy:.0%} of {size / _GIB:.1f} GB is in use"
        yield Advice(f"LMCACHE_MAX_LOCAL_CPU_SIZE={value} ({_UNIT}) would do", why)


def _sick_tiers(now: Figures) -> Iterator[Advice]:
    for tier in now.tiers:
        setting = _SETTINGS[tier.kind]
        if tier.damaged:
            why = f"{tier.damaged:,} damaged or foreign objects were met in the {tier.kind} tier, and deleted"
            yield Advice(f"lmcache-ext check URL, with that of {setting}, and look at the medium", why)
        if tier.trips:
            why = f"the {tier.kind} tier failed so often that it was passed by, {tier.trips:,} times"
            yield Advice(f"see whether the storage of {setting} answers; the worker's log has the reason", why)


def _slow_tiers(now: Figures) -> Iterator[Advice]:
    brought = sum(tier.hit for tier in now.tiers)
    if now.slow > brought:
        why = f"{now.slow:,} tokens were computed because their tier is slower; {brought:,} came from tiers"
        yield Advice("faster storage, or no such tier; lmcache-ext bench tier URL tells its rate", why)
    for tier in now.tiers:
        written = tier.stored_bytes * tier.chunks / tier.used_bytes if tier.used_bytes else 0.0
        if tier.skipped > max(written, _FEW_CHUNKS):
            why = f"the {tier.kind} tier was busy or full for {tier.skipped:,} chunks, and took {written:,.0f}"
            yield Advice("raise LMCACHE_MIN_USES_BEFORE_WRITE_BACK, or faster or more storage", why)


def _missed(now: Figures) -> float:
    """The share of requests of which nothing was found; 0 where that says nothing."""
    if now.requests < _FEW_REQUESTS or now.prompt < _SHORT * now.requests:
        return 0.0
    return now.missed_requests / now.requests


def _round(gb: float) -> str:
    return f"{gb:.0f}" if gb >= 10 else f"{max(gb, 0.1):.1f}"


RULES: tuple[Callable[[Figures], Iterator[Advice]], ...] = (
    _broken,
    _failed_loads,
    _failed_stores,
    _sick_tiers,
    _pool_too_small,
    _skipped_stores,
    _slow_tiers,
    _loads_slower,
    _nothing_shared,
    _pool_too_large,
)
