"""`lmcache-ext bench tier URL`: how fast is one tier, without an engine, beside what lies below it?

Writes, reads and removes objects of its own. A tier that is bounded by its server may drop others for them.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import statistics
import sys
import time
from collections.abc import Iterator
from typing import Any

from lmcache_ext.cli.raw import raw_of
from lmcache_ext.cli.rounds import LOOKED_UP, MIB, BenchError, Raw, Rounds
from lmcache_ext.cli.tier_url import add_url, folders_of, is_set_up, look_at
from lmcache_ext.errors import ConfigError
from lmcache_ext.tiers import Address, Runner, Tier, open_tier
from lmcache_ext.tiers.disk import SHARDS

_SCAN_SECONDS = 600.0
_LOOK = 0.01  # seconds between two looks whether the scan is over
_MOST = 4096  # chunks, and what queues hold here


def add_to(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the subcommand."""
    parser = commands.add_parser("bench", help="measure one tier", description=__doc__)
    kinds = parser.add_subparsers(title="what", required=True)
    tier = kinds.add_parser("tier", help="store, load and look up, beside the raw limit", description=__doc__)
    add_url(tier)
    tier.add_argument("--chunk-mb", type=_sizes, default=[4.0, 32.0], help="MiB of a chunk, with commas; default 4,32")
    tier.add_argument("--chunks", type=_count, default=16, help="chunks in each round; default 16")
    tier.add_argument("--threads", type=_count, default=8, help="of the tier, and of what it is compared with")
    tier.add_argument("--rounds", type=_count, default=5, help="after one that warms up; default 5")
    tier.set_defaults(run=run)


def _sizes(text: str) -> list[float]:
    sizes = [float(each) for each in text.split(",")]
    if not all(0 < size <= 1024 and size * MIB % 8192 == 0 for size in sizes):
        raise ValueError(text)
    return sizes


def _count(text: str) -> int:
    value = int(text)
    if not 0 < value <= _MOST:
        raise ValueError(text)
    return value


def run(args: argparse.Namespace) -> int:
    """Measure and print; 1 if the tier does not work, 2 if the URL is wrong."""
    try:
        with contextlib.redirect_stdout(sys.stderr):  # NIXL, say, logs to the standard output
            report = measure(args)
    except ConfigError as error:
        print(f"lmcache-ext bench: {error}", file=sys.stderr)
        return 2
    except (BenchError, OSError) as error:
        print(f"lmcache-ext bench: {Address(args.url).shown}: {error}", file=sys.stderr)
        return 1
    print(json.dumps(report, indent=2) if args.json else "\n".join(_lines(report)))
    return 0


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """The whole report, as `--json` prints it. Raises ConfigError, BenchError, OSError."""
    with _opened(args.url, args.threads) as (tier, raw):
        sizes = [_one_size(tier, raw, size, args) for size in args.chunk_mb]
    return {
        "url": Address(args.url).shown,
        "compared_with": raw.name if raw else None,
        "threads": args.threads,
        "rounds": args.rounds,
        "chunks": args.chunks,
        "sizes": sizes,
    }


@contextlib.contextmanager
def _opened(url: str, threads: int) -> Iterator[tuple[Tier, Raw | None]]:
    """A tier at work, and its limit. Folders that were made for it are removed afterwards."""
    if capacity := Address(url).text("capacity_gb"):
        raise ConfigError("capacity_gb", capacity, "leave it out: what is there would leave for the benchmark")
    made = [] if url.startswith("plugin:") else [folder for folder in folders_of(look_at(url)) if not is_set_up(folder)]
    parents = [[each for each in (folder, *folder.parents) if not each.exists()] for folder in made]
    waits = {f"{kind}_timeout": 60.0 for kind in ("lookup", "store", "load", "delete")}
    tier = open_tier(url, threads=threads, store_queue=_MOST, load_queue=_MOST, **waits)
    try:
        yield tier, _limit(tier, threads)
    finally:
        tier.close(10)
        for folder, above in zip(made, parents, strict=True):
            for each in (*(folder / shard for shard in SHARDS), *above):
                with contextlib.suppress(OSError):  # somebody uses it already
                    each.rmdir()


def _limit(tier: Tier, threads: int) -> Raw | None:
    """Also finds out, with the reason, whether the tier can be written."""
    if not isinstance(tier, Runner):
        return None
    try:
        tier.medium.probe(write=True)
        raw = raw_of(tier.medium, threads)
    except Exception as error:  # each medium raises its own
        raise BenchError(f"can't be written: {error}") from error
    until = time.monotonic() + _SCAN_SECONDS
    while not tier.scanned:  # stores wait for it
        if time.monotonic() > until or tier.counts().trips:
            raise BenchError("what lies there can't be listed")
        time.sleep(_LOOK)
    return raw


def _one_size(tier: Tier, raw: Raw | None, size: float, args: argparse.Namespace) -> dict[str, Any]:
    rounds = Rounds(tier, raw, int(size * MIB), args.chunks)
    try:
        for number in range(args.rounds + 1):
            rounds.round(number)
            rounds.alone(min(args.chunks, LOOKED_UP // 2))
            if not number:
                rounds.forget_rates()
    except Exception as error:
        with contextlib.suppress(Exception):
            rounds.clear()
        raise error if isinstance(error, BenchError) else BenchError(f"{type(error).__name__}: {error}") from error
    except KeyboardInterrupt:
        rounds.clear()
        raise
    return {
        "chunk_mb": size,
        **{way: _rates(rounds, way) | _times(rounds, way) for way in ("store", "load")},
        "look_up": {"keys": LOOKED_UP, **_times(rounds, "look-up")},
    }


def _rates(rounds: Rounds, way: str) -> dict[str, Any]:
    ours, raw = rounds.rates[way], rounds.rates.get(f"raw {way}")
    ratio = statistics.median(a / b for a, b in zip(ours, raw, strict=True)) if raw else None
    return {
        "mb_per_s": round(statistics.median(ours) * 1e3, 1),
        "raw_mb_per_s": round(statistics.median(raw) * 1e3, 1) if raw else None,
        "ratio": round(ratio, 3) if ratio else None,
    }


def _times(rounds: Rounds, what: str) -> dict[str, Any]:
    times = sorted(rounds.times[what])
    ranks = {name: times[math.ceil(share * len(times)) - 1] for name, share in (("p50_ms", 0.5), ("p99_ms", 0.99))}
    return {**{name: round(value, 3) for name, value in ranks.items()}, "samples": len(times)}


def _lines(report: dict[str, Any]) -> Iterator[str]:
    raw = report["compared_with"]
    yield f"{report['url']}  {report['threads']} threads, {report['rounds']} rounds of {report['chunks']} chunks" + (
        f"; raw: {raw}" if raw else ""
    )
    yield f"{'':<24}{'MB/s':>9}{'raw MB/s':>10}{'ratio':>7}{'p50 ms':>10}{'p99 ms':>10}"
    for size in report["sizes"]:
        for way in ("store", "load"):
            one = size[way]
            limit = (f"{one['raw_mb_per_s']:.0f}", f"{one['ratio']:.2f}") if raw else ("-", "-")
            yield (
                f"{way + ', ' + _size(size):<24}{one['mb_per_s']:>9.0f}{limit[0]:>10}{limit[1]:>7}"
                f"{one['p50_ms']:>10.2f}{one['p99_ms']:>10.2f}"
            )
        one = size["look_up"]
        yield f"{'look-up of ' + str(one['keys']) + ' keys':<24}{'':>26}{one['p50_ms']:>10.2f}{one['p99_ms']:>10.2f}"


def _size(size: dict[str, Any]) -> str:
    return f"{size['chunk_mb']:g} MiB"
