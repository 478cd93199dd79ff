"""Peers that die, stop, lie or are not there: what is visible is right, what is taken comes back, nothing hangs."""

from __future__ import annotations

import itertools
import random
import signal
import socket
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest

from lmcache_ext.pd import Target
from tests.pd.peers import Decode, Peer, Prefill, keys, until
from tests.pd.test_handover import ended, settle

pytest.importorskip("nixl", reason="nixl is not installed")

BIG = 65536  # a row of chunks that take long enough to be caught under way: 1 MiB
QUICK = {"silence_s": 0.6, "beat_s": 0.1, "drain_s": 0.2}


@contextmanager
def peers(**made: Any) -> Iterator[list[Peer]]:
    """Processes that are gone afterwards, however that comes about."""
    up = [Peer(kind, **arguments) for kind, arguments in made.values()]
    try:
        yield up
    finally:
        for peer in up:
            peer.kill()


def several(prefill: Peer, target: Target, name: object, count: int = 4, chunks: int = 8) -> list[str]:
    """Begin several requests at once."""
    names = [f"{name}.{i}" for i in range(count)]
    for one in names:
        prefill("begin", one, target, keys(one, chunks))
    return names


def handed(prefill: Peer, target: Target, name: str) -> str:
    """How a short request ends."""
    prefill("begin", name, target, keys(name, 2))
    return ended(prefill, name)[name]


def more(decode: Peer, what: str, before: int) -> bool:
    """Whether there are more requests "placed", or more "chunks" received, since."""
    return decode("state").get(what, 0) > before


def test_prefillers_that_are_killed_leave_nothing_behind():
    rng, waited = random.Random(1), Counter[str]()
    made = {str(i): (Prefill, {"slots": 8, "row": BIG, "pace_s": 0.001}) for i in range(10)}
    decoder = (Decode, {"slots": 40, "row": BIG, "drain_s": 0.1})
    with peers(decode=decoder, after=(Prefill, {"slots": 8, "row": BIG}), **made) as (decode, after, *prefills):
        target = decode("target")
        for number, prefill in enumerate(prefills):
            what = rng.choice(["placed", "chunks", "chunks", None])
            before = decode("state").get(what, 0)
            names = several(prefill, target, number)
            if what is not None:  # the others die while they connect
                until(partial(more, decode, what, before))
                waited[what] += 1
            time.sleep(rng.random() * 0.05)
            prefill.kill()
            until(lambda n=number: decode("state").get("ended", 0) > n or decode("state")["open"] == 0)
            settle(decode, *names)
        assert decode("state")["chunks"] >= waited["chunks"] > 2 and waited.total() > 5
        until(lambda: decode("state")["ended"] >= waited.total())
        after("begin", "after", target, keys("after", 40))
        assert ended(after, "after") == {"after": "stored"}, "all slots can be had again"
        settle(decode, "after")


def test_decoders_that_are_killed_cost_their_requests_and_no_more():
    rng = random.Random(2)
    made = {str(i): (Decode, {"slots": 40, "row": BIG}) for i in range(10)}
    options = {"slots": 16, "row": BIG, "pace_s": 0.001}
    with peers(p=(Prefill, options), o=(Decode, {"slots": 32, "row": BIG}), **made) as (prefill, other, *decodes):
        dead = []
        for number, decode in enumerate(decodes):
            names = several(prefill, decode("target"), number)
            prefill("begin", f"other{number}", other("target"), keys(number, 2))
            time.sleep(rng.random() * 0.08)
            decode.kill()
            outcomes = ended(prefill, *names, f"other{number}")
            assert outcomes.pop(f"other{number}") == "stored", "another decoder's requests suffered"
            assert set(outcomes.values()) <= {"dead", "stored"}
            dead += [outcome for outcome in outcomes.values() if outcome == "dead"]
            settle(other, f"other{number}")
        assert len(dead) > 10


def test_a_decoder_that_is_back_on_its_ports_is_asked_anew():
    with peers(prefill=(Prefill, {"slots": 8, "retry_s": 0.2})) as (prefill,):
        decode = Peer(Decode, slots=16)
        target = decode("target")
        prefill("begin", "a", target, keys("a", 3))
        assert ended(prefill, "a") == {"a": "stored"}
        decode.kill()
        prefill("begin", "b", target, keys("b", 3))
        assert ended(prefill, "b") == {"b": "dead"}
        ports = {"init_port": target.init_port, "alloc_port": target.alloc_port}
        with peers(decode=(Decode, {"slots": 16, **ports})) as (again,):
            again("state")
            tries = itertools.count()
            until(lambda: handed(prefill, target, f"c{next(tries)}") == "stored")
            settle(again, *(f"c{i}" for i in range(next(tries))))


def test_a_decoder_that_is_not_there_costs_its_deadline_once():
    with socket.socket() as silent, peers(prefill=(Prefill, {"slots": 8, "connect_s": 2.0})) as (prefill,):
        silent.bind(("127.0.0.1", 0))
        silent.listen()  # connects, and never answers
        target = Target("127.0.0.1", *[silent.getsockname()[1]] * 2)
        began = time.monotonic()
        names = several(prefill, target, "first")
        assert set(ended(prefill, *names).values()) == {"dead"}
        assert 1.9 < time.monotonic() - began < 10
        began = time.monotonic()
        names = several(prefill, target, "then")
        assert set(ended(prefill, *names).values()) == {"dead"} and time.monotonic() - began < 1.5


@pytest.mark.parametrize("host", ["http://127.0.0.1", "127.0.0.1/", "a,b", "*"])
def test_a_host_that_is_none_costs_its_requests_alone(host):
    with peers(decode=(Decode, {"slots": 8}), prefill=(Prefill, {"slots": 4})) as (decode, prefill):
        prefill("begin", "bad", Target(host, 7300, 7400), keys("bad", 6))
        prefill("begin", "good", decode("target"), keys("good", 2))
        assert ended(prefill, "bad", "good") == {"bad": "dead", "good": "stored"}
        until(lambda: prefill("quiet"))
        settle(decode, "good")
        prefill.close()


def test_a_decoder_without_room_says_so_in_time_and_room_is_waited_for():
    options = {"slots": 16, "alloc_wait_s": 0.5}
    with peers(decode=(Decode, {"slots": 8}), prefill=(Prefill, options)) as (decode, prefill):
        target = decode("target")
        prefill("begin", "a", target, keys("a", 6))
        assert ended(prefill, "a") == {"a": "stored"}
        began = time.monotonic()
        prefill("begin", "b", target, keys("b", 6))
        prefill("begin", "small", target, keys("small", 2))
        until(lambda: prefill("outcomes").get("small") == "stored")
        assert "b" not in prefill("outcomes"), "a small request waited behind a large one"
        assert ended(prefill, "b") == {"b": "full"} and 0.4 < time.monotonic() - began < 10
        prefill("begin", "c", target, keys("c", 6))
        decode("claim", "a")
        assert ended(prefill, "c") == {"c": "stored"}
        settle(decode, "small", "c")


@pytest.mark.parametrize("after", ["continues", "dies"])
def test_a_stopped_prefiller_loses_its_requests_at_once_and_its_slots_when_it_is_safe(after):
    decoder = (Decode, {"slots": 24, "row": BIG, **QUICK})
    with peers(decode=decoder, prefill=(Prefill, {"slots": 8, "row": BIG, "pace_s": 0.05})) as (decode, prefill):
        names = several(prefill, decode("target"), "a", count=2)
        until(lambda: decode("state").get("chunks", 0) >= 3)
        prefill.signal(signal.SIGSTOP)
        until(lambda: decode("state").get("given up"))
        state = decode("state")
        assert state["open"] > 0 and state["used"] > state["ready"], "its bytes may still come"
        time.sleep(0.5)
        assert decode("state")["used"] == state["used"]
        with peers(other=(Prefill, {"slots": 8, "row": BIG})) as (other,):
            other("begin", "again", decode("target"), keys("a.0", 8))
            assert ended(other, "again") == {"again": "stored"}, "keys that were given up can be written by others"
        if after == "dies":
            prefill.kill()
        else:
            prefill.signal(signal.SIGCONT)
            assert set(ended(prefill, *names).values()) & {"refused", "corrupt", "dead"}
        settle(decode, *names, "again")


def test_a_stopped_decoder_is_given_up_and_serves_again_when_it_goes_on():
    options = {"slots": 8, "row": BIG, "pace_s": 0.05, "silence_s": 0.6, "retry_s": 0.1}
    with peers(decode=(Decode, {"slots": 40, "row": BIG, **QUICK}), prefill=(Prefill, options)) as (decode, prefill):
        target = decode("target")
        names = several(prefill, target, "a")
        until(lambda: decode("state").get("chunks", 0) >= 3)
        decode.signal(signal.SIGSTOP)
        assert "dead" in ended(prefill, *names).values()
        decode.signal(signal.SIGCONT)
        settle(decode, *names)
        tries = itertools.count()
        until(lambda: handed(prefill, target, f"b{next(tries)}") == "stored")
        settle(decode, *(f"b{i}" for i in range(next(tries))))


def test_bytes_that_change_on_their_way_are_a_miss():
    with peers(decode=(Decode, {"slots": 16}), prefill=(Prefill, {"slots": 9, "flip": True})) as (decode, prefill):
        for name in ("a", "b"):
            prefill("begin", name, decode("target"), keys(name, 9))
            assert ended(prefill, name) == {name: "corrupt"}
            assert decode("match", keys(name, 9)) < 9
            settle(decode, name)
            until(lambda: prefill("quiet"), what="slots stay taken")  # so that the next goes through each of them
        assert decode("state")["wrong sum"] >= 2


def test_a_silent_proxy_costs_nothing():
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        options = {"slots": 8, "proxy": f"127.0.0.1:{silent.getsockname()[1]}"}
        with peers(decode=(Decode, {"slots": 64}), prefill=(Prefill, options)) as (decode, prefill):
            names = several(prefill, decode("target"), "a", count=20, chunks=2)
            assert set(ended(prefill, *names).values()) == {"stored"}
            assert prefill("state")["notified"] == 20
            began = time.monotonic()
            prefill.close()
            assert time.monotonic() - began < 3


def test_chunks_that_nobody_fetches_may_be_evicted_after_a_while():
    with peers(decode=(Decode, {"slots": 8, "ttl_s": 0.5}), prefill=(Prefill, {"slots": 8})) as (decode, prefill):
        for name in ("a", "b"):
            prefill("begin", name, decode("target"), keys(name, 8))
            assert ended(prefill, name) == {name: "stored"}
        until(lambda: decode("state")["leases"] == 0)
        assert decode("wrong") == []


def test_cancelled_requests_give_their_slots_back_at_once():
    with peers(decode=(Decode, {"slots": 32}), prefill=(Prefill, {"slots": 4, "pace_s": 0.1})) as (decode, prefill):
        names = several(prefill, decode("target"), "a", count=3)
        until(lambda: decode("state").get("chunks", 0) >= 2)
        for name in names:
            prefill("cancel", name, decode("target"))
        assert set(ended(prefill, *names).values()) == {"cancelled"}
        state = settle(decode, *names)
        assert state["cancelled"] == 3 and state["used"] < 24


@pytest.mark.parametrize(("here", "there", "outcome"), [(0.3, 60.0, "timeout"), (60.0, 0.3, "refused")])
def test_requests_that_stall_are_given_up_by_either_side(here, there, outcome):
    decoder, options = (Decode, {"slots": 16, "stall_s": there}), {"slots": 4, "stall_s": here}
    with peers(decode=decoder, prefill=(Prefill, options)) as (decode, prefill):
        prefill("begin_only", "a", decode("target"), keys("a", 8))
        assert ended(prefill, "a") == {"a": outcome}
        settle(decode, "a")


def test_word_that_nothing_is_in_flight_is_asked_for_again():
    decoder, options = (Decode, {"slots": 16, "stall_s": 0.3, **QUICK}), {"slots": 4, "loses": True}
    with peers(decode=decoder, prefill=(Prefill, options)) as (decode, prefill):
        prefill("begin_only", "a", decode("target"), keys("a", 8))
        assert ended(prefill, "a") == {"a": "refused"}
        settle(decode, "a")


def test_a_silent_sender_elsewhere_is_shut_out_by_a_new_agent():
    decoder = (Decode, {"slots": 32, "quarantine_s": 0.5, "far": True, **QUICK})
    options = {"slots": 8, "retry_s": 0.1, "silence_s": 0.6}
    stopped = (Prefill, {**options, "pace_s": 0.2})
    with peers(decode=decoder, stopped=stopped, other=(Prefill, options)) as (decode, prefill, other):
        target = decode("target")
        several(prefill, target, "a", count=2, chunks=12)
        other("begin", "b", target, keys("b", 2))
        assert ended(other, "b") == {"b": "stored"}
        until(lambda: decode("state").get("chunks", 0) >= 4 + 2)
        prefill.signal(signal.SIGSTOP)
        until(lambda: decode("state").get("renewed"))
        settle(decode, "a.0", "a.1", "b")
        other("begin", "c", target, keys("c", 2))
        assert ended(other, "c") == {"c": "stored"}, "others ask for a new session"
        prefill.signal(signal.SIGCONT)
        assert set(ended(prefill, "a.0", "a.1").values()) <= {"dead", "refused"}
        settle(decode, "c")
        assert "fault" not in decode("state")


def test_idle_sides_cost_next_to_nothing():
    with peers(decode=(Decode, {"slots": 8}), prefill=(Prefill, {"slots": 8})) as (decode, prefill):
        prefill("begin", "a", decode("target"), keys("a", 4))
        assert ended(prefill, "a") == {"a": "stored"}
        before = decode("cpu_s"), prefill("cpu_s")
        time.sleep(1)
        spent = decode("cpu_s") - before[0], prefill("cpu_s") - before[1]
        assert max(spent) < 0.2, f"{spent} s of processor time in one second"
