"""Chunks from prefillers to decoders, each a process, over NIXL; every byte is looked at."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections.abc import Iterator

import pytest
import zmq.asyncio

from dynamo_lmcache.proxy.metrics import Metrics
from dynamo_lmcache.proxy.notify import Outcome as Heard
from dynamo_lmcache.proxy.notify import Waits, bind_notifications, receive_notifications
from tests.pd.peers import CHUNK, Decode, Peer, Prefill, keys, until

pytest.importorskip("nixl", reason="nixl is not installed")

SLOTS = 64


def ended(peer: Peer, *req_ids: str) -> dict[str, str]:
    """How they ended, once all of them have and every slot is back."""
    until(lambda: set(req_ids) <= peer("outcomes").keys() and peer("quiet"), 15)
    return {req_id: outcome for req_id, outcome in peer("outcomes").items() if req_id in req_ids}


def settle(decode: Peer, *req_ids: str) -> dict[str, int]:
    """Fetch what was handed over; nothing may be left but ready chunks that are what their keys say."""

    def settled() -> bool:
        for req_id in req_ids:
            decode("claim", req_id)
        state = decode("state")
        return state["open"] == state["leases"] == 0 and state["used"] == state["ready"]

    until(settled)
    assert decode("wrong") == []
    return decode("state")


@pytest.fixture(scope="module", params=["default", "tcp"])
def pair(request) -> Iterator[tuple[Peer, Peer]]:
    """One prefiller, one decoder; over what UCX chooses itself, and over TCP."""
    env = {} if request.param == "default" else {"UCX_TLS": "tcp"}
    decode, prefill = Peer(Decode, slots=SLOTS, env=env), Peer(Prefill, slots=SLOTS, env=env)
    yield prefill, decode
    prefill.close()
    until(lambda: decode("state").get("bye"))
    decode.close()


def test_requests_arrive_whole(pair):
    prefill, decode = pair
    target = decode("target")
    prefill("begin", "a", target, keys("a", 12))
    prefill("begin", "b", target, keys("b", 5), 100)  # the last chunk is partial
    prefill("begin", "c", target, [*keys("a", 12)[:7], *keys("c", 4)])  # shares a prefix with a
    prefill("begin", "d", target, keys("d", 1), 1)
    assert set(ended(prefill, "a", "b", "c", "d").values()) == {"stored"}
    for names in (keys("a", 12), keys("b", 5), keys("c", 4), keys("d", 1)):
        assert decode("match", names) == len(names)
    state = settle(decode, "a", "b", "c", "d")
    assert state["there already"] == 7 and state["chunks"] == 22 and "wrong sum" not in state


def test_the_same_request_again_sends_nothing(pair):
    prefill, decode = pair
    before = decode("state")["chunks"]
    for name in ("e", "e2"):
        prefill("begin", name, decode("target"), keys("e", 6))
        assert ended(prefill, name) == {name: "stored"}
    assert settle(decode, "e", "e2")["chunks"] == before + 6


def test_random_traffic(pair):
    """Requests of all lengths that share prefixes, some cancelled; more than the pool holds passes through it."""
    prefill, decode = pair
    rng = random.Random(7)
    target, names, claimed = decode("target"), [f"t{i}" for i in range(40)], set()

    def claim() -> bool:
        for name in prefill("outcomes").keys() - claimed:
            decode("claim", name)
            claimed.add(name)
        return claimed >= set(names)

    for name in names:
        head = keys(("prefix", rng.randrange(3)), 8)[: rng.randrange(8)]
        prefill("begin", name, target, [*head, *keys(name, rng.randrange(1, 6))], rng.choice([CHUNK, 16, 255]))
        if rng.random() < 0.2:
            prefill("cancel", name, target)
        claim()
    until(claim, 15)
    outcomes = [prefill("outcomes")[name] for name in names]
    assert set(outcomes) == {"stored", "cancelled"} and outcomes.count("stored") > 25
    settle(decode, *names)


def test_chunks_are_seen_while_later_ones_are_computed():
    decode, prefill = Peer(Decode, slots=SLOTS), Peer(Prefill, slots=4, pace_s=0.03)
    prefill("begin", "a", decode("target"), keys("a", 16))
    until(lambda: decode("match", keys("a", 16)) >= 3)
    assert prefill("outcomes") == {} and decode("match", keys("a", 16)) < 16
    assert ended(prefill, "a") == {"a": "stored"}, "16 chunks pass through 4 slots"
    settle(decode, "a")
    prefill.close(), decode.close()


def test_a_key_that_is_being_written_is_waited_for_in_turn():
    decode, prefill = Peer(Decode, slots=SLOTS), Peer(Prefill, slots=SLOTS, pace_s=0.03)
    target = decode("target")
    prefill("begin", "first", target, keys("a", 10))
    until(lambda: decode("state").get("placed") == 1)
    prefill("begin", "second", target, [keys("a", 10)[9], *keys("b", 1)])
    prefill("begin", "third", target, keys("b", 1))
    until(lambda: decode("match", keys("a", 10)) >= 3)
    assert decode("state")["placed"] == 1, "one that came later has slots for what an earlier one waits for"
    assert set(ended(prefill, "first", "second", "third").values()) == {"stored"}
    assert settle(decode, "first", "second", "third")["chunks"] == 11
    prefill.close(), decode.close()


def test_two_prefillers_and_two_decoders():
    decodes = [Peer(Decode, slots=SLOTS) for _ in range(2)]
    prefills = [Peer(Prefill, slots=8) for _ in range(2)]
    targets = [decode("target") for decode in decodes]
    mine: dict[int, list[str]] = {0: [], 1: []}
    for i in range(24):
        name = f"r{i}"
        # Every other request is wanted by both decoders, and each prefix by both prefillers.
        prefills[i % 2]("begin", name, targets[i // 2 % 2], [*keys(("p", i // 8), 3), *keys(name, 1 + i % 4)])
        mine[i % 2].append(name)
    for prefill, names in zip(prefills, mine.values(), strict=True):
        assert set(ended(prefill, *names).values()) == {"stored"}
    states = [settle(decode, *mine[0], *mine[1]) for decode in decodes]
    assert all(state["there already"] > 0 and state["chunks"] > 20 for state in states)
    for peer in (*prefills, *decodes):
        peer.close()


def test_slots_of_another_shape_or_layout_are_refused():
    decode = Peer(Decode, slots=8, layout="HND")
    for options in ({"layout": "NHD"}, {"layout": "HND", "row": 8192}):
        prefill = Peer(Prefill, slots=2, **options)
        prefill("begin", "a", decode("target"), keys("a", 1))
        assert ended(prefill, "a") == {"a": "refused"}
        prefill.close()
    assert decode("state")["refused"] == 2
    decode.close()


class Proxy:
    """The real proxy's listener, with somebody who waits for requests."""

    def __init__(self, names: list[str], ranks: int = 1) -> None:
        self.heard: dict[str, Heard] = {}
        self.port = 0
        self._names, self._ranks = names, ranks
        self._up = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()), daemon=True)
        self._thread.start()
        assert self._up.wait(10)

    async def _run(self) -> None:
        waits = Waits(Metrics())
        context = zmq.asyncio.Context()
        with zmq.Context() as probe, probe.socket(zmq.PULL) as free:
            self.port = free.bind_to_random_port("tcp://127.0.0.1")
        socket = bind_notifications(context, "127.0.0.1", self.port)
        listening = asyncio.ensure_future(receive_notifications(socket, waits))

        async def one(name: str) -> None:
            with waits.open(name, self._ranks) as wait:
                self.heard[name] = await wait.outcome(10)

        tasks = [asyncio.ensure_future(one(name)) for name in self._names]
        await asyncio.sleep(0)
        self._up.set()
        await asyncio.gather(*tasks)
        listening.cancel()
        context.destroy(0)

    def join(self) -> dict[str, Heard]:
        """What was heard of each."""
        self._thread.join(15)
        return self.heard


def test_the_proxy_hears_how_it_went_once_all_ranks_are_done():
    proxy = Proxy(["good", "bad"], ranks=2)
    parts = [{"rank": i, "ranks": 2} for i in range(2)]
    decode = [Peer(Decode, slots=16, part=part) for part in parts]
    ranks = [Peer(Prefill, slots=4, proxy=f"127.0.0.1:{proxy.port}", part=p, alloc_wait_s=0.2) for p in parts]
    ranks[0]("begin", "good", decode[0]("target"), keys("a", 3))
    ended(ranks[0], "good")
    time.sleep(0.3)
    assert proxy.heard == {}, "one of two ranks is not enough"
    ranks[1]("begin", "good", decode[1]("target"), keys("a", 3))
    ranks[1]("begin", "bad", decode[1]("target"), keys("c", 17))
    assert ended(ranks[1], "good", "bad") == {"good": "stored", "bad": "refused"}
    assert proxy.join() == {"good": Heard.STORED, "bad": Heard.FAILED}
    for peer in (*ranks, *decode):
        peer.close()
