"""One client process of the storm: stores, loads and verifies chunks at random until SIGTERM, then says what it did.

python storm_worker.py ADDRESS SEED
"""

from __future__ import annotations

import json
import random
import signal
import sys
import time

from blake3 import blake3

from lmcache_ext.server.client import Client, Grant
from tests.server.helpers import spec

GROUPS = (spec("small", (20_480, 20_480)), spec("large", (131_072,)))
CHAINS, LENGTH = 40, 6


def chain(group: int, number: int) -> list[bytes]:
    return [blake3(f"{group} {number} {i}".encode()).digest() for i in range(LENGTH)]


def halves(part: memoryview) -> list[memoryview]:
    middle = part.nbytes // 16 * 8
    return [part[:middle], part[middle:]]


def pattern(key: bytes, half: memoryview) -> bytes:
    return key[:8] * (half.nbytes // 8)


class Worker:
    def __init__(self, address: str, seed: int) -> None:
        self.dice = random.Random(seed)
        self.client = Client(address, f"storm {seed}", patience=0.3)
        for each in GROUPS:
            self.client.join(each)
        self.did = {"stored": 0, "loaded": 0, "wrong": 0, "misses": 0}
        self.over = False
        self.turn = 0

    def dawdle(self) -> None:
        """Be caught in the middle of a copy."""
        if self.dice.random() < 0.3:
            time.sleep(0.001)

    def run(self) -> None:
        while not self.over:
            self.turn += 1
            group = self.dice.randrange(2)
            keys = chain(group, self.dice.randrange(CHAINS))
            if not self.client.up:
                time.sleep(0.01)
            elif not self.load(GROUPS[group], keys):
                self.store(GROUPS[group], keys)
        self.client.close(2.0)

    def load(self, group, keys: list[bytes]) -> bool:
        name = str(self.turn)
        while (hit := self.client.lookup(name, group.root, keys)) is None and not self.over:
            time.sleep(0.0005)
        if hit and hit.lease:
            for i in range(hit.ready):
                self.verify(hit.lease, i, keys[i])
            self.did["loaded"] += hit.ready
        else:
            self.did["misses"] += 1
        self.client.forget(name)
        return bool(hit and hit.ready == len(keys))

    def verify(self, lease: Grant, i: int, key: bytes) -> None:
        for part in lease.parts(i):
            for half in halves(part):
                if half != pattern(key, half):
                    self.did["wrong"] += 1
                    print(json.dumps({"wrong": key.hex(), "offset": lease.offsets[i]}), flush=True)
                self.dawdle()

    def store(self, group, keys: list[bytes]) -> None:
        grant = self.client.prepare(group.root, keys).wait()
        if grant is None:
            return
        failed = []
        for i in grant.slots:
            if self.dice.random() < 0.05:
                failed.append(i)
                grant.parts(i)[0][:100] = bytes(100)
                continue
            for part in grant.parts(i):
                for half in halves(part):
                    half[:] = pattern(keys[i], half)
                    self.dawdle()
        self.client.complete(grant, True, failed)
        self.did["stored"] += len(grant.slots) - len(failed)


if __name__ == "__main__":
    worker = Worker(sys.argv[1], int(sys.argv[2]))
    signal.signal(signal.SIGTERM, lambda *_: setattr(worker, "over", True))
    print("ready", flush=True)
    worker.run()
    print(json.dumps(worker.did), flush=True)
