"""Parts of the connector that need no engine."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch

from lmcache_ext.integration.vllm import worker as worker_module
from lmcache_ext.integration.vllm.loads import Loader
from lmcache_ext.integration.vllm.metadata import Attach, Report, StepMeta
from lmcache_ext.integration.vllm.spoilt import Spoilt


def test_a_full_gpu_does_not_end_an_engine_that_joins_a_server() -> None:
    side = worker_module.WorkerSide("e", mock.Mock(), 0, 2, None, 1.0, "X")
    side._pages = mock.Mock(row_bytes=8)
    full = torch.OutOfMemoryError("CUDA out of memory")
    with mock.patch.object(worker_module, "SegmentPool") as pool:
        with mock.patch.object(worker_module, "open_transfer", side_effect=full):
            side.bind(StepMeta(attach=Attach(1, mock.Mock(), (0,))))
        assert pool.return_value.close.called
    report = side.report()
    assert report is not None and report.done[1].failed == 1


class Transfer:
    """A data plane that copies nothing."""

    def __init__(self) -> None:
        self.beats, self.stopped, self.idle = 0, False, True

    def beat(self) -> None:
        self.beats += 1

    def poll(self) -> list[Any]:
        return []

    def submit(self, *_: Any) -> None:
        pass

    def fence(self) -> None:
        pass


@pytest.mark.parametrize("whole", [True, False])
def test_a_servers_memory_is_locked_at_full_speed_unless_the_engine_computes_and_then_it_is_said(whole: bool) -> None:
    side = worker_module.WorkerSide("e", mock.Mock(), 0, 2, None, 1.0, "X")
    side._pages, transfer = mock.Mock(row_bytes=8), Transfer()

    class Pool:
        whole = False

        def __init__(self, *_: Any) -> None:
            pass

    with (
        mock.patch.object(worker_module, "SegmentPool", Pool),
        mock.patch.object(worker_module, "open_transfer", return_value=transfer),
    ):
        side.bind(StepMeta(attach=Attach(1, mock.Mock(), (0,))))
        for meta, beats in ((StepMeta(), 0), (StepMeta(forward=True), 1), (StepMeta(), 1)):
            side.bind(meta)
            side.collect()
            assert transfer.beats == beats and 1 not in (side.report() or Report()).done
        transfer.stopped, Pool.whole = True, whole
        side.collect()
        report = side.report()
    assert report is not None and report.done[1].failed == (0 if whole else 1)


BLOCK = 32


@pytest.fixture
def spoilt() -> Spoilt:
    """Over a pool in which somebody else holds every block."""
    one = Spoilt(BLOCK)
    one.bind(mock.Mock(blocks=[SimpleNamespace(ref_cnt=2) for _ in range(20)]))
    return one


def scheduled(request_id: str, done: int, tokens: int) -> Any:
    cached = SimpleNamespace(req_ids=[request_id], num_computed_tokens=[done])
    return SimpleNamespace(
        scheduled_new_reqs=[], scheduled_cached_reqs=cached, num_scheduled_tokens={request_id: tokens}
    )


def test_blocks_are_wrong_until_they_are_computed_again(spoilt: Spoilt) -> None:
    spoilt.failed("r", [5, 6, 7, 8], 6)
    assert spoilt._pool.evict_blocks.call_args.args == ({6, 7, 8},)
    spoilt.follow(scheduled("other", 0, 1))
    spoilt.follow(scheduled("r", BLOCK, BLOCK + 5))  # 6 is right once this step has run
    assert spoilt.preempted("r") == [7, 8] and spoilt.preempted("r") == []


def test_a_request_that_has_computed_all_again_leaves_nothing(spoilt: Spoilt) -> None:
    spoilt.failed("r", [5, 6, 7, 8], 6)
    spoilt.follow(scheduled("r", BLOCK, 2 * BLOCK))
    spoilt.follow(scheduled("r", 3 * BLOCK, BLOCK))
    assert not spoilt._open
    assert spoilt.preempted("r") == []


def test_a_request_that_is_gone_leaves_nothing(spoilt: Spoilt) -> None:
    spoilt.failed(None, [5, 6], 5)
    assert spoilt._pool.evict_blocks.called and not spoilt._open


def test_a_load_keeps_its_blocks_when_its_request_has_lost_them() -> None:
    loader = Loader(mock.Mock(), mock.Mock(), mock.Mock(), 64, BLOCK)
    flight = SimpleNamespace(request_id="r", table=[5, 6])
    loader._flights.loads.return_value = [flight]  # type: ignore[attr-defined]
    for table, then in (([], [5, 6]), ([7, 8, 9], [5, 6]), ([5, 6, 7], [5, 6, 7])):
        loader.goes("r", table)
        assert flight.table == then


def test_at_its_end_a_request_still_holds_its_blocks_itself(spoilt: Spoilt) -> None:
    spoilt.failed("r", [5, 6], 5)
    spoilt._pool.blocks[6].ref_cnt = 1
    assert spoilt.finished("r", computed=0) == [5]
