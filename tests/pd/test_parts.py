"""Ranks of different TP sizes: what fits to what, sums that agree, and chunks that two senders fill together."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import msgspec
import numpy as np
import pytest

from lmcache_ext.pd import sums
from lmcache_ext.pd.parts import Misfit, Plan, at, writers_of
from lmcache_ext.pd.wire import Geometry
from tests.pd.peers import CHUNK, ROWS, Decode, Peer, Prefill, keys, part_of, pool_of, until

pytest.importorskip("nixl", reason="nixl is not installed")

HND = ((2, 1, 4, 256), (1, 1, 4, 128))  # three layers, four heads
NHD = ((3, 16, 4, 32),)
MLA = ((3, 1, 0, 512),)


def geometry(rank: int = 0, ranks: int = 1, pages: Any = HND) -> Geometry:
    row = sum(layers * outer * max(1, heads // ranks) * size for layers, outer, heads, size in pages)
    return Geometry(CHUNK, ROWS, row, "layout", rank, ranks, pages)


@pytest.mark.parametrize("pages", [HND, NHD, MLA])
@pytest.mark.parametrize(("senders", "receivers"), [(2, 1), (1, 2), (4, 2), (8, 2), (2, 2), (1, 1)])
@pytest.mark.parametrize("tokens", [CHUNK, 40])
def test_all_writers_fill_every_slot_and_their_sums_agree(pages, senders, receivers, tokens):
    if pages is MLA:
        senders = receivers = 1  # one rank of each engine has a pool
    slots = {r: np.zeros(geometry(r, receivers, pages).nbytes(tokens), np.uint8) for r in range(receivers)}
    numbers = []
    for s, r in writers_of(geometry(0, senders, pages), receivers):
        plan = Plan(geometry(s, senders, pages), geometry(r, receivers, pages))
        source = part_of(b"k" * 32, tokens, plan.sender)
        for a, b, n in plan.pieces(tokens):
            slots[r][b : b + n] = source[a : a + n]
        numbers.append((plan.writer, plan.writers))
        mine, theirs = pool_of(1, plan.sender.row_bytes), pool_of(1, plan.receiver.row_bytes)
        mine.bytes[: len(source)], theirs.bytes[: len(slots[r])] = source, slots[r]
        taken = list(sums.of_pool(mine)([(0, plan.runs(tokens, at_receiver=False))]))
        assert list(sums.of_pool(theirs)([(0, plan.runs(tokens, at_receiver=True))])) == taken
    assert numbers == [(i, len(numbers)) for i in range(len(numbers))]
    for r, slot in slots.items():
        assert np.array_equal(slot, part_of(b"k" * 32, tokens, geometry(r, receivers, pages)))


def test_the_receivers_geometry_follows_from_the_senders():
    assert at(geometry(1, 2), 0, 1) == geometry() and at(geometry(), 3, 4) == geometry(3, 4)
    assert at(geometry(0, 1, MLA), 0, 1) == geometry(0, 1, MLA)


@pytest.mark.parametrize(
    ("sender", "receiver", "why"),
    [
        (geometry(0, 2), geometry(1, 2), "nothing for"),  # ports in the wrong order: another rank's heads
        (geometry(0, 4), geometry(1, 2), "nothing for"),
        (geometry(1, 8), geometry(0, 2), "nothing for"),  # its head is sent by another
        (geometry(0, 2, ()), geometry(0, 1, ()), "can't be cut"),
        (geometry(0, 2), geometry(0, 2, NHD), "pages.* differ"),
        (geometry(0, 3), geometry(), "can't be divided"),
        (msgspec.structs.replace(geometry(), row_bytes=640), geometry(), "row_bytes differ"),
        (msgspec.structs.replace(geometry(0, 2), row_bytes=8), geometry(), "not its row"),
        (geometry(2, 2), geometry(), "no sense"),
        (geometry(-1, 2), geometry(), "no sense"),
        (msgspec.structs.replace(geometry(0, 2), chunk_tokens=16), geometry(), "chunk_tokens differ"),
        (geometry(0, 2, ((1 << 40, 1, 4, 1),)), geometry(0, 1, ((1 << 40, 1, 4, 1),)), "no sense"),
    ],
)
def test_what_does_not_fit_is_named(sender, receiver, why):
    with pytest.raises(Misfit, match=why):
        Plan(sender, receiver)


def peers_of(kind: Any, ranks: int, **more: Any) -> list[Peer]:
    parts = [{"rank": rank, "ranks": ranks, "pages": HND} for rank in range(ranks)]
    return [Peer(kind, slots=24, row=geometry(0, ranks).row_bytes, part=part, **more) for part in parts]


def test_two_senders_fill_one_receivers_chunks():
    (decode,), prefill = peers_of(Decode, 1), peers_of(Prefill, 2, pace_s=0.01)
    target = decode("target")
    prefill[0]("begin", "a", target, keys("a", 8), 40)
    until(lambda: prefill[0]("outcomes") == {"a": "stored"})
    assert decode("match", keys("a", 8)) == 0, "half of the heads is no chunk"
    prefill[1]("begin", "a", target, keys("a", 8), 40)
    until(lambda: prefill[1]("outcomes") == {"a": "stored"})
    assert decode("match", keys("a", 8)) == 8 and decode("wrong") == []
    assert decode("state")["holds"] == 1
    for peer in (*prefill, decode):
        peer.close()


def test_one_sender_fills_two_receivers_and_ports_in_the_wrong_order_are_refused():
    decode, (prefill,) = peers_of(Decode, 2), peers_of(Prefill, 1)
    targets = [peer("target") for peer in decode]
    prefill("begin", "a", targets[0], keys("a", 4))
    prefill("begin_only", "b", replace(targets[1], rank=0), keys("b", 2))
    until(lambda: len(prefill("outcomes")) == 2)
    assert prefill("outcomes") == {"a": "stored", "b": "refused"}
    for peer in (prefill, *decode):
        peer.close()


def test_a_flipped_bit_in_one_part_fails_the_chunk():
    (decode,), prefill = peers_of(Decode, 1), [*peers_of(Prefill, 2)]
    bad = peers_of(Prefill, 2, flip=True)[1]
    target = decode("target")
    prefill[0]("begin", "a", target, keys("a", 6))
    bad("begin", "a", target, keys("a", 6))
    until(lambda: bad("outcomes") == {"a": "corrupt"})
    assert decode("wrong") == [] and decode("match", keys("a", 6)) < 6
    for peer in (*prefill, bad, decode):
        peer.close()
