"""The worker half: maps the pool, runs the plans that each step brings, and reports what became of them."""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from lmcache_ext.errors import ConfigError, LMCacheError, TransferError
from lmcache_ext.integration.vllm.log import get_logger
from lmcache_ext.integration.vllm.metadata import Attach, Report, StepMeta
from lmcache_ext.integration.vllm.model import Model
from lmcache_ext.transfer import GpuPool, HostPool, PageTable, Transfer, gpu_pool, open_transfer, rendezvous
from lmcache_ext.transfer.base import Plan, Result, Way
from lmcache_ext.transfer.pool import Shape
from lmcache_ext.transfer.rendezvous import Berth
from lmcache_ext.transfer.segment import SegmentPool

logger = get_logger("worker")

_FIND_SECONDS = 120.0  # for the rank that stores for this one to publish its pool
_CLOSE_SECONDS = 5.0


class WorkerSide:
    """One rank's data plane.

    Args:
        engine_id: shared by all ranks and the scheduler of one engine.
        rank: of this worker in its engine, 0 to world size - 1.
        pool_bytes: of this rank's pool; None: chunks are in a cache server's memory, to be attached later.
        setting: what to name when the pool can't be had.
        on_gpu: whether the pool shall lie in the GPU's memory, if the KV cache does.
    """

    def __init__(
        self, engine_id: str, model: Model, rank: int, blocks_per_chunk: int, pool_bytes: int | None,
        load_timeout: float, setting: str, on_gpu: bool = False,
    ) -> None:  # fmt: skip
        self._engine_id = engine_id
        self._model = model
        self._rank = rank
        self._bpc = blocks_per_chunk
        self._pool_bytes = pool_bytes
        self._load_timeout = load_timeout
        self._setting = setting
        self._on_gpu = on_gpu
        self._pages: PageTable | None = None
        self._pool: HostPool | GpuPool | SegmentPool | None = None
        self._transfer: Transfer | None = None
        self._retired: list[Transfer] = []  # of memory that was mapped before, until their plans have ended
        self._attaching = 0  # id of the order under way
        self._stores: list[Plan] = []  # of the bound step, until its forward has run
        self._waiting: dict[int, str] = {}  # async loads under way → the request that waits
        self._blocks: dict[int, list[int]] = {}  # loads under way → their targets
        self._received: set[str] = set()
        self._invalid: set[int] = set()
        self._report = Report()
        self._forward = False

    @property
    def writes(self) -> bool:
        """Whether this rank has a pool of its own."""
        return self._model.writer(self._rank) == self._rank

    def register(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Learn where the KV pages lie, map the pool and say so.

        Raises:
            LayoutError: we don't know this layout.
            ConfigError: the pool does not fit.
        """
        pages = self._pages = PageTable.of(tensors, self._model.num_blocks)
        if self._pool_bytes is None:
            rendezvous.publish(self._engine_id, self._berth(pages, "", 0))
            return
        shape = Shape.fit(self._pool_bytes, self._bpc, pages.row_bytes, self._setting)
        device = pages.keep[0].device.index if self._on_gpu and pages.device == "cuda" else None
        pool = self._create(shape, device) if self.writes else self._attach(shape)
        self._pool = pool
        self._transfer = open_transfer(pages, pool, self._load_timeout)
        if self.writes:
            berth = self._berth(pages, pool.path, shape.slots)
            if isinstance(pool, GpuPool):
                berth = replace(berth, gpu=pool.device, address=pool.address)
            rendezvous.publish(self._engine_id, berth)
        logger.info(
            "rank %d: %s pool of %.2f GB, %d chunks of %d bytes; KV layout %s",
            self._rank,
            "host" if device is None else "GPU",
            shape.nbytes / (1 << 30),
            shape.slots,
            shape.slot_bytes,
            pages.layout,
        )

    def _berth(self, pages: PageTable, path: str, slots: int) -> Berth:
        return Berth(self._rank, os.getpid(), path, slots, self._bpc, pages.row_bytes, pages.layout, pages.cuts)

    def _create(self, shape: Shape, device: int | None) -> HostPool | GpuPool:
        name = f"lmcache_ext-{self._rank}"
        try:
            return HostPool.create(shape, name) if device is None else gpu_pool(shape, name, device)
        except TransferError as error:
            raise ConfigError(
                self._setting, shape.nbytes, f"{error}: leave room for it beside vLLM's (--gpu-memory-utilization)"
            ) from None
        except OSError as error:
            raise LMCacheError(
                f"no host pool of {shape.nbytes / (1 << 30):.2f} GB ({self._setting}): {error.strerror}"
            ) from None

    def _attach(self, shape: Shape) -> HostPool:
        writer = self._model.writer(self._rank)
        berth = rendezvous.find(self._engine_id, writer, _FIND_SECONDS)
        if berth is None:
            raise LMCacheError(f"rank {writer} did not publish its pool within {_FIND_SECONDS} s")
        if berth.row_bytes != shape.row_bytes:
            raise LMCacheError(
                f"rank {writer} has rows of {berth.row_bytes} bytes, rank {self._rank} {shape.row_bytes}"
            )
        return HostPool.attach(berth.path, berth.shape, member=self._rank - writer)

    # -- one step, in vLLM's order -----------------------------------------------------------------------------------

    def bind(self, meta: StepMeta) -> None:
        """A step begins: start its loads at once, ordered after the work that the engine issued before."""
        self._forward = meta.forward
        self._stores = meta.stores
        self._invalid.update(meta.invalid)
        self._received.update(meta.arrived)
        if meta.attach is not None:
            self._attach_segment(meta.attach)
        if self._transfer is None:
            self._refuse(meta)
            return
        if meta.forward or meta.loads:
            self._transfer.beat()
        if meta.cancel:
            for transfer in (self._transfer, *self._retired):
                transfer.cancel(meta.cancel)
        if meta.loads:
            self._waiting.update(meta.waiting)
            self._blocks.update((plan.id, plan.blocks.tolist()) for plan in meta.loads)
            self._transfer.submit(meta.loads, self._transfer.fence())

    def _attach_segment(self, order: Attach) -> None:
        """Copy to and from a server's memory from now on. What was submitted for another goes on there."""
        assert self._pages is not None
        if self._transfer is not None:
            self._retired.append(self._transfer)
            self._transfer = self._pool = None
        pool: SegmentPool | None = None
        try:
            pool = SegmentPool(order.segment, order.parts[self._rank], self._pages.row_bytes)
            self._transfer = open_transfer(self._pages, pool, self._load_timeout)
        except Exception as error:  # also torch's own: the GPU may be full
            if pool is not None:
                pool.close()
            logger.error("rank %d can't use the cache server's memory: %s", self._rank, error)
            self._report.add(Result(order.id, Way.LOAD, False, 0, 0.0, str(error)))
            return
        self._pool, self._attaching = pool, order.id

    def start_load(self, meta: StepMeta) -> None:
        """The forward comes next: let it see the loads that it needs."""
        if meta.now and self._transfer is not None:
            self._transfer.join(meta.now)

    def save(self) -> None:
        """The forward has been issued: start this step's stores behind it."""
        stores, self._stores = self._stores, []
        if not stores or self._transfer is None:
            return
        if self.writes:
            self._transfer.submit(stores, self._transfer.fence())
        else:
            for plan in stores:
                self._report.add(Result(plan.id, Way.STORE, True, 0, 0.0))

    def collect(self) -> set[str]:
        """Requests whose loads ended, well or not, since the last call."""
        if not self._forward:
            self.save()  # up to 0.30 vLLM does not ask for it on a step without a forward
        for transfer in (self._transfer, *self._retired):
            for result in transfer.poll() if transfer else ():
                self._take(result)
        self._settle()
        received, self._received = self._received, set()
        return received

    def _settle(self) -> None:
        """Say once that the server's memory can be used, and let go of what was before."""
        if self._attaching and isinstance(self._pool, SegmentPool) and self._transfer is not None:
            stopped = self._transfer.stopped  # looked at first: it is so as soon as all is there, too
            whole = self._pool.whole
            if whole or stopped:
                error = "" if whole else "not all of the cache server's memory can be used"
                self._report.add(Result(self._attaching, Way.LOAD, whole, 0, 0.0, error))
                self._attaching = 0
        for transfer in [each for each in self._retired if each.idle]:
            self._retired.remove(transfer)
            threading.Thread(target=transfer.close, args=(_CLOSE_SECONDS,), daemon=True).start()

    def _take(self, result: Result) -> None:
        self._report.add(result)
        if result.way is Way.LOAD:
            targets = self._blocks.pop(result.id)
            if not result.ok:
                logger.error("load %d failed (%s); its tokens are computed instead", result.id, result.error)
                self._invalid.update(targets)
            if (request_id := self._waiting.pop(result.id, None)) is not None:
                self._received.add(request_id)
        elif not result.ok:
            logger.warning("store %d failed: %s", result.id, result.error)

    def _refuse(self, meta: StepMeta) -> None:
        """No data plane: every plan fails at once."""
        for plan in meta.loads:
            self._invalid.update(plan.blocks.tolist())
        self._received.update(meta.waiting.values())
        for plan in [*meta.loads, *meta.stores]:
            self._report.add(Result(plan.id, plan.way, False, 0, 0.0, "no data plane"))
        self._stores = []

    def invalid(self) -> set[int]:
        """Blocks whose load failed since the last call."""
        invalid, self._invalid = self._invalid, set()
        return invalid

    def report(self) -> Report | None:
        """What there is to say of the step that ends; None: it computed nothing, and no plan ended."""
        report, self._report = self._report, Report()
        report.computed = self._forward
        return report if report.done or report.computed else None

    def close(self) -> None:
        """The worker is going down."""
        for transfer in (self._transfer, *self._retired):
            if transfer is not None:
                transfer.close(_CLOSE_SECONDS)
        self._transfer, self._retired = None, []
        if self._pool is not None:
            self._pool.close()
            self._pool = None


def rank_of(config: Any) -> int:
    """This worker's rank within its engine."""
    parallel = config.parallel_config
    try:
        from vllm.distributed import get_pp_group, get_tensor_model_parallel_rank

        return int(get_pp_group().rank_in_group * parallel.tensor_parallel_size + get_tensor_model_parallel_rank())
    except AssertionError:  # no process groups: one process drives the connector by hand
        return int(parallel.rank)
