"""A disk tier makes hundreds of folders: where they lie, and who removes them."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

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
