"""Requests that tiers bring chunks for, and promises that are made before the last of them is there.

    tier ──▶ L1   ████████████████████░░░░░
    L1 ──▶ blocks          ██████████████████   from here on the request holds blocks

A promise is made once what is still on its way will take no longer than twice the copy of what is there: then the last
bytes are copied as they come, and blocks are held for about as long as copies take. What does not come after all is
reported as invalid blocks, and computed.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from lmcache_ext.engine import Below, Directory, Want
from lmcache_ext.integration.vllm.flights import Flight, Flights
from lmcache_ext.integration.vllm.loads import Loader
from lmcache_ext.integration.vllm.log import get_logger
from lmcache_ext.integration.vllm.lookup import Finder
from lmcache_ext.integration.vllm.metadata import StepMeta
from lmcache_ext.integration.vllm.requests import Match, Tracker

logger = get_logger("scheduler")

_EARLY = 2.0  # in copies of what is there; with 1 a copy that takes longer than usual ends after the tier
_LEAST_SECONDS = 0.004  # a copy that is shorter is not worth the steps that it would take
_ALONE_SECONDS, _NAP_SECONDS = 0.002, 0.0001  # an answer that comes so soon is waited for where nobody else runs


@dataclass
class _Open:
    """A promise that is not kept yet. One load at a time is under way for it; each takes what came meanwhile."""

    tracker: Tracker
    first: int  # token of its request, where the promise begins
    start: int  # up to here loads were planned
    end: int
    keys: list[bytes]  # of the chunks that hold [start, end)
    targets: list[int]  # their blocks
    load: Flight  # the last one
    gone: bool = False  # the request is; vLLM waits for our word to free its blocks


class Fetcher:
    """All of one engine. Scheduler's thread.

    Args:
        patience: seconds that a request waits for tiers at most.
    """

    def __init__(
        self, below: Below, directory: Directory, finder: Finder, flights: Flights, loader: Loader, block_size: int,
        patience: float,
    ) -> None:  # fmt: skip
        self._below, self._directory, self._finder = below, directory, finder
        self._flights, self._loader = flights, loader
        self._bs, self._patience = block_size, patience
        self._open: dict[str, _Open] = {}
        self._waited = False  # in this step

    @property
    def busy(self) -> bool:
        """Whether somebody waits for what only a next step can bring."""
        return bool(self._open) or self._below.busy

    # -- before the promise ------------------------------------------------------------------------------------------

    def find(self, tracker: Tracker, match: Match, alone: bool) -> Match | None:
        """What can be promised to a request of which `match` is in memory; None: ask again, tiers bring more.

        Args:
            alone: nobody else has anything to compute.
        """
        if tracker.fetched:
            return match
        waits = self._waits(tracker, match, alone)
        match = self._finder.find(tracker, match.local)
        if waits and (coming := self._worth(tracker.id, match)):
            match = self._finder.with_coming(tracker, match, coming)
        return None if waits and match.end == match.ready else match

    def _waits(self, tracker: Tracker, match: Match, alone: bool) -> bool:
        """Whether tiers are bringing what follows in memory."""
        known = self._below.knows(tracker.id)
        wants = [] if known else self._finder.beyond(tracker, match)
        waits = bool(known or wants) and self._below.fetch(
            tracker.id, wants, self._patience, tracker.trace, () if known else match.keys
        )
        if waits and wants and alone and not self._waited:
            # Cheaper than to be asked again in a step that does nothing.
            self._waited, until = True, time.monotonic() + _ALONE_SECONDS  # once a step
            while waits and time.monotonic() < until:
                time.sleep(_NAP_SECONDS)
                self._below.poll()
                waits = self._below.fetch(tracker.id, (), self._patience, tracker.trace)
        tracker.fetched = not waits
        return waits

    def _worth(self, request_id: str, match: Match) -> Sequence[Want]:
        """What should be promised behind `match`, which a tier still brings; empty: better wait for it."""
        wants, seconds = self._below.soon(request_id)
        copy = (match.ready - match.local) * self._loader.token_seconds
        return wants if seconds <= _EARLY * copy and copy >= _LEAST_SECONDS else ()

    def let_go(self, request_id: str) -> None:
        """What tiers brought for a request is held by its load, or by nobody."""
        self._below.release(request_id)

    # -- behind it ---------------------------------------------------------------------------------------------------

    def promised(
        self, tracker: Tracker, first: int, end: int, keys: list[bytes], targets: list[int], load: Flight
    ) -> None:
        """`load` is the beginning of a promise of tokens [first, end).

        Args:
            keys: of the chunks behind it.
            targets: the blocks that they go to.
        """
        tracker.fetched = load.unfinished = True
        self._open[tracker.id] = _Open(tracker, first, load.end, end, keys, targets, load)

    def gone(self, request_id: str) -> None:
        """The request is over."""
        self.let_go(request_id)
        if (each := self._open.get(request_id)) is not None:
            each.gone = True

    def step(self, meta: StepMeta) -> None:
        """Plan what came, and give up what does not come any more. Never raises: somebody waits."""
        self._waited = False
        for each in list(self._open.values()):
            if not self._flights.under_way(each.load):
                self._go_on(each, meta)

    def _go_on(self, each: _Open, meta: StepMeta) -> None:
        over = each.gone or each.load.doomed or bool(each.load.tally.failed)
        waits = planned = False
        try:
            if not over:
                waits = self._below.fetch(each.tracker.id, (), 0.0)
                planned = self._plan(each, meta)
        except Exception:
            logger.exception("the rest of what request %s was promised can't be planned", each.tracker.id)
        if each.start < each.end and (waits or planned):
            return
        del self._open[each.tracker.id]
        self.let_go(each.tracker.id)
        if each.start < each.end:
            self._give_up(each, meta, over)

    def _plan(self, each: _Open, meta: StepMeta) -> bool:
        """Load what came since the last time; False: nothing did."""
        chunks = self._directory.lease(each.keys[: self._directory.match(each.keys)])
        if not chunks:
            return False
        tokens = min(each.end - each.start, sum(chunk.tokens for chunk in chunks))
        blocks = -(-tokens // self._bs)
        load = self._loader.plan(
            each.tracker, each.start, each.targets[:blocks], chunks, tokens, before=each.start - each.first
        )
        meta.loads.append(load.plan)
        self._flights.follow(each.load, load)
        each.load, each.start = load, each.start + tokens
        each.keys, each.targets = each.keys[len(chunks) :], each.targets[blocks:]
        load.unfinished = each.start < each.end
        if not load.unfinished:
            meta.waiting[load.plan.id] = each.tracker.id
        return True

    def _give_up(self, each: _Open, meta: StepMeta, over: bool) -> None:
        """The rest does not come.

        Args:
            over: vLLM knows which blocks were not filled, or nobody needs them.
        """
        self._flights.follow(each.load)
        meta.arrived.append(each.tracker.id)
        if not over:
            logger.warning("tiers did not bring all of request %s's prefix; the rest is computed", each.tracker.id)
            meta.invalid.extend(each.targets)
            self._loader.lost(each.tracker, each.start - each.first, each.targets)
