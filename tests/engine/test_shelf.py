"""What routers are told of a tier."""

from __future__ import annotations

import pytest

from lmcache_ext.engine import Chunk, Shelf, State
from lmcache_ext.events import Announcement, EventLog, Tier
from lmcache_ext.tiers import Outcome
from lmcache_ext.tiers.example import Example
from tests.tiers.helpers import chunk, end, gb, key, over, store


def noted(i: int) -> Chunk:
    what = Announcement((f"block {i}".encode(),), None, [1, 2], 2, None, None, None)
    return Chunk(key(i), 0, 64, what, State.READY, leases=0, uses=0)


class Scene:
    def __init__(self, medium: Example | None = None, **options: float) -> None:
        self.tier = over(medium or Example(), **options)
        self.log = EventLog(Tier.DISK)
        self.shelf = Shelf(self.tier, self.log)
        self.blocks: set[bytes] = set()

    def stored(self, i: int) -> None:
        if store(self.tier, i) is Outcome.OK:
            self.shelf.stored(key(i), noted(i))

    @property
    def known(self) -> list[int]:
        self.shelf.poll()
        for event in self.log.take():
            assert event.tier is Tier.DISK
            change = self.blocks.update if event.stored else self.blocks.difference_update
            change(event.what.block_hashes)
        assert len(self.shelf.chunks()) == len(self.blocks)
        return sorted(int(block.split()[1]) for block in self.blocks)


def test_what_is_stored_is_told_and_what_is_deleted_is_taken_back() -> None:
    scene = Scene()
    scene.stored(1), scene.stored(2), scene.stored(2)
    assert scene.known == [1, 2]
    end(scene.tier, scene.tier.delete([key(1)]))
    assert scene.known == [2]
    scene.stored(1)
    assert scene.known == [1, 2]
    end(scene.tier, scene.tier.delete([key(2)]))
    scene.stored(2)  # before anybody has looked
    assert scene.known == [1, 2]
    assert scene.tier.close(5)


def test_what_was_evicted_is_taken_back_whenever_its_store_is_heard_of() -> None:
    scene = Scene(capacity_gb=gb(4 * 16384))
    for i in range(20):
        scene.stored(i)
        assert all(scene.tier.holds(key(n)) for n in scene.known)
    assert not scene.tier.holds(key(0))
    scene.shelf.stored(key(0), noted(0))  # the news of its store come late
    assert 0 not in scene.known and 0 < len(scene.known) < 20
    assert scene.tier.close(5)


def test_nothing_is_told_of_what_others_may_remove() -> None:
    medium = Example()
    medium.shared = True
    scene = Scene(medium)
    scene.stored(1)
    assert scene.known == []
    assert scene.tier.close(5)


def test_more_departures_than_are_remembered_take_all_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lmcache_ext.tiers.index._MOST_LEFT", 2)
    scene = Scene()
    for i in range(6):
        scene.stored(i)
    end(scene.tier, scene.tier.delete([key(i) for i in range(3)]))
    assert scene.known == []  # some of them are there, and nobody can say which
    scene.stored(5)
    assert scene.known == [5]
    assert scene.tier.close(5)


def test_what_is_told_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lmcache_ext.engine.shelf._MOST_TOLD", 2)
    scene = Scene()
    for i in range(4):
        scene.stored(i)
    assert scene.known == [0, 1]
    end(scene.tier, scene.tier.delete([key(0)]))
    assert scene.known == [1]
    scene.stored(3)
    assert scene.known == [1, 3]
    assert scene.tier.close(5)


def test_chunks_that_routers_can_not_index_pass_in_silence() -> None:
    scene = Scene()
    assert store(scene.tier, 1, chunk(1)) is Outcome.OK
    scene.shelf.stored(key(1), Chunk(key(1), 0, 64, None, State.READY, leases=0, uses=0))
    assert scene.known == []
    assert scene.tier.close(5)
