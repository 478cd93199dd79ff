"""README's first command, for real: it serves, its curl works, its second call hits, Ctrl-C leaves nothing behind."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.launch.processes import free_port, heed_sigint, running_with

ROOT = Path(__file__).resolve().parents[2]
START_S = 600  # alone it takes 100 s; vLLM compiles, and a busy machine compiles slowly
STOP_S = 90


def read_until(process: subprocess.Popen[str], log: Path, line: str) -> str:
    deadline = time.monotonic() + START_S
    while line not in log.read_text():
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.5)
    return log.read_text()


@pytest.fixture
def served(tmp_path):
    """The script's output once it is ready, and its process."""
    keep = {k: v for k, v in os.environ.items() if not k.startswith(("LMCACHE_", "DYN_", "VLLM_", "HF_", "MODEL"))}
    env = {**keep, "VENV": sys.prefix, "SKIP_SETUP": "1", "DEVICE": "cpu", "LOG_DIR": str(tmp_path)}
    env |= {"HTTP_PORT": str(free_port()), "DYN_SYSTEM_PORT": str(free_port()), "TEST_MARKER": str(tmp_path)}
    log = tmp_path / "script.log"
    with log.open("w") as output:
        process = subprocess.Popen(
            # Without vLLM's own prefix cache, a hit can only be ours.
            [ROOT / "launch" / "agg_lmcache.sh", "--no-enable-prefix-caching"],
            env=env,
            cwd=ROOT / "backends",
            stdout=output,
            stderr=subprocess.STDOUT,
            preexec_fn=heed_sigint,
        )
    try:
        yield process, read_until(process, log, "Ctrl-C stops it")
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait(STOP_S)


@pytest.mark.engine
@pytest.mark.timeout(START_S + STOP_S + 60)
def test_it_serves_hits_and_stops(served, tmp_path):
    process, output = served
    command = re.search(r"^curl .*", output, re.MULTILINE)
    promised = re.search(r'cached_tokens should be (\d+), and the text of both "(\w+)"', output)
    assert command and promised, output
    answers = []
    for _ in range(2):
        done = subprocess.run(["bash", "-c", command[0]], capture_output=True, text=True, timeout=60, check=True)
        answers.append(json.loads(done.stdout))
    cached = [answer["usage"]["prompt_tokens_details"]["cached_tokens"] for answer in answers]
    assert cached == [0, int(promised[1])]
    assert [answer["choices"][0]["text"] for answer in answers] == [promised[2]] * 2
    assert running_with(f"TEST_MARKER={tmp_path}")
    process.send_signal(signal.SIGINT)
    assert process.wait(STOP_S) == 130
    assert not running_with(f"TEST_MARKER={tmp_path}")
