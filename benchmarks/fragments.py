"""How scattered are a request's blocks once an engine has served for a while? No GPU, a minute.

    python benchmarks/fragments.py [--out benchmarks/results/fragments.md]

vLLM's own block pool, 16 requests at once that come with a prompt of random length, take blocks as they decode, and go
in random order. A run: blocks of one prompt with rising adjacent numbers, so what one strided copy could move.
"""

from __future__ import annotations

import argparse
import itertools
import random
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from vllm.v1.core.block_pool import BlockPool

sys.path.insert(0, str(Path(__file__).resolve().parent))
from report import say

BLOCK, RUNNING = 16, 16
PROMPTS = ((500, 2000), (2000, 8000), (8000, 32000))  # tokens, least and most
POOLS = (4000, 16000, 64000)  # blocks
MOMENTS = (10, 100, 1000, 3000)  # requests served
AROUND = 50  # requests at each moment


def run_length(blocks: list[Any]) -> float:
    """Mean length of the runs."""
    ids = [block.block_id for block in blocks]
    breaks = sum(1 for one, two in itertools.pairwise(ids) if two != one + 1)
    return len(ids) / (breaks + 1)


def serve(size: int, least: int, most: int, rng: random.Random) -> dict[int, float]:
    """Mean run length of the prompts that come around each moment."""
    pool = BlockPool(num_gpu_blocks=size, enable_caching=False, hash_block_size=BLOCK)
    live: list[list[Any]] = []
    found: dict[int, list[float]] = {moment: [] for moment in MOMENTS}

    def leave() -> None:
        pool.free_blocks(reversed(live.pop(rng.randrange(len(live)))))

    for served in range(max(MOMENTS) + AROUND):
        need = -(-rng.randint(least, most) // BLOCK)
        while pool.get_num_free_blocks() < need + 4 * RUNNING:
            leave()
        blocks = pool.get_new_blocks(need)
        for moment in MOMENTS:
            if moment <= served < moment + min(AROUND, moment):
                found[moment].append(run_length(blocks))
        live.append(blocks)
        for blocks in live:
            blocks += pool.get_new_blocks(rng.randint(0, 3))
        while len(live) >= RUNNING:
            leave()
    return {moment: statistics.mean(values) for moment, values in found.items()}


def main() -> None:
    """Simulate and report."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    lines = [
        "# How scattered a request's blocks are",
        "",
        f"`python benchmarks/fragments.py`, {time.strftime('%Y-%m-%d')}. Mean length of runs of adjacent blocks of "
        f"{BLOCK} tokens, in vLLM's own block pool, after so many requests.",
        "",
        f"| blocks in the pool | prompts, tokens | {' | '.join(f'{moment}' for moment in MOMENTS)} |",
        f"|---|---|{'---|' * len(MOMENTS)}",
    ]
    for size in POOLS:
        for least, most in PROMPTS:
            found = serve(size, least, most, random.Random(1))
            cells = " | ".join(f"{found[moment]:.1f}" for moment in MOMENTS)
            lines.append(f"| {size} | {least} to {most} | {cells} |")
    say(lines, options.out)


if __name__ == "__main__":
    main()
