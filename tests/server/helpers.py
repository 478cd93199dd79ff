"""A real server in a process of its own, and raw speech with it."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import zmq

from lmcache_ext.ports import free_port
from lmcache_ext.server import protocol as p
from lmcache_ext.server.client import Client, Spec
from lmcache_ext.server.owners import this_process
from tests.processes import send

if TYPE_CHECKING:
    from lmcache_ext.engine import Level

ROOT = Path(__file__).resolve().parents[2]
PARTS = (8192, 4096)  # bytes of a chunk, for each of two ranks
TOKENS = 16


def until(condition: Callable[[], bool], timeout: float = 15.0) -> bool:
    """Whether `condition` came true in time."""
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.005)
    return True


def keys(count: int, seed: str = "") -> list[bytes]:
    return [os.urandom(32) if not seed else f"{seed}{i}".encode().ljust(32, b"\1")[:32] for i in range(count)]


def spec(name: str = "m", parts: tuple[int, ...] = PARTS) -> Spec:
    return Spec(name.encode().ljust(32, b"\0"), name, parts, TOKENS)


class Server:
    """`lmcache-ext server`, at the same ports each time it is started."""

    def __init__(self, folder: Path, *flags: str, env: dict[str, str] | None = None) -> None:
        self.port, self.http = free_port(), free_port()
        self.address, self.url = f"tcp://127.0.0.1:{self.port}", f"http://127.0.0.1:{self.http}"
        self.log = folder / "server.log"
        given = {"--l1-size-gb": "0.0625", "--eviction-policy": "LRU", "--silence-seconds": "0.5"}
        words = [word for flag, value in given.items() if flag not in flags for word in (flag, value)]
        ports = ["--host", "127.0.0.1", "--port", str(self.port), "--http-port", str(self.http)]
        self._command = [sys.executable, "-m", "lmcache_ext.cli.main", "server", *ports, *words, *flags]
        self._env = {**os.environ, "PYTHONPATH": str(ROOT), **(env or {})}
        self.start()

    def start(self) -> None:
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(self._command, stdout=log, stderr=log, env=self._env, cwd=ROOT)
        assert until(self._answers, 20), self.log.read_text()

    def _answers(self) -> bool:
        assert self.process.poll() is None, self.log.read_text()
        try:
            return self.ask("GET", "/healthcheck")[0] in (200, 401)
        except OSError:
            return False

    def ask(self, method: str, path: str, body: object = None, **headers: str):
        """(status, JSON) of an HTTP request."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, headers, method=method)
        try:
            with urllib.request.urlopen(request, timeout=5) as answer:
                return answer.status, json.loads(answer.read())
        except urllib.error.HTTPError as error:
            return error.code, json.loads(error.read())

    def status(self):
        return self.ask("GET", "/status")[1]

    def state(self) -> tuple[list[str], int]:
        """(broken invariants, leases)."""
        now = self.ask("GET", "/status?check=1")[1]
        return now["faults"], now["l1"]["leases"]

    def signal(self, number: signal.Signals) -> None:
        send(self.process.pid, number)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(10)

    def stop(self) -> int:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGCONT)
            self.process.terminate()
        return self.process.wait(15)

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *error: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(10)


def clean(server: Server) -> Server:
    """The same, once nobody is attached and nothing is in host memory."""
    assert until(lambda: not server.status()["clients"]), server.status()["clients"]
    server.ask("POST", "/cache/clear")
    assert until(lambda: server.status()["l1"]["used"] == 0), server.status()  # tiers may still be writing
    assert server.state() == ([], 0)
    return server


class Local:
    """A server in a thread of this process: for what need not be a process, started in no time."""

    def __init__(self, *levels: Level, silence: float = 5.0) -> None:
        from lmcache_ext.server.loop import Loop  # not above: the storm's workers come here, and shall start quickly
        from lmcache_ext.server.memory import Segment
        from lmcache_ext.server.service import Service
        from lmcache_ext.server.state import Setup

        setup = Setup(16 << 20, 1 << 20, silence=silence, levels=levels)
        self.service = Service(setup, Segment(setup.nbytes, "test"))
        self.loop = Loop(self.service, "tcp://127.0.0.1:*")
        self.address = self.loop.address
        self.loop.start()

    def state(self) -> tuple[list[str], int]:
        """(broken invariants, leases)."""
        return self.loop.call(lambda: (self.service.check(), self.service.directory.leases)).result(timeout=5)

    def __enter__(self) -> Local:
        return self

    def __exit__(self, *error: object) -> None:
        assert self.loop.stop(10)


class Raw:
    """A client by hand: frames out, frames in."""

    def __init__(self, address: str) -> None:
        self._context = zmq.Context()
        self.socket = self._context.socket(zmq.DEALER)
        self.socket.linger = 0
        self.socket.connect(address)
        self._numbers = itertools.count(1)
        self.boot = b""

    def send(self, frames: list[bytes]) -> None:
        self.socket.send_multipart(frames)

    def receive(self, timeout: float = 15.0):
        """(number, reply), or None."""
        if not self.socket.poll(timeout * 1000):
            return None
        number, self.boot, reply = p.unpack_reply(self.socket.recv_multipart())
        return number, reply

    def ask(self, request, deadline: float = 0.0, number: int | None = None):
        number = next(self._numbers) if number is None else number
        self.send(p.pack_request(number, request, deadline))
        answer = self.receive()
        assert answer is not None, f"no answer to {request}"
        assert answer[0] == number
        return answer[1]

    def hello(self, name: str = "raw") -> bytes:
        """The token of a new session."""
        return self.ask(p.Hello(name, [this_process()])).session

    def join(self, session: bytes, which: Spec) -> int:
        return self.ask(p.Join(session, which.root, which.model, list(which.parts), which.tokens)).group

    def close(self) -> None:
        self.socket.close()
        self._context.term()


def attached(server: Server | Local, which: Spec, name: str = "test", patience: float = 10.0) -> Client:
    client = Client(server.address, name, patience=patience)
    client.join(which)
    assert client.wait_up(10, which.root)
    return client


def look(client: Client, which: Spec, chain: list[bytes], id: str = "r", **more):
    """The answer to a look-up, once it is there."""
    found = []
    assert until(lambda: bool(found.append(client.lookup(id, which.root, chain, **more)) or found[-1]), 15)
    return found[-1]


def store(
    client: Client, which: Spec, chain: list[bytes], fill: Callable[[bytes], bytes] = lambda key: key[-8:], **more
):
    """Store chunks whose bytes are `fill(key)`, repeated. Returns how many can be found."""
    grant = client.prepare(which.root, chain, **more).wait()
    assert grant is not None
    for i in grant.slots:
        for part in grant.parts(i):
            part[:] = fill(chain[i]) * (part.nbytes // 8)
    return client.complete(grant).wait(5).count
