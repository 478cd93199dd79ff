"""Local disk: one file for each object, in one folder or several (`file:///a/,/b/`).

    <folder>/<first byte of the key, hex>/<key, hex>              an object
    <folder>/<first byte of the key, hex>/<key, hex>.<unique>.tmp being written; its writer holds a lock on it

A file is written under its temporary name and renamed when complete, so no half object is ever visible, whenever the
process ends. Nothing is flushed by default: after a power failure the last seconds may be missing or damaged, which the
header and the sum find out; `fsync=1` flushes each file before its rename.

O_DIRECT is used where the file system grants it and all parts begin and end on blocks of 4096 bytes; else the page
cache, which is told to let go of the bytes afterwards. Sizes count in whole blocks of the file system; its directories
are not counted.

Several engines may use one folder, each with its own capacity, which counts what it wrote or found. What one removes is
a miss for the others. With `shared=1` an engine also finds what others wrote after its start.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import itertools
import logging
import mmap
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from lmcache_ext.errors import ConfigError
from lmcache_ext.tiers.base import KEY_BYTES, Parts, address_of
from lmcache_ext.tiers.header import BLOCK
from lmcache_ext.tiers.medium import MEDIA, Found, Medium
from lmcache_ext.tiers.urls import Address

logger = logging.getLogger("lmcache_ext.tiers")

SHARDS = tuple(f"{i:02x}" for i in range(256))
FORSAKEN = 3600.0  # seconds; a temporary file this old is a dead writer's, also where locks do not work


@MEDIA.register("file")
class Disk(Medium):
    """Files in `folders`.

    Args:
        folders: absolute; made if need be. A key has its place in one of them, whatever their order.
        odirect: use O_DIRECT where it is granted.
        fsync: flush each object before it becomes visible.
        shared: look into the folders for objects that other engines wrote.
    """

    lasting = True

    def __init__(
        self, folders: Sequence[Path], odirect: bool = True, fsync: bool = False, shared: bool = False
    ) -> None:
        self.shared = shared
        self._folders = tuple(folders)
        self._fsync = fsync
        self._unique = itertools.count()
        self._elsewhere: dict[bytes, Path] = {}  # found in another folder than its own
        self._devices: dict[Path, int] = {}
        self._block = BLOCK
        self._direct = dict.fromkeys(self._folders, odirect)
        self._largest = BLOCK
        self._suspect: Path | None = None  # the last file that could not be read

    @classmethod
    def from_address(cls, address: Address) -> Disk:
        """`file:///folder/,/folder/?odirect=1&fsync=0&shared=0`"""
        folders = [Path(part) for part in address.location.split(",") if part]
        if not folders or not all(folder.is_absolute() for folder in folders):
            raise ConfigError("url", address.url, "must name absolute folders: file:///a/,/b/")
        odirect, fsync, shared = (address.flag(*flag) for flag in (("odirect", True), ("fsync",), ("shared",)))
        return cls(folders, odirect, fsync, shared)

    def open(self) -> None:
        for folder in self._folders:
            try:
                for shard in SHARDS:
                    (folder / shard).mkdir(parents=True, exist_ok=True)
            except OSError as error:
                if not all((folder / shard).is_dir() for shard in SHARDS):
                    raise ConfigError("url", str(folder), f"can't be set up as a cache: {error.strerror}") from None
            self._devices[folder] = folder.stat().st_dev
            self._block = max(self._block, os.statvfs(folder).f_frsize)
            if self._direct[folder]:
                self._direct[folder] = self._grants_direct(folder)

    def _grants_direct(self, folder: Path) -> bool:
        try:
            with self._scratch(folder, os.O_WRONLY | os.O_DIRECT) as fd:
                os.write(fd, mmap.mmap(-1, BLOCK))
        except OSError as error:
            logger.info("%s: no O_DIRECT (%s), using the page cache", folder, error.strerror)
            return False
        return True

    def footprint(self, nbytes: int) -> int:
        return -(-nbytes // self._block) * self._block

    @property
    def folders(self) -> tuple[Path, ...]:
        """Where objects lie."""
        return self._folders

    # -- objects ----------------------------------------------------------------------------------------------------

    def path(self, key: bytes) -> Path:
        """Where the object of `key` lies."""
        folder = self._elsewhere.get(key) if self._elsewhere else None
        if folder is None:
            folder = self._home(key)
        name = key.hex()
        return folder / name[:2] / name

    def _home(self, key: bytes) -> Path:
        """Rendezvous: a folder more or less moves only its own share of the keys."""
        if len(self._folders) == 1:
            return self._folders[0]
        return max(self._folders, key=lambda folder: hashlib.blake2b(key + os.fsencode(folder), digest_size=8).digest())

    def _temporary(self, path: Path) -> Path:
        return path.with_name(f"{path.name}.{os.getpid():x}-{time.time_ns():x}-{next(self._unique):x}.tmp")

    def _flags(self, path: Path, parts: Parts) -> int:
        direct = self._direct[path.parent.parent] and all(
            part.nbytes % BLOCK == 0 and address_of(part) % BLOCK == 0 for part in parts
        )
        return os.O_DIRECT if direct else 0

    def write(self, key: bytes, header: memoryview, parts: Parts) -> None:
        path = self.path(key)
        temporary = self._temporary(path)
        direct = self._flags(path, parts)
        self._largest = max(self._largest, BLOCK + sum(part.nbytes for part in parts))
        with _opened(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | direct) as fd:
            try:
                with contextlib.suppress(OSError):  # no locks here: then age tells
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                self._put(fd, header, parts)
                if self._fsync:
                    os.fdatasync(fd)
                temporary.replace(path)
            except BaseException:
                with contextlib.suppress(OSError):
                    temporary.unlink()
                raise
            if not direct:
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)

    def read(self, key: bytes, header: memoryview, parts: Parts) -> int:
        path = self.path(key)
        direct = self._flags(path, parts)
        try:
            with _opened(path, os.O_RDONLY | direct) as fd:
                size = os.fstat(fd).st_size
                whole = size == BLOCK + sum(part.nbytes for part in parts)
                moved = self._get(fd, header, parts if whole else ())
                size = moved if whole else size
                if not direct:
                    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
                return size
        except FileNotFoundError:
            raise
        except OSError:
            self._suspect = path
            raise

    def _put(self, fd: int, header: memoryview, parts: Parts) -> None:
        """Write an object from the file's start."""
        _write_all(fd, [header, *parts])

    def _get(self, fd: int, header: memoryview, parts: Parts) -> int:
        """Fill `header` and `parts` from the file's start; returns how many bytes there were."""
        return _read_all(fd, [header, *parts])

    def size(self, key: bytes) -> int | None:
        try:
            return self.path(key).stat().st_size
        except FileNotFoundError:
            return None

    def remove(self, key: bytes) -> None:
        self.path(key).unlink(missing_ok=True)
        self._elsewhere.pop(key, None)

    # -- housekeeping -----------------------------------------------------------------------------------------------

    def scan(self, sweep: bool, faults: list[str]) -> Iterator[Found]:
        """About 5 µs a file."""
        for folder in self._folders:
            for shard in SHARDS:
                with contextlib.suppress(FileNotFoundError), os.scandir(folder / shard) as entries:
                    for entry in entries:
                        if found := self._look_at(folder, entry, sweep, faults):
                            yield found

    def _look_at(self, folder: Path, entry: os.DirEntry[str], sweep: bool, faults: list[str]) -> Found | None:
        try:
            key = _key_of(entry.name)
            status = entry.stat(follow_symlinks=False)
            fault = None
            if key is None:
                dead = entry.name.endswith(".tmp") and self._is_forsaken(entry.path, status.st_mtime)
                fault = "was left by a writer that ended" if dead else None
                if not entry.name.endswith(".tmp"):
                    faults.append(f"{entry.path} is not ours")
            elif status.st_size < BLOCK:
                fault = "is cut off within its header"
            elif len(self._folders) > 1 and (home := self._home(key)) != folder:
                if (home / entry.name[:2] / entry.name).exists():
                    fault = "is there twice"
                else:
                    self._elsewhere[key] = folder
            if fault is None:
                return Found(key, status.st_size, status.st_mtime) if key else None
            faults.append(f"{entry.path} {fault}")
            if sweep:
                Path(entry.path).unlink(missing_ok=True)
        except FileNotFoundError:
            pass  # somebody removed it just now
        return None

    def _is_forsaken(self, path: str, when: float) -> bool:
        """Whether no living writer has this temporary file. A writer that has not locked it yet loses it, and fails."""
        with _opened(Path(path), os.O_RDONLY) as fd:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
            except OSError:
                return time.time() - when > FORSAKEN
        return True

    def probe(self, write: bool) -> None:
        """One folder that works is enough: keys of the others go on failing, one by one."""
        faults = []
        for folder in self._folders:
            try:
                self._require_mounted(folder)
                if write:
                    self._try_write(folder)
                elif self._suspect is not None and self._suspect.parent.parent == folder:
                    _read_start(self._suspect)
                return
            except OSError as error:
                faults.append(error)
        raise faults[0]

    def _require_mounted(self, folder: Path) -> None:
        """Where a mount was lost there is another, empty folder: nothing may be written into that."""
        if folder.stat().st_dev != self._devices[folder]:
            raise OSError(f"{folder} is on another device than at the start")
        for shard in SHARDS:
            if not (folder / shard).is_dir():
                (folder / shard).mkdir()

    def _try_write(self, folder: Path) -> None:
        """Is there room for the largest object so far, and can a block be written?"""
        with self._scratch(folder, os.O_WRONLY) as fd:
            os.posix_fallocate(fd, 0, self._largest)
            os.pwrite(fd, bytes(BLOCK), 0)
            os.fdatasync(fd)

    @contextlib.contextmanager
    def _scratch(self, folder: Path, flags: int) -> Iterator[int]:
        """A new file to try something with; it is gone afterwards."""
        name = self._temporary(folder / SHARDS[0] / "probe")
        with _opened(name, flags | os.O_CREAT | os.O_EXCL) as fd:
            try:
                yield fd
            finally:
                name.unlink(missing_ok=True)


def _key_of(name: str) -> bytes | None:
    if len(name) != 2 * KEY_BYTES or name != name.lower():
        return None
    try:
        return bytes.fromhex(name)
    except ValueError:
        return None


def _read_start(path: Path) -> None:
    with contextlib.suppress(FileNotFoundError), _opened(path, os.O_RDONLY) as fd:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.pread(fd, BLOCK, 0)


@contextlib.contextmanager
def _opened(path: Path, flags: int) -> Iterator[int]:
    fd = os.open(path, flags | os.O_CLOEXEC, 0o600)
    try:
        yield fd
    finally:
        os.close(fd)


def _write_all(fd: int, views: list[memoryview]) -> None:
    done = 0
    while views:
        moved = os.pwritev(fd, views, done)
        if not moved:
            raise OSError(f"nothing was written at {done}")
        done += moved
        views = _rest(views, moved)


def _read_all(fd: int, views: list[memoryview]) -> int:
    """Fill `views` from the file's start; returns how many bytes there were."""
    done = 0
    while views:
        moved = os.preadv(fd, views, done)
        if not moved:
            break
        done += moved
        views = _rest(views, moved)
    return done


def _rest(views: list[memoryview], moved: int) -> list[memoryview]:
    """What is left of `views` behind their first `moved` bytes."""
    for i, view in enumerate(views):
        if moved < view.nbytes:
            return [view.cast("B")[moved:], *views[i + 1 :]]
        moved -= view.nbytes
    return []
