"""`lmcache-ext report`: does the cache help, by a running worker's own figures, and what to set next?"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass

from lmcache_ext.cli.advice import Advice, advise
from lmcache_ext.cli.figures import Figures, TierFigures, figures
from lmcache_ext.cli.scrape import Scrape, ScrapeError, Window, address, default_worker, fetch
from lmcache_ext.cli.shared import ServerFigures, is_server, server_figures
from lmcache_ext.cli.text import size

_LONGEST_S = 3600.0


def add_to(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the subcommand."""
    parser = commands.add_parser("report", help="does the cache help? a running worker's figures", description=__doc__)
    add_workers(parser)
    parser.add_argument(
        "--over", type=seconds, default=0.0, metavar="SECONDS", help="watch for so long; default: since the start"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of lines")
    parser.set_defaults(run=run)


def add_workers(parser: argparse.ArgumentParser) -> None:
    """The argument that `report` and `top` share."""
    parser.add_argument(
        "worker",
        nargs="*",
        type=address,
        help="a worker's system port or a shared server's HTTP port, as port, host:port or URL; default: "
        "DYN_SYSTEM_PORT, else 8081, on this machine",
    )


def seconds(text: str) -> float:
    """A time of up to an hour. Raises ValueError, of which argparse makes a message."""
    value = float(text)
    if not 0 <= value <= _LONGEST_S:
        raise ValueError(text)
    return value


def run(args: argparse.Namespace) -> int:
    """Print the report of each worker; 1 if one can't be read or has no cache."""
    urls = args.worker or [default_worker()]
    before = {}
    if args.over:
        before = {url: _try(url)[0] for url in urls}
        time.sleep(args.over)
    reports = [_report(url, before.get(url)) for url in urls]
    if args.json:
        print(json.dumps({report.url: report.as_dict() for report in reports}, indent=2))
    for report in reports:
        if report.now is None:
            print(f"lmcache-ext report: {report.error}", file=sys.stderr)
        elif not args.json:
            lines = report.now.lines() if isinstance(report.now, ServerFigures) else _lines(report.now)
            print("\n".join([f"{report.url}  {report.model}", *lines, *_advice(report)]))
    return 1 if any(report.error for report in reports) else 0


@dataclass(frozen=True)
class Report:
    """What is said of one worker, or server: figures and advice, or the error."""

    url: str
    error: str = ""
    model: str = ""
    now: Figures | ServerFigures | None = None
    advice: tuple[Advice, ...] = ()

    def as_dict(self) -> dict[str, object]:
        """The same for `--json`."""
        if self.now is None:
            return {"error": self.error}
        advice = [entry.as_dict() for entry in self.advice]
        return {"model": self.model, "figures": self.now.as_dict(), "advice": advice}


def _try(url: str) -> tuple[Scrape | None, str]:
    try:
        return fetch(url), ""
    except ScrapeError as error:
        return None, str(error)


def _report(url: str, before: Scrape | None) -> Report:
    reading, error = _try(url)
    if reading is None:
        return Report(url, error)
    if is_server(reading):
        return Report(url, "", "shared server", server_figures(Window(before, reading)))
    try:
        now = figures(Window(before, reading))
    except ScrapeError as why:
        return Report(url, f"{url}: {why}")
    return Report(url, "", reading.model(), now, tuple(advise(now)))


def _advice(report: Report) -> Iterator[str]:
    for entry in report.advice:
        yield f"  -> {entry.do}"
        yield f"     because {entry.why}"


def _lines(now: Figures) -> Iterator[str]:
    if not now.requests:
        yield "  no request was looked up" + (" in that time" if now.seconds else " yet: send some, and ask again")
        return
    since = f"in {now.seconds:.0f} s" if now.seconds else "since the start"
    yield f"  {since}: {now.requests:,} requests, {now.prompt:,} prompt tokens, of which"
    for name, tokens in (("GPU prefix cache", now.gpu), ("host memory", now.host), ("computed", now.computed)):
        yield f"    {name:<18}{now.share(tokens):>7.1%}  {tokens:,} tokens"
    yield _saving(now)
    yield f"  pool: {now.occupancy:.0%} of {now.capacity_chunks:,} chunks{_size(now)}, {now.evicted_chunks:,} evicted"
    yield f"  loads: {_speed(now.load_gb_per_s)}; stores: {_speed(now.store_gb_per_s)}, {now.skipped:,} tokens skipped"
    yield from map(_tier, now.tiers)
    if now.slow:
        yield f"  tiers too slow: {now.slow:,} tokens were computed instead"
    if now.failed or now.failed_stores or now.faults:
        yield f"  failed: {now.failed:,} tokens' loads, {now.failed_stores:,} stores, {now.faults:,} faults"


def _tier(tier: TierFigures) -> str:
    moved = f"{size(tier.loaded_bytes)} read, {size(tier.stored_bytes)} written"
    lost = [f", {count:,} {what}" for count, what in ((tier.skipped, "not written"), (tier.failed, "failed")) if count]
    holds = f"; {tier.chunks:,} chunks, {size(tier.used_bytes)}" if tier.chunks else ""  # what many share has no index
    return f"  {tier.kind}: {tier.hit:,} tokens came from it; {moved}{''.join(lost)}{holds}"


def _size(now: Figures) -> str:
    size = now.capacity_bytes
    return f" ({size / (1 << 30):.1f} GB)" if size else ""


def _saving(now: Figures) -> str:
    if not now.loads:
        return "  nothing was loaded from host memory"
    if now.saved_s is None:
        return "  time saved: can't be told, for too little was computed to know what a token costs"
    each = f"{now.saved_s / now.loads:.3f} s for each of {now.loads:,} requests that loaded"
    ttft = f"; the mean time to the first token is {now.ttft_s:.3f} s" if now.ttft_s is not None else ""
    return f"  time saved, estimated: {now.saved_s:.1f} s, {each}{ttft}"


def _speed(gb_per_s: float | None) -> str:
    return "none" if gb_per_s is None else f"{gb_per_s:.2f} GB/s on average"
