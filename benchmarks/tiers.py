"""One tier without an engine: store and load beside what the same threads reach with bare O_DIRECT calls.

python benchmarks/tiers.py [--url file:///var/tmp/tier/] [--sizes 32,4,1] [--threads 8] [--rounds 8] [--out FILE]

Each round measures the raw limit and the tier one right after the other, in turns which comes first; what is reported
is the ratio within rounds, so that other users of the disk touch both alike.
"""

from __future__ import annotations

import argparse
import contextlib
import mmap
import os
import platform
import random
import shutil
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from lmcache_ext.tiers import Parts, Tier, open_tier

sys.path.insert(0, str(Path(__file__).resolve().parent))
from report import say

MIB = 1 << 20
MARK = 0.9


def buffers(count: int, nbytes: int) -> list[memoryview]:
    """Page-aligned memory with bytes in it, as slots of the host pool are."""
    made = [memoryview(mmap.mmap(-1, nbytes)) for _ in range(count)]
    for view in made:
        view[:] = random.randbytes(min(nbytes, MIB)) * (nbytes // min(nbytes, MIB))
    return made


def in_threads(threads: int, items: int, call: Callable[[int], None]) -> float:
    """Seconds for `call(0)` to `call(items - 1)`, spread over threads."""
    todo = iter(range(items))
    lock = threading.Lock()

    def work() -> None:
        while True:
            with lock:
                i = next(todo, None)
            if i is None:
                return
            call(i)

    workers = [threading.Thread(target=work) for _ in range(threads)]
    began = time.perf_counter()
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(600)
    return time.perf_counter() - began


class Raw:
    """Bare O_DIRECT files: one call each, no header, no sum, no rename."""

    def __init__(self, folder: Path, threads: int) -> None:
        self.folder = folder
        self.threads = threads
        folder.mkdir(parents=True)

    def write(self, memory: list[memoryview]) -> float:
        """Seconds to write every buffer into a new file."""

        def one(i: int) -> None:
            with opened(self.folder / str(i), os.O_WRONLY | os.O_CREAT | os.O_DIRECT) as fd:
                assert os.pwrite(fd, memory[i], 0) == memory[i].nbytes

        return in_threads(self.threads, len(memory), one)

    def read(self, memory: list[memoryview]) -> float:
        """Seconds to read them again."""

        def one(i: int) -> None:
            with opened(self.folder / str(i), os.O_RDONLY | os.O_DIRECT) as fd:
                assert os.preadv(fd, [memory[i]], 0) == memory[i].nbytes

        return in_threads(self.threads, len(memory), one)

    def clear(self) -> None:
        """Remove the files."""
        for path in self.folder.iterdir():
            path.unlink()


@contextlib.contextmanager
def opened(path: Path, flags: int) -> Iterator[int]:
    """A file descriptor."""
    fd = os.open(path, flags, 0o600)
    try:
        yield fd
    finally:
        os.close(fd)


def finish(tier: Tier, jobs: int) -> None:
    """Wait until `jobs` jobs have ended, all of them well."""
    while jobs:
        assert tier.wait(60)
        for result in tier.poll():
            assert all(result.ok), result
            jobs -= 1


def timed(call: Callable[[], None]) -> float:
    """Seconds."""
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


class Bench:
    """Rounds of one chunk size."""

    def __init__(self, tier: Tier, raw: Raw, nbytes: int, count: int) -> None:
        self.tier = tier
        self.raw = raw
        self.nbytes = nbytes
        self.memory = buffers(count, nbytes)
        self.chunks: list[Parts] = [[view[: nbytes // 2], view[nbytes // 2 :]] for view in self.memory]  # two ranks
        self.rates: dict[str, list[float]] = {name: [] for name in ("raw store", "store", "raw load", "load")}

    def round(self, number: int) -> None:
        """Both ways, raw and tier, in turns."""
        keys = [random.randbytes(32) for _ in self.memory]
        done = {
            "raw store": lambda: self.raw.write(self.memory),
            "store": lambda: timed(lambda: self._submit(self.tier.submit_store, keys)),
            "raw load": lambda: self.raw.read(self.memory),
            "load": lambda: timed(lambda: self._submit(self.tier.submit_load, keys)),
        }
        names = ["raw store", "store"], ["raw load", "load"]
        for pair in names:
            for name in pair if number % 2 else reversed(pair):
                self.rates[name].append(len(keys) * self.nbytes / done[name]() / 1e9)
        self.tier.delete(keys)
        finish(self.tier, 1)
        self.raw.clear()

    def _submit(self, submit: Callable[[list[bytes], list[Parts], float], int], keys: list[bytes]) -> None:
        for key, parts in zip(keys, self.chunks, strict=True):
            submit([key], [parts], 60.0)
        finish(self.tier, len(keys))

    def _alone(self, call: Callable[[bytes], int], key: bytes) -> None:
        call(key)
        finish(self.tier, 1)

    def latency(self) -> list[tuple[str, list[float]]]:
        """Milliseconds of one chunk at a time, store, load and look-up, sorted."""
        keys = [random.randbytes(32) for _ in range(20)]
        parts = self.chunks[0]
        calls: dict[str, Callable[[bytes], int]] = {
            "store": lambda key: self.tier.submit_store([key], [parts]),
            "load": lambda key: self.tier.submit_load([key], [parts]),
            "look-up of 128 keys": lambda key: self.tier.lookup([key] * 128),
        }
        taken = []
        for name, call in calls.items():
            each = [timed(partial(self._alone, call, key)) * 1e3 for key in keys]
            taken.append((name, sorted(each)))
        self.tier.delete(keys)
        finish(self.tier, 1)
        return taken


def interval(values: list[float]) -> str:
    """Median and the middle half."""
    q1, q2, q3 = statistics.quantiles(values, n=4)
    return f"{q2:.2f} [{q1:.2f}, {q3:.2f}]"


def rows_of(bench: Bench) -> tuple[list[str], list[str]]:
    """Lines of the two tables."""
    size = f"{bench.nbytes / MIB:g} MiB"
    rates = []
    for way in ("store", "load"):
        ratios = [ours / raw for ours, raw in zip(bench.rates[way], bench.rates[f"raw {way}"], strict=True)]
        verdict = "met" if statistics.median(ratios) >= MARK else "missed"
        both = f"{interval(bench.rates[f'raw {way}'])} | {interval(bench.rates[way])}"
        rates.append(f"| {way}, {size} | {both} | {interval(ratios)} | {verdict if bench.nbytes >= 32 * MIB else ''} |")
    times = [f"| {name}, {size} | {v[len(v) // 2]:.3f} | {v[-1]:.3f} |" for name, v in bench.latency()]
    return rates, times


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--url", default="file:///var/tmp/lmcache-ext-tiers/")
    parser.add_argument("--raw", type=Path, default=Path("/var/tmp/lmcache-ext-raw"), help="on the same disk")
    parser.add_argument("--sizes", default="32,4,1", help="MiB of a chunk")
    parser.add_argument("--mib", type=int, default=768, help="MiB moved each way in a round")
    parser.add_argument("--threads", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--out", type=Path, default=None)
    options = parser.parse_args()
    random.seed(0)
    tier = open_tier(options.url, threads=options.threads, store_queue=4096, load_queue=4096)
    raw = Raw(options.raw, options.threads)
    rates, times = [], []
    try:
        for size in (int(float(each) * MIB) for each in options.sizes.split(",")):
            bench = Bench(tier, raw, size, max(options.threads * 2, options.mib * MIB // size))
            for number in range(options.rounds + 1):
                bench.round(number)
            bench.rates = {name: values[1:] for name, values in bench.rates.items()}  # the first round warms up
            more_rates, more_times = rows_of(bench)
            rates += more_rates
            times += more_times
    finally:
        tier.close(10)
        shutil.rmtree(options.raw)
    say(
        [
            f"`python benchmarks/tiers.py {' '.join(sys.argv[1:])}` on {platform.machine()}, {os.cpu_count()} cores, "
            f"{time.strftime('%Y-%m-%d')}; {options.threads} threads, {options.rounds} rounds, chunks of two parts.",
            "",
            "| what | raw O_DIRECT, GB/s | tier, GB/s | tier / raw | mark: at least 0.9 |",
            "|---|---|---|---|---|",
            *rates,
            "",
            "| one at a time | median, ms | longest of 20, ms |",
            "|---|---|---|",
            *times,
        ],
        options.out,
    )


if __name__ == "__main__":
    main()
