"""Prefill and decode apart, with files and TCP; then one of them is killed while requests are under way: each of those
ends soon, with the right answer or an error; what is left of the worker goes away; the other serves on and gets its
memory back; and once the worker is started again, all is as before.

KILL_ROUNDS (default 2) and KILL_SEED (default 1) say how many kills, and which moments.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import sys
import threading
import time
import urllib.error
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.launch.processes import running_with
from tests.launch.routing import Frontend, post, running, until
from tests.launch.script import ROOT, START_S, STOP_S, Script, serving
from tests.launch.test_disagg import prove

sys.path.insert(0, str(ROOT / "launch" / "demo_model"))
import recall

ROUNDS, SEED = int(os.environ.get("KILL_ROUNDS", "2")), int(os.environ.get("KILL_SEED", "1"))
pytestmark = [pytest.mark.engine, pytest.mark.timeout((ROUNDS + 1) * START_S + STOP_S + 120)]

IN_FLIGHT, TOKENS = 8, 512  # two of them given up by their clients
ANSWER_S = 90  # within which a request ends, whatever happens to its workers
GONE_S = 40  # for what is left of a killed worker
BACK_S = 90  # for blocks that prefill held for a decode worker that died: NIXL's lease is 30 s
DECODE, PREFILL = 0, 1
PARTS = ("worker", "engine", "group")  # the worker's own process, its engine's, or all of them


@dataclass
class Call:
    """One request and what came of it."""

    query: recall.Query
    patience: float = 2 * ANSWER_S  # after which the client goes away
    text: str = ""
    error: str = ""
    seconds: float = 0.0

    def make(self, port: int) -> None:
        body = {"model": "demo", "prompt": self.query.prompt, "max_tokens": 3, "temperature": 0}
        began = time.monotonic()
        try:
            self.text = post(f"http://127.0.0.1:{port}/v1/completions", body, self.patience)["choices"][0]["text"]
        except urllib.error.HTTPError as error:
            self.error = f"{error.code} {error.read()[:300]!r}"
        except OSError as error:
            self.error = repr(error)
        self.seconds = time.monotonic() - began

    @property
    def right(self) -> bool:
        return not self.error and self.text == self.query.expected


@dataclass
class Deployment:
    """The script's processes; a killed worker is started again beside them."""

    script: Script
    rng: random.Random
    stack: contextlib.ExitStack
    roots: dict[int, psutil.Process] = field(default_factory=dict)
    starts: int = 0

    def __post_init__(self) -> None:
        self.frontend = Frontend(self.script.http_port, self.script.folder / "frontend.log")
        for child in psutil.Process(self.script.process.pid).children():
            port = child.environ().get("DYN_SYSTEM_PORT") if "dynamo_lmcache.vllm" in child.cmdline() else None
            if port:
                self.roots[int(port) - self.script.system_port] = child
        self.script.process.send_signal(signal.SIGSTOP)  # else it ends all when one ends

    def calls(self, known: list[recall.Query], usual: float) -> list[Call]:
        """Half of them on contexts that the cache holds, half on new ones; one of each is given up."""
        old = self.rng.sample(known, IN_FLIGHT // 2)
        calls = [Call(query) for query in [*old, *questions(self.rng, IN_FLIGHT - len(old))]]
        calls[0].patience, calls[-1].patience = (self.rng.uniform(0.05, usual) for _ in range(2))
        return calls

    def kill(self, which: int, part: str) -> list[psutil.Process]:
        """Returns the processes that have to go."""
        root = self.roots[which]
        below = root.children(recursive=True)
        engine = next(each for each in below if "EngineCore" in " ".join(each.cmdline()) or "EngineCore" in each.name())
        if part == "group":
            os.killpg(root.pid, signal.SIGKILL)
        else:
            (root if part == "worker" else engine).send_signal(signal.SIGKILL)
        return [root, *below]

    def restart(self, which: int, root: tuple[list[str], dict[str, str], str]) -> None:
        self.starts += 1
        command, env, folder = root
        log = self.script.folder / f"again{self.starts}.log"
        process = self.stack.enter_context(running(command, env, Path(folder), log))
        until(lambda: process.poll() is not None or "serving demo at" in log.read_text(), START_S, "it serves again")
        assert process.poll() is None, log.read_text()[-3000:]
        self.roots[which] = psutil.Process(process.pid)

    def idle(self, which: int) -> list[str]:
        """What this worker still holds for requests that are over."""
        names = ["vllm:kv_cache_usage_perc", "vllm:num_requests_running", "vllm:num_requests_waiting"]
        names += ["lmcache:pinned_memory_objs_count", "lmcache:pinned_gpu_blocks"] if which == PREFILL else []
        values = {name: self.script.metric(which, name) for name in names}
        return [f"{name} {value}" for name, value in values.items() if value]


def questions(rng: random.Random, count: int) -> list[recall.Query]:
    return [recall.queries(recall.make_context(rng, TOKENS), rng, 1)[0] for _ in range(count)]


def running_still(processes: list[psutil.Process]) -> list[psutil.Process]:
    """Zombies are over: the script is stopped and can't reap them."""
    found = []
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            if process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Script]:
    flags = ["--enforce-eager", "--no-warmup", "--no-enable-prefix-caching"]
    with serving(tmp_path_factory.mktemp("disagg"), "disagg_lmcache.sh", *flags) as made:
        yield made


@pytest.fixture
def deployment(script: Script) -> Iterator[Deployment]:
    with contextlib.ExitStack() as stack:
        try:
            yield Deployment(script, random.Random(SEED), stack)
        finally:
            script.process.send_signal(signal.SIGCONT)


def together(deployment: Deployment, calls: list[Call], after: Any = None) -> None:
    """Make the calls at once; `after` runs while they are under way."""
    threads = [threading.Thread(target=call.make, args=(deployment.script.http_port,)) for call in calls]
    for thread in threads:
        thread.start()
    if after is not None:
        after()
    for thread in threads:
        thread.join(2 * ANSWER_S + 10)
    assert not any(thread.is_alive() for thread in threads)


def insist(deployment: Deployment, queries: list[recall.Query]) -> None:
    """Ask again until each is answered right. An error is excused, a wrong answer never."""
    deadline = time.monotonic() + ANSWER_S
    while queries:
        calls = [Call(query) for query in queries]
        together(deployment, calls)
        assert all(call.error or call.right for call in calls), calls
        queries = [call.query for call in calls if call.error]
        assert not queries or time.monotonic() < deadline, calls
        time.sleep(0.3)


def test_files_and_tcp(script: Script) -> None:
    prove(script, decode=DECODE, prefill=[PREFILL])
    assert script.listeners() == set()
    assert script.cpu_share(4.0) < 0.5, "an idle NIXL agent must not burn a core"


@pytest.mark.parametrize(
    ("wrong", "status"), [({"prompt": "a" * 5000}, 400), ({"prompt": ""}, 400), ({"model": "nobody"}, 404)]
)
def test_bad_requests_get_openai_errors(script: Script, wrong: dict[str, str], status: int) -> None:
    body = {"model": "demo", "prompt": "a", "max_tokens": 1, **wrong}
    with pytest.raises(urllib.error.HTTPError) as caught:
        post(f"http://127.0.0.1:{script.http_port}/v1/completions", body)
    with caught.value as error:
        assert error.code == status and json.loads(error.read())["message"]


def test_killed_workers(deployment: Deployment) -> None:
    rng = deployment.rng
    known = questions(rng, 6)
    insist(deployment, known)
    began = time.monotonic()
    insist(deployment, known)
    usual = time.monotonic() - began
    for round_ in range(ROUNDS):
        which, part = (PREFILL, DECODE)[round_ % 2], rng.choice(PARTS)
        moment = rng.uniform(0.0, usual)
        root = deployment.roots[which]
        start = root.cmdline(), root.environ(), root.cwd()
        calls = deployment.calls(known, usual)
        left: list[psutil.Process] = []

        def strike(moment: float = moment, which: int = which, part: str = part, left: Any = left) -> None:
            time.sleep(moment)
            left += deployment.kill(which, part)

        together(deployment, calls, strike)
        outcome = [call.error[:60] or f"right in {call.seconds:.1f} s" for call in calls]
        print(f"round {round_}: {part} of {('decode', 'prefill')[which]} killed after {moment:.2f} s: {outcome}")
        assert all(call.error or call.right for call in calls), calls
        assert all(call.seconds < ANSWER_S for call in calls), calls
        until(lambda left=left: not running_still(left), GONE_S, f"the end of {left}")
        survivor = 1 - which
        meanwhile = [Call(call.query) for call in calls[:2]]  # with half of a deployment gone, Dynamo says 503
        together(deployment, meanwhile)
        assert all((call.error or call.right) and call.seconds < ANSWER_S for call in meanwhile), meanwhile
        until(lambda survivor=survivor: not deployment.idle(survivor), BACK_S, f"{deployment.idle(survivor)} held")
        if round_ == ROUNDS - 1 > 0:
            break  # that one comes back was shown
        deployment.restart(which, start)
        insist(deployment, [call.query for call in calls])
        for worker in (DECODE, PREFILL):
            until(lambda worker=worker: not deployment.idle(worker), BACK_S, f"{deployment.idle(worker)} held")
    deployment.script.process.send_signal(signal.SIGCONT)
    assert deployment.script.process.wait(STOP_S) == 1
    deployment.stack.close()
    assert not running_with(deployment.script.marker)
