"""The scheduler half: decides what to load and store, and keeps the directory.

It lives in vLLM's scheduler process and runs inside its step, so nothing here blocks, and nothing here may raise into
vLLM: the connector wraps every hook. What each hook does and why stands in docs/connector.md.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from vllm.v1.request import Request, RequestStatus

from lmcache_ext.config import EngineConfig
from lmcache_ext.engine import Chunk, Directory
from lmcache_ext.events import EventLog, Tier
from lmcache_ext.integration.vllm.events import announce
from lmcache_ext.integration.vllm.flights import Flight, Flights, Pins
from lmcache_ext.integration.vllm.log import get_logger
from lmcache_ext.integration.vllm.lookup import Finder
from lmcache_ext.integration.vllm.metadata import Report, StepMeta
from lmcache_ext.integration.vllm.requests import Match, Tracker, track
from lmcache_ext.integration.vllm.stores import Storer
from lmcache_ext.metrics import Recorder
from lmcache_ext.policies import POLICIES
from lmcache_ext.transfer.base import Plan, Way

logger = get_logger("scheduler")

# A load within the step keeps newcomers from starting theirs until it is over. Beyond this many bytes a rank, some
# 20 ms of a PCIe 5 link, that costs more than the 2 ms that a load between steps takes to be noticed.
_SYNC_BYTES = 1 << 30
_COMPLETED = (RequestStatus.FINISHED_STOPPED, RequestStatus.FINISHED_LENGTH_CAPPED)


class SchedulerSide:
    """One engine's control plane.

    Args:
        config: the engine's settings.
        block_size: tokens of one of vLLM's blocks.
        workers: how many workers report on each plan.
        slots: chunks that fit into the pool.
        grown: how many of them can be used by now.
        row_bytes: bytes of one block in each pool.
        root: of the engine's namespace, by epoch.
        events: whether vLLM publishes KV events.
        skip_last: tokens at a prompt's end that are never looked up.
        stores, loads: what this engine's `kv_role` lets it do.
    """

    def __init__(
        self,
        config: EngineConfig,
        block_size: int,
        workers: int,
        slots: int,
        grown: Callable[[], int],
        row_bytes: Sequence[int],
        root: Any,
        events: bool = False,
        skip_last: int = 0,
        stores: bool = True,
        loads: bool = True,
    ) -> None:
        self.config = config
        self._bs = block_size
        self._chunk = config.chunk_size
        self._bpc = config.chunk_size // block_size
        self._root_of, self._epoch = root, 0
        self._root: bytes = root(0)
        self._stores, self._loads = stores and config.local_cpu, loads and config.local_cpu
        self._row_bytes = sum(row_bytes)
        self._most_at_once = _SYNC_BYTES // max(row_bytes, default=1) * block_size
        self.recorder = Recorder()
        self.recorder.gauge("lmcache_is_healthy", 1)
        self.log = EventLog(Tier.CPU) if events else None
        self.directory = Directory(POLICIES.get(config.cache_policy)(), self.log)
        self._slots, self._grown = slots, grown
        self.pins = Pins(config.max_pinned_fraction)
        self.flights = Flights(self.directory, self.pins, workers, config.store_timeout_secs)
        self._storer = Storer(self.directory, self.flights, self.pins, self.recorder, config, block_size, events)
        self._finder = Finder(self.directory, self.recorder, config, block_size, skip_last)
        self._trackers: dict[str, Tracker] = {}
        self._running: set[str] = set()  # requests that were scheduled and are not finished or preempted
        self._meta = StepMeta()  # of the step that is being scheduled
        self._seen_hashes: Any = None  # identity of the block pool's hash table: it changes with vLLM's reset
        self._pool: Any = None
        self._pool_caches = False  # whether what one request has loaded is there for the next

    # -- a request comes ---------------------------------------------------------------------------------------------

    def bind(self, pool: Any) -> None:
        """vLLM's block pool, once, before the first request."""
        self._pool = pool
        self._seen_hashes = getattr(pool, "cached_block_hash_to_block", None)
        self._pool_caches = bool(getattr(pool, "enable_caching", False))
        self.pins.bind(pool)

    def match(self, request: Request, local: int) -> tuple[int | None, bool]:
        """(tokens beyond `local` that we can load, whether the request has to wait for them). Idempotent.

        None tokens: ask again, another request is loading the same chunks.
        """
        tracker = self._tracker(request)
        tracker.local = local
        if not tracker.may_load or not self._loads:
            return 0, False
        match = self._finder.find(tracker, local)
        extra = match.end - local
        if extra <= 0 or extra < self.config.min_retrieve_tokens:
            return 0, False
        patience = self.config.load_timeout_secs
        if self._pool_caches and self.flights.shares(tracker.id, match.keys[0], local, patience):
            return None, False
        # A synchronous load costs the engine no extra step, but everybody waits for it: only where nobody else runs,
        # and no other load is before it.
        alone = not self.flights.loading and not (self._running - {tracker.id})
        tracker.wants_async = not alone or extra > self._most_at_once
        return extra, tracker.wants_async

    def allocated(self, request: Request, block_ids: list[int], external: int) -> None:
        """vLLM allocated blocks and wants `external` of the promised tokens in them."""
        tracker = self._tracker(request)
        tracker.blocks = list(block_ids)
        first = tracker.hits is None
        if first:
            tracker.hits = (tracker.local, 0)
        if external <= 0:
            return
        match = tracker.match
        start = match.local if match else 0
        targets = block_ids[start // self._bs : (start + external) // self._bs]
        chunks = self._lease(match, start + external)
        if chunks is None:
            self.refuse(tracker.id, targets, tracker.wants_async)
            return
        assert match is not None
        self._plan_load(tracker, match, targets, chunks, external)
        tracker.match = None
        if first:
            tracker.hits = (tracker.local, external)

    def waits(self, request: Request) -> bool:
        """Whether the last promise to `request` was one that it waits for."""
        return self._tracker(request).wants_async

    def refuse(self, request_id: str, targets: list[int], waits: bool) -> None:
        """A promise can't be kept: the workers report its blocks as invalid, and vLLM computes the tokens."""
        logger.error("KV of request %s was promised and is gone; it is computed instead", request_id)
        self.recorder.count("num_faults")
        self._meta.invalid.extend(targets)
        if waits:
            self._meta.arrived.append(request_id)
        if (tracker := self._trackers.get(request_id)) is not None:
            tracker.may_load = False

    # -- a step ------------------------------------------------------------------------------------------------------

    def step(self, output: Any) -> StepMeta:
        """Orders for the step that `output`, a SchedulerOutput, describes."""
        meta, self._meta = self._meta, StepMeta()
        meta.forward = output.total_num_scheduled_tokens > 0
        try:
            if self.directory.capacity < self._slots:
                self.directory.grow(self._grown())
            self.flights.tick()
            self._preempted(output.preempted_req_ids or (), meta)
            computed = self._follow_blocks(output)
            self._storer.plan_step(self._trackers, computed)
            self._late()
        except Exception:
            self._fault("planning stores")
        meta.stores = self._storer.take()
        return meta

    def _follow_blocks(self, output: Any) -> dict[str, int]:
        """Keep block tables up to date; {request: tokens computed once this step has run}."""
        computed: dict[str, int] = {}
        scheduled = output.num_scheduled_tokens
        for new in output.scheduled_new_reqs:
            if (tracker := self._trackers.get(new.req_id)) is not None:
                tracker.blocks = list(new.block_ids[0])
                computed[new.req_id] = new.num_computed_tokens + scheduled[new.req_id]
        cached = output.scheduled_cached_reqs
        resumed = cached.resumed_req_ids
        for req_id, blocks, done in zip(cached.req_ids, cached.new_block_ids, cached.num_computed_tokens, strict=True):
            tracker = self._trackers.get(req_id)
            if tracker is None or tracker.done:
                continue
            if req_id in resumed:
                tracker.blocks = list(blocks[0]) if blocks else []
            elif blocks:
                tracker.blocks.extend(blocks[0])
            computed[req_id] = done + scheduled[req_id]
        self._running.update(scheduled)
        return computed

    def _preempted(self, request_ids: Any, meta: StepMeta) -> None:
        for request_id in request_ids:
            self._running.discard(request_id)
            meta.cancel.extend(self.flights.of(request_id, Way.STORE))

    def _late(self) -> None:
        for flight in self.flights.expire():
            logger.error(
                "store %d did not end within %s s (LMCACHE_STORE_TIMEOUT_SECS); %d GPU blocks given back",
                flight.plan.id,
                self.config.store_timeout_secs,
                len(flight.plan.blocks),
            )
            self.recorder.count("put_failed_count")

    # -- workers answer ----------------------------------------------------------------------------------------------

    def update(self, report: Report | None, invalid: set[int]) -> None:
        """Results of a step. `invalid`: blocks that vLLM is about to compute again."""
        if invalid:
            # The step that met them computed on bytes that never came, and so may every store that is under way.
            self.flights.doom_stores()
            for flight in self.flights.failed_loads(invalid):
                self._load_failed(flight, invalid)
        for flight in self.flights.settle(report) if report else ():
            if flight.plan.way is Way.STORE:
                self._stored(flight)
            else:
                self._loaded(flight)

    def _load_failed(self, flight: Flight, invalid: set[int]) -> None:
        flight.doomed = True
        first = next(i for i, block in enumerate(flight.plan.blocks.tolist()) if block in invalid)
        bad_rows = {row // self._bpc for row in flight.plan.rows.tolist()[first:]}
        for chunk in flight.chunks:
            if chunk.slot in bad_rows:
                self.directory.drop(chunk.key)
        self.recorder.count("num_failed_tokens", (len(flight.plan.blocks) - first) * self._bs)
        if (tracker := self._trackers.get(flight.request_id)) is not None:
            tracker.may_load = False
            tracker.loaded_only(first * self._bs)
            tracker.store_again()

    def _stored(self, flight: Flight) -> None:
        tracker = self._trackers.get(flight.request_id)
        if flight.tally.failed or flight.doomed:
            self.recorder.count("put_failed_count")
            if tracker is not None:
                tracker.store_failed()
            return
        self.recorder.count("num_stored_tokens", flight.tokens)
        self._speed("store", flight)

    def _loaded(self, flight: Flight) -> None:
        if not flight.tally.failed:
            self._speed("retrieve", flight)

    def _speed(self, verb: str, flight: Flight) -> None:
        self.recorder.sample(f"time_to_{verb}", flight.tally.seconds)
        if flight.tally.seconds > 0:
            self.recorder.sample(f"{verb}_speed", flight.tally.nbytes / flight.tally.seconds / 1e9)

    # -- a request goes ----------------------------------------------------------------------------------------------

    def finished(self, request: Request, block_ids: list[int]) -> dict[str, Any] | None:
        """The request is over and its blocks are about to be freed: last chance to store from them.

        Returns what its answer's `kv_transfer_params` shall say, if it asked.
        """
        tracker = self._trackers.pop(request.request_id, None)
        self._running.discard(request.request_id)
        if tracker is None:
            return None
        if tracker.may_store and request.status in _COMPLETED:
            tracker.blocks = list(block_ids)
            # The last sampled token has no KV yet, and steps that vLLM runs ahead may have raised its count.
            self._storer.plan_last(tracker, min(request.num_computed_tokens, request.num_tokens - 1))
        self.directory.touch(reversed(tracker.chain.keys))
        return tracker.hit_report()

    def busy(self) -> bool:
        """Whether vLLM must keep stepping without requests: stores hold its blocks, or wait to be sent."""
        return self._storer.waiting or self.flights.storing

    def reset(self) -> bool:
        """Forget everything; KV computed before this call is never stored or found again."""
        self._epoch += 1
        self._root = self._root_of(self._epoch)
        for tracker in self._trackers.values():
            tracker.retire()
        self.flights.doom_stores()
        logger.info("cache reset: %d chunks forgotten", self.directory.clear())
        return True

    def switch_off(self) -> None:
        """No promise and no store from now on."""
        self._stores = self._loads = False
        for tracker in self._trackers.values():
            tracker.retire()
        self.recorder.gauge("lmcache_is_healthy", 0)

    # -- telling -----------------------------------------------------------------------------------------------------

    def events(self) -> list[Any]:
        """vLLM KV events since the last call. After vLLM cleared all of its own, ours are said again."""
        if self.log is None:
            return []
        table = getattr(self._pool, "cached_block_hash_to_block", None)
        if table is not self._seen_hashes:
            self._seen_hashes = table
            self.log.take()
            self.log.announce(self.directory.chunks())
        return [announce(event) for event in self.log.take()]

    def measure(self) -> None:
        """Bring gauges up to date: O(1)."""
        record, directory = self.recorder, self.directory
        evicted = directory.evicted - int(record.totals.get("local_cpu_evict_keys_count", 0))
        if evicted:
            record.count("local_cpu_evict_count", evicted)
            record.count("local_cpu_evict_keys_count", evicted)
        record.gauge("local_cache_usage", directory.used * self._bpc * self._row_bytes)
        record.gauge("local_cpu_hot_cache_count", len(directory))
        record.gauge("local_cpu_capacity_count", directory.capacity)
        record.gauge("pinned_memory_objs_count", directory.leases)
        record.gauge("pinned_gpu_blocks", self.pins.count)
        looked = record.totals.get("num_lookup_tokens", 0)
        if looked:
            record.gauge("retrieve_hit_rate", record.totals.get("num_hit_tokens", 0) / looked)
            record.gauge("lookup_hit_rate", record.totals.get("num_lookup_hits", 0) / looked)

    # -- helpers -----------------------------------------------------------------------------------------------------

    def _tracker(self, request: Request) -> Tracker:
        tracker = self._trackers.get(request.request_id)
        if tracker is None:
            tracker = track(request, self._root, self._chunk)
            tracker.may_store &= self._stores
            tracker.done = not tracker.may_store
            self._trackers[request.request_id] = tracker
        return tracker

    def _lease(self, match: Match | None, end: int) -> list[Chunk] | None:
        if match is None or end > match.end:
            return None
        count = -(-end // self._chunk) - match.local // self._chunk
        return self.directory.lease(match.keys[:count])

    def _plan_load(
        self, tracker: Tracker, match: Match, targets: list[int], chunks: list[Chunk], external: int
    ) -> None:
        first = match.local // self._bs
        base = first // self._bpc
        slots = np.array([chunk.slot for chunk in chunks], dtype=np.int64)
        index = np.arange(first, first + len(targets), dtype=np.int64)
        rows = slots[index // self._bpc - base] * self._bpc + index % self._bpc
        plan = Plan(self.flights.next_id(), Way.LOAD, np.array(targets, dtype=np.int64), rows)
        self.flights.add(Flight(plan, tracker.id, chunks, external, end=match.local + external))
        self._meta.loads.append(plan)
        if tracker.wants_async:
            self._meta.waiting[plan.id] = tracker.id
        else:
            self._meta.now.append(plan.id)
        self.recorder.count("num_retrieve_requests")
        self.recorder.count("num_requested_tokens", external)
        self.recorder.count("num_hit_tokens", external)

    def _fault(self, doing: str) -> None:
        """Block tables may be out of step now: nothing is stored from the requests that are here."""
        self.recorder.count("num_faults")
        self._storer.roll_back()
        for tracker in self._trackers.values():
            tracker.retire()
        logger.exception("fault while %s; requests under way go on without the cache", doing)
