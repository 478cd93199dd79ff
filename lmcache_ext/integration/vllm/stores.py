"""Which chunks of which requests are stored, and from which blocks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from lmcache_ext.config import EngineConfig
from lmcache_ext.engine import Chunk, Directory, Outcome
from lmcache_ext.integration.vllm.events import announcement
from lmcache_ext.integration.vllm.flights import Flight, Flights, Pins
from lmcache_ext.integration.vllm.requests import Tracker
from lmcache_ext.metrics import Recorder
from lmcache_ext.transfer.base import Plan, Way


@dataclass
class _Batch:
    """Chunks of one request that are stored together, as one plan."""

    chunks: list[Chunk] = field(default_factory=list)
    blocks: list[int] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    replaces: list[bytes] = field(default_factory=list)


class Storer:
    """Plans stores. Full chunks of the prompt; with `save_decode_cache` of the output, too; and the prompt's last
    partial chunk in whole blocks, until a fuller one replaces it.

    Only tokens whose ids are final are stored: up to min(computed after the step, known tokens), so rejected drafts and
    the engine's run-ahead never are. A chunk that finds no slot, or whose blocks can't be spared, is tried again on the
    request's next step.
    """

    def __init__(
        self,
        directory: Directory,
        flights: Flights,
        pins: Pins,
        recorder: Recorder,
        config: EngineConfig,
        block_size: int,
        events: bool,
    ) -> None:
        self._directory = directory
        self._flights = flights
        self._pins = pins
        self._recorder = recorder
        self._config = config
        self._bs = block_size
        self._bpc = config.chunk_size // block_size
        self._events = events
        self._plans: list[Plan] = []
        self._batch = _Batch()  # being put together

    @property
    def waiting(self) -> bool:
        """Whether there are plans that no step has taken yet."""
        return bool(self._plans)

    def take(self) -> list[Plan]:
        """Plans since the last call."""
        plans, self._plans = self._plans, []
        return plans

    def plan_step(self, trackers: Mapping[str, Tracker], computed: Mapping[str, int]) -> None:
        """Store what the step under way completes. `computed`: tokens that have KV once it has run."""
        if not any(not trackers[request_id].done for request_id in computed) or not self._pins.spare():
            return
        for request_id, end in computed.items():
            tracker = trackers[request_id]
            if not tracker.done:
                self._plan(tracker, min(end, tracker.request.num_tokens))
                tracker.done = tracker.tail_planned and not self._config.save_decode_cache

    def plan_last(self, tracker: Tracker, end: int) -> None:
        """The request is over: store what is still missing of its first `end` tokens."""
        if self._pins.spare():
            self._plan(tracker, end)
        missing = self._end(tracker, end) // self._config.chunk_size - tracker.planned
        if missing > 0:
            self._recorder.count("num_skipped_store_tokens", missing * self._config.chunk_size)

    def roll_back(self) -> None:
        """A fault came while a batch was put together: take its reservations back."""
        batch, self._batch = self._batch, _Batch()
        for chunk in batch.chunks:
            self._directory.complete_store(chunk, False)

    def _end(self, tracker: Tracker, end: int) -> int:
        return end if self._config.save_decode_cache else min(end, tracker.request.num_prompt_tokens)

    def _plan(self, tracker: Tracker, computed: int) -> None:
        size = self._config.chunk_size
        end = self._end(tracker, computed)
        full = end // size
        batch = self._batch
        if tracker.planned < full:
            keys = tracker.chain.extend(tracker.request.all_token_ids, full * size)
            while tracker.planned < full:
                i = tracker.planned
                if not self._reserve(tracker, batch, keys[i], i * size, (i + 1) * size):
                    break
                tracker.planned += 1
            if tracker.tail and tracker.planned * size > tracker.tail[1]:
                batch.replaces.append(tracker.tail[0])
                tracker.tail = None
        if not tracker.tail_planned and tracker.planned == full:
            self._plan_tail(tracker, batch, computed)
        if batch.chunks:
            self._submit(tracker, batch)
        self._batch = _Batch()

    def _tail_end(self, tracker: Tracker) -> int:
        """Where the prompt's last whole block ends."""
        return int(tracker.request.num_prompt_tokens) // self._bs * self._bs

    def _plan_tail(self, tracker: Tracker, batch: _Batch, computed: int) -> None:
        end, size = self._tail_end(tracker), self._config.chunk_size
        start = tracker.planned * size
        if computed < end:
            return
        if start >= end or not self._config.stores_partial:
            tracker.tail_planned = True
            return
        key = tracker.chain.partial(tracker.request.all_token_ids, end)
        if self._reserve(tracker, batch, key, start, end):
            tracker.tail_planned = True
            if tracker.tail and tracker.tail[0] != key and tracker.tail[1] > start:
                batch.replaces.append(tracker.tail[0])
            tracker.tail = (key, end)

    def _reserve(self, tracker: Tracker, batch: _Batch, key: bytes, start: int, end: int) -> bool:
        """Add a chunk of tokens [start, end) to the batch unless it is there already; False: not now."""
        first, last = start // self._bs, end // self._bs
        blocks = tracker.blocks[first:last]
        if len(blocks) < last - first or 0 in blocks:  # 0 is vLLM's null block: no KV behind it
            return False
        note = announcement(tracker.request, first, last, self._bs) if self._events else None
        chunk = self._directory.prepare_store(key, end - start, note)
        if chunk is Outcome.EXISTS:
            return True
        if chunk is Outcome.FULL:
            return False
        assert isinstance(chunk, Chunk)
        batch.chunks.append(chunk)
        batch.blocks.extend(blocks)
        batch.rows.extend(range(chunk.slot * self._bpc, chunk.slot * self._bpc + len(blocks)))
        return True

    def _submit(self, tracker: Tracker, batch: _Batch) -> None:
        plan = Plan(
            self._flights.next_id(),
            Way.STORE,
            np.array(batch.blocks, dtype=np.int64),
            np.array(batch.rows, dtype=np.int64),
        )
        flight = Flight(
            plan,
            tracker.id,
            batch.chunks,
            tokens=sum(chunk.tokens for chunk in batch.chunks),
            pinned=self._pins.pin(batch.blocks),
            replaces=batch.replaces,
        )
        self._batch = _Batch()
        self._flights.add(flight)
        self._plans.append(plan)
        self._recorder.count("num_store_requests")
