"""The client against a real server that freezes, dies, starts anew, and has tiers."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from lmcache_ext.engine import Chunk, Level
from lmcache_ext.ports import free_port
from lmcache_ext.server import protocol as p
from lmcache_ext.server.client import Client
from lmcache_ext.server.link import Spec, State
from lmcache_ext.server.mirror import Mirror, Note
from lmcache_ext.server.owners import started, this_process
from lmcache_ext.tiers import open_tier
from tests.processes import freeze, state_of
from tests.server.helpers import ROOT, Local, Raw, attached, keys, look, spec, store, until


@pytest.fixture
def client(server):
    one = attached(server, spec())
    yield one
    one.close()


def whole(chunk: list[memoryview], key: bytes) -> bool:
    return all(bytes(part) == key[-8:] * (part.nbytes // 8) for part in chunk)


def test_what_one_client_stores_another_reads(server, client):
    chain = keys(20)
    assert store(client, spec(), chain) == 20
    other = attached(server, spec(), "other")
    hit = look(other, spec(), [*chain, *keys(1)])
    assert hit.ready == 20
    assert all(whole(hit.lease.parts(i), chain[i]) for i in range(20))
    assert look(other, spec(), chain) is hit, "asked again, the answer is the same"
    assert server.status()["l1"]["leases"] == 20
    other.forget("r")
    assert until(lambda: server.status()["l1"]["leases"] == 0)
    other.close()


def test_a_lookup_of_128_keys_with_ten_clients_is_quick(server, client):
    chain = keys(128)
    store(client, spec(), chain)
    others = [attached(server, spec(), f"idle {i}") for i in range(9)]
    raw = Raw(server.address)
    session = raw.hello()
    group, packed, times = raw.join(session, spec()), b"".join(chain), []
    for _ in range(50):
        began = time.perf_counter()
        assert raw.ask(p.Lookup(session, group, [p.Ask("r", packed)])).answers[0].ready == 128
        times.append(time.perf_counter() - began)
    assert sorted(times)[5] < 0.001
    raw.close()
    for other in others:
        other.close()


def test_asks_of_one_round_travel_together(server, client):
    chain = keys(40)
    store(client, spec(), chain)
    before = server.status()["requests"].get("lookup", 0)
    with client._lock:  # the thread can't take any until all are there
        pass
    client._link.timer, hold = (lambda: False), client._link.timer
    for i in range(40):
        client.lookup(str(i), spec().root, chain[: i + 1], lease=False)
    client._link.timer = hold
    client._link.poke()
    assert [look(client, spec(), chain, str(i)).ready for i in range(40)] == list(range(1, 41))
    assert server.status()["requests"]["lookup"] - before <= 2


@pytest.mark.parametrize("there", [True, False])
def test_a_process_ends_at_once_that_forgot_its_client(server, there):
    address = server.address if there else f"tcp://127.0.0.1:{free_port()}"
    program = "import sys; from lmcache_ext.server.client import Client; c = Client(sys.argv[1]); print(c.wait_up(0.5))"
    command = [sys.executable, "-c", program, address]
    done = subprocess.run(command, capture_output=True, text=True, timeout=10, cwd=ROOT)
    assert (done.stdout.strip(), done.stderr, done.returncode) == (str(there), "", 0)


def test_nothing_is_there_without_a_server():
    client = Client(f"tcp://127.0.0.1:{free_port()}", "alone")
    client.join(spec())
    began = time.perf_counter()
    assert client.lookup("r", spec().root, keys(3)).ready == 0
    assert client.prepare(spec().root, keys(3)).wait() is None
    client.forget("r")
    assert time.perf_counter() - began < 1
    client.close()
    assert not client._link._thread.is_alive()


def test_a_frozen_server_costs_one_deadline_and_then_nothing(server, client):
    client._link.patience = client._patience = 0.2
    chain = keys(4)
    store(client, spec(), chain)
    assert look(client, spec(), chain, "held").ready == 4
    server.signal(signal.SIGSTOP)
    began = time.monotonic()
    assert look(client, spec(), chain, "frozen").ready == 0
    assert 0.1 < time.monotonic() - began < 3
    assert until(lambda: not client.up)  # its thread knows a moment after the caller has given up
    for i in range(100):
        assert client.lookup(f"later {i}", spec().root, chain).ready == 0
    pending = client.prepare(spec().root, keys(2))
    assert pending.over
    client.forget("held")
    assert time.monotonic() - began < 5, "each cost as much as the first"
    server.signal(signal.SIGCONT)
    assert client.wait_up(15, spec().root)
    assert look(client, spec(), chain, "again").ready == 4
    client.forget("again")
    client.forget("frozen")
    assert until(lambda: server.status()["l1"]["leases"] == 0), "what was given back meanwhile is back"


def test_a_reservation_that_the_client_gave_up_is_given_back(server, client):
    client._link.patience = client._patience = 0.15
    before = server.status()["requests"].get("prepare", 0)
    server.signal(signal.SIGSTOP)
    pending = client.prepare(spec().root, keys(5))
    assert pending.wait() is None
    server.signal(signal.SIGCONT)
    assert client.wait_up(15, spec().root)
    assert until(lambda: server.status()["requests"].get("prepare", 0) > before)
    assert until(lambda: server.status()["l1"]["used"] == 0)


@pytest.mark.parametrize("what", ["prepare", "lease", "lookup"])
def test_what_was_granted_after_the_client_gave_up_is_given_back(what):
    with Local() as server:
        client, chain = attached(server, spec()), keys(3)
        store(client, spec(), chain)
        client._link.patience = client._patience = 0.1
        handle, delay = server.service.handle, [0.3]

        def late(frames):
            reply = handle(frames)
            if p.unpack_request(frames[1]).__class__.__name__.lower() == what and delay:
                assert server.service.directory.leases == 3
                time.sleep(delay.pop())
            return reply

        server.service.handle = late
        if what == "lookup":
            assert look(client, spec(), chain).ready == 0
        else:
            pending = client.prepare(spec().root, keys(3)) if what == "prepare" else client.lease(spec().root, chain)
            assert pending.wait() is None
        assert client.wait_up(15, spec().root)
        assert until(lambda: server.state() == ([], 0))
        assert not delay
        client.close()


def test_a_new_server_is_found_and_nothing_of_the_old_one_is_used(server, client):
    chain = keys(4)
    store(client, spec(), chain)
    old = look(client, spec(), chain, "old").lease
    reserved = client.prepare(spec().root, keys(2)).wait()
    boot = client.attachment.boot
    server.kill()
    assert whole(old.parts(0), chain[0]), "the memory stays as long as it is mapped"
    assert until(lambda: not client.up)
    server.start()
    assert client.wait_up(15, spec().root)
    assert client.attachment.boot != boot
    assert client.complete(reserved).wait(1) is None
    client.release(old)
    assert look(client, spec(), chain, "new").ready == 0
    assert store(client, spec(), chain) == 4
    hit = look(client, spec(), chain, "newer")
    assert whole(hit.lease.parts(3), chain[3])
    assert hit.lease.attachment.memory is not old.attachment.memory
    client.forget("newer")
    assert until(lambda: server.status()["l1"]["leases"] == 0)


CHILD = """
import sys, time
from lmcache_ext.server.client import Client
from tests.server.helpers import spec, keys, store, look
client = Client(sys.argv[1], "child", patience=10.0)
client.join(spec())
assert client.wait_up(10, spec().root)
chain = keys(3, "child")
store(client, spec(), chain)
hit = look(client, spec(), chain)
grant = client.prepare(spec().root, keys(2, "unwritten")).wait()
print("holding", flush=True)
time.sleep(60)
"""


@pytest.fixture
def holder(server):
    """A process that leases three chunks and is writing two."""
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, server.address], stdout=subprocess.PIPE, text=True, cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert child.stdout.readline() == "holding\n"
    yield child
    child.kill()
    child.wait(5)
    child.stdout.close()


def test_the_dead_hold_nothing(server, holder):
    assert server.status()["l1"]["leases"] == 5
    dead = server.status()["proven_dead"]
    holder.kill()
    assert until(lambda: server.status()["l1"]["leases"] == 0)
    assert server.status()["l1"]["chunks"] == 3
    assert server.status()["proven_dead"] == dead + 1
    assert server.status()["clients"] == []


def test_the_silent_keep_what_they_hold_until_they_speak(server, client, holder):
    freeze(holder.pid)
    before_that = server.status()["quarantined"]
    assert until(lambda: server.status()["quarantined"] == before_that + 2)
    assert store(client, spec(), keys(2, "unwritten")) == 2, "others may write the same keys, elsewhere"
    before = server.status()["l1"]["used"]
    assert server.status()["l1"]["leases"] == 5
    time.sleep(0.7)
    assert server.status()["l1"]["leases"] == 5, "time proves nothing"
    holder.send_signal(signal.SIGCONT)
    assert until(lambda: not any(each["silent"] for each in server.status()["clients"]))
    holder.kill()
    assert until(lambda: server.status()["l1"]["leases"] == 0)
    assert server.status()["l1"]["used"] == before - 2 * 12288


def test_a_session_lives_as_long_as_one_of_its_processes(server, client):
    worker = subprocess.Popen(["sleep", "60"])
    try:
        raw = Raw(server.address)
        session = raw.hello("pair")
        chain = keys(1)
        helper = subprocess.Popen(["sleep", "60"])
        mine = [p.Process(process.pid, started(process.pid)) for process in (helper, worker)]
        token = raw.ask(p.Hello("crew", mine[:1])).session
        assert raw.ask(p.Adopt(token, mine[1:])) == p.Done(2)
        group = raw.join(token, spec())
        raw.ask(p.Prepare(token, group, 1, chain[0]))
        helper.kill()
        helper.wait(5)
        time.sleep(0.3)
        assert server.status()["l1"]["leases"] == 1
        worker.kill()
        worker.wait(5)
        assert until(lambda: server.status()["l1"]["leases"] == 0)
        raw.ask(p.Bye(session))
        raw.close()
    finally:
        worker.kill()
        worker.wait(5)


def test_a_zombie_is_dead(server):
    raw, child = Raw(server.address), subprocess.Popen(["true"])
    assert until(lambda: state_of(child.pid) == "Z")
    session = raw.ask(p.Hello("zombie", [p.Process(child.pid, started(child.pid))])).session
    assert until(lambda: raw.ask(p.Ping(session)) != p.Done())
    child.wait(5)
    raw.close()


def test_who_is_silent_and_holds_nothing_is_forgotten_and_comes_back(server, client):
    assert until(lambda: len(server.status()["clients"]) == 1)
    raw = Raw(server.address)
    session = raw.hello("mute")
    assert until(lambda: len(server.status()["clients"]) == 1, 3)
    assert raw.ask(p.Ping(session)).kind == "session"
    assert raw.ask(p.Hello("mute", [this_process()])).session != session
    assert client._link.state is State.UP
    raw.close()


def found(client, chain, count):
    """(owner, what was found), asked again where a tier took longer than its 50 ms on a busy machine, or where only
    the first question told the client that the server is another one by now."""
    for n in range(10):
        assert client.wait_up(15, spec().root)
        hit = look(client, spec(), chain, f"owner {n}", wait=5.0)
        if hit.ready == count:
            return f"owner {n}", hit
        client.forget(f"owner {n}")
    raise AssertionError(f"{hit.ready} of {count} chunks came back")


def test_tiers_bring_back_what_memory_lost(tiered):
    client = attached(tiered, spec())
    chain = keys(6)
    store(client, spec(), chain)
    assert until(lambda: tiered.status()["l2"][0]["objects"] >= 6 and not tiered.status()["l1"]["leases"])
    assert tiered.ask("POST", "/cache/clear")[1] == {"status": "ok", "cleared": 6}
    assert look(client, spec(), chain, "l1 only").ready == 0
    owner, hit = found(client, chain + keys(1), 6)
    assert all(whole(hit.lease.parts(i), chain[i]) for i in range(6))
    client.forget(owner)
    tiered.kill()
    tiered.start()
    assert client.wait_up(15, spec().root)
    owner, hit = found(client, chain, 6)
    assert whole(hit.lease.parts(5), chain[5])
    client.forget(owner)
    assert until(lambda: tiered.status()["l1"]["leases"] == 0)
    client.close()


def test_a_tier_that_hangs_costs_no_more_than_the_wait():
    tier = open_tier("fault+fake://?fault.hang=1")
    with Local(Level("remote", tier)) as server:
        client = attached(server, spec())
        began = time.monotonic()
        assert look(client, spec(), keys(3), wait=0.3).ready == 0
        assert time.monotonic() - began < 10
        assert look(client, spec(), keys(3), "next").ready == 0
        client.close()
        tier.medium.heal()


def test_a_server_goes_on_when_who_asked_for_figures_gave_up():
    with Local() as server:
        began, go_on = threading.Event(), threading.Event()
        server.loop.call(lambda: (began.set(), go_on.wait(timeout=30)))
        assert began.wait(timeout=30)
        early, done = server.loop.call(lambda: done.append("early")), []
        assert early.cancel()  # as HTTP's event loop does once its patience is at an end
        go_on.set()
        assert server.loop.call(lambda: done.append("late")).result(timeout=30) is None
        assert done == ["late"] and server.loop.alive

        began.clear(), go_on.clear()
        under_way = server.loop.call(lambda: (began.set(), go_on.wait(timeout=30)))
        assert began.wait(timeout=30) and not under_way.cancel()
        go_on.set()
        client = attached(server, spec())
        assert store(client, spec(), keys(2)) == 2
        client.close()


def test_groups_that_nobody_is_in_make_room(server, client):
    for i in range(300):  # of 256
        other = Spec(i.to_bytes(32, "big"), "m", (4096,), 16)
        client.join(other)
        assert client.wait_up(15, other.root)
        store(client, other, keys(1))
        client.leave(other.root)
    assert len(server.status()["groups"]) <= 256
    assert store(client, spec(), keys(1)) == 1, "who is in a group stays in it"


def test_a_group_that_is_left_before_it_was_joined_is_left():
    with Local() as server:
        client = attached(server, spec())
        for i in range(3):
            other = Spec(bytes([i + 1]) * 32, "m", (4096,), 16)
            client.join(other)
            client.leave(other.root)
        (session,) = server.service.sessions.values()
        assert until(lambda: len(server.service.groups) > 1)
        assert until(lambda: session.groups == {1} and len(client.attachment.groups) == 1)
        client.close()


def test_a_group_that_was_left_can_be_given_back_to(server, client):
    chain = keys(3)
    store(client, spec(), chain)
    assert look(client, spec(), chain).ready == 3
    grant = client.prepare(spec().root, keys(2)).wait()
    client.leave(spec().root)
    assert until(lambda: spec().root not in client.attachment.groups)
    assert until(lambda: server.status()["clients"][0]["groups"] == [])
    assert server.status()["l1"]["leases"] == 5
    client.forget("r")
    assert client.complete(grant).wait(15).count == 2
    assert until(lambda: server.status()["l1"]["leases"] == 0)
    assert client.prepare(spec().root, keys(1)).wait() is None
    assert client.lookup("late", spec().root, chain).ready == 0


def test_a_prompt_longer_than_a_lookup_may_be_has_no_tail_and_waits_no_longer_than_one_may():
    tier = open_tier("fake://", capacity_gb=1)
    with Local(Level("remote", tier)) as server:
        which = Spec(b"l" * 32, "m", (64,), 16)
        client = Client(server.address, "long", patience=10.0)
        client.join(which)
        assert client.wait_up(15, which.root)
        chain = keys(p.MAX_KEYS + 1)
        store(client, which, chain[p.MAX_KEYS - 1 : p.MAX_KEYS])
        assert until(lambda: tier.counts().objects == 1)
        client.clear().wait(15)
        store(client, which, chain[: p.MAX_KEYS - 1])
        assert look(client, which, chain, last=8, wait=7200.0).ready == p.MAX_KEYS
        client.close()


@pytest.mark.parametrize("bye", [True, False])
def test_who_still_holds_something_can_go_without_goodbye(bye):
    with Local() as server:
        client, chain = attached(server, spec()), keys(3)
        store(client, spec(), chain)
        assert look(client, spec(), chain).ready == 3
        client.close(bye=bye)
        if bye:
            assert until(lambda: server.state() == ([], 0))
        else:
            time.sleep(0.2)
            assert server.state() == ([], 3), "a worker may still copy"


def test_what_was_told_twice_is_done_once_and_its_first_answer_counts():
    with Local() as server:
        client = attached(server, spec())
        grant = client.prepare(spec().root, keys(2)).wait()
        handle, seen = server.service.handle, []

        def slow(frames):
            reply = handle(frames)
            if isinstance(p.unpack_request(frames[1]), p.Complete):
                seen.append(reply)
                if len(seen) == 1:
                    assert until(lambda: any(len(end.numbers) > 1 for end in list(client._link._ends.values())))
            return reply

        server.service.handle = slow
        client._link.patience, client._link._next_beat = 0.1, math.inf  # told again, and never silent meanwhile
        assert client.complete(grant).wait(15) == p.Done(2)
        assert until(lambda: not client._link._ends and len(seen) > 1)
        assert server.state() == ([], 0)
        client.close()


@pytest.fixture
def mirror():
    """An engine's part of a server's directory."""
    with Local() as server:
        client = attached(server, spec())
        one = Mirror(client, spec().root)
        one.use(client.attachment)
        one.server = server
        yield one
        client.close()


def granted(mirror, key):
    """A slot to write."""
    got = []

    def asked():
        mirror.poll()
        got.append(mirror.prepare_store(key, spec().tokens, Note(b"", "r")))
        mirror.flush()
        return isinstance(got[-1], Chunk)

    assert until(asked)
    return got[-1]


@pytest.mark.parametrize("thrown_away", [False, True])
def test_what_the_server_threw_away_is_not_said_to_be_stored(mirror, thrown_away):
    chunk = granted(mirror, keys(1)[0])
    if thrown_away:
        service = mirror.server.service
        mirror.server.loop.call(lambda: service.directory.forget(None)).result(15)
    mirror.complete_store(chunk, True)
    said = []
    assert until(lambda: said.append(mirror.published([chunk])) or said[-1] is not None)
    assert said[-1] == (not thrown_away) and mirror.server.state() == ([], 0)


def test_a_slot_that_was_granted_goes_back_when_its_chunk_is_dropped(mirror):
    key = keys(1)[0]
    mirror.expect(key, spec().tokens, Note(b"", "r"))
    mirror.flush()
    assert until(lambda: (mirror._listen(), key in mirror._answers)[1])
    mirror.drop(key)
    assert not mirror.busy and until(lambda: mirror.server.state() == ([], 0))


def test_others_can_be_told_and_asked(server, client):
    chain = keys(3)
    store(client, spec(), chain)
    assert client.touch(spec().root, chain[::-1]).wait(15) == p.Done()
    assert client.drop(spec().root, chain[2:]).wait(15) == p.Done(1)
    held = client.lease(spec().root, chain[:2]).wait()
    assert held.slots == [0, 1]
    assert client.lease(spec().root, chain).wait() is None
    assert json.loads(client.stats().wait(15).json)["l1"]["leases"] == 2
    assert client.quota("tenant", 5000).wait(15) == p.Share(0, 5000)
    assert client.clear(spec().root).wait(15) == p.Done(2)
    client.release(held)
    client.release(held)
    assert until(lambda: server.status()["l1"]["used"] == 0)
