"""What routers are told of chunks that come, share blocks, and go."""

from __future__ import annotations

from dataclasses import dataclass

from lmcache_ext.events import Announcement, EventLog, Tier


@dataclass
class Held:
    note: object


def chunk(*blocks: bytes) -> Held:
    return Held(Announcement(blocks, None, range(2 * len(blocks)), 2, None, None, None))


def said(log: EventLog) -> list[tuple[bool, tuple[bytes, ...]]]:
    return [(event.stored, event.what.block_hashes) for event in log.take()]


def test_a_block_goes_with_the_last_chunk_that_holds_it() -> None:
    log, partial, full = EventLog(Tier.CPU), chunk(b"a", b"b"), chunk(b"a", b"b", b"c")
    log.stored(partial)
    log.stored(full)
    log.removed(partial)
    assert said(log) == [(True, (b"a", b"b")), (True, (b"a", b"b", b"c"))]
    log.announce([full])  # said again, not held twice
    log.removed(full)
    assert said(log) == [(True, (b"a", b"b", b"c")), (False, (b"a", b"b", b"c"))]


def test_what_nobody_takes_is_bounded_and_still_counted() -> None:
    log, one, other = EventLog(Tier.CPU, limit=1), chunk(b"a"), chunk(b"a")
    log.stored(one)
    log.stored(other)
    assert said(log) == [(True, (b"a",))] and log.dropped == 1
    log.removed(one)
    assert said(log) == []
    log.removed(other)
    assert said(log) == [(False, (b"a",))]


def test_chunks_without_a_note_pass_in_silence() -> None:
    log = EventLog(Tier.CPU)
    log.stored(Held(None))
    log.announce([Held(None)])
    log.removed(Held(None))
    assert said(log) == []
