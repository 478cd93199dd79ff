"""A disk tier makes hundreds of folders: where they lie, and who removes them."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lmcache_ext.tiers import Runner, open_tier

MEMORY = Path("/dev/shm")


@pytest.fixture
def tmp_path(tmp_path: Path) -> Iterator[Path]:
    """As pytest's, but removed by the test: pytest would do it some runs later, and keep somebody else waiting."""
    yield tmp_path
    shutil.rmtree(tmp_path, ignore_errors=True)


@pytest.fixture
def quick_path() -> Iterator[Path]:
    """A folder in memory if there is such a place: the contract opens a hundred tiers. test_disk has real disks."""
    with tempfile.TemporaryDirectory(dir=MEMORY if os.access(MEMORY, os.W_OK) else None) as folder:
        yield Path(folder)


@pytest.fixture
def opened(request: pytest.FixtureRequest) -> Iterator[Callable[..., Runner]]:
    """Opens tiers that close with the test, and come back soon after faults. A module's `OPENED` are its options."""
    made: list[Runner] = []
    usual = {"lookup_timeout": 5.0, "cooldown": 0.05, "cooldown_max": 0.2, **getattr(request.module, "OPENED", {})}

    def one(url: str, **options: Any) -> Runner:
        tier = open_tier(url, **{**usual, **options})
        assert isinstance(tier, Runner)
        made.append(tier)
        return tier

    yield one
    for tier in made:
        assert tier.close(10)
