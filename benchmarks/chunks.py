"""What the chunk size costs and brings: look-ups, tokens missed at a shared prefix's end, tiers. About three minutes.

    python benchmarks/chunks.py [--url file:///var/tmp/chunks/] [--url redis://127.0.0.1:6379] [--out FILE]

Chunks of Llama-3.1-8B: 128 KiB of KV a token in bf16. Prompts share prefixes of random length.
"""

from __future__ import annotations

import argparse
import mmap
import os
import random
import statistics
import sys
import time
from pathlib import Path

from lmcache_ext.engine import Chunk, Directory
from lmcache_ext.keys import Chain
from lmcache_ext.policies import POLICIES
from lmcache_ext.tiers import Tier, open_tier

sys.path.insert(0, str(Path(__file__).resolve().parent))
from report import say

SIZES = (128, 256, 512, 1024)
TOKEN_BYTES = 128 << 10
PROMPT, BLOCK = 32768, 16
MOVED = 1 << 30  # bytes each way and round
ROUNDS, WAIT_SECONDS = 3, 120.0


def lookup(size: int) -> float:
    """Milliseconds to hash a prompt and find all of it, median."""
    rng = random.Random(0)
    tokens = [rng.randrange(150_000) for _ in range(PROMPT)]
    directory = Directory(POLICIES.get("LRU")())
    directory.grow(PROMPT // size)
    for key in Chain(b"r" * 32, size).extend(tokens, PROMPT):
        chunk = directory.prepare_store(key, size)
        assert isinstance(chunk, Chunk)
        directory.complete_store(chunk, True)
    taken = []
    for _ in range(50):
        began = time.perf_counter()
        keys = Chain(b"r" * 32, size).extend(tokens, PROMPT)
        assert directory.match(keys) == len(keys)
        taken.append((time.perf_counter() - began) * 1e3)
    return statistics.median(taken)


def missed(size: int) -> float:
    """Tokens of a shared prefix that no whole chunk covers, on the mean. Prefixes of 500 to 8000 tokens."""
    rng = random.Random(0)
    return statistics.mean(rng.randint(500, 8000) % size for _ in range(100_000))


def done(tier: Tier, jobs: list[int]) -> None:
    """Wait for these jobs, which must succeed."""
    left, deadline = set(jobs), time.monotonic() + WAIT_SECONDS
    while left:
        if time.monotonic() > deadline:
            raise RuntimeError(f"{len(left)} jobs did not end within {WAIT_SECONDS} s")
        tier.wait(1.0)
        for result in tier.poll():
            if not all(result.ok):
                raise RuntimeError(f"{result.kind.value}: {[outcome.value for outcome in result.outcomes]}")
            left.discard(result.job)


def rates(tier: Tier, size: int, salt: int) -> tuple[float, float]:
    """GB/s of storing and of loading."""
    nbytes = size * TOKEN_BYTES
    count = MOVED // nbytes
    buffers = [[memoryview(mmap.mmap(-1, nbytes))] for _ in range(count)]
    for (part,) in buffers:
        part[:] = random.Random(salt).randbytes(1 << 20) * (nbytes >> 20)
    keys = [(salt * 1000 + i).to_bytes(32, "big") for i in range(count)]
    speeds = []
    for submit in (tier.submit_store, tier.submit_load):
        began = time.perf_counter()
        done(tier, [submit([key], [parts], WAIT_SECONDS) for key, parts in zip(keys, buffers, strict=True)])
        speeds.append(count * nbytes / (time.perf_counter() - began) / 1e9)
    done(tier, [tier.delete(keys)])
    return speeds[0], speeds[1]


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--url", action="append", default=[], help="a tier; may be given again")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    tiers = {url: open_tier(url, store_queue=1024) for url in options.url}
    heads = [f"{url.split(':')[0]}, store / load, GB/s" for url in tiers]
    lines = [
        "# What the chunk size costs and brings",
        "",
        f"`python benchmarks/chunks.py{''.join(f' --url {url}' for url in tiers)}` on {os.cpu_count()} cores, "
        f"{time.strftime('%Y-%m-%d')}. 128 KiB of KV a token. Rates: median of {ROUNDS}, the sizes in turns.",
        "",
        "| tokens a chunk | MiB | look-up of 32768 tokens, ms | tokens missed at a prefix's end | "
        f"{' | '.join(heads)} |",
        f"|---|---|---|---|{'---|' * len(heads)}",
    ]
    found: dict[tuple[str, int], list[tuple[float, float]]] = {}
    for turn in range(ROUNDS):
        for size in SIZES if turn % 2 else SIZES[::-1]:
            for url, tier in tiers.items():
                found.setdefault((url, size), []).append(rates(tier, size, turn * 10_000 + size))
    for size in SIZES:
        cells = []
        for url in tiers:
            stores, loads = zip(*found[url, size], strict=True)
            cells.append(f"{statistics.median(stores):.2f} / {statistics.median(loads):.2f}")
        mib = size * TOKEN_BYTES >> 20
        lines.append(f"| {size} | {mib} | {lookup(size):.2f} | {missed(size):.0f} | {' | '.join(cells)} |")
    for tier in tiers.values():
        tier.close(5.0)
    say(lines, options.out)


if __name__ == "__main__":
    main()
