"""What the policies are measured with: the bound is one, and the workloads are the same every time."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from benchmarks import policies as benchmark
from lmcache_ext.policies import POLICIES


def words(text: str) -> list[list[bytes]]:
    """One request of one chunk for each letter; one request for each word where there are blanks."""
    return [[letter.encode() for letter in word] for word in (text.split() if " " in text else text)]


@pytest.mark.parametrize(
    ("text", "size", "found"),
    [
        ("abcabc", 3, 3),
        ("abcabc", 2, 2),  # a and b stay, c is not stored
        ("abcabc", 1, 1),
        ("abac", 1, 1),
        ("abcdabcd", 3, 3),
        ("ab ac ab ac", 2, 4),  # a always, and b or c once
        ("70120304230321201701", 3, 12),  # a textbook: 11 where all that is missing must be stored
    ],
)
def test_the_optimum(text: str, size: int, found: int) -> None:
    assert benchmark.optimum(words(text), size) == found


def best_of_all_choices(text: str, size: int) -> int:
    """Hits of the luckiest of all pools."""
    pools = {frozenset[str](): 0}
    for letter in text:
        after: dict[frozenset[str], int] = {}
        for pool, found in pools.items():
            everything = pool | {letter}
            choices = [everything - {out} for out in everything] if len(everything) > size else [everything]
            for choice in choices:
                after[choice] = max(after.get(choice, 0), found + (letter in pool))
        pools = after
    return max(pools.values())


@pytest.mark.parametrize("seed", range(20))
def test_no_choice_of_victims_finds_more_than_the_optimum(seed: int) -> None:
    rng = random.Random(seed)
    text = "".join(rng.choice("abcdefg") for _ in range(40))
    for size in (1, 2, 3, 5):
        assert benchmark.optimum(words(text), size) == best_of_all_choices(text, size)


@pytest.mark.parametrize("name", benchmark.WORKLOADS)
def test_workloads_are_the_same_for_a_seed_and_no_policy_beats_the_optimum(name: str) -> None:
    make, _ = benchmark.WORKLOADS[name]
    blocks = make(150, random.Random(7))
    assert blocks == make(150, random.Random(7)) and len(blocks) == 150
    trace = benchmark.chunked(blocks)
    assert all(len(keys) == 2 * len(request) == len(set(keys)) for keys, request in zip(trace, blocks, strict=True))
    bounds = [benchmark.optimum(trace, size) for size in (300, 3000)]
    assert bounds[0] <= bounds[1]
    for policy in POLICIES:
        for size, bound in zip((300, 3000), bounds, strict=True):
            assert benchmark.hits(trace, POLICIES.get(policy)(), size) <= bound


def test_a_recorded_trace_is_read(tmp_path: Path) -> None:
    file = tmp_path / "trace.jsonl"
    lines = [{"timestamp": 0, "input_length": 1000, "output_length": 5, "hash_ids": ids} for ids in ([0, 1], [0, 2])]
    file.write_text("\n".join(map(json.dumps, lines)) + "\n")
    assert benchmark.recorded(file) == [[0, 1], [0, 2]]
    assert benchmark.hits(benchmark.chunked(benchmark.recorded(file)), POLICIES.get("LRU")(), 10) == 2
