"""Which chunks of which requests are stored, and from which blocks."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lmcache_ext.config import EngineConfig
from lmcache_ext.engine import Chunk, Directory, Outcome
from lmcache_ext.integration.vllm.events import Note
from lmcache_ext.integration.vllm.flights import Flight, Flights, Pins
from lmcache_ext.integration.vllm.requests import Tracker
from lmcache_ext.metrics import Recorder
from lmcache_ext.transfer.base import Plan, Way

_AHEAD = 8  # chunks beyond what is computed that a directory which asks is told of


_PATIENCE = 0.5  # seconds that a finished request's blocks are held for slots that were asked for


@dataclass
class _Parked:
    """A finished request whose last slots are not granted yet."""

    tracker: Tracker
    end: int
    pinned: list[Any]
    give_up: float


@dataclass
class _Batch:
    """Chunks of one request that are stored together, as one plan."""

    chunks: list[Chunk] = field(default_factory=list)
    blocks: list[int] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    replaces: list[bytes] = field(default_factory=list)


class Storer:
    """Plans stores. Full chunks of the prompt; with `save_decode_cache` of the output, too; and the prompt's last
    partial chunk, until a fuller one replaces it. A block of which only the first tokens count is copied whole.

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
        note: Note,
        over: Callable[[str, bool], None],
    ) -> None:
        self._directory = directory
        self._flights = flights
        self._pins = pins
        self._recorder = recorder
        self._config = config
        self._bs, self._step = block_size, config.tail_step(block_size)
        self._bpc = config.chunk_size // block_size
        self._note = note
        self._over = over  # over(request id, whether all of it is stored or on its way), once it is known
        self._parked: list[_Parked] = []
        self._plans: list[Plan] = []

    @property
    def waiting(self) -> bool:
        """Whether there are plans that no step has taken yet, or to be made as soon as there are slots."""
        return bool(self._plans or self._parked)

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
        spare = self._pins.spare()
        if spare:
            self._plan(tracker, end)
        if spare and self._directory.asks and not self._whole(tracker, end):
            blocks = [block for block in tracker.blocks[: -(-end // self._bs)] if block]
            self._parked.append(_Parked(tracker, end, self._pins.pin(blocks), time.monotonic() + _PATIENCE))
            self._directory.flush()
        else:
            self._settle(tracker, end)

    def retry(self) -> None:
        """A step begins: store from requests that were over before they had slots."""
        for parked in list(self._parked):
            self._plan(parked.tracker, parked.end)
            late = time.monotonic() > parked.give_up or not self._directory.asks
            if late or self._whole(parked.tracker, parked.end):
                self._parked.remove(parked)
                self._pins.unpin(parked.pinned)
                self._settle(parked.tracker, parked.end)

    def give_up(self) -> None:
        """What requests that are over computed may be wrong, or must not be stored any more."""
        parked, self._parked = self._parked, []
        for each in parked:
            self._pins.unpin(each.pinned)
            self._over(each.tracker.id, False)

    def _missing(self, tracker: Tracker, end: int) -> int:
        return max(0, self._end(tracker, end) // self._config.chunk_size - tracker.planned)

    def _whole(self, tracker: Tracker, end: int) -> bool:
        return tracker.tail_planned and not self._missing(tracker, end)

    def _settle(self, tracker: Tracker, end: int) -> None:
        if missing := self._missing(tracker, end):
            self._recorder.count("num_skipped_store_tokens", missing * self._config.chunk_size)
        self._over(tracker.id, self._whole(tracker, end))

    def _end(self, tracker: Tracker, end: int) -> int:
        return end if self._config.save_decode_cache else min(end, tracker.request.num_prompt_tokens)

    def _plan(self, tracker: Tracker, computed: int) -> None:
        """Store what is missing of the request's first `computed` tokens, all of it that can be stored now."""
        batch = _Batch()
        try:
            self._collect(tracker, batch, computed)
        except Exception:
            for chunk in batch.chunks:
                self._directory.complete_store(chunk, False)
            raise
        if batch.chunks:
            self._submit(tracker, batch)

    def _collect(self, tracker: Tracker, batch: _Batch, computed: int) -> None:
        size = self._config.chunk_size
        end = self._end(tracker, computed)
        full = end // size
        if self._directory.asks:
            self._expect(tracker, self._end(tracker, computed + _AHEAD * size))
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

    def _expect(self, tracker: Tracker, end: int) -> None:
        """Say what the next steps will store of the request's first `end` tokens."""
        size, tokens = self._config.chunk_size, tracker.request.all_token_ids
        full = min(end, tracker.request.num_tokens) // size
        keys = tracker.chain.extend(tokens, full * size)
        for i in range(tracker.planned, full):
            start = i * size
            self._directory.expect(keys[i], size, self._note(tracker.request, start, start + size))
        tail, start = tracker.prompt_end(self._step), full * size
        if self._config.stores_partial and not tracker.tail_planned and start < tail <= end:
            key = tracker.chain.partial(tokens, tail)
            self._directory.expect(key, tail - start, self._note(tracker.request, start, tail))

    def _plan_tail(self, tracker: Tracker, batch: _Batch, computed: int) -> None:
        end, size = tracker.prompt_end(self._step), self._config.chunk_size
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
        first, last = start // self._bs, -(-end // self._bs)
        blocks = tracker.blocks[first:last]
        if len(blocks) < last - first or 0 in blocks:  # 0 is vLLM's null block: no KV behind it
            return False
        chunk = self._directory.prepare_store(key, end - start, self._note(tracker.request, start, end))
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
        tokens = sum(chunk.tokens for chunk in batch.chunks)
        flight = Flight(
            plan,
            tracker.id,
            batch.chunks,
            tokens=tokens,
            pinned=self._pins.pin(batch.blocks),
            replaces=batch.replaces,
            span=tracker.trace.begin("lmcache.store", tokens=tokens),
        )
        self._flights.add(flight)
        self._plans.append(plan)
        self._recorder.count("num_store_requests")
