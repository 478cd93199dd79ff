"""Counting."""

from __future__ import annotations

import pytest

from lmcache_ext.metrics import CATALOGUE, Recorder, merge


def test_take_hands_over_only_what_is_new() -> None:
    r = Recorder()
    r.count("num_hit_tokens", 5)
    r.gauge("local_cpu_hot_cache_count", 3)
    r.sample("time_to_store", 0.5)
    assert r.take() == {
        "counters": {"num_hit_tokens": 5},
        "gauges": {"local_cpu_hot_cache_count": 3},
        "samples": {"time_to_store": [0.5]},
    }
    r.gauge("local_cpu_hot_cache_count", 3)
    assert r.take() is None
    assert r.totals["num_hit_tokens"] == 5


def test_unknown_names_and_wrong_kinds_are_faults() -> None:
    r = Recorder()
    with pytest.raises(KeyError):
        r.count("num_typos")
    with pytest.raises(AssertionError):
        r.count("time_to_store")


def test_samples_are_bounded_when_nobody_takes() -> None:
    r = Recorder()
    for _ in range(5000):
        r.sample("time_to_store", 1.0)
    assert len((r.take() or {})["samples"]["time_to_store"]) == 1024


def test_merge_adds_counters_and_keeps_the_later_gauge() -> None:
    a = {"counters": {"x": 1}, "gauges": {"g": 1}, "samples": {"s": [1]}}
    b = {"counters": {"x": 2, "y": 3}, "gauges": {"g": 2}, "samples": {"s": [2]}}
    assert merge(a, b) == {"counters": {"x": 3, "y": 3}, "gauges": {"g": 2}, "samples": {"s": [1, 2]}}


def test_histograms_have_buckets() -> None:
    assert all(bool(m.buckets) == (m.kind == "histogram") for m in CATALOGUE.values())
