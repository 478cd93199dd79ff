"""Counts in one thread, handed over as plain dicts: they cross processes as msgpack."""

from __future__ import annotations

from typing import Any

from lmcache_ext.metrics.catalogue import CATALOGUE

Delta = dict[str, dict[str, Any]]
"""{"counters": {name: increase}, "gauges": {name: value}, "samples": {name: [value]}}"""

_MAX_SAMPLES = 1024  # of one histogram between two takes; nobody took for a while if there are more


class Recorder:
    """Not thread-safe. Names must be in the catalogue."""

    def __init__(self) -> None:
        self._delta: Delta = _empty()
        self.totals: dict[str, float] = {}

    def count(self, name: str, by: float = 1) -> None:
        """Raise a counter."""
        assert CATALOGUE[name].kind == "counter", name
        self._delta["counters"][name] = self._delta["counters"].get(name, 0) + by
        self.totals[name] = self.totals.get(name, 0) + by

    def gauge(self, name: str, value: float) -> None:
        """Set a gauge."""
        assert CATALOGUE[name].kind == "gauge", name
        if self.totals.get(name) != value:
            self._delta["gauges"][name] = self.totals[name] = value

    def sample(self, name: str, value: float) -> None:
        """Add an observation to a histogram."""
        assert CATALOGUE[name].kind == "histogram", name
        samples = self._delta["samples"].setdefault(name, [])
        if len(samples) < _MAX_SAMPLES:
            samples.append(value)

    def take(self) -> Delta | None:
        """What is new since the last call, or None."""
        delta, self._delta = self._delta, _empty()
        return delta if any(delta.values()) else None


def _empty() -> Delta:
    return {"counters": {}, "gauges": {}, "samples": {}}


def merge(first: Delta, then: Delta) -> Delta:
    """Both, as one: counters add, later gauges win, samples queue up."""
    counters = dict(first.get("counters", {}))
    for name, by in then.get("counters", {}).items():
        counters[name] = counters.get(name, 0) + by
    samples = {name: list(values) for name, values in first.get("samples", {}).items()}
    for name, values in then.get("samples", {}).items():
        samples.setdefault(name, []).extend(values)
    return {"counters": counters, "gauges": {**first.get("gauges", {}), **then.get("gauges", {})}, "samples": samples}
