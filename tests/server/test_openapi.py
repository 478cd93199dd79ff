"""The HTTP API is what its description says, asked by schemathesis with what fits the description and what does not."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.server.helpers import Server

pytest.importorskip("schemathesis", reason="needs schemathesis of requirements/dev.in")


def test_the_api_is_as_it_is_described(tmp_path: Path) -> None:
    below = json.dumps({"type": "fs", "base_path": str(tmp_path / "kv")})
    with Server(tmp_path, "--l2-adapter", below) as server:
        done = subprocess.run(
            [
                sys.executable, "-m", "schemathesis.cli", "run", f"{server.url}/openapi.json", "--seed", "1",
                "--max-examples", "30", "--phases", "coverage,fuzzing", "--no-color",
            ],
            cwd=tmp_path, capture_output=True, text=True, timeout=240, check=False,
        )  # fmt: skip
        assert server.state()[0] == []
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert "16/16" in done.stdout, "all that is described was asked"
