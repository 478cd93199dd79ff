"""etcd and NATS are restarted while a worker serves: nothing hangs, nothing is wrong, nobody has to be started again.
Only when etcd has lost its data does all end, soon, and as a failure."""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from lmcache_ext.ports import free_port
from tests.launch.processes import listens, running_with
from tests.launch.routing import BLOCKS, TOKENS, Frontend, post, prompt, until
from tests.launch.script import START_S, STOP_S, Script, serving

pytestmark = [
    pytest.mark.engine,
    pytest.mark.timeout(START_S + STOP_S + 240),
    pytest.mark.skipif(
        shutil.which("nats-server") is None or shutil.which("etcd") is None,
        reason="needs Debian's etcd-server and nats-server",
    ),
]

AWAY_S = 2  # less than half of Dynamo's lease
BACK_S = 30
LEASE_S = 10
GONE_S = 90  # Dynamo takes up to 25 s to give up, then all is stopped


class Service:
    """A server on loopback that can be killed and started again, with its data."""

    def __init__(self, port: int, log: Path, *command: str) -> None:
        self.port, self._log, self._command = port, log, command
        self.start()

    def start(self) -> None:
        with self._log.open("a") as log:
            self._process = subprocess.Popen(self._command, stdout=log, stderr=subprocess.STDOUT)
        until(lambda: listens(self.port), 20, f"{self._command[0]} listens")

    def kill(self) -> None:
        self._process.kill()
        self._process.wait(20)


@pytest.fixture
def etcd(tmp_path: Path) -> Iterator[Service]:
    port, peers = free_port(), free_port()
    url = f"http://127.0.0.1:{port}"
    service = Service(
        port, tmp_path / "etcd.log", "etcd", "--data-dir", str(tmp_path / "etcd"), "--listen-client-urls", url,
        "--advertise-client-urls", url, "--listen-peer-urls", f"http://127.0.0.1:{peers}",
    )  # fmt: skip
    yield service
    service.kill()


@pytest.fixture
def nats(tmp_path: Path) -> Iterator[Service]:
    port, data = free_port(), str(tmp_path / "nats")
    service = Service(
        port, tmp_path / "nats.log", "nats-server", "-a", "127.0.0.1", "-p", str(port), "-js", "-sd", data
    )  # fmt: skip
    yield service
    service.kill()


def test_services_come_and_go(tmp_path: Path, etcd: Service, nats: Service) -> None:
    env = {
        "WORKERS": "1", "DYN_DISCOVERY_BACKEND": "etcd",
        "ETCD_ENDPOINTS": f"http://127.0.0.1:{etcd.port}", "NATS_SERVER": f"nats://127.0.0.1:{nats.port}",
    }  # fmt: skip
    with serving(tmp_path, "agg_router.sh", "--no-warmup", "--enforce-eager", **env) as script:
        frontend = Frontend(script.http_port, tmp_path / "frontend.log")
        text = prompt(1)
        right = frontend.ask(text).text

        nats.kill()
        nats.start()
        answer = frontend.insist(text, time.monotonic() + BACK_S)
        assert (answer.text, answer.cached) == (right, TOKENS)
        until(lambda: hears(frontend, script, text), BACK_S, "events reach the router again")

        etcd.kill()
        gap = time.monotonic() + AWAY_S
        while time.monotonic() < gap:
            assert frontend.ask(text).text == right, "requests don't pass through etcd"
        etcd.start()
        settled = time.monotonic() + LEASE_S + 2
        while time.monotonic() < settled:
            assert frontend.ask(text).text == right
            time.sleep(0.2)
        lost_for_good(script, etcd, tmp_path / "etcd")


def hears(frontend: Frontend, script: Script, text: str) -> bool:
    """Whether the router learns that the GPU was cleared and what host memory holds."""
    post(f"http://127.0.0.1:{script.system_port}/engine/control/clear_kv_blocks", {})
    frontend.ask(prompt(2))  # a step
    time.sleep(0.5)
    frontend.ask(text)
    return frontend.seen()[-1] == BLOCKS


def lost_for_good(script: Script, etcd: Service, data: Path) -> None:
    etcd.kill()
    shutil.rmtree(data)
    etcd.start()
    assert script.process.wait(GONE_S) == 1
    assert not running_with(script.marker)
    first = "frontend" if "frontend ended by itself" in script.output else "worker0"
    assert f"{first} ended by itself, with exit status 1" in script.output
    assert "ETCD_LEASE_TTL" in script.log(first)
