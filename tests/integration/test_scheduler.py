"""The connector under vLLM's real Scheduler, in whatever version is installed: see scenarios.py."""

from __future__ import annotations

import pytest

from tests.integration.scenarios import ALL


@pytest.mark.parametrize("name", ALL)
def test_scenario(name: str) -> None:
    ALL[name]()
