"""What left a server, and what an engine tells routers of it."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from lmcache_ext.engine import Chunk, State
from lmcache_ext.events import Announcement, EventLog, Tier
from lmcache_ext.server import protocol as p
from lmcache_ext.server.journal import Journal
from lmcache_ext.server.link import Call
from lmcache_ext.server.memory import Group, Stake
from lmcache_ext.server.news import News

ROOT = b"r" * 32


def key(i: int) -> bytes:
    return i.to_bytes(32, "little")


def group(number: int) -> Group:
    return Group(number, ROOT, "m", (8192,), 16)


def leaves(journal: Journal, whose: Group, *numbers: int) -> None:
    for i in numbers:
        journal.removed(Chunk(key(i), 0, 16, Stake(whose), State.LEAVING, leases=0, uses=0))


def test_a_journal_tells_what_left_since() -> None:
    journal, one = Journal(kept=8), group(1)
    assert journal.since(0, 5) == ([], 0, False)
    leaves(journal, one, *range(6))
    assert journal.since(0, 4) == ([(one, key(i)) for i in range(4)], 4, False)
    assert journal.since(4, 4) == ([(one, key(4)), (one, key(5))], 6, False)
    assert journal.since(6, 4) == ([], 6, False)
    assert journal.since(9, 4) == ([], 6, False)


def test_a_journal_keeps_the_last_and_says_what_it_forgot() -> None:
    journal, one = Journal(kept=4), group(1)
    leaves(journal, one, *range(10))
    left, at, missed = journal.since(3, 100)
    assert ([k for _, k in left], at, missed) == ([key(i) for i in range(6, 10)], 10, True)
    assert journal.since(6, 100)[2] is False
    assert [k for _, k in journal.since(8, 1)[0]] == [key(8)]


class Server:
    """Answers what a test says, when it says so."""

    def __init__(self) -> None:
        self.asked: list[tuple[int, Call]] = []

    def departures(self, root: bytes, since: int) -> Call:
        self.asked.append((since, Call(lambda at: None)))
        return self.asked[-1][1]

    def answer(self, at: int, *gone: int, more: bool = False, missed: bool = False) -> int:
        """Returns what it was asked."""
        since, call = self.asked.pop()
        call.reply = p.Departed(b"".join(map(key, gone)), at, more, missed)
        call.done.set()
        return since


class Scene:
    def __init__(self) -> None:
        self.server, self.log = Server(), EventLog(Tier.CPU)
        self.news = News(self.server, self.log)  # type: ignore[arg-type]
        self.session: Any = object()
        self.blocks: set[bytes] = set()
        self.poll()

    def poll(self) -> None:
        self.news._next = 0.0
        self.news.poll(self.session, ROOT)
        for event in self.log.take():
            change = self.blocks.update if event.stored else self.blocks.difference_update
            change(event.what.block_hashes)

    def stored(self, i: int, at: int) -> None:
        what = Announcement((f"block {i}".encode(),), None, [1, 2], 2, None, None, None)
        self.news.stored(key(i), what, at)

    @property
    def known(self) -> list[int]:
        self.poll()
        return sorted(int(block.split()[1]) for block in self.blocks)


def test_what_left_is_taken_back() -> None:
    scene = Scene()
    assert scene.server.answer(at=7) == 0
    scene.stored(1, at=7), scene.stored(2, at=7), scene.stored(1, at=7)
    assert scene.known == [1, 2]
    assert scene.server.answer(9, 1, 5) == 7
    assert scene.known == [2] and len(scene.news.chunks()) == 1
    scene.stored(1, at=9)
    assert scene.known == [1, 2]


@pytest.mark.parametrize("order", list(itertools.permutations("sda")))
def test_answers_may_be_looked_at_in_any_order(order: tuple[str, ...]) -> None:
    """It was stored when 7 had left, and left as the eighth; it was stored again when 9 had."""
    for again in (False, True):
        scene = Scene()
        for what in order:
            if what == "s":
                scene.stored(1, at=7)
            elif what == "d":
                scene.server.answer(9, 1)
                scene.poll()
            elif again:
                scene.stored(1, at=9)
        assert scene.known == ([1] if again else [])


def test_more_is_asked_for_at_once() -> None:
    scene = Scene()
    scene.server.answer(4, 1, more=True)
    scene.news.poll(scene.session, ROOT)
    assert scene.server.asked[-1][0] == 4


def test_all_is_taken_back_however_much_it_is() -> None:
    scene = Scene()
    scene.log._limit = 100
    for i in range(450):
        scene.stored(i, at=7)
        if not i % 50:
            scene.poll()
    assert len(scene.known) == 450
    scene.session = None  # the server is gone
    for _ in range(6):
        scene.poll()
    assert scene.known == [] and scene.news.chunks() == [] and scene.log.dropped == 0


def test_who_missed_some_takes_all_back() -> None:
    scene = Scene()
    scene.server.answer(90, missed=True)  # nothing was told before
    scene.stored(1, at=90), scene.stored(2, at=90)
    assert scene.known == [1, 2]
    scene.server.answer(300_000, 9, missed=True)
    assert scene.known == []
    scene.stored(2, at=300_000)
    assert scene.known == [2]


def test_another_session_or_root_begins_anew() -> None:
    scene = Scene()
    scene.server.answer(5, 1)
    scene.stored(2, at=5)
    assert scene.known == [2]
    scene.session = object()
    assert scene.known == [] and scene.server.asked[-1][0] == 0
    scene.server.answer(0)
    scene.stored(1, at=0)  # another server counts from the beginning
    assert scene.known == [1]
    scene.session = None
    assert scene.known == []


def test_an_answer_that_never_comes_holds_nothing_up() -> None:
    scene = Scene()
    scene.stored(1, at=0)
    assert scene.known == [1]
    call = scene.server.asked.pop()[1]
    call.done.set()  # it was given up, without a reply
    scene.poll()
    assert scene.server.asked[-1][0] == 0 and scene.known == [1]


def test_what_is_remembered_of_departures_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lmcache_ext.server.news._MOST_LEFT", 3)
    scene = Scene()
    scene.server.answer(10, *range(10))
    scene.poll()
    assert len(scene.news._left) == 3
