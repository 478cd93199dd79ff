"""What travels between the two halves of the connector: plans down, reports up, once a step."""

from __future__ import annotations

from dataclasses import dataclass, field

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorMetadata, KVConnectorWorkerMetadata

from lmcache_ext.transfer.base import Plan, Result
from lmcache_ext.transfer.segment import Segment


@dataclass(frozen=True)
class Attach:
    """A cache server's memory to map. Reported as a plan of this id, once the rank can use all of it."""

    id: int
    segment: Segment
    parts: tuple[int, ...]  # by rank: which of a slot's parts it copies to and from


@dataclass
class StepMeta(KVConnectorMetadata):
    """One step's orders to every worker. Plans hold numpy arrays: they are pickled once, by vLLM."""

    loads: list[Plan] = field(default_factory=list)
    stores: list[Plan] = field(default_factory=list)
    now: list[int] = field(default_factory=list)  # ids of loads that this step's forward reads
    waiting: dict[int, str] = field(default_factory=dict)  # id of an async load → the request that waits for it
    invalid: list[int] = field(default_factory=list)  # blocks that were promised and could not even be planned
    arrived: list[str] = field(default_factory=list)  # requests to report as received without any load
    cancel: list[int] = field(default_factory=list)  # stores that need not run if they have not begun
    attach: Attach | None = None  # behind all else in this step: what the next plans are for
    forward: bool = False  # whether this step computes anything


@dataclass
class Tally:
    """What the workers together say of one plan."""

    workers: int = 0
    failed: int = 0
    nbytes: int = 0  # of all workers
    seconds: float = 0.0  # of the slowest

    def add(self, other: Tally) -> Tally:
        """Both, as one."""
        return Tally(
            self.workers + other.workers,
            self.failed + other.failed,
            self.nbytes + other.nbytes,
            max(self.seconds, other.seconds),
        )


@dataclass
class Report(KVConnectorWorkerMetadata):
    """Plans that ended on some worker since the last step."""

    done: dict[int, Tally] = field(default_factory=dict)
    computed: bool = False  # whether the step that ends with this one computed anything

    def add(self, result: Result) -> None:
        """One worker finished one plan."""
        self._merge(result.id, Tally(1, 0 if result.ok else 1, result.nbytes, result.seconds))

    def aggregate(self, other: KVConnectorWorkerMetadata) -> Report:
        """Sum over workers."""
        assert isinstance(other, Report)
        for plan_id, tally in other.done.items():
            self._merge(plan_id, tally)
        self.computed |= other.computed
        return self

    def _merge(self, plan_id: int, tally: Tally) -> None:
        known = self.done.get(plan_id)
        self.done[plan_id] = known.add(tally) if known else tally
