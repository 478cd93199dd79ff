"""The Mooncake tier beside Mooncake's own client: put_from and get_into, over TCP to a peer in another process.

python benchmarks/tiers_mooncake.py [--sizes 32,4] [--threads 1] [--tier-threads 8] [--rounds 40] [--out FILE]

Starts a master and a peer on loopback. Each round measures client and tier one right after the other, in turns which
comes first; what is reported is the ratio within rounds.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import platform
import random
import statistics
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

from lmcache_ext.cli.raw import Pool
from lmcache_ext.cli.rounds import MIB, Rounds, interval
from lmcache_ext.ports import free_port
from lmcache_ext.tiers.mooncake import Mooncake
from lmcache_ext.tiers.mooncake_client import require_answer
from lmcache_ext.tiers.options import Options
from lmcache_ext.tiers.runner import Runner

sys.path.insert(0, str(Path(__file__).resolve().parent))
from report import say
from tiers import MARK

_PEER = """
import sys
from lmcache_ext.tiers.mooncake_client import connect
client = connect({settings!r}, 10.0)
print("ready", flush=True)
sys.stdin.read()
"""


def start_master() -> tuple[subprocess.Popen[bytes], int]:
    """A master that answers, and its port."""
    spec = importlib.util.find_spec("mooncake")
    assert spec is not None and spec.origin is not None, "pip install mooncake-transfer-engine-non-cuda"
    port = free_port()
    places = ("--rpc_address=127.0.0.1", f"--rpc_port={port}", "--metrics_host=127.0.0.1")
    command = [str(Path(spec.origin).with_name("mooncake_master")), *places, f"--metrics_port={free_port()}"]
    master = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        try:
            require_answer("127.0.0.1", port, 1.0)
            return master, port
        except OSError:
            time.sleep(0.02)
    master.kill()
    raise SystemExit("the master did not start")


def start_peer(settings: dict[str, str], nbytes: int) -> subprocess.Popen[bytes]:
    """Another process that gives `nbytes` to the pool."""
    program = _PEER.format(settings={**settings, "global_segment_size": str(nbytes)})
    streams: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    peer = subprocess.Popen([sys.executable, "-c", program], **streams)
    assert peer.stdout is not None and peer.stdout.readline() == b"ready\n", "the peer did not start"
    return peer


def rows_of(bench: Rounds, threads: int) -> list[str]:
    """Lines of the table."""
    rows = []
    for way in ("store", "load"):
        ratios = [ours / raw for ours, raw in zip(bench.rates[way], bench.rates[f"raw {way}"], strict=True)]
        verdict = "met" if statistics.median(ratios) >= MARK else "missed"
        both = f"{interval(bench.rates[f'raw {way}'])} | {interval(bench.rates[way])}"
        what = f"{way}, {bench.nbytes / MIB:g} MiB, {threads} at once"
        rows.append(f"| {what} | {both} | {interval(ratios)} | {verdict} |")
    return rows


def measure(settings: dict[str, str], threads: int, size: int, options: argparse.Namespace) -> list[str]:
    """All rounds of one size against a client of `threads` threads."""
    medium = Mooncake(settings, timeout=10.0, transfers=options.transfers or threads)
    tier = Runner(medium, Options(threads=options.tier_threads, store_queue=4096, load_queue=4096), "mooncake")
    client = Mooncake(settings, timeout=10.0, transfers=threads)
    client.open()
    try:
        bench = Rounds(tier, Pool(client, "bench", threads), size, max(4, options.mib * MIB // size))
        for number in range(options.rounds + 1):
            bench.round(number)
            if not number:
                bench.forget_rates()
        return rows_of(bench, threads)
    finally:
        tier.close(10)
        client.close()


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sizes", default="32,4", help="MiB of a chunk")
    parser.add_argument("--mib", type=int, default=128, help="MiB moved each way in a round")
    parser.add_argument("--threads", default="1", help="of the bare client")
    parser.add_argument("--tier-threads", type=int, default=8, help="of the tier")
    parser.add_argument("--transfers", type=int, default=0, help="of the tier, at once; 0: as the client")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--out", type=Path, default=None)
    options = parser.parse_args()
    random.seed(0)
    master, port = start_master()
    settings = {
        "local_hostname": "127.0.0.1",
        "metadata_server": "P2PHANDSHAKE",
        "protocol": "tcp",
        "rdma_devices": "",
        "global_segment_size": "0",
        "local_buffer_size": "0",
        "master_server_addr": f"127.0.0.1:{port}",
    }
    peer = start_peer(settings, 2 * max(options.mib, 128) * MIB + 256 * MIB)
    try:
        one = partial(measure, settings)
        sizes = [int(size) * MIB for size in options.sizes.split(",")]
        rows = [
            row for size in sizes for threads in options.threads.split(",") for row in one(int(threads), size, options)
        ]
    finally:
        peer.kill()
        master.kill()
    say(
        [
            f"`python benchmarks/tiers_mooncake.py {' '.join(sys.argv[1:])}` on {platform.machine()}, {os.cpu_count()} "
            f"cores, {time.strftime('%Y-%m-%d')}; {options.rounds} rounds, chunks of two parts, TCP over loopback, "
            f"{options.tier_threads} threads in the tier.",
            "",
            f"| what | client, GB/s | tier, GB/s | tier / client | mark: at least {MARK} |",
            "|---|---|---|---|---|",
            *rows,
        ],
        options.out,
    )


if __name__ == "__main__":
    main()
