"""Prefill and decode apart under vLLM's real Scheduler: see pd_scenarios.py."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("nixl", reason="nixl is not installed")

from tests.integration.pd_scenarios import ALL

ROOT = Path(__file__).parents[2]
_RUN_SECONDS = 240


@pytest.fixture(scope="module")
def done() -> subprocess.CompletedProcess[str]:
    """All of them, in a process of their own: NIXL's crashes when it ends, docs/pd.md says why."""
    return subprocess.run(
        [sys.executable, "-m", "tests.integration.pd_scenarios"],
        cwd=ROOT, capture_output=True, text=True, timeout=_RUN_SECONDS, check=False,
    )  # fmt: skip


@pytest.mark.timeout(_RUN_SECONDS + 30)
@pytest.mark.parametrize("name", ALL)
def test_scenario(name: str, done: subprocess.CompletedProcess[str]) -> None:
    verdicts = {words[1]: words[2] for line in done.stdout.splitlines() if (words := line.split())[:1] == ["scenario"]}
    assert verdicts.get(name) == "ok", done.stderr[-6000:]
