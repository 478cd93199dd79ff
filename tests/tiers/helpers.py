"""Keys, chunks in aligned memory, tiers of every kind, and how to wait for a job."""

from __future__ import annotations

import mmap
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from random import Random
from typing import Any

from lmcache_ext.tiers import Faults, Faulty, Found, JobResult, Medium, Options, Outcome, Parts, Runner, Tier
from lmcache_ext.tiers.disk import Disk
from lmcache_ext.tiers.example import Example
from lmcache_ext.tiers.fake import Fake
from lmcache_ext.tiers.fs import Share
from lmcache_ext.tiers.header import BLOCK, encode
from lmcache_ext.tiers.nixl_storage import NixlStorage
from tests.tiers import s3_server

KINDS = (
    "example", "fake", "disk", "disk-buffered", "two-disks", "unindexed", "redis", "mooncake", "fs", "nixl", "s3",
    "aesgcm",
)  # fmt: skip
PART = 8192  # bytes of each part of a test's chunk, unless it says otherwise
WHOLE = BLOCK + 2 * PART  # bytes of such an object


def key(i: int) -> bytes:
    return i.to_bytes(32, "little")


def memory(*lengths: int) -> list[memoryview]:
    """Writable parts; each begins on a memory page."""
    return [memoryview(mmap.mmap(-1, max(1, length)))[:length] for length in lengths]


def chunk(seed: object, *lengths: int) -> list[memoryview]:
    """Parts with bytes that only `seed` has."""
    parts = memory(*(lengths or (PART, PART)))
    for i, part in enumerate(parts):
        part[:] = Random(f"{seed} {i}").randbytes(len(part))
    return parts


def blank(*lengths: int) -> list[memoryview]:
    return memory(*(lengths or (PART, PART)))


def content(parts: Parts) -> bytes:
    return b"".join(parts)


def header_of(k: bytes, parts: Parts, expires: float = 0.0) -> memoryview:
    (block,) = memory(BLOCK)
    encode(block, k, parts, expires)
    return block


def options_of(kind: str, folder: Path) -> dict[str, Any]:
    """What tiers of a kind need beside their medium."""
    if kind != "aesgcm":
        return {}
    folder.mkdir(exist_ok=True)
    secret = folder / "secret"
    secret.write_text("5a" * 32)
    return {"serde": "aesgcm", "serde_key_file": str(secret)}


def as_stored(tier: Runner, i: int) -> list[memoryview]:
    """The parts that `tier` would hand to its medium for chunk `i`."""
    return [memory_with(part) for part in tier.serde.encode(key(i), chunk(i))]


def memory_with(part: memoryview) -> memoryview:
    (copy,) = memory(part.nbytes)
    copy[:] = part
    return copy


def whole(tier: Runner) -> int:
    """Bytes of an object of a test's chunk."""
    return BLOCK + tier.serde.nbytes(chunk(0))


class Unindexed(Example):
    """As a server that others use, too, and that bounds itself."""

    shared = True
    bounded = True
    batch = 3


def medium_of(kind: str, folder: Path) -> Medium:
    if kind == "fs":
        return Share([folder], shared=True)
    if kind == "nixl":
        return NixlStorage("POSIX", [folder])
    if kind == "s3":
        return s3_server.common().medium(str(folder))
    if kind == "mooncake":
        from tests.tiers.mooncake_server import medium_with_kept_client

        return medium_with_kept_client()
    if kind == "unindexed":
        return Unindexed()
    if kind == "redis":
        from tests.tiers.redis_servers import clean_redis

        return clean_redis()
    if kind in ("example", "aesgcm"):
        return Example()
    if kind == "fake":
        return Fake(latency=0.0005)
    folders = [folder / "a", folder / "b"] if kind == "two-disks" else [folder / "a"]
    return Disk(folders, odirect=kind != "disk-buffered")


class Gauge(Medium):
    """Passes everything on, and knows how much was there at most, a write counted from its begin to its removal."""

    def __init__(self, inner: Medium) -> None:
        self.inner = inner
        self.lasting = inner.lasting
        self.shared, self.bounded, self.batch = inner.shared, inner.bounded, inner.batch
        self.footprints: dict[bytes, int] = {}
        self.now = self.peak = 0
        self.lock = threading.Lock()

    def _count(self, k: bytes, size: int) -> None:
        with self.lock:
            self.now += size - self.footprints.pop(k, 0)
            if size:
                self.footprints[k] = size
            self.peak = max(self.peak, self.now)

    def open(self) -> None:
        self.inner.open()

    def close(self) -> None:
        self.inner.close()

    def footprint(self, nbytes: int) -> int:
        return self.inner.footprint(nbytes)

    def write(self, k: bytes, header: memoryview, parts: Parts) -> None:
        self._count(k, self.footprint(BLOCK + len(content(parts))))
        try:
            self.inner.write(k, header, parts)
        except BaseException:
            self._count(k, 0)
            raise

    def read(self, k: bytes, header: memoryview, parts: Parts) -> int:
        return self.inner.read(k, header, parts)

    def size(self, k: bytes) -> int | None:
        return self.inner.size(k)

    def sizes(self, keys: Sequence[bytes]) -> list[int | None]:
        return self.inner.sizes(keys)

    def remove(self, k: bytes) -> None:
        self.inner.remove(k)
        self._count(k, 0)

    def scan(self, sweep: bool, faults: list[str]) -> Iterator[Found]:
        return self.inner.scan(sweep, faults)

    def probe(self, write: bool) -> None:
        self.inner.probe(write)


def over(medium: Medium, spoilt: Faults | None = None, **options: Any) -> Runner:
    """A tier over `medium` whose first scan is done. Look-ups have time: the machine may be busy."""
    chosen = {"lookup_timeout": 5.0, "cooldown": 0.05, **options}
    tier = Runner(Faulty(medium, spoilt) if spoilt is not None else medium, Options(**chosen), "test")
    until(lambda: tier.scanned)
    return tier


def gb(nbytes: int) -> float:
    return nbytes / (1 << 30)


def until(true: Callable[[], object], seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.001)


def end(tier: Tier, job: int, seconds: float = 20) -> JobResult:
    """The result of `job`, the only one there is."""
    assert tier.wait(seconds)
    (result,) = tier.poll()
    assert result.job == job
    return result


def store(tier: Tier, i: int, parts: Parts | None = None) -> Outcome:
    return end(tier, tier.submit_store([key(i)], [chunk(i) if parts is None else parts])).outcomes[0]


def load(tier: Tier, i: int, parts: Parts | None = None) -> Outcome:
    """Also looks at the bytes, if it chooses the buffer."""
    into = blank() if parts is None else parts
    outcome = end(tier, tier.submit_load([key(i)], [into])).outcomes[0]
    if parts is None and outcome is Outcome.OK:
        assert content(into) == content(chunk(i)), "wrong bytes"
    return outcome


def found(tier: Tier, *numbers: int) -> list[bool]:
    return end(tier, tier.lookup([key(i) for i in numbers])).ok
