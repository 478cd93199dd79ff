"""The loop that drives the ring, against a GPU that is simulated: streams that run in any order that events allow.

Its calls of the driver end in Python here. So whatever order it forgets to ask for, some seed runs the other way round,
and bytes are wrong. The compiled loop runs once; compiling takes longer than all the rest.
"""

from __future__ import annotations

import ctypes
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from lmcache_ext.transfer import stages
from lmcache_ext.transfer.stages import Track, compiled, cut, explain, loop

I64, U32, INT = ctypes.c_int64, ctypes.c_uint32, ctypes.c_int
ROW, BLOCKS, POOL_ROWS, STAGE_ROWS, PIECE_ROWS, RINGS = 24, 40, 64, 4, 12, 2
COPY, KERNEL, ENGINE = 1, 2, 3  # streams


class Gpu:
    """Each stream is a list of operations, of which the first `done` have run. `forgets`: an event that is never
    waited for on a stream."""

    def __init__(self, seed: int, forgets: Callable[[int], bool] = lambda event: False, native: bool = False) -> None:
        self.native = native
        self.random = random.Random(seed)
        self.forgets = forgets
        self.queue: dict[int, list[Callable[[], bool]]] = {COPY: [], KERNEL: [], ENGINE: []}
        self.done = dict.fromkeys(self.queue, 0)
        self.records: dict[int, tuple[int, int]] = {}  # event → (stream, operations before its record)
        self.kv = np.zeros((BLOCKS, ROW), dtype=np.uint8)
        self.pool = np.zeros((POOL_ROWS, ROW), dtype=np.uint8)
        self.ring = np.zeros((RINGS, STAGE_ROWS, ROW), dtype=np.uint8)
        self.events = 0
        self.most_ahead = self.launches = self.ended = 0
        self.fails = ""
        self.to_pages = False
        calls: dict[str, tuple[Callable[..., int], list[Any]]] = {
            "wait_event": (self._wait_event, [I64, I64, U32]), "record": (self._record, [I64, I64]),
            "await_event": (self._await_event, [I64]), "copy_in": (self._copy, [I64] * 4),
            "copy_out": (self._copy, [I64] * 4), "launch": (self._launch, [I64, *[U32] * 7, *[I64] * 3]),
        }  # fmt: skip
        for name, (call, types) in calls.items():
            checked = self._or_fail(name, call)
            setattr(self, name, ctypes.CFUNCTYPE(INT, *types)(checked) if native else checked)

    def _or_fail(self, name: str, call: Callable[..., int]) -> Callable[..., int]:
        return lambda *arguments: 719 if name == self.fails else call(*map(int, arguments))

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
        self.run(lambda: self.reached(event))
        return 0

    def _copy(self, target: int, source: int, nbytes: int, stream: int) -> int:
        self.queue[stream].append(lambda: bool(ctypes.memmove(target, source, nbytes)) or True)
        return 0

    def _launch(self, function: int, *rest: int) -> int:
        assert (function, *rest[:7]) == (77, 5, 1, 1, 128, 1, 1, 9)
        stream, pointers = rest[7], rest[8]
        values = [ctypes.c_int64.from_address(p).value for p in (ctypes.c_int64 * 4).from_address(pointers)]
        blocks = np.ctypeslib.as_array((ctypes.c_int64 * values[2]).from_address(values[0])).copy()
        slot = (values[1] - self.ring.ctypes.data) // self.ring[0].nbytes
        assert values[3] == 4242
        self.launches += 1
        self.most_ahead = max(self.most_ahead, self.launches - self.ended)

        def kernel() -> bool:
            rows = self.ring[slot, : len(blocks)]
            if self.to_pages:
                self.kv[blocks] = rows
            else:
                rows[:] = self.kv[blocks]
            self.ended += 1
            return True

        self.queue[stream].append(kernel)
        return 0


class Lane:
    """The loop and what it needs, on a simulated GPU."""

    def __init__(self, gpu: Gpu, ahead: int = 3) -> None:
        self.gpu = gpu
        self.track = Track(
            copy=COPY, kernel=KERNEL, rings=[gpu.ring[i].ctypes.data for i in range(RINGS)], event=gpu.new_event,
            ahead=ahead, function=77, programs=5, threads=128, shared=9, arguments=[0, 0, 0, 4242], vary=(0, 1, 2),
        )  # fmt: skip
        self.issue = compiled(gpu) if gpu.native else loop(gpu)  # type: ignore[arg-type]

    def move(self, load: bool, blocks: np.ndarray, rows: np.ndarray) -> int:
        gpu, track = self.gpu, self.track
        parts = cut(rows, STAGE_ROWS, PIECE_ROWS, ROW, gpu.pool.ctypes.data)
        gpu.to_pages = load
        after, began, ended = (gpu.new_event() for _ in range(3))
        gpu._record(after, ENGINE)
        code = self.issue(
            load, after, began, ended, blocks.ctypes.data, parts.stages, parts.runs, parts.first, track.fixed,
            track.rings, track.middle, track.free, track.end, track.arguments, track.issued,
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
        gpu = Gpu(seed)
        assert there_and_back(gpu), seed
        assert gpu.most_ahead <= 3


def test_the_compiled_loop_is_the_same() -> None:
    assert there_and_back(Gpu(1, native=True))


@pytest.mark.parametrize("kind", ["middle", "free"])
def test_the_simulation_finds_a_missing_order(kind: str) -> None:
    wrong = 0
    for seed in range(25):
        # events are made in this order: middle, free, end
        places = range(1, RINGS + 1) if kind == "middle" else range(RINGS + 1, 2 * RINGS + 1)
        wrong += not there_and_back(Gpu(seed, lambda event, places=places: event in places))
    assert wrong > 0


def test_a_load_waits_for_its_fence() -> None:
    gpu = Gpu(1)
    lane = Lane(gpu)
    gpu.pool[:] = 5
    gpu.queue[ENGINE].append(lambda: bool(gpu.kv.fill(9)) or True)  # a step that still writes
    assert lane.move(True, np.arange(8), np.arange(8)) == 0
    assert (gpu.kv[:8] == 5).all() and (gpu.kv[8:] == 9).all()


@pytest.mark.parametrize(
    ("fails", "call"),
    [("wait_event", "cuStreamWaitEvent"), ("record", "cuEventRecord"), ("await_event", "cuEventSynchronize"),
     ("copy_in", "cuMemcpyAsync"), ("launch", "cuLaunchKernel")],
)  # fmt: skip
def test_a_call_that_fails_is_named(fails: str, call: str) -> None:
    gpu = Gpu(1)
    lane = Lane(gpu)
    gpu.fails = fails
    assert explain(lane.move(True, np.arange(8), np.arange(8))) == (call, 719)


def test_cut() -> None:
    rows = np.array([5, 6, 7, 2, 11, 12, 13, 14, 15], dtype=np.int64)
    made = cut(rows, stage_rows=6, piece_rows=12, row_bytes=10, host=1000)
    assert made.first.tolist() == [0, 6]
    assert made.stages.tolist() == [[0, 4, 6], [4, 5, 3]]
    assert made.runs.tolist() == [[0, 1050, 30], [30, 1020, 10], [40, 1110, 10], [50, 1120, 10], [0, 1130, 30]]


def test_cut_one_row_and_exact_stages() -> None:
    assert cut(np.array([4]), 8, 100, 1, 0).stages.tolist() == [[0, 1, 1]]
    assert cut(np.arange(16), 8, 100, 1, 0).stages.tolist() == [[0, 1, 8], [1, 2, 8]]


def test_codes_are_unambiguous() -> None:
    assert [explain(719 + i * stages._SITE) for i in range(1, 6)] == [(call, 719) for call in stages.CALLS[1:]]
