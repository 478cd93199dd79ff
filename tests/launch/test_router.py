"""Two workers behind Dynamo's KV router: a request goes to the one that holds its prefix, also only in host memory."""

from __future__ import annotations

import json
import random
import re
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from tests.launch.script import START_S, STOP_S, Script, serving

pytestmark = [pytest.mark.engine, pytest.mark.timeout(START_S + STOP_S + 120)]

HITS = "lmcache:num_hit_tokens_total"
TOKENS, BLOCK = 512, 32


def post(url: str, body: Any) -> dict[str, Any]:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(request, timeout=60) as answer:
        return dict(json.load(answer))


def prompt(seed: int) -> str:
    """A text of `TOKENS` tokens, one a character, that no other seed has, and one more."""
    rng = random.Random(seed)
    return "".join(rng.choice("abcdefghijklmnopqrstuvwxyz ") for _ in range(TOKENS)) + "?"


def ask(script: Script, text: str, worker: int | None = None) -> tuple[int, int]:
    """(the worker that answered, tokens that it did not compute). `worker`: past the router, to that one."""
    hints: dict[str, Any] = {"extra_fields": ["worker_id"]}
    if worker is not None:
        hints["backend_instance_id"] = worker
    body = {"model": "demo", "prompt": text, "max_tokens": 2, "temperature": 0, "nvext": hints}
    answer = post(f"http://127.0.0.1:{script.http_port}/v1/completions", body)
    found = re.search(r'worker_id": ?(\d+)', json.dumps(answer["nvext"]))
    assert found, answer
    return int(found[1]), answer["usage"]["prompt_tokens_details"]["cached_tokens"]


def seen_in_host_memory(script: Script) -> list[int]:
    """For each request so far, in blocks: how much of its prefix the router saw in the chosen worker's host memory."""
    lines = [line for line in script.log("frontend").splitlines() if "Selected worker" in line]
    plain = [re.sub(r"\x1b\[[0-9;]*m", "", line) for line in lines]
    return [int(re.search(r"host_pinned_blocks=(\d+)", line)[1]) for line in plain]  # type: ignore[index]


def clear(script: Script, **what: bool) -> None:
    """Empty the GPU caches of both workers, and with reset_connector=True ours, too."""
    for worker in (0, 1):
        url = f"http://127.0.0.1:{script.system_port + worker}/engine/control/clear_kv_blocks"
        assert post(url, what)["status"] == "success"


def tell(script: Script, homes: list[int], seed: int) -> None:
    """A step on each worker: what it has to announce travels with one."""
    for i, worker in enumerate(sorted(set(homes))):
        assert ask(script, prompt(seed + i), worker)[0] == worker
    time.sleep(1)


def test_the_router_knows_what_host_memory_holds(tmp_path: Path) -> None:
    with serving(tmp_path, "agg_router.sh", "--no-warmup", "--enforce-eager", LMCACHE_CHUNK_SIZE="64") as script:
        texts = [prompt(seed) for seed in range(6)]
        first = [ask(script, text) for text in texts]
        assert [cached for _, cached in first] == [0] * 6
        homes = [worker for worker, _ in first]
        assert len(set(homes)) == 2, "both workers should hold something"

        clear(script)
        tell(script, homes, 100)
        hits = sum(script.metric(worker, HITS) for worker in (0, 1))
        again = [ask(script, text) for text in texts]
        assert again == [(home, TOKENS) for home in homes]
        assert seen_in_host_memory(script)[-6:] == [TOKENS // BLOCK] * 6
        assert sum(script.metric(worker, HITS) for worker in (0, 1)) - hits == 6 * TOKENS

        clear(script, reset_connector=True)
        tell(script, homes, 200)
        assert [cached for _, cached in (ask(script, text) for text in texts)] == [0] * 6
        assert seen_in_host_memory(script)[-6:] == [0] * 6
        script.interrupt()
