"""The control plane alone: what a 32k-token prompt costs to hash and to look up among a million chunks.

python benchmarks/directory.py [--chunks 1000000] [--out benchmarks/results/directory.md]
"""

from __future__ import annotations

import argparse
import os
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

from lmcache_ext.engine import Chunk, Directory
from lmcache_ext.keys import Chain
from lmcache_ext.policies.lru import LRU

sys.path.insert(0, str(Path(__file__).resolve().parent))
from report import say

TOKENS, CHUNK, ROUNDS = 32768, 256, 200
ROOT = b"r" * 32


def fill(directory: Directory, keys: list[bytes]) -> None:
    """Make every key ready."""
    for key in keys:
        chunk = directory.prepare_store(key, CHUNK)
        assert isinstance(chunk, Chunk)
        directory.complete_store(chunk, True)


def timed(call: Callable[[], object]) -> list[float]:
    """Microseconds of each round, sorted."""
    taken = []
    for _ in range(ROUNDS):
        began = time.perf_counter()
        call()
        taken.append((time.perf_counter() - began) * 1e6)
    return sorted(taken)


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--chunks", type=int, default=1_000_000)
    parser.add_argument("--out", type=Path, default=None)
    options = parser.parse_args()
    rng = random.Random(0)
    tokens = [rng.randrange(150_000) for _ in range(TOKENS)]
    keys = Chain(ROOT, CHUNK).extend(tokens, TOKENS)
    directory = Directory(LRU())
    directory.grow(options.chunks + len(keys) + 1)
    fill(directory, [i.to_bytes(32, "little") for i in range(options.chunks)])
    fill(directory, keys)

    def hold() -> None:
        held = directory.lease(keys)
        assert held is not None
        directory.release(held)

    rows = {
        "hash 32k tokens (128 chunks)": timed(lambda: Chain(ROOT, CHUNK).extend(tokens, TOKENS)),
        "look up 128 chunks": timed(lambda: directory.match(keys)),
        "lease and release 128 chunks": timed(hold),
    }
    lines = [
        "# The control plane",
        "",
        f"`python benchmarks/directory.py` on {platform.machine()}, {os.cpu_count()} cores, "
        f"{time.strftime('%Y-%m-%d')}; {len(directory):,} chunks in the directory, {ROUNDS} rounds.",
        "",
        "| what | median | 99th percentile |",
        "|---|---|---|",
    ]
    for what, v in rows.items():
        lines.append(f"| {what} | {statistics.median(v):.0f} us | {v[int(len(v) * 0.99)]:.0f} us |")
    say(lines, options.out)


if __name__ == "__main__":
    main()
