"""Files through NIXL's POSIX plugin: the disk tier's files, registered memory, and transfers that fail."""

from __future__ import annotations

import mmap
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from lmcache_ext.errors import ConfigError
from lmcache_ext.tiers import Outcome, Runner, nixl_storage, open_tier
from lmcache_ext.tiers.disk import Disk
from lmcache_ext.tiers.nixl_storage import NixlStorage
from lmcache_ext.tiers.urls import Address
from tests.tiers.helpers import blank, chunk, content, end, found, header_of, key, load, memory, over, store, until
from tests.tiers.test_disk import files, small

pytest.importorskip("nixl", reason="nixl is not installed")


@contextmanager
def nixl(folder: Path, odirect: bool = True, **options: object) -> Iterator[Runner]:
    tier = over(NixlStorage("POSIX", [folder], odirect), **options)
    yield tier
    assert tier.close(10)


def agents(tier: Runner) -> list[Any]:
    assert isinstance(tier.medium, NixlStorage)
    return tier.medium._idle


@pytest.mark.parametrize("odirect", [True, False])
def test_files_are_those_of_the_disk_tier_and_the_other_way_round(tmp_path: Path, odirect: bool) -> None:
    with nixl(tmp_path, odirect) as tier:
        store(tier, 1), store(tier, 2, chunk(2, 5000, 0, 3))
        path = tmp_path / "01" / key(1).hex()
        assert path.read_bytes() == bytes(header_of(key(1), chunk(1))) + content(chunk(1))
    tier = over(Disk([tmp_path]))
    assert load(tier, 1) is Outcome.OK and store(tier, 3) is Outcome.OK
    assert tier.close(5)
    with nixl(tmp_path, odirect) as tier:
        assert found(tier, 1, 2, 3, 4) == [True, True, True, False]
        into = blank(5000, 0, 3)
        assert load(tier, 3) is Outcome.OK and load(tier, 2, into) is Outcome.OK
        assert content(into) == content(chunk(2, 5000, 0, 3)) and tier.check() == []


def test_payloads_do_go_through_nixl(quick_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    moved: list[tuple[str, int]] = []
    real = nixl_storage._Agent.transfer

    def note(self: Any, verb: str, memory: tuple[int, int], fd: int, at: int) -> None:
        moved.append((verb, memory[1]))
        real(self, verb, memory, fd, at)

    with nixl(quick_path) as tier:
        monkeypatch.setattr(nixl_storage._Agent, "transfer", note)
        store(tier, 1), load(tier, 1)
    assert moved == [("WRITE", 8192)] * 2 + [("READ", 8192)] * 2


def test_memory_is_registered_once_and_no_more_than_a_bound(quick_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with nixl(quick_path, threads=1) as tier:
        (agent,) = agents(tier)
        parts = chunk(1)
        for i in range(5):
            store(tier, i, parts)
            load(tier, i, parts)
        assert len(agent._ranges) == 2 + 1 and not agent._busy, "more than two parts, and what it was tried with"
        monkeypatch.setattr(nixl_storage, "_RANGES", 3)
        for i in range(10, 15):
            store(tier, i)
            assert load(tier, i) is Outcome.OK
        assert len(agent._ranges) <= 3 and agents(tier) == [agent]
    assert not agent._ranges, "close left memory registered"


@pytest.mark.parametrize("shared", [False, True])
def test_slots_of_one_pool_move_at_once(quick_path: Path, monkeypatch: pytest.MonkeyPatch, shared: bool) -> None:
    """Shared: one agent for all objects, the way that GDS goes, which can't run here."""
    monkeypatch.setattr(nixl_storage, "_ALONE", () if shared else ("POSIX",))
    pool = memoryview(mmap.mmap(-1, 64 * 65536))
    slots = [[pool[i * 65536 : i * 65536 + 32768], pool[i * 65536 + 32768 : (i + 1) * 65536]] for i in range(64)]
    for i, slot in enumerate(slots):
        for part, there in zip(slot, chunk(i, 32768, 32768), strict=True):
            part[:] = there
    keys = [key(i) for i in range(64)]
    with nixl(quick_path, threads=8) as tier:
        assert end(tier, tier.submit_store(keys, slots)).leading == 64
        pool[:] = bytes(len(pool))
        assert end(tier, tier.submit_load(keys, slots)).leading == 64
        assert all(content(slot) == content(chunk(i, 32768, 32768)) for i, slot in enumerate(slots))
        assert len(agents(tier)) in ({1} if shared else range(2, 9)) and tier.check() == []


@pytest.mark.parametrize("verb", ["WRITE", "READ"])
@pytest.mark.parametrize("queue", ["aio", "uring", "posix_aio"])
def test_a_transfer_that_fails_fails_alone_and_its_agent_goes(
    quick_path: Path, monkeypatch: pytest.MonkeyPatch, verb: str, queue: str
) -> None:
    """With POSIX AIO all transfers of one agent fail with one of them, and those that come later, too."""
    failed: list[object] = []
    real = nixl_storage._Agent.transfer

    def note(self: Any, *args: Any) -> None:
        try:
            real(self, *args)
        except Exception:
            failed.append(self)
            raise

    monkeypatch.setattr(nixl_storage._Agent, "transfer", note)
    medium = NixlStorage("POSIX", [quick_path], backend_params={f"use_{queue}": "true"})
    tier = over(medium, threads=4)
    store(tier, 1)
    fd = os.open(quick_path / "01" / key(1).hex(), os.O_RDONLY if verb == "WRITE" else os.O_WRONLY)
    stop, right = threading.Event(), []

    def others() -> None:
        while not stop.is_set():
            parts, (header,) = blank(), memory(4096)
            try:
                right.append(medium.read(key(1), header, parts) and content(parts) == content(chunk(1)))
            except Exception:
                right.append(False)

    thread = threading.Thread(target=others)
    thread.start()
    for _ in range(10):
        with pytest.raises(Exception, match=r"NIXL_ERR_BACKEND|ended a transfer"):
            medium._move(verb, fd, 4096, blank())
    until(lambda: len(right) > 20)
    stop.set()
    thread.join(10)
    os.close(fd)
    assert all(right) and len(failed) == 10 and not [each for each in failed if each in agents(tier)]
    assert load(tier, 1) is Outcome.OK and tier.close(10)


def test_a_full_disk_fails_stores_and_leaves_nothing() -> None:
    with small(1) as folder, nixl(folder, faults=100) as tier:
        assert store(tier, 1) is Outcome.OK
        assert store(tier, 2, chunk(2, 2_000_000)) is Outcome.FAILED
        assert len(files(folder)) == 1 and load(tier, 1) is Outcome.OK and store(tier, 3) is Outcome.OK


def test_a_plugin_that_says_done_too_early_is_found_out(quick_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with nixl(quick_path) as tier:
        monkeypatch.setattr(NixlStorage, "_move", lambda *_: None)
        assert store(tier, 1) is Outcome.FAILED and files(quick_path) == []
        monkeypatch.undo()
        assert store(tier, 1) is Outcome.OK and load(tier, 1) is Outcome.OK


def test_an_idle_tier_has_no_thread_that_spins(quick_path: Path) -> None:
    with nixl(quick_path, threads=2) as tier:
        store(tier, 1)
        began = sum(os.times()[:2])
        threading.Event().wait(timeout=1.0)
        assert sum(os.times()[:2]) - began < 0.3, "an idle agent burns a core"


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("nixl://posix", "absolute folders"),
        ("nixl://posix/", "absolute folders"),
        ("nixl://posix/a,b", "absolute folders"),
        ("nixl://obj/bucket", "posix, gds_mt, gds; for buckets: s3://"),
        ("nixl://posix/a?backend_params=use_uring", "name:value"),
        ("nixl://posix/a?colour=red", "known: .*backend_params.*odirect"),
    ],
)
def test_what_is_wrong_is_refused_at_the_start(url: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        open_tier(url)


def test_a_plugin_that_can_not_start_here_is_said_at_the_start(quick_path: Path) -> None:
    with pytest.raises(ConfigError, match="NIXL can't start it"):
        open_tier(f"nixl://posix{quick_path}/a?backend_params=ios_pool_size:many")


def test_a_plugin_that_refuses_the_file_system_is_said_at_the_start(
    quick_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise RuntimeError("NIXL_ERR_BACKEND")

    monkeypatch.setattr(nixl_storage._Agent, "transfer", refuse)
    with pytest.raises(ConfigError, match=f"can't write to {quick_path}/a: NIXL_ERR_BACKEND"):
        open_tier(f"nixl://posix{quick_path}/a")
    assert not files(quick_path / "a")


def test_a_breaker_tries_the_plugin_too(quick_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with nixl(quick_path) as tier:
        tier.medium.probe(write=True)
        monkeypatch.setattr(nixl_storage._Agent, "_finish", lambda *_: (_ for _ in ()).throw(OSError("gone")))
        with pytest.raises(OSError, match="gone"):
            tier.medium.probe(write=True)
    assert not files(quick_path)


def test_plugin_and_its_parameters_come_from_the_url(quick_path: Path) -> None:
    medium = NixlStorage.from_address(Address(f"nixl://GDS_MT{quick_path}?backend_params=thread_count:4"))
    assert (medium._plugin, medium._params) == ("GDS_MT", {"thread_count": "4"})
    tier = open_tier(f"nixl://posix{quick_path}/a?backend_params=use_uring:true&fsync=1")
    assert store(tier, 1) is Outcome.OK and load(tier, 1) is Outcome.OK
    assert tier.close(5)
