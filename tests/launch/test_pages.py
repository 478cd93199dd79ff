"""The three pages of the quick start, as a new user would follow them: their own commands, on their own ports.

PAGES=1 runs it, from a clone whose ports 8000, 8081, 8082 and 6379 are free; five minutes and more.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.launch.processes import heed_sigint
from tests.launch.script import ROOT, START_S, STOP_S

pytestmark = [
    pytest.mark.engine,
    pytest.mark.timeout(3600),
    pytest.mark.skipif(not os.environ.get("PAGES"), reason="takes minutes and fixed ports; PAGES=1 runs it"),
]


def blocks(page: str) -> list[str]:
    """The shell commands of a page, block by block."""
    return re.findall(r"^```bash\n(.*?)^```$", (ROOT / "docs" / page).read_text(), re.MULTILINE | re.DOTALL)


def said(command: str, seconds: float = 300) -> str:
    """What a command prints, which ends well."""
    done = subprocess.run(
        ["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, timeout=seconds, check=False
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
    return done.stdout


class Terminal:
    """A terminal in which something runs until Ctrl-C."""

    def __init__(self, folder: Path, command: str) -> None:
        self._log = folder / f"terminal-{time.monotonic_ns()}.log"
        keep = {k: v for k, v in os.environ.items() if not k.startswith(("LMCACHE_", "DYN_", "VLLM_", "HF_", "MODEL"))}
        with self._log.open("w") as out:
            self.process = subprocess.Popen(
                ["bash", "-c", f"exec env {command}" if "=" in command.split()[0] else f"exec {command}"],
                cwd=ROOT, env=keep, stdout=out, stderr=subprocess.STDOUT, preexec_fn=heed_sigint,
            )  # fmt: skip

    @property
    def output(self) -> str:
        return self._log.read_text()

    def wait(self, words: str) -> None:
        """Until it says so."""
        deadline = time.monotonic() + START_S
        while words not in self.output:
            assert self.process.poll() is None and time.monotonic() < deadline, self.output
            time.sleep(0.5)

    def curl(self) -> dict[str, Any]:
        """The answer to the line that it printed."""
        command = re.search(r"^curl .*", self.output, re.MULTILINE)
        assert command, self.output
        return dict(json.loads(said(command[0])))

    def stop(self) -> None:
        """Ctrl-C."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
        self.process.wait(STOP_S)


@contextlib.contextmanager
def terminal(folder: Path, command: str, ready: str = "Ctrl-C stops it") -> Iterator[Terminal]:
    """That command, from when it is ready to the end of the with block."""
    made = Terminal(folder, command)
    try:
        made.wait(ready)
        yield made
    finally:
        made.stop()


def cached(answer: dict[str, Any]) -> int:
    details = answer["usage"].get("prompt_tokens_details") or {}
    return int(details.get("cached_tokens") or 0)


def text(answer: dict[str, Any]) -> str:
    return str(answer["choices"][0]["text"])


def twice(served: Terminal) -> None:
    first, second = served.curl(), served.curl()
    assert cached(first) == 0 and cached(second) == 512 and text(first) == text(second)


def test_the_first_page(tmp_path: Path) -> None:
    serve, ask = blocks("quickstart.md")
    with terminal(tmp_path, serve) as served:
        twice(served)
        report, top = (line.split("#")[0] for line in ask.splitlines())
        assert "prompt tokens, of which" in said(report)
        assert "requests/s" in said(f"timeout -s INT 5 {top} || [ $? = 124 ]")


def test_the_second_page(tmp_path: Path) -> None:
    redis, serve, report, look = blocks("quickstart-redis.md")
    with terminal(tmp_path, redis, "Ready to accept connections"):
        with terminal(tmp_path, serve) as served:
            first = served.curl()
            assert cached(first) == 0
            time.sleep(3)
        with terminal(tmp_path, serve) as served:
            second = served.curl()
            assert cached(second) >= 256 and text(second) == text(first)
            assert re.search(r"remote: .*tokens came from it", said(report))
            assert cached(served.curl()) == 512
        for line in look.splitlines():
            said(line, 600)


def test_the_third_page(tmp_path: Path) -> None:
    serve, report, shared = blocks("quickstart-disagg.md")
    redis, *_ = blocks("quickstart-redis.md")
    with terminal(tmp_path, serve) as served:
        twice(served)
        assert "prompt tokens, of which" in said(report)
    with terminal(tmp_path, redis, "Ready to accept connections"):
        for restarted in (False, True):
            with terminal(tmp_path, shared) as served:
                answer = served.curl()
                assert (cached(answer) > 0) is restarted
                time.sleep(3)
