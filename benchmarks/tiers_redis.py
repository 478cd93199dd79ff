"""The Redis tier beside other ways to use the same server from Python.

python benchmarks/tiers_redis.py [--url redis://127.0.0.1:6379] [--sizes 32,8,1] [--threads 8] [--rounds 8] [--out FILE]

Without --url, starts a redis-server of its own on a free port and another way in, a Unix socket. Each round measures
bare sockets (no header, no sum, no queue), redis-py as it comes, and the tier, in an order that changes from round to
round; what is reported is the ratio within rounds. All overwrite, read and look up the same number of keys.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import platform
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from redis import Redis as Client

from lmcache_ext.cli.rounds import MIB, buffers, finish, in_threads, interval, timed
from lmcache_ext.tiers import Parts, Tier, open_tier

sys.path.insert(0, str(Path(__file__).resolve().parent))
from report import say

MARK = 0.8
Call = Callable[[], float]


@contextlib.contextmanager
def server() -> Iterator[list[str]]:
    """URLs of a server that ends with the block."""
    with tempfile.TemporaryDirectory() as folder, socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port, path = free.getsockname()[1], f"{folder}/redis.sock"
        free.close()
        words = f"redis-server --port {port} --bind 127.0.0.1 --unixsocket {path} --appendonly no --dir {folder} --save"
        with subprocess.Popen([*words.split(), ""], stdout=subprocess.DEVNULL) as process:
            try:
                wait_for(path, process)
                yield [f"redis://127.0.0.1:{port}", f"unix://{path}"]
            finally:
                process.terminate()
                process.wait(timeout=10)


def wait_for(path: str, process: subprocess.Popen[bytes]) -> None:
    """Until somebody listens."""
    until = time.monotonic() + 10
    while not Path(path).exists():
        if process.poll() is not None or time.monotonic() > until:
            raise SystemExit("redis-server does not start")
        time.sleep(0.05)


class Bare:
    """A socket for each thread: values go from and to memory, and nothing else happens."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.local = threading.local()

    def link(self) -> socket.socket:
        """This thread's."""
        if not hasattr(self.local, "link"):
            if self.url.startswith("unix"):
                self.local.link = socket.socket(socket.AF_UNIX)
                self.local.link.connect(self.url.removeprefix("unix://"))
            else:
                host, _, port = self.url.removeprefix("redis://").partition(":")
                self.local.link = socket.create_connection((host, int(port or 6379)))
                self.local.link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        link: socket.socket = self.local.link
        return link

    def store(self, key: bytes, memory: memoryview) -> None:
        """SET."""
        link = self.link()
        link.sendall(b"*3\r\n$3\r\nSET\r\n$%d\r\n%b\r\n$%d\r\n" % (len(key), key, memory.nbytes))
        link.sendall(memory)
        link.sendall(b"\r\n")
        assert link.recv(64) == b"+OK\r\n"

    def load(self, key: bytes, memory: memoryview) -> None:
        """GET."""
        link = self.link()
        link.sendall(b"*2\r\n$3\r\nGET\r\n$%d\r\n%b\r\n" % (len(key), key))
        start = link.recv(16)
        at = len(start) - start.index(b"\n") - 1
        memory[:at] = start[len(start) - at :]
        while at < memory.nbytes:
            at += link.recv_into(memory[at:])
        assert link.recv(2, socket.MSG_WAITALL) == b"\r\n"


class Library:
    """redis-py as it comes; what it read is copied to where it shall be."""

    def __init__(self, url: str) -> None:
        self.client = Client.from_url(url)

    def store(self, key: bytes, memory: memoryview) -> None:
        """SET."""
        self.client.set(key, memory)

    def load(self, key: bytes, memory: memoryview) -> None:
        """GET."""
        memory[:] = self.client.get(key)  # type: ignore[assignment]


class Bench:
    """Rounds of one chunk size on one server."""

    def __init__(self, url: str, tier: Tier, threads: int, nbytes: int, count: int) -> None:
        self.url = url
        self.tier = tier
        self.threads = threads
        self.nbytes = nbytes
        self.memory = buffers(count, nbytes)
        self.chunks: list[Parts] = [[view[: nbytes // 2], view[nbytes // 2 :]] for view in self.memory]  # two ranks
        self.ways = {"bare sockets": Bare(url), "redis-py": Library(url)}
        self.rates: dict[tuple[str, str], list[float]] = {}

    def round(self) -> None:
        """All ways, both directions, each with the whole server for itself."""
        names = [*self.ways, "tier"]
        random.shuffle(names)
        for name in names:
            keys = [random.randbytes(32) for _ in self.memory]
            for what in ("store", "load"):
                taken = self._tier(what, keys) if name == "tier" else self._other(name, what, keys)
                self.rates.setdefault((what, name), []).append(len(keys) * self.nbytes / taken / 1e9)
            Client.from_url(self.url).flushall()

    def _other(self, name: str, what: str, keys: list[bytes]) -> float:
        call = getattr(self.ways[name], what)
        return in_threads(self.threads, len(keys), lambda i: call(keys[i], self.memory[i]))

    def _tier(self, what: str, keys: list[bytes]) -> float:
        submit = self.tier.submit_store if what == "store" else self.tier.submit_load

        def work() -> None:
            for key, parts in zip(keys, self.chunks, strict=True):
                submit([key], [parts], 60.0)
            finish(self.tier, len(keys))

        return timed(work)

    def alone(self) -> list[str]:
        """Lines of the table of single chunks: what a chunk takes when nothing else is under way."""
        taken: dict[tuple[str, str], list[float]] = {}
        for _ in range(20):
            key = random.randbytes(32)
            for what in ("store", "load"):
                for name in random.sample([*self.ways, "tier"], 3):
                    taken.setdefault((what, name), []).append(1e3 * self._one(name, what, key))
            Client.from_url(self.url).flushall()
        label = f"{self.nbytes / MIB:g} MiB, {self.url.partition(':')[0]}"
        names = [*self.ways, "tier"]
        return [
            f"| {what}, {label} | {' | '.join(interval(taken[what, name]) for name in names)} |"
            for what in ("store", "load")
        ]

    def _one(self, name: str, what: str, key: bytes) -> float:
        if name != "tier":
            return timed(lambda: getattr(self.ways[name], what)(b"%b %b" % (name.encode(), key), self.memory[0]))
        submit = self.tier.submit_store if what == "store" else self.tier.submit_load

        def work() -> None:
            submit([key], [self.chunks[0]], 60.0)
            finish(self.tier, 1)

        return timed(work)

    def rows(self) -> list[str]:
        """Lines of the table."""
        lines = []
        scheme = self.url.partition(":")[0]
        for what in ("store", "load"):
            ours = self.rates[what, "tier"]
            best = max(self.ways, key=lambda name: statistics.median(self.rates[what, name]))
            ratios = [a / b for a, b in zip(ours, self.rates[what, best], strict=True)]
            cells = [interval(self.rates[what, name]) for name in (*self.ways, "tier")]
            met = "met" if statistics.median(ratios) >= MARK else "missed"
            size = f"{self.nbytes / MIB:g} MiB"
            lines.append(f"| {what}, {size}, {scheme} | {' | '.join(cells)} | {interval(ratios)} of {best} | {met} |")
        return lines


def look_ups(tier: Tier, url: str) -> str:
    """Milliseconds of a look-up of 128 keys, half of them there."""
    keys = [random.randbytes(32) for _ in range(128)]
    tier.submit_store(keys[::2], [[view] for view in buffers(64, 4096)])
    finish(tier, 1)

    def ask() -> None:
        tier.lookup(keys, 5.0)
        assert tier.wait(5)
        assert tier.poll()[0].ok == [True, False] * 64

    times = sorted(timed(ask) * 1e3 for _ in range(200))
    return f"| {url.partition(':')[0]} | {times[100]:.2f} | {times[197]:.2f} |"


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--url", default="", help="redis://host:port or unix:///path; all of its database is removed!")
    parser.add_argument("--sizes", default="32,8,1", help="MiB of a chunk")
    parser.add_argument("--mib", type=int, default=512, help="MiB moved each way in a round")
    parser.add_argument("--threads", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--out", type=Path, default=None)
    options = parser.parse_args()
    random.seed(0)
    rows, singles, times = [], [], []
    with contextlib.nullcontext([options.url]) if options.url else server() as urls:
        for url in urls:
            tier = open_tier(url, threads=options.threads, store_queue=4096, load_queue=4096)
            times.append(look_ups(tier, url))
            for size in (int(float(each) * MIB) for each in options.sizes.split(",")):
                bench = Bench(url, tier, options.threads, size, max(options.threads, options.mib * MIB // size))
                for number in range(options.rounds + 1):
                    bench.round()
                    if not number:  # warms up
                        bench.rates.clear()
                rows += bench.rows()
                singles += bench.alone()
            tier.close(10)
    say(
        [
            f"`python benchmarks/tiers_redis.py {' '.join(sys.argv[1:])}` on {platform.machine()}, "
            f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.0f}, {time.strftime('%Y-%m-%d')}; "
            f"{options.threads} threads, {options.rounds} rounds, chunks of two parts.",
            "",
            "| what | bare sockets, GB/s | redis-py, GB/s | tier, GB/s | tier / the fastest | mark: at least 0.8 |",
            "|---|---|---|---|---|---|",
            *rows,
            "",
            "| one at a time | bare sockets, ms | redis-py, ms | tier, ms |",
            "|---|---|---|---|",
            *singles,
            "",
            "| look-up of 128 keys | median, ms | 99th percentile, ms |",
            "|---|---|---|",
            *times,
        ],
        options.out,
    )


if __name__ == "__main__":
    main()
