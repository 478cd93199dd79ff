"""The loop that drives the ring, against a GPU that is simulated: streams that run in any order that events allow.

Its calls of the driver end in Python here. So whatever order it forgets to ask for, some seed runs the other way round,
and bytes are wrong. The compiled loop runs once; compiling takes longer than all the rest.
"""

from __future__ import annotations

import ctypes
import random
from collections.abc import Callable
from types import FunctionType
from typing import Any

import numpy as np
import pytest

from lmcache_ext.native import address_of
from lmcache_ext.transfer import stages
from lmcache_ext.transfer.stages import (
    AWAIT_EVENT,
    CALLS,
    COPY_IN,
    COPY_OUT,
    LAUNCH,
    RECORD,
    SET_KERNEL,
    WAIT_EVENT,
    Track,
    compiled,
    cut,
    explain,
)  # fmt: skip

I64, U32, INT = ctypes.c_int64, ctypes.c_uint32, ctypes.c_int
ROW, BLOCKS, POOL_ROWS, STAGE_ROWS, PIECE_ROWS, RINGS = 24, 40, 64, 4, 12, 3
COPY, OTHER_COPY, KERNEL, ENGINE = 1, 2, 3, 4  # streams


def interpreted() -> Callable[..., int]:
    """The loop, as Python runs it: `calls` are functions then."""
    return FunctionType(stages.issue.__code__, {**vars(stages), "call": lambda function, given: function(*given)})


class Gpu:
    """Each stream is a list of operations, of which the first `done` have run. `forgets`: an event that is never
    waited for on a stream."""

    def __init__(self, seed: int, forgets: Callable[[int], bool] = lambda event: False, native: bool = False) -> None:
        self.native = native
        self.random = random.Random(seed)
        self.forgets = forgets
        self.queue: dict[int, list[Callable[[], bool]]] = {COPY: [], OTHER_COPY: [], KERNEL: [], ENGINE: []}
        self.done = dict.fromkeys(self.queue, 0)
        self.records: dict[int, tuple[int, int]] = {}  # event → (stream, operations before its record)
        self.kv = np.zeros((BLOCKS, ROW), dtype=np.uint8)
        self.pool = np.zeros((POOL_ROWS, ROW), dtype=np.uint8)
        self.ring = np.zeros((RINGS, STAGE_ROWS, ROW), dtype=np.uint8)
        self.events = 0
        self.arguments = np.array([0, 0, 0, 4242])
        self.set: dict[int, list[int]] = {}  # graph → arguments
        self.flying: dict[int, bool] = {}  # graph → whether it was launched and has not run
        self.copies: list[int] = []  # the streams that they ran on
        self.fails = -1  # index of the call that does
        self.to_pages = False
        calls: list[tuple[Callable[..., int], list[Any]]] = [
            (self._wait_event, [I64, I64, U32]), (self._copy, [I64] * 4), (self._copy, [I64] * 4),
            (self._record, [I64, I64]), (self._set_kernel, [I64] * 3), (self._launch, [I64] * 2),
            (self._await_event, [I64]),
        ]  # fmt: skip
        self.calls: Any = [self._or_fail(i, call) for i, (call, _) in enumerate(calls)]
        if native:
            self.keep = [ctypes.CFUNCTYPE(INT, *types)(self.calls[i]) for i, (_, types) in enumerate(calls)]
            self.calls = np.array([address_of(function) for function in self.keep])

    def _or_fail(self, index: int, call: Callable[..., int]) -> Callable[..., int]:
        return lambda *arguments: 719 if index == self.fails else call(*map(int, arguments))

    def new_event(self) -> int:
        self.events += 1
        return self.events

    def run(self, until: Callable[[], bool]) -> None:
        """Let streams run, at random, until that holds."""
        while not until():
            ready = [s for s, ops in self.queue.items() if self.done[s] < len(ops)]
            self.random.shuffle(ready)
            assert any(self._step(stream) for stream in ready), "nothing can run"

    def _step(self, stream: int) -> bool:
        ran = self.queue[stream][self.done[stream]]()
        self.done[stream] += ran
        return ran

    def reached(self, event: int) -> bool:
        stream, before = self.records.get(event, (ENGINE, 0))
        return self.done[stream] >= before

    def _wait_event(self, stream: int, event: int, _: int) -> int:
        if event in self.records and not self.forgets(event):
            on, before = self.records[event]  # as it stands now: a later record does not count
            self.queue[stream].append(lambda: self.done[on] >= before)
        return 0

    def _record(self, event: int, stream: int) -> int:
        self.queue[stream].append(lambda: True)
        self.records[event] = (stream, len(self.queue[stream]))
        return 0

    def _await_event(self, event: int) -> int:
        if not self.forgets(event):
            self.run(lambda: self.reached(event))
        return 0

    def _copy(self, target: int, source: int, nbytes: int, stream: int) -> int:
        def copy() -> bool:
            self.copies.append(stream)
            return bool(ctypes.memmove(target, source, nbytes)) or True

        self.queue[stream].append(copy)
        return 0

    def _set_kernel(self, graph: int, node: int, parameters: int) -> int:
        assert node == graph + 100 and parameters == 77
        assert not self.flying.get(graph), "the graph is changed while it may run"
        self.set[graph] = self.arguments.tolist()
        return 0

    def _launch(self, graph: int, stream: int) -> int:
        values = self.set[graph]
        blocks = np.ctypeslib.as_array((ctypes.c_int64 * values[2]).from_address(values[0])).copy()
        slot = (values[1] - self.ring.ctypes.data) // self.ring[0].nbytes
        assert values[3] == 4242 and slot == graph and stream == KERNEL
        self.flying[graph] = True

        def kernel() -> bool:
            rows = self.ring[slot, : len(blocks)]
            if self.to_pages:
                self.kv[blocks] = rows
            else:
                rows[:] = self.kv[blocks]
            self.flying[graph] = False
            return True

        self.queue[stream].append(kernel)
        return 0


class Lane:
    """The loop and what it needs, on a simulated GPU."""

    def __init__(self, gpu: Gpu) -> None:
        self.gpu = gpu
        self.track = Track(
            copies=(COPY, OTHER_COPY), kernel=KERNEL, rings=[gpu.ring[i].ctypes.data for i in range(RINGS)],
            event=gpu.new_event, graphs=[(i, i + 100) for i in range(RINGS)], parameters=77,
            arguments=gpu.arguments, vary=(0, 1, 2),
        )  # fmt: skip
        self.issue = compiled() if gpu.native else interpreted()

    def move(self, load: bool, blocks: np.ndarray, rows: np.ndarray) -> int:
        gpu, track = self.gpu, self.track
        parts = cut(rows * ROW, STAGE_ROWS, PIECE_ROWS * ROW, ROW, gpu.pool.ctypes.data)
        gpu.to_pages = load
        after, began, ended = (gpu.new_event() for _ in range(3))
        gpu._record(after, ENGINE)
        code = self.issue(
            load, after, began, ended, blocks.ctypes.data, parts.stages, parts.runs, parts.first, gpu.calls,
            track.fixed, track.rings, track.middle, track.over, track.graphs, track.arguments, track.issued,
        )  # fmt: skip
        if not code:
            gpu.run(lambda: gpu.reached(ended))
        return int(code)


def there_and_back(gpu: Gpu) -> bool:
    """Whether everything arrives where it should, on the GPU, in the pool and back."""
    rng = np.random.default_rng(gpu.random.randrange(1 << 30))
    lane = Lane(gpu)
    gpu.kv[:] = rng.integers(1, 255, gpu.kv.shape)
    before = gpu.kv.copy()
    blocks = rng.permutation(BLOCKS)[:30].astype(np.int64)
    rows = rng.permutation(POOL_ROWS)[:30].astype(np.int64)
    rows[5:20] = np.arange(30, 45)
    rows = np.array(list(dict.fromkeys(rows.tolist())), dtype=np.int64)
    blocks = blocks[: len(rows)]
    assert lane.move(False, blocks, rows) == 0
    stored = np.array_equal(gpu.pool[rows], before[blocks])
    others = np.delete(gpu.pool, rows, axis=0)
    gpu.kv[blocks] = 0
    assert lane.move(True, blocks, rows) == 0
    return bool(stored and not others.any() and np.array_equal(gpu.kv, before))


def test_every_order_that_the_events_allow_is_right() -> None:
    for seed in range(200):
        assert there_and_back(Gpu(seed)), seed


def test_the_compiled_loop_is_the_same() -> None:
    assert there_and_back(Gpu(1, native=True))


@pytest.mark.parametrize("kind", ["middle", "over"])
def test_the_simulation_finds_a_missing_order(kind: str) -> None:
    wrong = 0
    for seed in range(25):
        # events are made in this order: middle, over
        places = range(1, RINGS + 1) if kind == "middle" else range(RINGS + 1, 2 * RINGS + 1)
        try:
            wrong += not there_and_back(Gpu(seed, lambda event, places=places: event in places))
        except AssertionError:
            wrong += 1
    assert wrong > 0


def test_one_copy_stream_at_a_time_and_in_turn() -> None:
    """Else a copy engine would stay with us until all is done, and the engine's own copies would wait."""
    for seed in range(50):
        gpu = Gpu(seed)
        lane = Lane(gpu)
        for load in (False, True):
            gpu.copies.clear()
            assert lane.move(load, np.arange(24), np.arange(24)) == 0
            stages = [stream for i, stream in enumerate(gpu.copies) if not i or stream != gpu.copies[i - 1]]
            assert len(stages) == 24 // STAGE_ROWS and set(stages) == {COPY, OTHER_COPY}


def test_a_load_waits_for_its_fence() -> None:
    gpu = Gpu(1)
    lane = Lane(gpu)
    gpu.pool[:] = 5
    gpu.queue[ENGINE].append(lambda: bool(gpu.kv.fill(9)) or True)  # a step that still writes
    assert lane.move(True, np.arange(8), np.arange(8)) == 0
    assert (gpu.kv[:8] == 5).all() and (gpu.kv[8:] == 9).all()


@pytest.mark.parametrize("call", [WAIT_EVENT, COPY_IN, RECORD, SET_KERNEL, LAUNCH, AWAIT_EVENT])
def test_a_call_that_fails_is_named(call: int) -> None:
    gpu = Gpu(1)
    lane = Lane(gpu)
    gpu.fails = call
    assert explain(lane.move(True, np.arange(8), np.arange(8))) == (CALLS[call], 719)


def test_a_store_that_fails_is_named() -> None:
    gpu = Gpu(1)
    gpu.fails = COPY_OUT
    assert explain(Lane(gpu).move(False, np.arange(8), np.arange(8))) == (CALLS[COPY_OUT], 719)


def test_cut() -> None:
    rows = np.array([5, 6, 7, 2, 11, 12, 13, 14, 15], dtype=np.int64)
    made = cut(rows * 10, stage_rows=6, piece_bytes=120, row_bytes=10, host=1000)
    assert made.first.tolist() == [0, 6]
    assert made.stages.tolist() == [[0, 4, 6], [4, 5, 3]]
    assert made.runs.tolist() == [[0, 1050, 30], [30, 1020, 10], [40, 1110, 10], [50, 1120, 10], [0, 1130, 30]]


def test_cut_one_row_and_exact_stages() -> None:
    assert cut(np.array([4]), 8, 100, 1, 0).stages.tolist() == [[0, 1, 1]]
    assert cut(np.arange(16), 8, 100, 1, 0).stages.tolist() == [[0, 1, 8], [1, 2, 8]]
