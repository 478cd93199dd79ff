"""What is said on the wire, by hand."""

from __future__ import annotations

import os
import time
from pathlib import Path

import msgspec
import pytest
import zmq

from lmcache_ext.server import protocol as p
from lmcache_ext.server.owners import this_process
from tests.server.helpers import Raw, keys, spec, until


@pytest.fixture
def raw(server):
    client = Raw(server.address)
    yield client
    client.close()


def test_welcome_says_where_the_memory_is(server, raw):
    welcome = raw.ask(p.Hello("me", [this_process()]))
    assert welcome.size == 64 << 20
    assert Path(welcome.path).stat().st_size == welcome.size
    assert welcome.server.pid == server.process.pid
    assert len(raw.boot) == 16
    raw.ask(p.Bye(welcome.session))


def test_a_chunk_is_reserved_written_found_leased_and_dropped(raw):
    session = raw.hello()
    joined = raw.ask(p.Join(session, spec("life").root, "life", [8192, 5000], 16))
    assert (joined.slot_bytes, joined.starts) == (16384, [0, 8192])
    group, chain = joined.group, keys(3)
    offsets = p.unpack_offsets(raw.ask(p.Prepare(session, group, 1, b"".join(chain))).offsets)
    assert len({offset // 16384 for offset in offsets}) == 3
    ask = p.Ask("r", b"".join(chain))
    assert raw.ask(p.Lookup(session, group, [ask])).answers == [p.Answer(0, False)]
    again = raw.ask(p.Prepare(session, group, 2, chain[0])).offsets
    assert p.unpack_offsets(again) == [p.EXISTS]
    assert raw.ask(p.Complete(session, 1, True, [2])).count == 2
    leased = raw.ask(p.Lookup(session, group, [p.Ask("r", b"".join(chain), ticket=3)])).answers[0]
    assert (leased.ready, p.unpack_offsets(leased.offsets)) == (2, offsets[:2])
    assert raw.ask(p.Lease(session, group, 4, b"".join(chain))).offsets == b""
    assert p.unpack_offsets(raw.ask(p.Lease(session, group, 4, b"".join(chain[:2]))).offsets) == offsets[:2]
    assert raw.ask(p.Drop(session, group, b"".join(chain))) == p.Done(2)
    assert raw.ask(p.Lookup(session, group, [ask])).answers[0].ready == 0
    assert raw.ask(p.Release(session, [3, 4, 99])) == p.Done(2)
    assert raw.ask(p.Release(session, [3])) == p.Done(0)
    assert raw.ask(p.Bye(session)) == p.Done(0)


def test_what_left_is_told_to_who_asks(raw):
    session = raw.hello()
    group, other = raw.join(session, spec("leaving")), raw.join(session, spec("elsewhere"))
    chain, foreign = keys(3), keys(1)
    raw.ask(p.Prepare(session, group, 1, b"".join(chain)))
    raw.ask(p.Prepare(session, other, 2, foreign[0]))
    before = raw.ask(p.Complete(session, 1, True)).at
    assert raw.ask(p.Complete(session, 2, True)).at == before
    ask = [p.Ask("r", chain[0])]
    assert raw.ask(p.Lookup(session, group, ask)).at == before
    assert raw.ask(p.Departures(session, group, before)) == p.Departed(b"", before, False, False)
    raw.ask(p.Drop(session, group, b"".join(chain[1:])))
    raw.ask(p.Drop(session, other, foreign[0]))
    assert raw.ask(p.Departures(session, group, before)) == p.Departed(b"".join(chain[1:]), before + 3, False, False)
    assert raw.ask(p.Departures(session, other, before)).keys == foreign[0]
    assert raw.ask(p.Departures(session, group, before + 3)).keys == b""
    raw.ask(p.Prepare(session, group, 3, chain[2]))
    assert raw.ask(p.Complete(session, 3, True)).at == before + 3
    assert raw.ask(p.Departures(session, group, before)).keys == chain[1]  # the other one is there again
    assert raw.ask(p.Lookup(session, group, ask)).at == before + 3
    assert raw.ask(p.Departures(session, 99, 0)).kind == "group"
    raw.ask(p.Clear(session, 0))
    raw.ask(p.Bye(session))


def test_many_asks_in_one_request_each_get_their_answer(raw):
    session = raw.hello()
    group, chain = raw.join(session, spec("batch")), keys(4)
    raw.ask(p.Prepare(session, group, 1, b"".join(chain[:3])))
    raw.ask(p.Complete(session, 1, True))
    asks = [p.Ask(str(n), b"".join(chain[n:])) for n in range(4)] + [p.Ask("none", b"")]
    assert [answer.ready for answer in raw.ask(p.Lookup(session, group, asks)).answers] == [3, 2, 1, 0, 0]
    raw.ask(p.Bye(session))


def test_another_groups_chunk_is_not_found(raw):
    session, chain = raw.hello(), keys(1)
    one, two = raw.join(session, spec("one")), raw.join(session, spec("two", (4096,)))
    raw.ask(p.Prepare(session, one, 1, chain[0]))
    raw.ask(p.Complete(session, 1, True))
    assert raw.ask(p.Lookup(session, two, [p.Ask("r", chain[0])])).answers[0].ready == 0
    assert raw.ask(p.Lease(session, two, 2, chain[0])).offsets == b""
    assert raw.ask(p.Drop(session, two, chain[0])) == p.Done(0)
    assert raw.ask(p.Lookup(session, one, [p.Ask("r", chain[0])])).answers[0].ready == 1
    raw.ask(p.Bye(session))


def wrong(session: bytes, group: int) -> list[tuple[str, object]]:
    return [
        ("session", p.Ping(bytes(16))),
        ("group", p.Lookup(session, 999, [])),
        ("group", p.Join(session, spec("wrong").root, "x", [1], 16)),
        ("refused", p.Join(session, spec("huge").root, "x", [1 << 30], 16)),
        ("ticket", p.Complete(session, 12345, True)),
        ("ticket", p.Prepare(session, group, 0, b"")),
        ("malformed", p.Lease(session, group, 7, b"no key")),
        ("malformed", p.Lookup(session, group, [p.Ask("a", bytes(32 * 4096)), p.Ask("b", bytes(32))])),
        ("refused", p.Hello("ghost", [p.Process(2**22 - 1, 5)])),
        ("refused", p.Hello("other", [p.Process(os.getpid(), 5)])),
        ("refused", p.Adopt(session, [this_process(), p.Process(1, 1)])),
    ]


def test_every_mistake_has_an_answer_of_its_kind(raw):
    session = raw.hello()
    group = raw.join(session, spec("wrong"))
    for kind, request in wrong(session, group):
        reply = raw.ask(request)
        assert isinstance(reply, p.Error), request
        assert reply.kind == kind, (request, reply)
    assert raw.ask(p.Ping(session)) == p.Done()
    raw.ask(p.Bye(session))


@pytest.mark.parametrize(
    ("frames", "kind"),
    [
        ([b"x"], "malformed"),
        ([], "malformed"),
        ([b"", b""], "malformed"),
        ([p.REQUEST.pack(b"??", 1, 5, 0), b""], "malformed"),
        ([p.REQUEST.pack(b"LX", 1, 5, 0), b"\xc1"], "malformed"),
        ([p.REQUEST.pack(b"LX", 1, 5, 0), msgspec.msgpack.encode(["ping"])], "malformed"),
        ([p.REQUEST.pack(b"LX", 1, 5, 0), msgspec.msgpack.encode(["what", bytes(16)])], "malformed"),
        ([p.REQUEST.pack(b"LX", 2, 5, 0), b"anything that version 2 says"], "version"),
        ([p.REQUEST.pack(b"LX", 1, 5, 0), msgspec.msgpack.encode(["ping", bytes(16)]), b"more"], "malformed"),
    ],
)
def test_what_is_no_request_is_answered_too(raw, frames, kind):
    raw.send(frames or [b""])
    _, reply = raw.receive()
    assert reply.kind == kind


def test_a_newer_minor_version_may_say_more(raw):
    session = raw.hello()
    raw.send([p.REQUEST.pack(b"LX", 1, 500, 0), msgspec.msgpack.encode(["ping", session, "and", {"more": 1}])])
    assert raw.receive() == (500, p.Done())
    raw.ask(p.Bye(session), number=501)


def test_what_came_too_late_or_out_of_order_does_nothing(raw):
    session = raw.hello()
    group, chain = raw.join(session, spec("late")), keys(1)
    reply = raw.ask(p.Prepare(session, group, 1, chain[0]), deadline=time.monotonic() - 0.01, number=10)
    assert reply.kind == "late"
    assert raw.ask(p.Release(session, [1]), number=12) == p.Done(0)
    assert raw.ask(p.Prepare(session, group, 1, chain[0]), number=11).kind == "stale"
    assert raw.ask(p.Hello("x", [this_process()]), deadline=1e-9).kind == "late"
    assert p.unpack_offsets(raw.ask(p.Prepare(session, group, 2, chain[0]), number=13).offsets)[0] >= 0
    assert raw.ask(p.Bye(session), number=14) == p.Done(1)


def test_quota_over_the_wire(raw):
    session = raw.hello()
    group, salt = raw.join(session, spec("quota")), p.salt_digest("tenant")
    assert raw.ask(p.Quota(session, salt, 2 * 12288)) == p.Share(0, 2 * 12288)
    offsets = p.unpack_offsets(raw.ask(p.Prepare(session, group, 1, b"".join(keys(3)), salt=salt)).offsets)
    assert offsets[2] == p.QUOTA
    assert raw.ask(p.Quota(session, salt)) == p.Share(2 * 12288, 2 * 12288)
    assert raw.ask(p.Quota(session, salt, -1)).limit == -1
    raw.ask(p.Bye(session))


def test_a_frame_that_is_too_large_cuts_only_its_sender_off(server, raw):
    other = Raw(server.address)
    session = other.hello()
    raw.send([bytes(p.REQUEST.size), bytes(p.MAX_FRAME + 1)])
    assert raw.receive(0.3) is None
    assert other.ask(p.Ping(session)) == p.Done()
    other.ask(p.Bye(session))
    other.close()


def test_noise_on_the_port_does_no_harm(server, raw):
    socket = zmq.Context.instance().socket(zmq.STREAM)
    socket.linger = 0
    socket.connect(server.address)
    who = socket.recv()
    socket.recv()
    socket.send_multipart([who, os.urandom(5000)])
    socket.close()
    session = raw.hello()
    assert raw.ask(p.Ping(session)) == p.Done()
    raw.ask(p.Bye(session))
    assert until(lambda: not server.status()["clients"])
    assert server.status()["errors"].get("internal", 0) == 0
