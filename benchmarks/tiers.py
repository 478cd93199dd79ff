"""One tier without an engine: store and load beside what the same threads reach with bare O_DIRECT calls.

python benchmarks/tiers.py [--url file:///var/tmp/tier/] [--sizes 32,4,1] [--threads 8] [--rounds 8] [--out FILE]

Each round measures the raw limit and the tier one right after the other, in turns which comes first; what is reported
is the ratio within rounds, so that other users of the disk touch both alike.
"""

from __future__ import annotations

import argparse
import os
import platform
import random
import statistics
import sys
import time
from pathlib import Path

from lmcache_ext.cli.raw import Files
from lmcache_ext.cli.rounds import MIB, Rounds, interval
from lmcache_ext.tiers import open_tier

sys.path.insert(0, str(Path(__file__).resolve().parent))
from report import say

MARK = 0.9


def rows_of(bench: Rounds) -> tuple[list[str], list[str]]:
    """Lines of the two tables."""
    size = f"{bench.nbytes / MIB:g} MiB"
    rates = []
    for way in ("store", "load"):
        ratios = [ours / raw for ours, raw in zip(bench.rates[way], bench.rates[f"raw {way}"], strict=True)]
        verdict = "met" if statistics.median(ratios) >= MARK else "missed"
        both = f"{interval(bench.rates[f'raw {way}'])} | {interval(bench.rates[way])}"
        rates.append(f"| {way}, {size} | {both} | {interval(ratios)} | {verdict if bench.nbytes >= 32 * MIB else ''} |")
    bench.times.clear()
    bench.alone()
    alone = {name: sorted(times) for name, times in bench.times.items()}
    times = [f"| {name}, {size} | {v[len(v) // 2]:.3f} | {v[-1]:.3f} |" for name, v in alone.items()]
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
    raw = Files([options.raw], options.threads)
    rates, times = [], []
    try:
        for size in (int(float(each) * MIB) for each in options.sizes.split(",")):
            bench = Rounds(tier, raw, size, max(options.threads * 2, options.mib * MIB // size))
            for number in range(options.rounds + 1):
                bench.round(number)
                if not number:
                    bench.forget_rates()
            more_rates, more_times = rows_of(bench)
            rates += more_rates
            times += more_times
    finally:
        tier.close(10)
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
