"""The scheduler half: decides what to load and store, and keeps the directory.

It lives in vLLM's scheduler process and runs inside its step, so nothing here blocks, and nothing here may raise into
vLLM: the connector wraps every hook. What each hook does and why stands in docs/connector.md.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from vllm.v1.request import Request, RequestStatus

from lmcache_ext.config import EngineConfig
from lmcache_ext.engine import Below, Directory
from lmcache_ext.integration.vllm import resets
from lmcache_ext.integration.vllm.events import Stream, announced, unnoted
from lmcache_ext.integration.vllm.fetching import Fetcher
from lmcache_ext.integration.vllm.flights import Flight, Flights, Pins
from lmcache_ext.integration.vllm.gauges import clock, measure
from lmcache_ext.integration.vllm.loads import Loader
from lmcache_ext.integration.vllm.log import get_logger
from lmcache_ext.integration.vllm.lookup import Finder
from lmcache_ext.integration.vllm.metadata import Report, StepMeta
from lmcache_ext.integration.vllm.pace import Pace
from lmcache_ext.integration.vllm.pd import Apart
from lmcache_ext.integration.vllm.requests import Tracker, follow_blocks, track
from lmcache_ext.integration.vllm.seat import Seat
from lmcache_ext.integration.vllm.stores import Storer
from lmcache_ext.metrics import Recorder
from lmcache_ext.policies import POLICIES
from lmcache_ext.telemetry import Silent, Stores, Telemetry
from lmcache_ext.tracing import NO_SPANS, Spans
from lmcache_ext.transfer.base import Way

logger = get_logger("scheduler")

# A load within the step keeps newcomers from starting theirs until it is over. Beyond this many bytes a rank, some
# 20 ms of a PCIe 5 link, that costs more than the 2 ms that a load between steps takes to be noticed.
_SYNC_BYTES = 1 << 30
_CLOSE_SECONDS = 5.0  # for write-backs at the end
_SPANS_SECONDS = 1.0  # for the last spans
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
        stream: where our events go, if vLLM publishes any.
        skip_last: tokens at a prompt's end that are never looked up.
        stores: whether this engine's `kv_role` lets it store.
        below: below(directory, recorder, pace): what brings chunks that the directory lacks.
        seat: at a cache server, whose directory takes the place of our own; it is `below`, too.
        telemetry: wants to know which requests are stored.
        spans: traces of requests; ours from here on.
        pd: this engine's part in hand-overs from prefill to decode engines.
    """

    def __init__(
        self, config: EngineConfig, block_size: int, workers: int, slots: int, grown: Callable[[], int],
        row_bytes: Sequence[int], root: Any, stream: Stream | None = None, skip_last: int = 0, stores: bool = True,
        below: Callable[[Directory, Recorder, Pace], Below] | None = None, seat: Seat | None = None,
        telemetry: Telemetry | None = None, spans: Spans = NO_SPANS, pd: Apart | None = None,
    ) -> None:  # fmt: skip
        self.config, self._spans, self._pd = config, spans, pd or Apart()
        self._bs, self._chunk, self._bpc = block_size, config.chunk_size, config.chunk_size // block_size
        self._root_of, self._epoch, self._root = root, 0, root(0)
        wanted = config.local_cpu or below is not None or seat is not None or self._pd.uses_pool
        self._stores, self._loads = stores and wanted, wanted
        self._row_bytes = sum(row_bytes)
        self._most_at_once = _SYNC_BYTES // max(row_bytes, default=1) * block_size
        self.recorder = Recorder()
        self.recorder.gauge("lmcache_is_healthy", 1)
        self._stream, self._seat = stream, seat
        listener = stream.memory if stream else None
        policy = POLICIES.get(config.cache_policy)()
        self.directory = seat.mirror if seat else self._pd.directory(policy, listener)
        self._slots, self._grown = slots, grown
        self._pd.open(self.directory, self._root, grown)
        self.pins = Pins(config.max_pinned_fraction)
        self._telemetry = telemetry or Silent()
        self._told = Stores(self._telemetry.report)
        self.flights = Flights(self.directory, self.pins, workers, config.store_timeout_secs, self._told)
        note = announced(block_size) if stream else unnoted
        note = seat.noting(note) if seat else note
        self._storer = Storer(
            self.directory, self.flights, self.pins, self.recorder, config, block_size, note, self._told.finished
        )  # fmt: skip
        self._finder = Finder(self.directory, self.recorder, config, block_size, skip_last, note)
        self._pace = Pace()
        self._loader = Loader(self.directory, self.flights, self.recorder, config.chunk_size, block_size)
        self.lower = seat or (below(self.directory, self.recorder, self._pace) if below else None)
        self._fetcher = self.lower and Fetcher(
            self.lower, self.directory, self._finder, self.flights, self._loader, block_size, config.load_timeout_secs
        )
        self._trackers: dict[str, Tracker] = {}
        self._running: set[str] = set()  # requests that were scheduled and are not finished or preempted
        self._meta = StepMeta()  # of the step that is being scheduled
        self._pool_caches = False  # whether what one request has loaded is there for the next

    # -- a request comes ---------------------------------------------------------------------------------------------

    def bind(self, pool: Any) -> None:
        """vLLM's block pool, once, before the first request."""
        if self._stream:
            self._stream.bind(pool)
        self._pool_caches = bool(getattr(pool, "enable_caching", False))
        resets.before_each(pool, self._give_way)
        self.pins.bind(pool)
        self._loader.spoilt.bind(pool)

    def _give_way(self) -> None:
        """vLLM is about to reset its prefix cache: give back the blocks that stores hold."""
        if not self.pins.alone():
            return  # it will not come to pass anyway
        for flight in self.flights.give_up_stores():
            self._meta.cancel.append(flight.plan.id)
            if (tracker := self._trackers.get(flight.request_id)) is not None:
                tracker.store_again()
        self._storer.give_up()

    def match(self, request: Request, local: int) -> tuple[int | None, bool]:
        """(tokens beyond `local` that we can load, whether the request has to wait for them). Idempotent.

        None tokens: ask again, another request is loading the same chunks.
        """
        self._pd.begin_turn()
        tracker = self._tracker(request)
        tracker.local = local
        if not tracker.may_load or not self._loads:
            return 0, False
        match = self._finder.find(tracker, local)
        if self._fetcher:
            self._grow()
            found = self._fetcher.find(tracker, match, alone=not self._running - {tracker.id})
            if found is None:
                return None, False
            match = found
        self._finder.count(tracker, match)
        extra = match.end - local
        if extra <= 0 or extra < self.config.min_retrieve_tokens:
            return 0, False
        patience = self.config.load_timeout_secs
        if self._pool_caches and self.flights.shares(tracker.id, match.keys[0], local, patience):
            return None, False
        # A synchronous load costs the engine no extra step, but everybody waits for it: only where nobody else runs,
        # and no other load is before it.
        alone = not self.flights.loading and not (self._running - {tracker.id})
        tracker.wants_async = not alone or extra > self._most_at_once or match.end > match.ready
        return extra, tracker.wants_async

    def allocated(self, request: Request, block_ids: list[int], external: int) -> None:
        """vLLM allocated blocks and wants `external` of the promised tokens in them."""
        tracker = self._tracker(request)
        tracker.blocks = list(block_ids)
        first = tracker.hits is None
        if first:
            tracker.hits = (tracker.local, 0)
        if external <= 0:
            if self._fetcher:
                self._fetcher.let_go(tracker.id)
            self._pd.admitted(tracker)
            return
        match = tracker.match
        start = match.local if match else 0
        end = start + external
        ready = min(end, match.ready) if match else end
        targets = block_ids[start // self._bs : -(-end // self._bs)]
        chunks = self._loader.lease(match, ready)
        if self._fetcher and (ready == end or chunks is None):
            self._fetcher.let_go(tracker.id)
        self._pd.admitted(tracker)
        if chunks is None:
            self.refuse(tracker.id, targets, tracker.wants_async)
            return
        assert match is not None
        blocks = -(-ready // self._bs) - start // self._bs
        flight = self._loader.plan(tracker, start, targets[:blocks], chunks, ready - start)
        self._loader.promised(external)
        self._meta.loads.append(flight.plan)
        if self._fetcher and ready < end:
            self._fetcher.promised(tracker, start, end, match.keys[len(chunks) :], targets[blocks:], flight)
        elif tracker.wants_async:
            self._meta.waiting[flight.plan.id] = tracker.id
        else:
            self._meta.now.append(flight.plan.id)
        if self.lower and self.config.min_uses_before_write_back:
            self.lower.offer(chunks, tracker.trace)
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
            self._loader.spoil(tracker, targets)

    # -- a step ------------------------------------------------------------------------------------------------------

    def step(self, output: Any) -> StepMeta:
        """Orders for the step that `output`, a SchedulerOutput, describes."""
        meta, self._meta = self._meta, StepMeta()
        meta.forward = output.total_num_scheduled_tokens > 0
        self._pace.step(output.total_num_scheduled_tokens)
        if self._fetcher:
            self._fetcher.step(meta)
        try:
            self._grow()
            self.flights.tick()
            if self.lower:
                self.lower.poll()
            self._preempted(output.preempted_req_ids or (), meta)
            computed = follow_blocks(output, self._trackers)
            self._loader.spoilt.follow(output)
            self._running.update(output.num_scheduled_tokens)
            self._storer.retry()
            self._storer.plan_step(self._trackers, computed)
            self.directory.flush()
            for flight in self.flights.expire():
                self.recorder.count("put_failed_count")
                if (tracker := self._trackers.get(flight.request_id)) is not None:
                    tracker.store_failed()
            self._pd.poll()
        except Exception:
            self._fault("planning stores")
        finally:
            self._pd.end_turn()
        if self._seat and not meta.loads and not self._storer.waiting:
            meta.attach = self._seat.order(self.flights)
        meta.stores = self._storer.take()
        return meta

    def _grow(self) -> None:
        if self.directory.capacity < self._slots:
            self.directory.grow(self._grown())

    def _preempted(self, request_ids: Any, meta: StepMeta) -> None:
        for request_id in request_ids:
            self._running.discard(request_id)
            meta.invalid.extend(self._loader.spoilt.preempted(request_id))
            meta.cancel.extend(self.flights.cancel_stores(request_id))

    # -- workers answer ----------------------------------------------------------------------------------------------

    def update(self, report: Report | None, invalid: set[int]) -> None:
        """Results of a step. `invalid`: blocks that vLLM is about to compute again."""
        if report and report.computed:
            self._pace.ended()
        if invalid:
            # The step that met them computed on bytes that never came, and so may every store that is under way.
            self.flights.doom_stores()
            self._storer.give_up()
            for flight in self.flights.failed_loads(invalid):
                self._loader.failed(flight, invalid, self._trackers.get(flight.request_id))
        if self._seat and report:
            self._seat.told(report)
        for flight in self.flights.settle(report) if report else ():
            flight.end_span()
            if flight.plan.way is Way.STORE:
                self._stored(flight)
            elif not flight.tally.failed:
                self._loader.ended(flight)
        self._pd.poll()

    def _stored(self, flight: Flight) -> None:
        tracker = self._trackers.get(flight.request_id)
        if flight.tally.failed or flight.doomed:
            if not flight.cancelled:
                self.recorder.count("put_failed_count")
            if tracker is not None:
                tracker.store_again() if flight.cancelled else tracker.store_failed()
            return
        self.recorder.count("num_stored_tokens", flight.tokens)
        if self.lower:
            self.lower.offer(flight.chunks, flight.span.trace)
        clock(self.recorder, "store", flight.tally)

    # -- a request goes ----------------------------------------------------------------------------------------------

    def finished(self, request: Request, block_ids: list[int]) -> dict[str, Any] | None:
        """The request is over and its blocks are about to be freed: last chance to store from them.

        Returns what its answer's `kv_transfer_params` shall say, if it asked.
        """
        tracker = self._trackers.pop(request.request_id, None)
        self._running.discard(request.request_id)
        self._loader.goes(request.request_id, block_ids)
        if self._fetcher:
            self._fetcher.gone(request.request_id)
        wrong = self._loader.spoilt.finished(request.request_id, request.num_computed_tokens)
        self._meta.invalid.extend(wrong)
        if tracker is None:
            self._told.finished(request.request_id, ok=False)
            return None
        if tracker.may_store and request.status in _COMPLETED:
            tracker.blocks = list(block_ids)
            # The last sampled token has no KV yet, and steps that vLLM runs ahead may have raised its count.
            self._storer.plan_last(tracker, min(request.num_computed_tokens, request.num_tokens - 1))
        else:
            self._told.finished(tracker.id, ok=False)
        self.directory.touch(reversed(tracker.chain.keys))
        told = self._pd.finished(tracker, request.status in _COMPLETED)
        return {**(tracker.hit_report() or {}), **told} or None

    def busy(self) -> bool:
        """Whether vLLM must keep stepping without requests: its blocks are held, or stores wait to be sent."""
        return self._storer.waiting or self.flights.storing or bool(self._fetcher and self._fetcher.busy)

    def reset(self) -> bool:
        """Forget everything; KV computed before this call is never stored or found again."""
        self._epoch += 1
        self._root = self._root_of(self._epoch)
        for tracker in self._trackers.values():
            tracker.retire()
        self.flights.doom_stores()
        self._storer.give_up()
        self._pd.reset()
        logger.info("cache reset: %d chunks forgotten", self.directory.clear())
        return True

    def close(self) -> None:
        """The engine ends: what is on its way to tiers has a few seconds."""
        if self.lower:
            self.lower.close(_CLOSE_SECONDS)
        self._telemetry.close()
        self._spans.close(_SPANS_SECONDS)
        self._pd.close()

    def switch_off(self) -> None:
        """No promise and no store from now on."""
        self._stores = self._loads = False
        for tracker in self._trackers.values():
            tracker.retire()
        self.recorder.gauge("lmcache_is_healthy", 0)

    # -- telling -----------------------------------------------------------------------------------------------------

    def events(self) -> list[Any]:
        """vLLM KV events since the last call. After vLLM cleared all of its own, ours are said again."""
        if not self._stream:
            return []
        return self._stream.take(self._seat, None) if self._seat else self._stream.take(self.directory, self.lower)

    def measure(self) -> None:
        """Bring gauges up to date: O(1)."""
        if not self._seat:
            measure(self.recorder, self.directory, self._bpc * self._row_bytes)
        self.recorder.gauge("pinned_gpu_blocks", self.pins.count)
        self._telemetry.measure(self.recorder)
        if self.lower:
            self.lower.measure(self.recorder)
        self._pd.measure(self.recorder)

    # -- helpers -----------------------------------------------------------------------------------------------------

    def _tracker(self, request: Request) -> Tracker:
        tracker = self._trackers.get(request.request_id)
        if tracker is None:
            tracker = track(request, self._root, self._chunk)
            tracker.may_store &= self._stores
            tracker.done = not tracker.may_store
            tracker.trace = self._spans.of(tracker.id, getattr(request, "trace_headers", None))
            self._trackers[request.request_id] = tracker
        return tracker

    def _fault(self, doing: str) -> None:
        """Block tables may be out of step now: nothing is stored from the requests that are here."""
        self.recorder.count("num_faults")
        for tracker in self._trackers.values():
            tracker.retire()
        logger.exception("fault while %s; requests under way go on without the cache", doing)
