"""Hand-over from a prefill rank to a decode rank, beside NIXL alone with the same memory, between two processes.

python benchmarks/pd.py [--device cpu|cuda] [--sizes 32,4,1,0.25] [--mib 256] [--rounds 30] [--tls tcp] [--no-sums]
    [--out FILE]

A hand-over is everything: slots are asked for, sums are taken and proved, chunks become visible in a Directory, the end
is heard of. NIXL alone is registered memory and writes of the same sizes, all posted at once. Each round measures both
one right after the other, in turns which comes first; what is reported is the ratio within rounds. On GPUs the memory
is theirs: the first's here, the last's there.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import platform
import statistics
import sys
import threading
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from blake3 import blake3

from lmcache_ext.cli.rounds import MIB, interval
from lmcache_ext.engine.directory import Directory
from lmcache_ext.pd import (
    Agent,
    DirectoryStore,
    Ended,
    Geometry,
    Memory,
    Outcome,
    Receiver,
    ReceiverOptions,
    Sender,
    SenderOptions,
    Target,
    sums,
)
from lmcache_ext.pd.agent import State
from lmcache_ext.pd.options import Sums
from lmcache_ext.policies import POLICIES
from lmcache_ext.transfer.pool import HostPool, Shape

sys.path.insert(0, str(Path(__file__).resolve().parent))
from report import say

MARK = 0.9
CHUNK, ROWS = 256, 16
_NAP_S = 0.0002  # between two looks at NIXL's transfers, as the sender does it
_POLL_S = 0.001  # between two looks at the sender
_THREADS = ("lmcache-pd-sender", "lmcache-pd-sum")


def nothing(asked: Sequence[object]) -> list[bytes]:
    """Sums that cost nothing, and prove nothing."""
    return [b"0" * 16] * len(asked)


def slots_of(shape: Shape, gpu: int | None) -> tuple[Any, Memory, Sums]:
    """(what keeps the memory, slots in it with every page taken, how they are summed)"""
    if gpu is None:
        pool = HostPool.create(shape, "lmcache-bench-pd")
        pool.bytes[:] = 1
        return pool, Memory.of(pool), sums.of_pool(pool)
    import torch

    from lmcache_ext.pd.gpu_sums import GpuSums

    torch.cuda.set_device(gpu)
    store = torch.ones(shape.nbytes, dtype=torch.uint8, device="cuda")
    torch.cuda.synchronize()
    memory = Memory.on_gpu(store.data_ptr(), shape, gpu)
    return store, memory, GpuSums(memory)


def gpus(device: str) -> tuple[int | None, int | None]:
    """(the sender's, the receiver's)"""
    if device == "cpu":
        return None, None
    import torch

    return 0, torch.cuda.device_count() - 1


def serve(pipe: Any, shape: Shape, gpu: int | None, proved: bool) -> None:
    """The decode side, in a process of its own: a receiver, and an agent for NIXL alone, on the same slots."""
    keep, memory, take = slots_of(shape, gpu)
    directory = Directory(POLICIES.get("LRU")())
    directory.grow(shape.slots)
    store = DirectoryStore(directory, threading.Lock())
    receiver = Receiver(memory, take if proved else nothing, Geometry.of(shape, CHUNK), store, ReceiverOptions())
    bare = Agent(memory, receives=True)
    there = Memory(memory.address, memory.nbytes, memory.slot_bytes, memory.device, memory.device_id)
    pipe.send((receiver.init_port, receiver.alloc_port, bare.metadata(), there))
    while (said := pipe.recv()) is not None:
        store.claim(said)
        pipe.send((dict(receiver.counts), time.process_time()))
    del keep
    os._exit(0)  # NIXL's libraries may crash in their destructors


class Bench:
    """Both ways from some slots into others."""

    def __init__(self, slots: int, size: int, post_bytes: int, proved: bool = True, device: str = "cpu") -> None:
        self.slots, self.nbytes = slots, slots * size
        shape, (here, there) = Shape(slots, ROWS, size // ROWS), gpus(device)
        self._pipe, theirs = multiprocessing.get_context("spawn").Pipe()
        self._process = multiprocessing.get_context("spawn").Process(target=serve, args=(theirs, shape, there, proved))
        self._process.start()
        init_port, alloc_port, metadata, memory = self._pipe.recv()
        self._keep, mine, take = slots_of(shape, here)
        options = SenderOptions(post_bytes=post_bytes, inflight_bytes=max(256 * MIB, 8 * post_bytes))
        self.sender = Sender(mine, take if proved else nothing, Geometry.of(shape, CHUNK), options)
        self.target = Target("127.0.0.1", init_port, alloc_port)
        self._bare = Agent(mine, receives=False)
        self._remote = self._bare.connect(metadata, memory)
        self._batch = max(1, post_bytes // size)
        self._count = 0

    def alone(self) -> float:
        """Seconds of NIXL alone."""
        began = time.perf_counter()
        left = []
        for first in range(0, self.slots, self._batch):
            part = range(first, min(self.slots, first + self._batch))
            left.append(self._bare.write(self._remote, part, part))
        while left:
            left = [each for each in left if each.state() is State.PROC]
            if left:
                time.sleep(_NAP_S)
        return time.perf_counter() - began

    def handed_over(self) -> float:
        """Seconds of a hand-over, from the first word to the last."""
        self._count += 1
        name = f"r{self._count}"
        keys = [blake3(f"{name}.{i}".encode()).digest() for i in range(self.slots)]
        began = time.perf_counter()
        self.sender.begin(name, self.target, keys)
        for i in range(self.slots):
            self.sender.ready(name, self.target, i, i)
        while True:
            for event in self.sender.poll():
                if isinstance(event, Ended):
                    took = time.perf_counter() - began
                    assert event.outcome is Outcome.STORED and event.sent == self.slots, event
                    assert "wrong sum" not in self._ask(name)[0]
                    return took
            time.sleep(_POLL_S)

    def _ask(self, claim: str) -> Any:
        self._pipe.send(claim)
        return self._pipe.recv()

    def cpu(self) -> dict[str, float]:
        """Processor time so far, in seconds: of this thread, the sender's two, and all of the other process."""
        ids = {each.name: each.ident for each in threading.enumerate()}
        took = {name: time.clock_gettime(time.pthread_getcpuclockid(ids[name] or 0)) for name in _THREADS}
        return {"alone": time.thread_time(), **took, "receiver": self._ask("")[1]}

    def close(self) -> None:
        """End both processes' sides."""
        self.sender.close(10)
        self._bare.drop(self._remote)
        self._bare.close()
        self._pipe.send(None)
        self._process.join(10)


def rows_of(size: int, options: argparse.Namespace) -> tuple[str, str]:
    """A line of each table."""
    bench = Bench(max(1, options.mib * MIB // size), size, options.post_mib * MIB, options.sums, options.device)
    ways: list[tuple[str, Callable[[], float]]] = [("alone", bench.alone), ("ours", bench.handed_over)]
    rates: dict[str, list[float]] = {"alone": [], "ours": []}
    spent: dict[tuple[str, str], list[float]] = {}
    for number in range(options.rounds + 2):
        for name, way in ways if number % 2 else reversed(ways):
            before = bench.cpu()
            rates[name].append(bench.nbytes / way() / 1e9)
            for what, seconds in bench.cpu().items():
                spent.setdefault((name, what), []).append((seconds - before[what]) / bench.nbytes * 1e9)
    bench.close()
    alone, ours = (rates[name][2:] for name in ("alone", "ours"))  # the first rounds connect
    ratios = [o / a for o, a in zip(ours, alone, strict=True)]
    verdict = "met" if statistics.median(ratios) >= MARK else "missed"
    took = {which: statistics.median(values[2:]) for which, values in spent.items()}
    needed = (took["alone", "alone"], *(took["ours", what] for what in (*_THREADS, "receiver")))
    return (
        f"| {size / MIB:g} MiB | {interval(alone)} | {interval(ours)} | {interval(ratios)} | {verdict} |",
        f"| {size / MIB:g} MiB | " + " | ".join(f"{seconds:.3f}" for seconds in needed) + " |",
    )


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--sizes", default="32,4,1,0.25", help="MiB of a chunk")
    parser.add_argument("--mib", type=int, default=256, help="MiB of a request")
    parser.add_argument("--post-mib", type=int, default=8, help="MiB of one transfer, of both ways")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--tls", default="", help="UCX_TLS; empty: what UCX chooses")
    parser.add_argument("--no-sums", dest="sums", action="store_false", help="what the protocol alone costs")
    parser.add_argument("--out", type=Path, default=None)
    options = parser.parse_args()
    os.environ.setdefault("UCX_NET_DEVICES", "lo")
    os.environ.setdefault("NIXL_LOG_LEVEL", "WARN")
    if options.tls:
        os.environ["UCX_TLS"] = options.tls
    rows = [rows_of(int(float(size) * MIB), options) for size in options.sizes.split(",")]
    proof = "" if options.sums else ", no sums"
    machine = f"{options.device} of {platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}"
    say(
        [
            f"{machine}; {options.rounds} rounds of {options.mib} MiB; NIXL {version('nixl')}, "
            f"UCX_TLS {options.tls or 'as UCX chooses'}{proof}. Medians, with the middle half.",
            "",
            "| chunk | NIXL alone, GB/s | hand-over, GB/s | hand-over / NIXL | mark: at least 0.9 |",
            "|---|---|---|---|---|",
            *(rate for rate, _ in rows),
            "",
            "| processor time, s/GB | NIXL alone: its thread | hand-over: sender's thread | sums | receiver |",
            "|---|---|---|---|---|",
            *(cost for _, cost in rows),
        ],
        options.out,
    )
    sys.stdout.flush()
    os._exit(0)  # NIXL's libraries may crash in their destructors


if __name__ == "__main__":
    main()
