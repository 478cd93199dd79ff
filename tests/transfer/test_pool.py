"""The pool and how a scheduler finds it."""

from __future__ import annotations

import json
import multiprocessing
import os
from pathlib import Path

import numpy as np
import pytest

from lmcache_ext.errors import ConfigError, LMCacheError
from lmcache_ext.transfer import GpuPool, Growth, HostPool, rendezvous
from lmcache_ext.transfer.pool import Shape
from lmcache_ext.transfer.rendezvous import Berth


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LMCACHE_RUNTIME_DIR", str(tmp_path / "run"))


def berth(pool: HostPool, rank: int = 0, pid: int | None = None) -> Berth:
    shape = pool.shape
    pid = os.getpid() if pid is None else pid
    return Berth(rank, pid, pool.path, shape.slots, shape.blocks_per_slot, shape.row_bytes, "layout")


def test_a_pool_holds_whole_slots() -> None:
    assert Shape.fit(1000, 2, 100, "X").slots == 5
    with pytest.raises(ConfigError, match=r"X.*holds no chunk"):
        Shape.fit(199, 2, 100, "X")


def _write_elsewhere(path: str, shape: Shape) -> None:
    HostPool.attach(path, shape, member=1).row(3)[:] = 7


def test_another_process_maps_the_same_bytes() -> None:
    pool = HostPool.create(Shape(4, 2, 4096), "test")
    child = multiprocessing.get_context("spawn").Process(target=_write_elsewhere, args=(pool.path, pool.shape))
    child.start()
    child.join(60)
    assert child.exitcode == 0
    assert np.all(pool.row(3) == 7) and np.all(pool.row(2) == 0)


def test_a_pool_leaves_nothing_in_dev_shm() -> None:
    before = set(Path("/dev/shm").iterdir())
    pool = HostPool.create(Shape(4, 2, 4096), "test")
    pool.bytes[:] = 1
    assert set(Path("/dev/shm").iterdir()) == before


def test_attach_refuses_another_shape() -> None:
    pool = HostPool.create(Shape(4, 2, 4096), "test")
    with pytest.raises(OSError, match="expected"):
        HostPool.attach(pool.path, Shape(50, 2, 4096), member=1)


def test_growth_is_what_every_member_reached() -> None:
    shape = Shape(5, 3, 100)  # no whole memory page: the words come behind the slots all the same
    pool = HostPool.create(shape, "test")
    follower = HostPool.attach(pool.path, shape, member=1)
    growth = Growth(pool.path, shape, members=2)
    assert growth.slots() == 0
    pool.grown, follower.grown = 4, 2
    assert (growth.slots(), follower.made, pool.maker, follower.maker) == (2, 4, True, False)
    pool.bytes[:] = 255
    assert growth.slots() == 2
    assert Growth(pool.path, shape, members=1).slots() == 4


def test_publish_find_retract() -> None:
    pool = HostPool.create(Shape(4, 2, 4096), "test")
    for rank in (0, 1):
        rendezvous.publish("engine/1", berth(pool, rank))
    assert rendezvous.find("engine/1", 1, 0) == berth(pool, 1)
    assert rendezvous.find("engine/2", 0, 0.05) is None
    rendezvous.retract("engine/1", 2)
    assert rendezvous.find("engine/1", 0, 0) is None


def test_files_of_dead_processes_are_swept() -> None:
    pool = HostPool.create(Shape(4, 2, 4096), "test")
    path = rendezvous.publish("dead", berth(pool))
    path.write_text(json.dumps({**json.loads(path.read_text()), "pid": 2**22 + 1}))
    rendezvous.publish("alive", berth(pool))
    assert not path.exists()
    assert rendezvous.find("alive", 0, 0) is not None


def test_the_runtime_folder_is_ours_alone(tmp_path: Path) -> None:
    assert rendezvous.runtime_dir().stat().st_mode & 0o777 == 0o700


def test_a_runtime_folder_that_cannot_be_made_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LMCACHE_RUNTIME_DIR", str(tmp_path / "file" / "below"))
    with pytest.raises(LMCacheError, match="LMCACHE_RUNTIME_DIR"):
        rendezvous.runtime_dir()


def test_a_pool_on_a_gpu_takes_no_host_memory_but_its_words() -> None:
    pool = GpuPool(Shape(1 << 20, 16, 1 << 20), "test", 0x7F0000000000, 3)  # 16 TiB
    growth = Growth(pool.path, pool.shape, 1)
    assert growth.slots() == 0 and pool.maker and pool.on_gpu
    pool.grown = pool.shape.slots
    assert growth.slots() == pool.made == 1 << 20
    growth.serve()
    assert pool.serving and os.fstat(pool.fd).st_blocks * 512 <= 2 * 4096
    assert pool.at(np.array([5])).tolist() == [5 << 20]
    with pytest.raises(AttributeError):  # nobody reads a hole for a chunk
        pool.bytes  # type: ignore[attr-defined]  # noqa: B018 - that is the test
    pool.close()
