"""The decode side: receivers take chunks into the engine's own slots, where the ordinary look-up finds them.

Receivers have threads of their own, which give out slots and make chunks visible while the engine is idle. So the
directory is one that they share with the scheduler; what the scheduler has found stays there until its turn is over.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from lmcache_ext.config import EngineConfig
from lmcache_ext.engine import Directory, Listener, LockedDirectory
from lmcache_ext.integration.vllm.log import get_logger
from lmcache_ext.integration.vllm.pd.base import Apart
from lmcache_ext.integration.vllm.requests import Tracker
from lmcache_ext.metrics import Recorder
from lmcache_ext.pd import DirectoryStore, Place, Receiver, Store
from lmcache_ext.policies import EvictionPolicy

logger = get_logger("pd")

_CLOSE_SECONDS = 3.0
ReceiverOf = Callable[[int, str, Store], Receiver]
"""(index of a pool, what else than its geometry must be equal, where slots come from) → a receiver for it."""


class _GrowingStore(DirectoryStore):
    """As its base, over a pool that may have grown while the engine was idle."""

    def __init__(self, directory: LockedDirectory, grown: Callable[[], int]) -> None:
        super().__init__(directory, directory.lock)
        self._grown = grown

    def reserve(
        self, req_id: str, writer: int, writers: int, keys: Sequence[bytes], tokens: Sequence[int]
    ) -> list[Place] | None:
        self._directory.grow(self._grown())
        return super().reserve(req_id, writer, writers, keys, tokens)


class Decode(Apart):
    """One receiver for each pool.

    Args:
        config: the engine's settings.
        block_size: tokens of one of vLLM's blocks.
        pools: how many there are.
        receiver_of: makes a receiver.
    """

    uses_pool = True

    def __init__(self, config: EngineConfig, block_size: int, pools: int, receiver_of: ReceiverOf) -> None:
        self._config, self._step, self._pools = config, config.tail_step(block_size), pools
        self._receiver_of = receiver_of
        self._receivers: list[Receiver] = []
        self._directory: LockedDirectory
        self._store: _GrowingStore
        self._claimed: set[str] = set()  # vLLM's ids of requests that have claimed, until they are over

    def directory(self, policy: EvictionPolicy, listener: Listener | None) -> Directory:
        self._directory = LockedDirectory(policy, listener)
        return self._directory

    def open(self, directory: Directory, root: bytes, grown: Callable[[], int]) -> None:
        assert directory is self._directory
        self._store = _GrowingStore(self._directory, grown)
        for i in range(self._pools):
            self._receivers.append(self._receiver_of(i, root.hex(), self._store))

    def begin_turn(self) -> None:
        self._directory.begin_turn()

    def end_turn(self) -> None:
        self._directory.end_turn()

    # -- a request ---------------------------------------------------------------------------------------------------

    def admitted(self, tracker: Tracker) -> None:
        if self._store.holds and tracker.may_load and tracker.id not in self._claimed:
            self._claimed.add(tracker.id)
            self._store.claim_by(self._names(tracker))

    def _names(self, tracker: Tracker) -> list[bytes]:
        """Keys by which its hand-over may be known: that of its prompt's last chunk, as the prefill side names it, and
        those that it found."""
        request, size = tracker.request, self._config.chunk_size
        whole = tracker.prompt_end(self._step)
        found = list(reversed(tracker.match.keys)) if tracker.match else []
        full = tracker.chain.extend(request.all_token_ids, whole // size * size)
        tail = [tracker.chain.partial(request.all_token_ids, whole)] if whole % size else []
        return [*tail, *found, *full[-1:]]

    def finished(self, tracker: Tracker, whole: bool) -> dict[str, Any]:
        self._claimed.discard(tracker.id)
        return {}

    # -- now and then ------------------------------------------------------------------------------------------------

    def measure(self, recorder: Recorder) -> None:
        chunks = sum(receiver.counts["chunks"] for receiver in self._receivers)
        for name, value in (("pd_received_chunks", chunks), ("pd_unclaimed_handovers", self._store.unclaimed)):
            if value > recorder.totals.get(name, 0):
                recorder.count(name, value - recorder.totals.get(name, 0))
        recorder.gauge("pd_open_handovers", self._store.holds)

    def close(self) -> None:
        for receiver in self._receivers:
            if not receiver.close(_CLOSE_SECONDS):
                logger.warning("a receiver did not end within %g s", _CLOSE_SECONDS)
