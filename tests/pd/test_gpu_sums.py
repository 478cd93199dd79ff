"""The kernel that sums slots in a GPU's memory against a plain reference, in Triton's interpreter: without a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="Triton comes with the locked packages; an install without it has no CUDA plane")

from tests.interpreted import kernels

ONE, TWO = np.uint64(0x3F58476D1CE4E5B9), np.uint64(0x14D049BB133111EB)
STEP, APART = np.uint64(0x1E3779B97F4A7C15), np.uint64(0x2545F4914F6CDD1D)


@pytest.fixture(scope="module")
def kernel() -> Iterator[Any]:
    with kernels() as module:
        yield module


def mixed(x: np.ndarray) -> np.ndarray:
    x = (x ^ (x >> np.uint64(31))) * ONE
    x = (x ^ (x >> np.uint64(29))) * TWO
    return np.asarray(x ^ (x >> np.uint64(32)))


def reference(words: np.ndarray) -> list[int]:
    one = mixed(words + np.arange(1, len(words) + 1, dtype=np.uint64) * STEP)
    return [int(one.sum()), int(mixed(one ^ APART).sum())]


def taken(kernel: Any, words: np.ndarray, programs: int, cuts: tuple[int, ...] = ()) -> list[int]:
    """As the class does it, run by run."""
    memory, runs = torch.from_numpy(words.view(np.int64)), list(zip((0, *cuts), (*cuts, len(words)), strict=True))
    table = torch.tensor([[memory.data_ptr() + 8 * start, end - start, start] for start, end in runs])
    totals = torch.full((len(runs), programs, 2), -1, dtype=torch.int64)
    kernel.add_words[(programs, len(runs))](table, totals, kernel.BLOCK)
    return [int(each) for each in totals.sum((0, 1)).numpy().view(np.uint64)]


@pytest.fixture
def words() -> np.ndarray:
    """More than one tile, the last of them not full."""
    return np.random.default_rng(7).integers(0, 1 << 64, 3 * 2048 + 77, dtype=np.uint64)


@pytest.mark.parametrize("programs", [1, 3, 64])
def test_a_sum_is_the_references(kernel: Any, words: np.ndarray, programs: int) -> None:
    assert taken(kernel, words, programs) == reference(words)


def test_runs_are_summed_as_one_behind_the_other(kernel: Any, words: np.ndarray) -> None:
    assert taken(kernel, words, 2, (5, 2048, 4000)) == reference(words)


def test_whatever_differs_shows(kernel: Any, words: np.ndarray) -> None:
    honest = taken(kernel, words, 2)
    rng, seen = np.random.default_rng(11), [honest]
    for _ in range(8):  # a bit
        other = words.copy()
        other[rng.integers(len(words))] ^= np.uint64(1) << np.uint64(rng.integers(64))
        seen.append(taken(kernel, other, 2))
    swapped, shifted, stale = words.copy(), np.roll(words, 512), words.copy()
    swapped[[3, 4]] = swapped[[4, 3]]
    stale[2048:4096] = 0  # a part that has not come
    seen += [taken(kernel, each, 2) for each in (swapped, shifted, stale, words[:-1], np.append(words, np.uint64(0)))]
    assert len({tuple(each) for each in seen}) == len(seen)
