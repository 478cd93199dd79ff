"""Which chunks a request loads, into which blocks, and what is done about a load that failed."""

from __future__ import annotations

import numpy as np

from lmcache_ext.engine import Chunk, Directory
from lmcache_ext.integration.vllm.flights import Flight, Flights
from lmcache_ext.integration.vllm.gauges import clock
from lmcache_ext.integration.vllm.requests import Match, Tracker
from lmcache_ext.integration.vllm.spoilt import Spoilt
from lmcache_ext.metrics import Recorder, smoothed
from lmcache_ext.transfer.base import Plan, Way


class Loader:
    """Plans loads.

    Args:
        chunk: tokens of a full chunk.
        block_size: tokens of one of vLLM's blocks.
    """

    def __init__(self, directory: Directory, flights: Flights, recorder: Recorder, chunk: int, block_size: int) -> None:
        self._directory, self._flights, self._recorder = directory, flights, recorder
        self._chunk, self._bs, self._bpc = chunk, block_size, chunk // block_size
        self.spoilt = Spoilt(block_size)
        self.token_seconds = 0.0  # that the copy of a token takes, 0: not known

    def lease(self, match: Match | None, end: int) -> list[Chunk] | None:
        """Hold the chunks of what was found, up to token `end`; None: they can't be had any more."""
        if match is None or end > match.ready:
            return None
        count = -(-end // self._chunk) - match.local // self._chunk
        return self._directory.lease(match.keys[:count])

    def plan(
        self, tracker: Tracker, start: int, targets: list[int], chunks: list[Chunk], tokens: int, before: int = 0
    ) -> Flight:
        """A load of tokens [start, start + tokens) from leased chunks into the blocks `targets`.

        Args:
            before: tokens of the same promise that earlier loads bring.
        """
        first = start // self._bs
        base = first // self._bpc
        slots = np.array([chunk.slot for chunk in chunks], dtype=np.int64)
        index = np.arange(first, first + len(targets), dtype=np.int64)
        rows = slots[index // self._bpc - base] * self._bpc + index % self._bpc
        plan = Plan(self._flights.next_id(), Way.LOAD, np.array(targets, dtype=np.int64), rows)
        span = tracker.trace.begin("lmcache.load", tokens=tokens)
        table = tracker.blocks[:]
        flight = Flight(plan, tracker.id, chunks, tokens, end=start + tokens, before=before, table=table, span=span)
        self._flights.add(flight)
        return flight

    def promised(self, tokens: int) -> None:
        """A request was promised so many."""
        self._recorder.count("num_retrieve_requests")
        self._recorder.count("num_requested_tokens", tokens)
        self._recorder.count("num_hit_tokens", tokens)

    def ended(self, flight: Flight) -> None:
        """A load went well."""
        clock(self._recorder, "retrieve", flight.tally)
        self.token_seconds = smoothed(self.token_seconds, flight.tally.seconds / max(flight.tokens, 1))

    def lost(self, tracker: Tracker, brought: int, targets: list[int]) -> None:
        """What was promised behind so many tokens does not come: the blocks `targets` were not filled."""
        self.spoil(tracker, targets)
        self._recorder.count("num_failed_tokens", len(targets) * self._bs)
        tracker.loaded_only(brought)

    def spoil(self, tracker: Tracker, targets: list[int]) -> None:
        """The blocks `targets` were not filled: nobody finds them, and their request is promised nothing again."""
        tracker.may_load = False
        self.spoilt.failed(tracker.id, tracker.blocks or targets, targets[0])

    def goes(self, request_id: str, table: list[int]) -> None:
        """The request is over, with these blocks: its loads under way may yet fail, and then all of them are spoilt."""
        for flight in self._flights.loads():
            if flight.request_id == request_id:
                self._widen(flight, table)

    @staticmethod
    def _widen(flight: Flight, table: list[int]) -> None:
        """The request has more blocks than when its load was planned, unless they are others by now."""
        if table[: len(flight.table)] == flight.table:
            flight.table = table[:]

    def failed(self, flight: Flight, invalid: set[int], tracker: Tracker | None) -> None:
        """A load whose blocks `invalid` were not filled. Its chunks from there on are not found again."""
        flight.doomed = True
        first = flight.first_of(invalid)
        if tracker is not None:
            self._widen(flight, tracker.blocks)  # the step behind it has computed further ones from these by now
        owner = flight.request_id if tracker is not None else None
        self.spoilt.failed(owner, flight.table, int(flight.plan.blocks[first]))
        for chunk in flight.chunks_from(first, self._bpc):
            self._directory.drop(chunk.key)
        self._recorder.count("num_failed_tokens", (len(flight.plan.blocks) - first) * self._bs)
        if tracker is not None:
            tracker.may_load = False
            tracker.loaded_only(flight.before + first * self._bs)
            tracker.store_again()
