"""Two workers behind Dynamo's KV router: a request goes to the one that holds its prefix, also only in host memory."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from lmcache_ext.ports import free_port
from tests.launch.processes import running_with
from tests.launch.routing import BLOCKS, TOKENS, Frontend, get, post, prompt, running, until
from tests.launch.script import START_S, STOP_S, Script, serving

pytestmark = [pytest.mark.engine, pytest.mark.timeout(2 * START_S + STOP_S + 120)]

HITS, EVICTED = "lmcache:num_hit_tokens_total", "lmcache:local_cpu_evict_keys_count_total"
POOL_GB, CHUNKS = "0.006", 98  # of 64 tokens
FORGET_S = 30  # files tell of a dead worker after 10 s
SETTLE_S = 2  # from an engine's step to the router's index


class Deployment:
    """A script's two workers and its frontend."""

    def __init__(self, script: Script) -> None:
        self.script = script
        self.frontend = Frontend(script.http_port, script.folder / "frontend.log")
        self._seed = 1000

    def clear(self, **what: bool) -> None:
        """Empty the GPU caches of both workers, and with reset_connector=True ours, too."""
        for worker in (0, 1):
            url = f"http://127.0.0.1:{self.script.system_port + worker}/engine/control/clear_kv_blocks"
            assert post(url, what)["status"] == "success"

    def fill(self, worker: int, prompts: int = 1) -> None:
        """New prompts for one worker; also a step, with which what it has to announce travels."""
        for _ in range(prompts):
            self._seed += 1
            assert self.frontend.ask(prompt(self._seed), worker).worker == worker

    def told(self, workers: set[int], prompts: int = 1) -> None:
        """After which the router has heard all of these workers' news."""
        for worker in workers:
            self.fill(worker, prompts)
        time.sleep(SETTLE_S)

    def total(self, name: str) -> float:
        return sum(self.script.metric(worker, name) for worker in (0, 1))


@contextmanager
def another_frontend(script: Script) -> Iterator[Frontend]:
    """One that comes when the workers have served for a while, as a restarted one does."""
    first = _child(script, "dynamo_lmcache.frontend")
    port, log = free_port(), script.folder / "frontend2.log"
    command = [str(port) if word == str(script.http_port) else word for word in first.cmdline()]
    with running(command, first.environ(), Path(first.cwd()), log) as process:
        late = Frontend(port, log)
        until(lambda: process.poll() is None and _lists(port), 60, "a second frontend")
        yield late


def _lists(port: int) -> bool:
    try:
        return bool(get(f"http://127.0.0.1:{port}/v1/models")["data"])
    except OSError:
        return False


def _child(script: Script, *words: str) -> psutil.Process:
    """The script's child that has these in its command line or environment."""
    children = psutil.Process(script.process.pid).children()
    (found,) = [
        child for child in children if set(words) <= {*child.cmdline(), *map("=".join, child.environ().items())}
    ]
    return found


def test_the_router_knows_what_host_memory_holds(tmp_path: Path) -> None:
    env = {"LMCACHE_CHUNK_SIZE": "64", "LMCACHE_MAX_LOCAL_CPU_SIZE": POOL_GB}
    with serving(tmp_path, "agg_router.sh", "--no-warmup", "--enforce-eager", **env) as script:
        both = Deployment(script)
        assert script.metric(0, "lmcache:local_cpu_capacity_count") == CHUNKS
        texts = [prompt(seed) for seed in range(6)]
        homes = [both.frontend.ask(text).worker for text in texts]
        assert len(set(homes)) == 2, "both workers should hold something"

        routed_by_host_memory(both, both.frontend, texts, homes)
        with another_frontend(script) as late:
            routed_by_host_memory(both, late, texts, homes)
            evicted(both, late, texts, homes)
        forgotten_on_request(both, texts, homes)
        a_worker_that_crashed_comes_back_empty(both)


def routed_by_host_memory(both: Deployment, frontend: Frontend, texts: list[str], homes: list[int]) -> None:
    both.clear()
    both.told(set(homes))
    hits = both.total(HITS)
    again = [frontend.ask(text) for text in texts]
    assert [(answer.worker, answer.cached) for answer in again] == [(home, TOKENS) for home in homes]
    assert frontend.seen()[-6:] == [BLOCKS] * 6
    assert both.total(HITS) - hits == 6 * TOKENS
    assert again[0].sources == {"gpu_cache": 0, "host_memory": TOKENS, "computed": 1}


def evicted(both: Deployment, late: Frontend, texts: list[str], homes: list[int]) -> None:
    """Other prompts push the texts out of host memory: both routers hear it."""
    both.clear()
    both.told(set(homes), CHUNKS * 64 // TOKENS + 1)
    assert both.total(EVICTED) >= 6 * TOKENS // 64
    answers = [*map(both.frontend.ask, texts[:3]), *map(late.ask, texts[3:])]
    assert [answer.cached for answer in answers] == [0] * 6
    assert both.frontend.seen()[-3:] == late.seen()[-3:] == [0] * 3


def forgotten_on_request(both: Deployment, texts: list[str], homes: list[int]) -> None:
    both.clear(reset_connector=True)
    both.told(set(homes))
    assert [both.frontend.ask(text).cached for text in texts] == [0] * 6
    assert both.frontend.seen()[-6:] == [0] * 6


def a_worker_that_crashed_comes_back_empty(both: Deployment) -> None:
    script, frontend = both.script, both.frontend
    worker = _child(script, f"DYN_SYSTEM_PORT={script.system_port + 1}")
    command, env, folder = worker.cmdline(), worker.environ(), Path(worker.cwd())
    text = prompt(100)
    survivor, dead = _who_is_who(both, worker)
    frontend.ask(text, dead)
    both.clear()
    both.told({dead})
    assert frontend.ask(text).worker == dead and frontend.seen()[-1] == BLOCKS

    script.process.send_signal(signal.SIGSTOP)  # it would end the others
    os.killpg(worker.pid, signal.SIGKILL)
    deadline = time.monotonic() + FORGET_S
    assert {frontend.insist(prompt(seed), deadline).worker for seed in range(200, 206)} == {survivor}
    log = script.folder / "worker1-again.log"
    with running(command, env, folder, log):
        until(lambda: "serving demo at" in log.read_text(), START_S, "the worker serves again")
        new = until(lambda: _workers(frontend) - {survivor, dead}, FORGET_S, "the new instance in discovery").pop()
        answer = frontend.ask(text)
        assert answer.worker != dead and (answer.cached, frontend.seen()[-1]) == (0, 0)

        text = prompt(101)
        frontend.ask(text, new)
        both.clear()
        both.told({new})
        answer = frontend.ask(text)
        assert (answer.worker, answer.cached, frontend.seen()[-1]) == (new, TOKENS, BLOCKS)
    script.process.send_signal(signal.SIGCONT)
    assert script.process.wait(STOP_S) == 1 and "worker1 ended by itself" in script.output
    assert not running_with(script.marker)


def _workers(frontend: Frontend) -> set[int]:
    """Instances that the frontend can reach."""
    found = get(f"http://127.0.0.1:{frontend.port}/health")["instances"]
    return {entry["instance_id"] for entry in found if entry["endpoint"] == "generate"}


def _who_is_who(both: Deployment, second: psutil.Process) -> tuple[int, int]:
    """(instance of worker0, of worker1): their logs say which instance they serve."""
    log = both.script.log("worker0")
    first, other = sorted(_workers(both.frontend), key=lambda worker: str(worker) not in log)
    assert str(first) in log and str(other) not in log
    return first, other
