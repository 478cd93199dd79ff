"""The entry point: exit statuses and the message of a bad setting."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("argv", "variables", "message"),
    [
        ([], {"ENABLE_LMCACHE": "perhaps"}, "ENABLE_LMCACHE='perhaps'"),
        ([], {"DYN_SYSTEM_PORT": "40000"}, "DYN_SYSTEM_PORT='40000'"),
        (["--connector", "lmcache"], {}, "set ENABLE_LMCACHE=1"),
        ([], {"ENABLE_LMCACHE": "1", "LMCACHE_CONFIG_FILE": "/nowhere.yaml"}, "LMCACHE_CONFIG_FILE"),
    ],
)
def test_a_bad_setting_ends_with_2_and_one_line(argv: list[str], variables: dict[str, str], message: str) -> None:
    plain = {name: value for name, value in os.environ.items() if not name.startswith(("DYN_", "LMCACHE_", "ENABLE_"))}
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    model = str(ROOT / "launch" / "demo_model")
    done = subprocess.run(
        [sys.executable, "-m", "dynamo_lmcache.vllm", "--model", model, *argv],
        env={**plain, "PYTHONPATH": paths, "HF_HUB_OFFLINE": "1", **variables},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 2, done.stderr[-2000:]
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("dynamo_lmcache.vllm: ") and message in last
