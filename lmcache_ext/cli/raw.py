"""What a tier is compared with: bare O_DIRECT files, or the store's own client."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from lmcache_ext.cli.rounds import Raw
from lmcache_ext.tiers import Medium
from lmcache_ext.tiers.base import address_of
from lmcache_ext.tiers.disk import Disk
from lmcache_ext.tiers.mooncake import Mooncake
from lmcache_ext.tiers.redis_tier import Redis
from lmcache_ext.tiers.s3 import S3

_STEP = 256 << 10  # bytes: as the S3 tier reads


def raw_of(medium: Medium, threads: int) -> Raw | None:
    """The limit of an open medium; None: none is known. What it writes lies beside the tier's objects, not among them.

    Raises whatever the store's client raises.
    """
    name = f"lmcache-ext-bench-{secrets.token_hex(4)}"
    if isinstance(medium, Disk):
        return Files([folder / name for folder in medium.folders], threads)
    if isinstance(medium, S3):
        return Bucket(medium.client, f"{medium.root}-{name}", threads)
    if isinstance(medium, Redis):
        return Server(medium.client, name, threads)
    if isinstance(medium, Mooncake):
        return Pool(medium, name, threads)
    return None


class Files(Raw):
    """Bare O_DIRECT files: one call each, no header, no sum, no rename. Through the page cache where that is refused.

    Args:
        folders: each is made, and removed by `clear`.
    """

    name = "O_DIRECT"

    def __init__(self, folders: Sequence[Path], threads: int) -> None:
        self.threads = threads
        self._folders = folders
        self._flag = os.O_DIRECT if self._grants_direct() else 0
        if not self._flag:
            self.name = "files, page cache"

    def _grants_direct(self) -> bool:
        try:
            with self._opened(0, os.O_WRONLY | os.O_CREAT | os.O_DIRECT):
                return True
        except OSError:
            return False
        finally:
            self.clear()

    def store(self, i: int, view: memoryview) -> None:
        with self._opened(i, os.O_WRONLY | os.O_CREAT | self._flag) as fd:
            if os.pwrite(fd, view, 0) != view.nbytes:
                raise OSError("a short write")

    def load(self, i: int, view: memoryview) -> None:
        with self._opened(i, os.O_RDONLY | self._flag) as fd:
            if os.preadv(fd, [view], 0) != view.nbytes:
                raise OSError("a short read")

    def clear(self) -> None:
        for folder in self._folders:
            with contextlib.suppress(FileNotFoundError):
                for path in folder.iterdir():
                    path.unlink()
                folder.rmdir()

    @contextlib.contextmanager
    def _opened(self, i: int, flags: int) -> Iterator[int]:
        folder = self._folders[i % len(self._folders)]
        folder.mkdir(parents=True, exist_ok=True)
        fd = os.open(folder / str(i), flags, 0o600)
        try:
            yield fd
        finally:
            os.close(fd)


class _Named(Raw):
    """Values with names of their own in some store."""

    def __init__(self, client: Any, start: str, threads: int) -> None:
        self.client = client
        self.threads = threads
        self._start = start
        self._names: set[str] = set()

    def _name(self, i: int) -> str:
        self._names.add(f"{self._start}/{i}")
        return f"{self._start}/{i}"

    def clear(self) -> None:
        for name in list(self._names):
            self._remove(name)
            self._names.discard(name)

    def _remove(self, name: str) -> None:
        self.client.delete(name)


class Bucket(_Named):
    """obstore alone: one PUT or GET for each buffer, nothing in front, nothing proven."""

    name = "obstore"

    def store(self, i: int, view: memoryview) -> None:
        self.client.put(self._name(i), view, use_multipart=False)

    def load(self, i: int, view: memoryview) -> None:
        at = 0
        for step in self.client.get(self._name(i)).stream(min_chunk_size=_STEP):
            view[at : at + len(step)] = memoryview(step)
            at += len(step)


class Server(_Named):
    """redis-py as it comes; what it read is copied to where it shall be."""

    name = "redis-py"

    def store(self, i: int, view: memoryview) -> None:
        self.client.set(self._name(i), view)

    def load(self, i: int, view: memoryview) -> None:
        view[:] = self.client.get(self._name(i))


class Pool(_Named):
    """Mooncake's client: one value for each buffer, from and into registered memory."""

    name = "Mooncake's client"

    def __init__(self, medium: Mooncake, start: str, threads: int) -> None:
        super().__init__(medium.client(), start, min(threads, medium.transfers))
        self._medium = medium
        self._known: set[int] = set()

    def write(self, memory: Sequence[memoryview]) -> float:
        """Registration is not measured, and shared with the tier."""
        for view in memory:
            if address_of(view) not in self._known:
                self._medium.register(view)
                self._known.add(address_of(view))
        return super().write(memory)

    def store(self, i: int, view: memoryview) -> None:
        self._require(self.client.put_from(self._name(i), address_of(view), view.nbytes), "put")

    def load(self, i: int, view: memoryview) -> None:
        self._require(self.client.get_into(self._name(i), address_of(view), view.nbytes), "get")

    def _remove(self, name: str) -> None:
        self.client.remove(name, True)

    @staticmethod
    def _require(code: int, what: str) -> None:
        if code < 0:
            raise OSError(f"Mooncake could not {what}: error {code}")
