"""The prefill side: each prompt's chunks go to the decode engine that the request names, as they are stored.

    admitted ──begin──▶ senders ask for slots ──a chunk is ready in L1: leased──▶ sent ──Released──▶ the lease goes back
    finished ──whatever will never be stored──▶ the senders fail it, and tell the proxy

Senders have threads of their own and go on while the engine is idle; leases come back with its next step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from lmcache_ext.config import EngineConfig
from lmcache_ext.engine import Chunk, Directory
from lmcache_ext.integration.vllm.log import get_logger
from lmcache_ext.integration.vllm.pd.base import Apart
from lmcache_ext.integration.vllm.pd.spec import ANSWER, FIRST_TOKEN, NAME, Spec
from lmcache_ext.integration.vllm.requests import Tracker
from lmcache_ext.metrics import Recorder
from lmcache_ext.pd import Ended, Outcome, Released, Sender, Target, Together

logger = get_logger("pd")

_CLOSE_SECONDS = 3.0
SenderOf = Callable[[int, str], Sender]
"""(index of a pool, what else than its geometry must be equal) → a sender for it."""


@dataclass(eq=False)
class _Loan:
    """A chunk that senders read."""

    chunk: Chunk
    readers: int


@dataclass(eq=False)
class _Outgoing:
    """One request on its way to a decode engine."""

    req_id: str
    legs: list[tuple[Sender, Target]]
    missing: dict[bytes, int]  # key → index of each chunk that senders were not given yet
    open: int  # legs that have not ended
    loans: dict[int, _Loan] = field(default_factory=dict)  # index → what is being read
    over: bool = False  # no store will be planned for it any more
    failed: bool = False


class Prefill(Apart):
    """One sender for each pool.

    Args:
        config: the engine's settings.
        block_size: tokens of one of vLLM's blocks.
        writers: the ranks that have a pool, in the order of the pools.
        ranks: of the engine.
        sender_of: makes a sender.
    """

    uses_pool = True

    def __init__(
        self, config: EngineConfig, block_size: int, writers: Sequence[int], ranks: int, sender_of: SenderOf
    ) -> None:
        self._config, self._step = config, config.tail_step(block_size)
        self._writers, self._ranks = list(writers), ranks
        self._sender_of = sender_of
        self._senders: list[Sender] = []
        self._directory: Directory
        self._version = -1  # the directory's, when it was last looked at for chunks
        self._going: dict[str, _Outgoing] = {}  # by the proxy's id, until all leases are back
        self._by_request: dict[str, _Outgoing | None] = {}  # by vLLM's id, until that is over; None: nothing goes
        self._counts = {"pd_sent_chunks": 0, "pd_handovers": 0, "pd_failed_handovers": 0}

    def open(self, directory: Directory, root: bytes, grown: Callable[[], int]) -> None:
        self._directory = directory
        self._senders = [self._sender_of(i, root.hex()) for i in range(len(self._writers))]

    # -- a request ---------------------------------------------------------------------------------------------------

    def admitted(self, tracker: Tracker) -> None:
        params = tracker.request.kv_transfer_params or {}
        if NAME not in params or tracker.id in self._by_request:
            return
        self._by_request[tracker.id] = None
        try:
            spec = Spec.of(params[NAME])
            targets = spec.targets([sender.geometry for sender in self._senders], self._writers, self._ranks)
        except ValueError as error:
            logger.warning("request %s is not handed over: %s %s", tracker.id, NAME, error)
            self._refuse(params[NAME])
            return
        if spec.req_id in self._going:
            logger.warning("request %s is not handed over: %s is under way already", tracker.id, spec.req_id)
            return
        legs = [(self._senders[i], target) for i, target in targets]
        self._by_request[tracker.id] = self._begin(tracker, spec, legs)

    def _begin(self, tracker: Tracker, spec: Spec, legs: list[tuple[Sender, Target]]) -> _Outgoing | None:
        keys, last = self._chunks(tracker)
        told = tuple(range(len(spec.init_ports)))  # as many as the proxy knows
        if not keys:
            self._senders[0].tell(spec.req_id, True, told)
            return None
        outgoing = _Outgoing(spec.req_id, legs, {key: i for i, key in enumerate(keys)}, len(legs))
        together = Together(len(legs), told)
        for sender, target in legs:
            sender.begin(spec.req_id, target, keys, last, together)
        self._going[spec.req_id] = outgoing
        self._hand_over(outgoing)
        return outgoing

    def _chunks(self, tracker: Tracker) -> tuple[list[bytes], int]:
        """(keys of the prompt's chunks, its tail included; tokens of the last of them)."""
        request, size = tracker.request, self._config.chunk_size
        if request.prompt_token_ids is None or request.num_prompt_tokens < 2:  # of one token nothing can be had
            return [], 0
        whole = tracker.prompt_end(self._step)
        keys = list(tracker.chain.extend(request.all_token_ids, whole // size * size))
        if whole % size and self._config.stores_partial:
            return [*keys, tracker.chain.partial(request.all_token_ids, whole)], whole % size
        return keys, size

    def _refuse(self, given: Any) -> None:
        """Let the proxy know, if it said who it is."""
        req_id = given.get("req_id") if isinstance(given, dict) else None
        if isinstance(req_id, str) and req_id:
            self._senders[0].tell(req_id, False, (0,))

    def finished(self, tracker: Tracker, whole: bool) -> dict[str, Any]:
        outgoing = self._by_request.pop(tracker.id, None)
        if outgoing is not None:
            outgoing.over = True
            if not whole:
                outgoing.missing.clear()
                for sender, target in outgoing.legs:
                    sender.cancel(outgoing.req_id, target)
        params = tracker.request.kv_transfer_params or {}
        output = tracker.request.output_token_ids
        return {ANSWER: int(output[0])} if params.get(FIRST_TOKEN) is True and output else {}

    # -- every step --------------------------------------------------------------------------------------------------

    def poll(self) -> None:
        for sender in self._senders:
            for event in sender.poll():
                if (outgoing := self._going.get(event.req_id)) is not None:
                    if isinstance(event, Released):
                        self._released(outgoing, event.index)
                    else:
                        self._ended(outgoing, event)
        changed, self._version = self._version != self._directory.version, self._directory.version
        for outgoing in [each for each in self._going.values() if each.missing and (changed or each.over)]:
            self._hand_over(outgoing)

    def _hand_over(self, outgoing: _Outgoing) -> None:
        """Give the senders what is ready by now, and tell them what will never be."""
        lost = []
        for key, index in list(outgoing.missing.items()):
            chunk = self._directory.ready(key)
            if chunk is not None and self._directory.hold(chunk):
                del outgoing.missing[key]
                outgoing.loans[index] = _Loan(chunk, len(outgoing.legs))
                for sender, target in outgoing.legs:
                    sender.ready(outgoing.req_id, target, index, chunk.slot)
            elif outgoing.over and not self._directory.coming(key):
                del outgoing.missing[key]
                lost.append(index)
        if lost:
            for sender, target in outgoing.legs:
                sender.lose(outgoing.req_id, target, lost, f"{len(lost)} of its chunks could not be stored here")

    def _released(self, outgoing: _Outgoing, index: int) -> None:
        loan = outgoing.loans.get(index)
        if loan is None:
            return
        loan.readers -= 1
        if not loan.readers:
            del outgoing.loans[index]
            self._directory.release([loan.chunk])
            self._forget(outgoing)

    def _ended(self, outgoing: _Outgoing, event: Ended) -> None:
        outgoing.open -= 1
        self._counts["pd_sent_chunks"] += event.sent
        if event.outcome is not Outcome.STORED and not outgoing.failed:
            outgoing.failed = True
            outgoing.missing.clear()
            self._counts["pd_failed_handovers"] += event.outcome is not Outcome.CANCELLED
            for sender, target in outgoing.legs:  # the other ranks' parts are of no use
                sender.cancel(outgoing.req_id, target)
        self._counts["pd_handovers"] += not outgoing.open and not outgoing.failed
        self._forget(outgoing)

    def _forget(self, outgoing: _Outgoing) -> None:
        if not outgoing.open and not outgoing.loans:
            self._going.pop(outgoing.req_id, None)

    # -- now and then ------------------------------------------------------------------------------------------------

    def reset(self) -> None:
        for outgoing in self._going.values():
            lost = list(outgoing.missing.values())
            outgoing.missing.clear()
            for sender, target in outgoing.legs if lost else ():
                sender.lose(outgoing.req_id, target, lost, "the cache was reset")

    def measure(self, recorder: Recorder) -> None:
        for name, value in self._counts.items():
            if value > recorder.totals.get(name, 0):
                recorder.count(name, value - recorder.totals.get(name, 0))
        recorder.gauge("pd_open_handovers", len(self._going))

    def close(self) -> None:
        for sender in self._senders:
            if not sender.close(_CLOSE_SECONDS):
                logger.warning("a sender did not end within %g s", _CLOSE_SECONDS)
