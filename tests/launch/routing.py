"""Requests through a frontend with a KV router, and what its log says of them; processes beside those of a script."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import signal
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ANSWER_S = 60
TOKENS, BLOCK = 512, 32
BLOCKS = TOKENS // BLOCK


def get(url: str) -> Any:
    with _open(url, ANSWER_S) as answer:
        return json.load(answer)


def post(url: str, body: Any, seconds: float = ANSWER_S) -> dict[str, Any]:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with _open(request, seconds) as answer:
        return dict(json.load(answer))


def _open(request: Any, seconds: float) -> Any:
    return urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=seconds)


def prompt(seed: int) -> str:
    """A text of `TOKENS` tokens, one a character, that no other seed has, and one more."""
    rng = random.Random(seed)
    return "".join(rng.choice("abcdefghijklmnopqrstuvwxyz ") for _ in range(TOKENS)) + "?"


@dataclass(frozen=True)
class Answer:
    """Who answered, the text, and how much of the prompt was not computed."""

    worker: int
    text: str
    cached: int
    sources: dict[str, int] | None  # tokens of the prompt, by where their KV came from


@dataclass
class Frontend:
    """A frontend on loopback."""

    port: int
    log: Path

    def ask(self, text: str, worker: int | None = None, seconds: float = ANSWER_S) -> Answer:
        """`worker`: past the router, to that one."""
        hints: dict[str, Any] = {"extra_fields": ["worker_id", "engine_data"]}
        if worker is not None:
            hints["backend_instance_id"] = worker
        body = {"model": "demo", "prompt": text, "max_tokens": 2, "temperature": 0, "nvext": hints}
        answer = post(f"http://127.0.0.1:{self.port}/v1/completions", body, seconds)
        found = answer["nvext"]["worker_id"]
        cached = answer["usage"]["prompt_tokens_details"]["cached_tokens"]
        sources = answer["nvext"].get("engine_data", {}).get("prompt_tokens_from")
        return Answer(found["decode_worker_id"], answer["choices"][0]["text"], cached, sources)

    def insist(self, text: str, deadline: float) -> Answer:
        """Ask until there is an answer; until then the only excuses are a refused connection and 404, 500 or 503."""
        while True:
            try:
                return self.ask(text)
            except urllib.error.HTTPError as error:
                assert error.code in (404, 500, 503), error
            except urllib.error.URLError as error:
                assert isinstance(error.reason, ConnectionError), error
            assert time.monotonic() < deadline, self.log.read_text()[-4000:]
            time.sleep(0.2)

    def seen(self, where: str = "host_pinned_blocks") -> list[int]:
        """For each routed request so far, in blocks: what the router saw in the chosen worker's host memory beyond
        what it saw on its GPU; or beyond both, in `disk_blocks`."""
        lines = [line for line in self.log.read_text().splitlines() if "Selected worker" in line]
        plain = [re.sub(r"\x1b\[[0-9;]*m", "", line) for line in lines]
        return [int(re.search(rf"{where}=(\d+)", line)[1]) for line in plain]  # type: ignore[index]


@contextlib.contextmanager
def running(command: list[str], env: Mapping[str, str], folder: Path, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process in a group of its own, killed at the end."""
    with log.open("w") as output:
        process = subprocess.Popen(
            command, env=dict(env), cwd=folder, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(30)


def until(condition: Callable[[], Any], seconds: float, what: str) -> Any:
    """Its first true value."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, f"not within {seconds:.0f} s: {what}"
        time.sleep(0.2)
    return value
