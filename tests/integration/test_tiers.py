"""Tiers below host memory under vLLM's real Scheduler: see tier_scenarios.py and ahead_scenarios.py."""

from __future__ import annotations

import pytest

from tests.integration import ahead_scenarios, tier_scenarios

ALL = {**tier_scenarios.ALL, **ahead_scenarios.ALL}


@pytest.mark.parametrize("name", ALL)
def test_scenario(name: str) -> None:
    ALL[name]()
