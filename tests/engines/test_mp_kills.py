"""Prefill and decode through a shared cache server, and SIGKILL to one of its processes with requests in flight.

MP_KILLS=10 kills ten times, any of the processes, and Mooncake's master, which then is below the server's memory;
otherwise only those die that start again in a second or two.
"""

from __future__ import annotations

import json
import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lmcache_ext.ports import free_port
from tests.engines import apart, engines
from tests.engines.apart import FLAGS, Served
from tests.engines.pd_kills import proper, questions
from tests.tiers.mooncake_server import Master

pytestmark = [pytest.mark.engine, pytest.mark.timeout(1800)]

KILLS = int(os.environ.get("MP_KILLS", "0"))
ANSWER_S = 30.0


class Set:
    """Cache server, prefiller, decoder and proxy, each of which can be started anew on its ports."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._server, self._http, self._telemetry, *ports = (free_port() for _ in range(6))
        self.master = Master() if KILLS else None
        prefill, decode, proxy = ports
        self._start: dict[str, Callable[[], Served]] = {
            "server": self._serve,
            "prefiller": lambda: self._engine("prefiller", prefill, "0"),
            "decoder": lambda: self._engine("decoder", decode, "1"),
            "proxy": lambda: self._proxy(prefill, decode, proxy),
        }
        self.of: dict[str, Served] = {}
        for name in self._start:
            self.of[name] = self._start[name]()
        self.ready()

    def _serve(self) -> Served:
        command = ["lmcache_ext.cli.main", "server", "--host", "127.0.0.1", "--port", str(self._server)]
        command += ["--http-port", str(self._http), "--l1-size-gb", "0.25", "--chunk-size", "64"]
        below: dict[str, Any] = {"type": "fs", "base_path": str(self._folder / "kv")}
        if self.master is not None:
            below = {"type": "mooncake_store", **self.master.settings(128)}
        command += ["--l2-adapter", json.dumps(below)]
        return apart.start(self._folder, "server", self._http, command, {})

    def _engine(self, name: str, port: int, core: str) -> Served:
        transfer = {
            "kv_connector": "LMCacheMPConnector", "kv_role": "kv_both",
            "kv_connector_extra_config": {"lmcache.mp.host": "tcp://127.0.0.1", "lmcache.mp.port": self._server},
        }  # fmt: skip
        command = ["vllm.entrypoints.openai.api_server", "--model", str(engines.MODEL), *FLAGS, "--host"]
        command += ["127.0.0.1", "--port", str(port), "--no-enable-prefix-caching", "--enable-prompt-tokens-details"]
        env = {"VLLM_CPU_OMP_THREADS_BIND": core, "PYTHONHASHSEED": "0"}
        if name == "prefiller":
            env["LMCACHE_REQUEST_TELEMETRY_TYPE"] = "fastapi"
            env["LMCACHE_REQUEST_TELEMETRY_ENDPOINT"] = f"http://127.0.0.1:{self._telemetry}/api/v1/telemetry"
        return apart.start(self._folder, name, port, [*command, "--kv-transfer-config", json.dumps(transfer)], env)

    def _proxy(self, prefill: int, decode: int, port: int) -> Served:
        command = ["dynamo_lmcache.proxy", "--host", "127.0.0.1", "--port", str(port), "--prefiller-port", str(prefill)]
        command += ["--decoder-port", str(decode), "--telemetry-port", str(self._telemetry), "--notify-timeout", "5"]
        command += ["--read-timeout", "10", "--answer-timeout", "20"]
        return apart.start(self._folder, "proxy", port, command, {})

    def ready(self) -> None:
        """Wait until all are healthy."""
        for name, served in self.of.items():
            if name == "server":
                self.until(lambda: self.status() is not None, 60)
            else:
                served.wait()

    def status(self) -> dict[str, Any] | None:
        """The server's; None: it does not answer."""
        try:
            return dict(apart.ask(f"{self.of['server'].url}/status?check=1", timeout_s=5)[1])
        except OSError:
            return None

    @staticmethod
    def until(condition: Callable[[], bool], seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline
            time.sleep(0.1)

    @property
    def names(self) -> list[str]:
        return [*self.of, *(["mooncake"] if self.master else [])]

    def kill(self, name: str) -> None:
        if name == "mooncake":
            assert self.master is not None
            self.master.kill()
        else:
            self.of[name].kill()

    def revive(self, name: str) -> None:
        if name == "mooncake":
            assert self.master is not None
            self.master.restart()
        else:
            self.of[name] = self._start[name]()

    def complete(self, query: Any) -> tuple[int, Any]:
        body = {"model": str(engines.MODEL), "prompt": query.token_ids, "max_tokens": 3, "temperature": 0}
        try:
            return apart.ask(f"{self.of['proxy'].url}/v1/completions", body, ANSWER_S + 10)  # type: ignore[no-any-return]
        except OSError:  # the proxy itself is dead
            return 503, {"error": {"message": "no proxy"}}

    def close(self) -> None:
        for name in reversed(self.of):
            self.of[name].stop()
        if self.master is not None:
            self.master.kill()


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Set]:
    made = Set(tmp_path_factory.mktemp("mp"))
    yield made
    made.close()


def storm(running: Set, seed: int, victim: str, moment: float) -> list[tuple[float, int, Any]]:
    """Four requests at a time; the victim dies `moment` seconds after they began, and comes back."""
    ends: list[tuple[float, int, Any]] = []
    right: list[bool] = []
    over = threading.Event()

    def ask(i: int) -> None:
        number = seed * 100000 + i * 1000
        while not over.is_set():
            query = questions(number, 1)[0] if number % 2 else questions(seed, 1)[0]
            number += 1
            begun = time.monotonic()
            status, answer = running.complete(query)
            ends.append((time.monotonic() - begun, status, answer))
            if status == 200:
                right.append(answer["choices"][0]["text"] == query.expected)
            else:
                time.sleep(0.2)

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    time.sleep(moment)
    running.kill(victim)
    time.sleep(1.0)
    running.revive(victim)
    running.ready()
    time.sleep(1.0)
    over.set()
    for thread in threads:
        thread.join(ANSWER_S + 20)
    assert not any(thread.is_alive() for thread in threads), "a request hangs"
    assert sum(right) >= 0.95 * len(right), f"{len(right) - sum(right)} of {len(right)} answers are wrong"
    return ends


def answered(running: Set, seed: int) -> None:
    """Answers are right, and a second one comes from the server, once proxies and engines have found each other."""
    query = questions(seed, 1)[0]
    deadline = time.monotonic() + 60
    while True:
        status, answer = running.complete(query)
        details = answer["usage"]["prompt_tokens_details"] if status == 200 else None
        if details and details["cached_tokens"]:
            assert answer["choices"][0]["text"] == query.expected
            return
        assert time.monotonic() < deadline, (status, answer)
        time.sleep(0.3)


def test_killed_with_requests_in_flight(running: Set) -> None:
    answered(running, 1)
    dice = random.Random(20)
    # Each of them once before any of them twice.
    rounds = [dice.sample(running.names, len(running.names)) for _ in range(-(-KILLS // len(running.names)))]
    victims = [name for names in rounds for name in names][:KILLS] or ["server", "proxy"]
    for i, victim in enumerate(victims):
        proper(storm(running, 2 + i, victim, dice.uniform(0.5, 3.0)))
        answered(running, 1000 + i)
        running.until(lambda: (status := running.status()) is not None and status["l1"]["leases"] == 0, 20)
        status = running.status()
        assert status is not None and status["faults"] == []
        assert len(status["clients"]) == 2
