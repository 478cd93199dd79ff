"""A worker's `/metrics` read from outside, and what happened between two readings."""

from __future__ import annotations

import http.client
import os
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass

from prometheus_client.parser import text_string_to_metric_families

TIMEOUT_S = 5.0
DEFAULT_PORT = "8081"

Samples = Mapping[str, list[tuple[Mapping[str, str], float]]]


class ScrapeError(Exception):
    """The metrics could not be read; the message says what was tried and what to do."""


@dataclass(frozen=True)
class Scrape:
    """One reading: samples by full name (`…_total`, `…_sum`), each with its labels."""

    at: float  # monotonic seconds
    samples: Samples

    def has(self, name: str) -> bool:
        """Whether there is any sample of that name."""
        return bool(self.samples.get(name))

    def total(self, name: str) -> float:
        """The sum over all label sets, as over the engines of one worker; 0 if there is none."""
        return sum(value for _, value in self.samples.get(name, ()))

    def model(self) -> str:
        """The served model's name, as vLLM labels it."""
        for name in ("lmcache:num_lookup_requests_total", "vllm:prompt_tokens_total"):
            for labels, _ in self.samples.get(name, ()):
                if labels.get("model_name"):
                    return labels["model_name"]
        return "?"


def address(where: str) -> str:
    """The URL behind a port, a host:port or a URL with or without a path."""
    if where.isdigit():
        where = f"127.0.0.1:{where}"
    url = where if "://" in where else f"http://{where}"
    return url if "/" in url.split("://", 1)[1] else f"{url}/metrics"


def default_worker() -> str:
    """Where the first worker of this machine is, as the launch scripts start it."""
    return address(os.environ.get("DYN_SYSTEM_PORT") or DEFAULT_PORT)


def parse(text: str, at: float | None = None) -> Scrape:
    """Prometheus' text format. Raises ScrapeError for anything else."""
    samples: dict[str, list[tuple[Mapping[str, str], float]]] = {}
    try:
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                samples.setdefault(sample.name, []).append((sample.labels, sample.value))
    except ValueError as error:
        raise ScrapeError(f"what came back is not Prometheus' text format: {error}") from None
    return Scrape(time.monotonic() if at is None else at, samples)


def fetch(url: str) -> Scrape:
    """Read `url`, past any proxy. Raises ScrapeError; takes at most a few times TIMEOUT_S."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(url, timeout=TIMEOUT_S) as answer:
            text = answer.read().decode("utf-8")
    except (OSError, ValueError, http.client.HTTPException) as error:  # URLError is an OSError
        reason = error.reason if isinstance(error, urllib.error.URLError) else error
        raise ScrapeError(
            f"{url} can't be read: {reason}; give the worker's system port (DYN_SYSTEM_PORT, {DEFAULT_PORT} in launch/)"
        ) from None
    return parse(text)


@dataclass(frozen=True)
class Window:
    """What happened from `first` to `last`; since the worker's start if `first` is None."""

    first: Scrape | None
    last: Scrape

    @property
    def seconds(self) -> float | None:
        """Its length; None since the start, which /metrics does not date."""
        return None if self.first is None else max(self.last.at - self.first.at, 1e-9)

    def increase(self, name: str) -> float:
        """How much the counter (or the sum or count of a histogram) grew. One that fell began anew with its worker."""
        now = self.last.total(name)
        before = self.first.total(name) if self.first else 0.0
        return now - before if now >= before else now

    def mean(self, histogram: str) -> float | None:
        """The mean observation; None if there was none."""
        count = self.increase(f"{histogram}_count")
        return self.increase(f"{histogram}_sum") / count if count else None
