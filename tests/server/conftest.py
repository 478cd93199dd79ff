"""Two servers for all tests of this folder: starting one takes a second or two."""

from __future__ import annotations

import json

import pytest

from tests.server.helpers import Server, clean


@pytest.fixture(scope="session")
def _plain(tmp_path_factory):
    with Server(tmp_path_factory.mktemp("plain"), "--silence-seconds", "1") as running:
        yield running
        assert running.status()["errors"].get("internal", 0) == 0
        assert running.stop() == 0


@pytest.fixture(scope="session")
def _tiered(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiered")
    adapter = json.dumps({"type": "fs", "base_path": str(folder / "kv"), "max_capacity_gb": 1})
    with Server(folder, "--l2-adapter", adapter, "--instance-id", "one") as running:
        yield running
        assert running.status()["errors"].get("internal", 0) == 0
        assert running.stop() == 0


@pytest.fixture
def server(_plain):
    """Host memory only; without clients and chunks."""
    return clean(_plain)


@pytest.fixture
def tiered(_tiered):
    """With a folder below host memory; without clients and chunks."""
    return clean(_tiered)
