"""`lmcache-ext top`: workers' caches, live, from their /metrics. Ctrl-C ends it."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from lmcache_ext.cli.figures import TIERS, Figures, TierFigures, figures
from lmcache_ext.cli.report import add_workers, seconds
from lmcache_ext.cli.scrape import Scrape, ScrapeError, Window, default_worker, fetch
from lmcache_ext.cli.shared import ServerFigures, is_server, server_figures
from lmcache_ext.cli.text import bar, share, size

_HOME, _CLEAR_BELOW, _CLEAR_RIGHT = "\x1b[H", "\x1b[J", "\x1b[K"
_LABEL, _COLUMN = 22, 24


def add_to(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the subcommand."""
    parser = commands.add_parser("top", help="workers' caches, live in the terminal", description=__doc__)
    add_workers(parser)
    parser.add_argument("--every", type=seconds, default=2.0, metavar="SECONDS", help="between two frames (default 2)")
    parser.add_argument("--frames", type=int, default=0, metavar="N", help="end after so many; default: never")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Draw frames until Ctrl-C, or `--frames` of them. 1 if the last one had no figures of any worker."""
    urls: list[str] = args.worker or [default_worker()]
    before: dict[str, Scrape | str] = {url: read(url) for url in urls}
    drawn, alive = 0, True
    try:
        while not args.frames or drawn < args.frames:
            time.sleep(max(args.every, 0.1))
            now = {url: read(url) for url in urls}
            columns: dict[str, Column] = {url: column(before[url], now[url]) for url in urls}
            show(frame(columns), sys.stdout.isatty())
            alive = any(not isinstance(entry, str) for entry in columns.values())
            before, drawn = now, drawn + 1
    except KeyboardInterrupt:
        return 0
    return 0 if alive else 1


def read(url: str) -> Scrape | str:
    """A reading, or why there is none: a worker that restarts is no reason to end."""
    try:
        return fetch(url)
    except ScrapeError as error:
        return str(error)


Column = tuple[Figures, Scrape] | ServerFigures | str


def column(before: Scrape | str, now: Scrape | str) -> Column:
    """One worker's or server's figures over the last interval, or why there are none."""
    if isinstance(now, str):
        return now
    if isinstance(before, str):
        return "it has just come back: figures follow"
    window = Window(before, now)
    try:
        return server_figures(window) if is_server(now) else (figures(window), now)
    except ScrapeError as error:
        return str(error)


def show(lines: Sequence[str], terminal: bool) -> None:
    """Print a frame: over the last one on a terminal, below it elsewhere."""
    if terminal:
        print(_HOME + "\n".join(line + _CLEAR_RIGHT for line in lines) + _CLEAR_BELOW, end="", flush=True)
    else:
        print("\n".join(lines), flush=True)


def frame(columns: Mapping[str, Column]) -> list[str]:
    """One line for each figure, one column for each worker, the same below for servers; first, who has none."""
    lines = [f"{url}: {entry}" for url, entry in columns.items() if isinstance(entry, str)]
    workers = {url: entry for url, entry in columns.items() if isinstance(entry, tuple)}
    servers = {url: entry for url, entry in columns.items() if isinstance(entry, ServerFigures)}
    if workers:
        rows = [*ROWS, *(row for kind in TIERS for row in _tier_rows(kind, workers.values()))]
        lines.append(_head(workers))
        lines += [_line(label, [value(*entry) for entry in workers.values()]) for label, value in rows]
    if servers:
        lines.append(_head(servers))
        lines += [_line(label, [value(entry) for entry in servers.values()]) for label, value in SERVER_ROWS]
    return lines


def _head(urls: Iterable[str]) -> str:
    return _line(time.strftime("%H:%M:%S"), [url.split("://", 1)[1].removesuffix("/metrics") for url in urls])


def _tier_rows(kind: str, workers: Iterable[tuple[Figures, Scrape]]) -> Iterator[tuple[str, Row]]:
    """Rows of a tier, if any of the workers has it."""
    if not any(tier.kind == kind for now, _ in workers for tier in now.tiers):
        return

    def row(label: str, value: Callable[[TierFigures, Figures], str]) -> tuple[str, Row]:
        def of(now: Figures, last: Scrape) -> str:
            return next((value(tier, now) for tier in now.tiers if tier.kind == kind), "-")

        return f"{kind} {label}", of

    yield row("tokens/s", lambda tier, now: _each_second(tier.hit, now))
    yield row("in, out a s", lambda tier, now: f"{_rate(tier.loaded_bytes, now)}, {_rate(tier.stored_bytes, now)}")
    yield row("holds", lambda tier, now: f"{tier.chunks:,}, {size(tier.used_bytes)}" if tier.chunks else "-")
    yield row("not written/s", lambda tier, now: _each_second(tier.skipped, now))
    yield row("failed/s", lambda tier, now: _each_second(tier.failed, now))


def _line(label: str, values: Sequence[str]) -> str:
    return f"{label:<{_LABEL}}" + "".join(f"{value:<{_COLUMN}}" for value in values).rstrip()


def _rate(nbytes: float, now: Figures | ServerFigures) -> str:
    return size(nbytes / (now.seconds or 1))


def _each_second(count: float, now: Figures | ServerFigures) -> str:
    return f"{count / (now.seconds or 1):,.1f}"


def _share(tokens: int, now: Figures) -> str:
    return f"{bar(now.share(tokens))} {now.share(tokens):.1%}" if now.prompt else "-"


def _milliseconds(value: float | None) -> str:
    return "-" if value is None else f"{value * 1000:,.1f} ms"


def _speed(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


Row = Callable[[Figures, Scrape], str]
ROWS: tuple[tuple[str, Row], ...] = (
    ("model", lambda now, last: last.model()[-_COLUMN + 1 :]),
    ("cache", lambda now, last: "on" if now.healthy else "SWITCHED OFF"),
    ("requests running", lambda now, last: f"{last.total('vllm:num_requests_running'):.0f}"),
    ("requests waiting", lambda now, last: f"{last.total('vllm:num_requests_waiting'):.0f}"),
    ("requests/s", lambda now, last: _each_second(now.requests, now)),
    ("prompt tokens/s", lambda now, last: _each_second(now.prompt, now)),
    ("  GPU prefix cache", lambda now, last: _share(now.gpu, now)),
    ("  host memory", lambda now, last: _share(now.host, now)),
    ("  computed", lambda now, last: _share(now.computed, now)),
    ("time to first token", lambda now, last: _milliseconds(now.ttft_s)),
    ("loads GB/s", lambda now, last: _speed(now.load_gb_per_s)),
    ("stores GB/s", lambda now, last: _speed(now.store_gb_per_s)),
    ("pool", lambda now, last: f"{bar(now.occupancy)} {now.occupancy:.1%}"),
    ("chunks", lambda now, last: f"{now.chunks:,} of {now.capacity_chunks:,}"),
    ("evicted chunks/s", lambda now, last: _each_second(now.evicted_chunks, now)),
    ("pinned chunks", lambda now, last: f"{now.pinned_chunks:,}"),
    ("pinned GPU blocks", lambda now, last: f"{now.pinned_gpu_blocks:,}"),
    ("failed tokens/s", lambda now, last: _each_second(now.failed, now)),
    ("faults/s", lambda now, last: _each_second(now.faults, now)),
)
SERVER_ROWS: tuple[tuple[str, Callable[[ServerFigures], str]], ...] = (
    ("shared server", lambda now: f"{now.clients} clients, {now.silent} silent"),
    ("look-ups/s", lambda now: _each_second(now.lookups, now)),
    ("  chunks found", lambda now: share(now.found, now.looked_up)),
    ("stored, read a s", lambda now: f"{_rate(now.stored_bytes, now)}, {_rate(now.leased_bytes, now)}"),
    ("memory", lambda now: f"{bar(now.usage)} {now.usage:.1%}"),
    ("chunks", lambda now: f"{now.chunks:,}"),
    ("leases", lambda now: f"{now.leases:,}"),
    ("evicted chunks/s", lambda now: _each_second(now.evicted, now)),
    ("refused chunks/s", lambda now: _each_second(now.refused, now)),
    ("failed stores/s", lambda now: _each_second(now.failed, now)),
    ("tiers", lambda now: ", ".join(f"{name} {size(n)}" for name, n in now.tiers.items()) or "-"),
)
