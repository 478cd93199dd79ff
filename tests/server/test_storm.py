"""Ten processes on one server; some are killed, some stopped and woken, and the server is stopped, killed and started.

No byte that anybody reads may be wrong, and in the end nothing may be held.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

from tests.processes import freeze
from tests.server.helpers import ROOT, Server, until

SECONDS = 3.0


class Crew:
    """The worker processes."""

    def __init__(self, server: Server, folder: Path) -> None:
        self._server, self._folder, self._seed = server, folder, 0
        self.all: list[tuple[subprocess.Popen, Path]] = []
        self.alive: list[subprocess.Popen] = []

    def add(self) -> None:
        self._seed += 1
        path = self._folder / f"worker{self._seed}"
        command = [sys.executable, "-m", "tests.server.storm_worker", self._server.address, str(self._seed)]
        with path.open("w") as out, path.with_suffix(".err").open("w") as errors:
            env = {**os.environ, "PYTHONPATH": str(ROOT), "OPENBLAS_NUM_THREADS": "1"}
            worker = subprocess.Popen(command, stdout=out, stderr=errors, cwd=ROOT, env=env)
        self.all.append((worker, path))
        self.alive.append(worker)

    def kill(self, worker: subprocess.Popen) -> None:
        worker.kill()
        worker.wait(5)
        self.alive.remove(worker)

    def reports(self) -> list[dict]:
        """What those that lived until the end did; every line of anybody that is a complaint fails the test."""
        found = []
        for worker, path in self.all:
            lines = [json.loads(line) for line in path.read_text().splitlines() if line.startswith("{")]
            assert not [line for line in lines if "offset" in line], lines
            if worker in self.alive:
                assert worker.returncode == 0, path.with_suffix(".err").read_text()
                found.append(lines[-1])
        return found

    def end(self) -> None:
        for worker in self.alive:
            worker.send_signal(signal.SIGCONT)
            worker.terminate()
        for worker in self.alive:
            worker.wait(15)

    def __enter__(self) -> Crew:
        return self

    def __exit__(self, *error: object) -> None:
        for worker, _ in self.all:
            if worker.poll() is None:
                worker.kill()
            worker.wait(5)


def stop_one(server: Server, crew: Crew, dice: random.Random, writer: bool) -> subprocess.Popen:
    """Stop a worker, if it can be found in the middle of a store, or of a load."""
    for _ in range(30):
        victim = dice.choice(crew.alive)
        freeze(victim.pid)
        mine = [each for each in server.status()["clients"] if victim.pid in each["pids"]]
        if mine and (mine[0]["writes"] if writer else mine[0]["holds"] - mine[0]["writes"]):
            break
        victim.send_signal(signal.SIGCONT)
    freeze(victim.pid)
    return victim


def stop_and_wake(server: Server, crew: Crew, dice: random.Random, writer: bool) -> None:
    """One worker stands still until it counts as silent and others have used the whole memory anew."""
    victim = stop_one(server, crew, dice, writer)
    before = server.status()["l1"]["evicted"]

    def enough() -> bool:
        now = server.status()
        speaking = [pid for each in now["clients"] if not each["silent"] for pid in each["pids"]]
        return victim.pid not in speaking and now["l1"]["evicted"] - before > 200

    until(enough, 3.0)
    victim.send_signal(signal.SIGCONT)


def kill_one(server: Server, crew: Crew, dice: random.Random) -> None:
    """A worker that is attached and speaks: it is proven dead before it could be silent."""
    assert until(lambda: any(not each["silent"] for each in server.status()["clients"]))
    speaking = {pid for each in server.status()["clients"] if not each["silent"] for pid in each["pids"]}
    victim = dice.choice([worker for worker in crew.alive if worker.pid in speaking] or crew.alive)
    crew.kill(victim)
    assert until(lambda: all(victim.pid not in each["pids"] for each in server.status()["clients"]))


def test_no_byte_is_wrong_whoever_dies_or_stands_still(tmp_path):
    dice = random.Random(11)
    flags = ("--l1-size-gb", "0.016", "--extent-mb", "1", "--silence-seconds", "0.3")
    with Server(tmp_path, *flags) as server, Crew(server, tmp_path) as crew:
        for _ in range(10):
            crew.add()
        assert until(lambda: len(server.status()["clients"]) == 10 and server.status()["l1"]["evicted"] > 50, 60)
        began, quarantined, dead, events = time.monotonic(), 0, 0, 0
        while time.monotonic() - began < SECONDS or events < 8:
            events += 1
            if events % 4 == 3:
                kill_one(server, crew, dice)
                crew.add()
            elif events == 4:
                seen = server.status()
                quarantined, dead = seen["quarantined"], seen["proven_dead"]
                server.kill()
                server.start()
            elif events == 6:
                server.signal(signal.SIGSTOP)
                time.sleep(0.4)
                server.signal(signal.SIGCONT)
            else:
                stop_and_wake(server, crew, dice, writer=bool(events % 2))
        assert until(lambda: [each["silent"] for each in server.status()["clients"]] == [False] * 10, 20)
        assert server.ask("GET", "/status?check=1")[1]["faults"] == []
        crew.end()
        reports = crew.reports()
        assert until(lambda: server.status()["clients"] == [], 5)
        now = server.ask("GET", "/status?check=1")[1]
        print(events, quarantined + now["quarantined"], dead + now["proven_dead"], reports)
        assert now["faults"] == []
        assert now["l1"]["leases"] == 0
        assert now["errors"].get("internal", 0) == 0
        assert sum(report["loaded"] for report in reports) > 500
        assert sum(report["stored"] for report in reports) > 500
        assert dead + now["proven_dead"] >= 1
        assert quarantined + now["quarantined"] > 0
        server.ask("POST", "/cache/clear")
        now = server.status()["l1"]
        assert (now["used"], now["spare_extents"]) == (0, now["extents"])
        assert server.stop() == 0
