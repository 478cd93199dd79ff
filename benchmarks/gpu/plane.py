"""The CUDA data plane beside the link that it drives, without an engine. Needs a GPU; a minute.

    python benchmarks/gpu/plane.py [--out FILE]

First the ceiling: pinned copies one way and both ways. Then stores and loads of scattered pages through the plane, and
what both do to a GPU that decodes: a CUDA graph which reads 8 GiB of weights, as a model of 8 billion parameters does a
step, between a small copy to the GPU and one back, as an engine has them: those share the copy engines with us, and may
wait behind what we have queued there. Then what a growing pool does to that step.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lmcache_ext.transfer import HostPool, PageTable, Plan, cuda, growth
from lmcache_ext.transfer.base import Way
from lmcache_ext.transfer.driver import Driver
from lmcache_ext.transfer.pool import Growth, Shape

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from report import say

GIB = 1 << 30
TOTAL = 2 * GIB
LAYERS = 32
IDS = itertools.count(1)


def clock(f: Callable[[], Any], rounds: int = 5) -> float:
    """Median seconds of `f`, which returns when its work is done."""
    f()
    taken = []
    for _ in range(rounds):
        began = time.perf_counter()
        f()
        taken.append(time.perf_counter() - began)
    return statistics.median(taken)


def ceiling() -> dict[str, float]:
    """GB/s of large pinned copies."""
    host, back = (torch.empty(2 * GIB, dtype=torch.uint8, pin_memory=True) for _ in range(2))
    there, other = (torch.empty(2 * GIB, dtype=torch.uint8, device="cuda") for _ in range(2))
    one, two = torch.cuda.Stream(), torch.cuda.Stream()

    def run(load: bool, store: bool) -> None:
        if load:
            with torch.cuda.stream(one):
                there.copy_(host, non_blocking=True)
        if store:
            with torch.cuda.stream(two):
                back.copy_(other, non_blocking=True)
        torch.cuda.synchronize()

    ways = {"load": (True, False), "store": (False, True), "both": (True, True)}
    return {name: sum(way) * 2 * GIB / clock(lambda way=way: run(*way)) / 1e9 for name, way in ways.items()}


class Bench:
    """A plane over KV memory of `page` bytes a page, and a pool that holds it once."""

    def __init__(self, page: int, blocks_per_slot: int = 16) -> None:
        self.blocks = TOTAL // (page * LAYERS)
        self.kv = torch.zeros(LAYERS, self.blocks * 2, page // 2, dtype=torch.int16, device="cuda")
        pages = PageTable.of({f"l{i}": self.kv[i] for i in range(LAYERS)}, self.blocks * 2)
        # Two halves, so that loads and stores at once touch different pages and slots.
        shape = Shape(2 * self.blocks // blocks_per_slot, blocks_per_slot, pages.row_bytes)
        self.pool = HostPool.create(shape, "bench")
        Growth(self.pool.path, shape, 1).serve()
        self.plane = cuda.CudaTransfer(pages, self.pool, 30.0)
        while self.pool.grown < shape.slots:
            time.sleep(0.01)
        rng = np.random.default_rng(0)
        blocks = rng.permutation(self.blocks * 2)
        self.halves = {Way.LOAD: blocks[: self.blocks], Way.STORE: blocks[self.blocks :]}

    def submit(self, way: Way, plans: int = 4) -> None:
        rows = np.arange(self.blocks) + (0 if way is Way.LOAD else self.blocks // 16 * 16)
        for part in np.array_split(np.arange(self.blocks), plans):
            plan = Plan(next(IDS), way, self.halves[way][part].astype(np.int64), rows[part].astype(np.int64))
            self.plane.submit([plan], self.plane.fence())

    def wait(self) -> None:
        while any(self.plane._open.values()):
            assert all(result.ok for result in self.plane.poll())
            time.sleep(0.0002)

    def move(self, *ways: Way) -> float:
        """GB/s, all ways together."""

        def once() -> None:
            for way in ways:
                self.submit(way)
            self.wait()

        return len(ways) * TOTAL / clock(once, 3) / 1e9

    def close(self) -> None:
        self.plane.close(10.0)
        self.pool.close()


class Decoder:
    """Replays a step and tells its median time."""

    def __init__(self) -> None:
        weights = [torch.randn(4096, 14336, device="cuda", dtype=torch.bfloat16) for _ in range(72)]
        x = torch.randn(16, 4096, device="cuda", dtype=torch.bfloat16)
        for _ in range(2):
            torch.matmul(x, weights[0])
        self.host = [torch.zeros(4096, dtype=torch.int32, pin_memory=True) for _ in range(2)]
        self.device = torch.zeros(4096, dtype=torch.int32, device="cuda")
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.out = [torch.matmul(x, w) for w in weights]
        self.weights = weights

    def steps(self, seconds: float, beside: Callable[[], None] = lambda: None) -> list[float]:
        """Seconds of each step for as long as told; `beside` runs between steps, as an engine's main thread would."""
        taken, end = [], time.perf_counter() + seconds
        done = torch.cuda.Event(blocking=True)
        while time.perf_counter() < end:
            began = time.perf_counter()
            self.device.copy_(self.host[0], non_blocking=True)
            self.graph.replay()
            self.host[1].copy_(self.device, non_blocking=True)
            done.record()
            beside()
            done.synchronize()  # of this step alone: the copies run on
            taken.append(time.perf_counter() - began)
        return taken


def decode_beside(bench: Bench, decoder: Decoder, *ways: Way) -> tuple[float, float]:
    """(ratio of the mean step with the link kept full to the mean without, GB/s moved meanwhile). Interleaved."""
    alone, beside, moved, spent = [], [], 0, 0.0

    def refill() -> None:
        nonlocal moved
        for result in bench.plane.poll():
            moved += result.nbytes
        for way in ways:
            if len(bench.plane._open[way]) < 3:
                bench.submit(way, plans=4)

    for _ in range(3):
        alone += decoder.steps(0.15)
        refill()
        before, began = moved, time.perf_counter()
        beside += decoder.steps(0.3, refill)
        spent += time.perf_counter() - began
        moved, before = moved, before
        bench.wait()
    return statistics.mean(beside) / statistics.mean(alone), moved / spent / 1e9


def variants() -> Iterator[tuple[int, int]]:
    """(MiB a stage, stages that the ring holds)."""
    yield from ((64, 2), (64, 4), (32, 2), (32, 4), (16, 4), (16, 8))


@contextlib.contextmanager
def patched(place: Any, **values: Any) -> Iterator[None]:
    """Module constants, for a while."""
    before = {name: getattr(place, name) for name in values}
    for name, value in values.items():
        setattr(place, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(place, name, value)


def growing(decoder: Decoder, gib: int, busy: bool) -> tuple[float, float, float]:
    """(seconds until a pool of `gib` GiB is whole, ratio of the mean decode step meanwhile, longest step in ms). The
    plane is told of each step, as by an engine that is busy; or of none."""
    alone = decoder.steps(0.5)
    page = 64 << 10
    kv = torch.zeros(LAYERS, 64, page // 2, dtype=torch.int16, device="cuda")
    pages = PageTable.of({f"l{i}": kv[i] for i in range(LAYERS)}, 64)
    pool = HostPool.create(Shape(gib * GIB // (16 * pages.row_bytes), 16, pages.row_bytes), "bench")
    Growth(pool.path, pool.shape, 1).serve()
    began = time.perf_counter()
    plane = cuda.CudaTransfer(pages, pool, 30.0)
    steps: list[float] = []
    while pool.grown < pool.shape.slots and time.perf_counter() - began < 20:
        steps += decoder.steps(0.05, plane.poll if busy else lambda: None)
    seconds = (time.perf_counter() - began) * pool.shape.slots / max(1, pool.grown)
    plane.close(20.0)
    pool.close()
    return seconds, statistics.mean(steps) / statistics.mean(alone), max(steps) * 1e3


def pinning(decoder: Decoder) -> Iterator[str]:
    """What taking memory and page-locking it do to the step, apart."""
    driver = Driver()
    for mib in (4, 32, 256):
        shape = Shape(2 * GIB // (mib << 20), 1, mib << 20)
        for pins in (False, True):
            pool = HostPool.create(shape, "bench")
            Growth(pool.path, shape, 1).serve()
            if pins:
                pool.bytes[:] = 1
            calls: list[float] = []

            def pin(address: int, nbytes: int, pins: bool = pins, calls: list[float] = calls) -> None:
                began = time.perf_counter()
                if pins:
                    driver.pin(address, nbytes)
                calls.append(time.perf_counter() - began)

            alone = decoder.steps(0.3)
            began = time.perf_counter()
            with patched(growth, _PIECE_BYTES=mib << 20):
                grower = growth.PoolGrowth(pool, pin, driver.enter, growth.slots_per_piece(shape))
            steps = decoder.steps(0.02)
            while pool.grown < shape.slots and time.perf_counter() - began < 20:
                steps += decoder.steps(0.02)
            seconds, call = time.perf_counter() - began, statistics.mean(calls) * 1e3
            ratio = statistics.mean(steps) / statistics.mean(alone)
            what = "pinning" if pins else "taking"
            yield f"| {what}, {mib} MiB | {seconds:.2f} s | {call:.2f} ms | x {ratio:.3f} | {max(steps) * 1e3:.1f} ms |"
            for address in grower.close(20.0) if pins else ():
                driver.unpin(address)
            pool.close()


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--variants", action="store_true", help="also try other stage sizes and queues")
    options = parser.parse_args()
    limit = ceiling()
    lines = [
        "# The CUDA data plane beside the link",
        "",
        f"`python benchmarks/gpu/plane.py{' --variants' * options.variants}` on one {torch.cuda.get_device_name()}, "
        f"torch {torch.__version__}, {time.strftime('%Y-%m-%d')}. Pinned copies reach "
        + ", ".join(f"{speed:.1f} GB/s ({name})" for name, speed in limit.items())
        + ". 2 GiB each way in scattered pages of 32 layers.",
        "",
        "| page | load | store | both at once |",
        "|---|---|---|---|",
    ]
    ways = {"load": (Way.LOAD,), "store": (Way.STORE,), "both": (Way.LOAD, Way.STORE)}
    for page in (8 << 10, 64 << 10, 512 << 10):
        bench = Bench(page)
        cells = [f"{(speed := bench.move(*way)):.1f} GB/s, {speed / limit[name]:.1%}" for name, way in ways.items()]
        bench.close()
        lines.append(f"| {page >> 10} KiB | {' | '.join(cells)} |")
        sys.stderr.write(lines[-1] + "\n")
    decoder = Decoder()
    lines += ["", "A decode step that reads 8.5 GB of weights, beside a link that is kept full:", ""]
    lines += ["| page | stage | slots | beside loads | beside stores | beside both |", "|---|---|---|---|---|---|"]
    tried = list(variants()) if options.variants else [(cuda.STAGE_BYTES >> 20, cuda.RINGS)]
    for page in (64 << 10,):
        for stage, slots in tried:
            with patched(cuda, STAGE_BYTES=stage << 20, RINGS=slots):
                bench = Bench(page)
                beside = [decode_beside(bench, decoder, *way) for way in ways.values()]
                bench.close()
            cells = [f"x {ratio:.3f} at {speed:.1f} GB/s" for ratio, speed in beside]
            lines.append(f"| {page >> 10} KiB | {stage} MiB | {slots} | {' | '.join(cells)} |")
            sys.stderr.write(lines[-1] + "\n")
    lines += ["", "The same step while a pool of 8 GiB grows:", ""]
    lines += ["| engine | pool complete after | mean step | longest step |", "|---|---|---|---|"]
    for busy in (False, True):
        seconds, ratio, longest = growing(decoder, 8, busy)
        what = "busy: it steps" if busy else "idle"
        lines.append(f"| {what} | {seconds:.1f} s | x {ratio:.3f} | {longest:.1f} ms |")
        sys.stderr.write(lines[-1] + "\n")
    if options.variants:
        lines += ["", "Apart, 2 GiB:", "", "| what, at once | in all | a call | mean step | longest step |"]
        lines.append("|---|---|---|---|---|")
        for line in pinning(decoder):
            lines.append(line)
            sys.stderr.write(line + "\n")
    say(lines, options.out)


if __name__ == "__main__":
    main()
