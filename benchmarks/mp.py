"""A shared cache server on a CPU machine: first token, cold and warm, beside the embedded engine and upstream's server.

    pip install --target DIR --no-deps lmcache==0.5.6 nvtx aiofile caio aiofiles redis sortedcontainers \\
        opentelemetry-exporter-prometheus grpcio-observability==1.78.0
    python benchmarks/mp.py --upstream DIR [--pairs 5] [--out benchmarks/results/mp_cpu.md]

All engines live at once and take turns: `ours` (embedded), `joined` (LMCacheMPConnector at `lmcache-ext server`), its
`neighbour` (another engine at the same server, which is asked what `joined` has stored) and `upstream`
(LMCacheMPConnector of vLLM with LMCache's server). Model, prompts and settings are those of ttft.py.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from lmcache_ext.ports import free_port
from lmcache_ext.server import protocol as p
from lmcache_ext.server.client import Client, Spec

sys.path.insert(0, str(Path(__file__).resolve().parent))
from report import say
from ttft import BLOCK, LENGTH, MODEL, REPEATS, Child, ratio

LOOKUP_KEYS = 128  # a prompt of 32k tokens
CLIENTS = 10
RATIOS = (
    ("warm joined", "warm ours", "at most 1.05"),
    ("warm neighbour", "warm joined", ""),
    ("cold joined", "cold ours", ""),
    ("warm upstream", "warm joined", "at least 5"),
    ("cold upstream", "cold joined", ""),
)


@contextmanager
def server(command: list[str], port: int, env: dict[str, str]) -> Iterator[None]:
    """A process that listens at `port`, until the end of the block."""
    process = subprocess.Popen(command, env={**os.environ, **env}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 120
        while True:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{command} does not serve")
            time.sleep(0.1)
        yield
    finally:
        process.terminate()
        try:
            process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(timeout=10)


def measure(children: dict[str, Child], pairs: int) -> dict[str, list[float]]:
    """Seconds by name; the order of the systems changes with every pair."""
    systems = [name for name in children if name != "neighbour"]
    taken: dict[str, list[float]] = {f"{when} {name}": [] for when in ("cold", "warm") for name in systems}
    taken["warm neighbour"] = []
    for i in range(pairs):
        rng = random.Random(1000 + i)
        ids = [rng.randrange(10, 2000) for _ in range(LENGTH)]
        order = systems[i % len(systems) :] + systems[: i % len(systems)]
        for name in order:
            seconds, cached = children[name].ask(ids)
            assert cached == 0, (name, cached)
            taken[f"cold {name}"].append(seconds)
        for _ in range(REPEATS):
            for name in [*order, "neighbour"]:
                seconds, cached = children[name].ask(ids)
                assert cached >= (LENGTH - 1) // 256 * 256 - 256, (name, cached)
                taken[f"warm {name}"].append(seconds)
        sys.stderr.write(f"pair {i}: { {k: round(v[-1], 3) for k, v in taken.items()} }\n")
    return taken


def lookups(address: str) -> list[float]:
    """Seconds of look-ups of a 32k prompt that is there, leased, there and back, with `CLIENTS` clients attached."""
    spec = Spec(os.urandom(32), "lookups", (4096,), 256)
    clients = [Client(address, f"client {i}", patience=2.0) for i in range(CLIENTS)]
    for client in clients:
        client.join(spec)
        assert client.wait_up(10.0, spec.root)
    keys = [os.urandom(32) for _ in range(LOOKUP_KEYS)]
    grant = clients[0].prepare(spec.root, keys).wait()
    assert grant is not None and clients[0].complete(grant).wait(5.0) == p.Done(LOOKUP_KEYS)
    taken = []
    for i in range(200):
        client, name = clients[i % CLIENTS], f"look {i}"
        began = time.perf_counter()
        while (hit := client.lookup(name, spec.root, keys)) is None:
            time.sleep(0.00005)
        taken.append(time.perf_counter() - began)
        assert hit.ready == LOOKUP_KEYS
        client.forget(name)
    for client in clients:
        client.close()
    return taken


def table(taken: dict[str, list[float]], looks: list[float], options: argparse.Namespace) -> list[str]:
    """The report, in lines of Markdown."""
    lines = [
        "# A shared cache server on two CPU cores", "",
        f"`python benchmarks/mp.py --pairs {options.pairs} --dtype {options.dtype}` on {platform.machine()}, "
        f"{os.cpu_count()} cores, {time.strftime('%Y-%m-%d')}. Random model of 181M parameters, {LENGTH} tokens, block "
        f"{BLOCK}, chunk 256, one request at a time, {REPEATS} warm ones a pair.", "",
        "| what | seconds, median [least, most] |", "|---|---|",
    ]  # fmt: skip
    for name, seconds in taken.items():
        lines.append(f"| {name} | {statistics.median(seconds):.3f} [{min(seconds):.3f}, {max(seconds):.3f}] |")
    middle, slow = statistics.median(looks) * 1e3, sorted(looks)[int(len(looks) * 0.99)] * 1e3
    look = f"{middle:.2f} ms, 99 % within {slow:.2f} ms"
    lines += [
        f"| look-up of {LOOKUP_KEYS} keys with leases, {CLIENTS} clients attached | {look} (mark: under 1 ms) |",
        "", "| ratio of pairs | median [least, most] | mark |", "|---|---|---|",
    ]  # fmt: skip
    for a, b, mark in RATIOS:
        if a in taken:
            lines.append(f"| {a} / {b} | {ratio(taken[a], taken[b])} | {mark} |")
    return lines


def main() -> None:
    """See the top."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--dtype", default="bfloat16", help="float32 is faster on a processor without avx512_bf16")
    parser.add_argument("--upstream", type=Path, help="where LMCache is installed; none: without it")
    parser.add_argument("--out", type=Path, default=None)
    options = parser.parse_args()
    ours, theirs, http = free_port(), free_port(), free_port()
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        (Path(folder) / "config.json").write_text(json.dumps(MODEL))
        command = [sys.executable, "-m", "lmcache_ext.cli.main", "server", "--host", "127.0.0.1", "--port", str(ours)]
        stack.enter_context(server([*command, "--http-port", str(http), "--l1-size-gb", "3"], ours, {}))
        children = {name: Child(name, folder, options.dtype, {"TTFT_PORT": str(ours)}) for name in ("ours", "joined")}
        children["neighbour"] = Child("joined", folder, options.dtype, {"TTFT_PORT": str(ours)})
        if options.upstream:
            env = {"PYTHONPATH": str(options.upstream.resolve()), "LMCACHE_DISABLE_PLUGIN": "1"}
            command = [
                sys.executable, "-m", "lmcache.v1.multiprocess.server", "--host", "127.0.0.1", "--port", str(theirs),
                "--l1-size-gb", "3", "--chunk-size", "256", "--eviction-policy", "LRU", "--disable-observability",
                "--supported-transfer-mode", "auto",
            ]  # fmt: skip
            stack.enter_context(server(command, theirs, env))
            children["upstream"] = Child("upstream", folder, options.dtype, {**env, "TTFT_PORT": str(theirs)})
        for child in children.values():
            stack.callback(child.close)
        for child in children.values():
            child.wait()
            child.ask(list(range(10, 310)))  # compile what the first request compiles
        taken = measure(children, options.pairs)
        looks = lookups(f"tcp://127.0.0.1:{ours}")
    say(table(taken, looks, options), options.out)


if __name__ == "__main__":
    main()
