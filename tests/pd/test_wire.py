"""Messages: what they look like to others, and what nonsense does to those who read it, which must be nothing."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
import xxhash
import zmq

from lmcache_ext.pd import Geometry, Target, identity, wire
from tests.pd.peers import CHUNK, ROW, ROWS, Decode, Peer, Prefill, keys, until
from tests.pd.test_handover import ended, settle

pytest.importorskip("nixl", reason="nixl is not installed")

GEOMETRY = Geometry(CHUNK, ROWS, ROW)
S = b"s" * wire.SESSION_BYTES
MESSAGES: list[Any] = [
    wire.AllocRequest(S, 1, "r", keys("a", 3), 100, 1.0),
    wire.ChunksWritten(S, 1, [0, 2], [b"x" * 16] * 2),
    wire.CancelNotif(S, 1, "r", True),
    wire.Pong(S),
    wire.Bye(S),
]
ANSWERS: list[Any] = [
    wire.AllocResponse(S, 0, [3, 4, 5], [1]),
    wire.ChunksTaken(S, 0, [0], [1]),
    wire.Ping(S),
    wire.Refusal("request", "no", S, 0),
]


@pytest.mark.parametrize("message", MESSAGES + ANSWERS)
def test_messages_come_out_as_they_went_in(message):
    decode = wire.decode_from_sender if message in MESSAGES else wire.decode_from_receiver
    assert decode(wire.sealed(message)) == message
    frame, total = wire.sealed(message)
    assert decode([frame]) is None and decode([frame, total[:-1] + b"?"]) is None
    assert decode([frame + b"\0", total]) is None and decode([]) is None


def test_names_are_upstreams():
    fields = msgspec.msgpack.decode(wire.encode(MESSAGES[0]))
    assert fields["type"] == "AllocRequest" and {"req_id", "keys", "last_chunk_toks"} <= fields.keys()
    fields = msgspec.msgpack.decode(wire.encode(ANSWERS[0]))
    assert fields["type"] == "AllocResponse" and {"remote_indexes", "already_sent_indexes"} <= fields.keys()
    assert msgspec.msgpack.decode(wire.encode(wire.ProxyNotif("r"))) == {"type": "ProxyNotif", "req_id": "r"}


def test_bytes_of_a_chunk_are_whole_rows():
    assert [GEOMETRY.nbytes(tokens) // ROW for tokens in (1, 16, 17, 255, 256)] == [1, 1, 2, 16, 16]
    assert GEOMETRY.slot_bytes == ROWS * ROW


def test_this_process_is_itself_and_alive_and_others_are_not():
    import os

    me = identity.own()
    fd = identity.watch(me)
    assert identity.same_machine(me) and fd is not None
    os.close(fd)
    assert identity.watch(msgspec.structs.replace(me, start=me.start + 1)) is None, "a number that was given anew"
    assert not identity.same_machine(msgspec.structs.replace(me, boot="other"))


class Nonsense:
    """Frames that are nearly right. Half of them bear the sum of what they say."""

    def __init__(self, seed: int, messages: list[Any]) -> None:
        self._rng = random.Random(seed)
        self.messages = messages

    def __call__(self) -> list[bytes]:
        rng = self._rng
        message = rng.choice(self.messages)
        if rng.random() < 0.5:
            frame = self._bytes(wire.encode(message))
        else:
            fields = msgspec.msgpack.decode(wire.encode(message))
            name = rng.choice([name for name in fields if name not in ("session", "number")])
            fields[name] = self._value(fields[name])
            frame = msgspec.msgpack.encode(fields)
        total = xxhash.xxh3_64_digest(frame) if rng.random() < 0.8 else rng.randbytes(rng.randrange(10))
        frames = [frame, total]
        if rng.random() < 0.05:
            frames = frames[: rng.randrange(2)] or frames * 2
        return frames

    def _bytes(self, frame: bytes) -> bytes:
        rng, changed = self._rng, bytearray(frame)
        for _ in range(rng.randrange(1, 4)):
            at = rng.randrange(len(changed) + 1)
            kind = rng.randrange(3)
            if kind == 0:
                changed[at:at] = rng.randbytes(rng.randrange(1, 9))
            elif kind == 1:
                del changed[at : at + rng.randrange(1, 9)]
            elif at < len(changed):
                changed[at] = rng.randrange(256)
        return bytes(changed)

    def _value(self, value: Any) -> Any:
        rng = self._rng
        if rng.random() < 0.2:
            return rng.choice([None, "", "r" * 600, b"", 1e308, float("nan"), float("inf"), [], {}, [[]] * 3, True])
        if isinstance(value, list):
            changed = list(value) * rng.choice([0, 1, 1, 1, 2, 50])
            return [self._value(each) if rng.random() < 0.3 else each for each in changed]
        if isinstance(value, bytes):
            return rng.choice([rng.randbytes(len(value)), rng.randbytes(rng.randrange(64)), b""])
        if isinstance(value, str):
            return rng.choice(["", "r" * 600, value + "?"])
        return rng.choice([-1, 0, 1, 2, 7, 255, 256, 257, -(2**63), 2**63, -1.0, rng.randrange(16)])


@pytest.fixture
def sockets() -> Iterator[Any]:
    """Sockets of the test: (kind) → socket, all closed afterwards."""
    context = zmq.Context()
    made: list[Any] = []

    def make(kind: int) -> Any:
        made.append(context.socket(kind))
        return made[-1]

    yield make
    for each in made:
        each.close(0)
    context.term()


def greet(sockets: Any, target: Target, mutate: Nonsense | None = None, times: int = 0) -> wire.NixlInitResponse:
    """Say `times` times nonsense on the init port, then ask properly for a session."""
    socket = sockets(zmq.DEALER)
    socket.connect(f"tcp://{target.host}:{target.init_port}")
    for _ in range(times):
        assert mutate is not None
        socket.send_multipart([b"", *mutate()])
    socket.send_multipart([b"", *wire.sealed(wire.NixlInitRequest(wire.VERSION, identity.own(), GEOMETRY))])
    while socket.poll(10_000):
        answer = wire.decode_answer(socket.recv_multipart()[1:])
        if isinstance(answer, wire.NixlInitResponse):
            return answer
    raise AssertionError("the receiver does not answer any more")


def numbered(messages: list[Any], session: bytes, number: int) -> list[Any]:
    """`messages` of a session, about its request `number`."""
    given = {"session": session, "number": number}
    return [
        msgspec.structs.replace(message, **{name: value for name, value in given.items() if hasattr(message, name)})
        for message in messages
    ]


def test_12000_frames_of_nonsense_do_a_receiver_nothing(sockets):
    decode, prefill = Peer(Decode, slots=64, alloc_wait_s=0.2, drain_s=0.1), Peer(Prefill, slots=8)
    target = decode("target")
    init = wire.NixlInitRequest(1, identity.own(), GEOMETRY)
    session = greet(sockets, target, Nonsense(1, [init]), 2000).session
    socket = sockets(zmq.DEALER)
    socket.connect(f"tcp://{target.host}:{target.alloc_port}")
    nonsense = Nonsense(2, [])
    for i in range(10_000):
        if i % 20 == 0:
            if i % 200 == 0:  # a number that happened to be high has made the session useless
                socket.send_multipart(wire.sealed(wire.Bye(session)))
                session = greet(sockets, target).session
            else:
                socket.send_multipart(wire.sealed(wire.CancelNotif(session, i - 20, "r", True)))
            nonsense.messages = numbered(MESSAGES[:4], session, i)
            socket.send_multipart(wire.sealed(nonsense.messages[0]))  # what the others are about
        socket.send_multipart(nonsense())
        if i % 1000 == 500:  # real traffic beside it
            prefill("begin", f"r{i}", target, keys(i, 2))
    names = [f"r{i}" for i in range(500, 10_000, 1000)]
    assert set(ended(prefill, *names).values()) <= {"stored", "full"}
    socket.send_multipart(wire.sealed(wire.Bye(session)))
    state = settle(decode, *names)
    assert state["malformed"] > 4000 and state["refused"] > 500 and "fault" not in state and state["placed"] > 50
    prefill("begin", "after", target, keys("after", 64))
    assert ended(prefill, "after") == {"after": "stored"}
    settle(decode, "after")
    prefill.close(), decode.close()


def test_8000_frames_of_nonsense_do_a_sender_nothing(sockets):
    """A receiver that has gone mad: real at the handshake, and then this."""
    decode = Peer(Decode, slots=16)
    options = {"slots": 8, "answer_s": 0.3, "alloc_wait_s": 0.3, "connect_s": 1.0, "retry_s": 0.01, "silence_s": 30}
    prefill = Peer(Prefill, **options)
    init, alloc = sockets(zmq.ROUTER), sockets(zmq.ROUTER)
    ports = [each.bind_to_random_port("tcp://127.0.0.1") for each in (init, alloc)]
    mad = Target("127.0.0.1", *ports)
    answer = greet(sockets, decode("target"))
    rng, sent, names = random.Random(3), 0, []
    until_s = time.monotonic() + 30
    while sent < 8000:
        assert time.monotonic() < until_s
        names.append(f"m{len(names)}")
        prefill("begin", names[-1], mad, keys(names[-1], 3))
        if init.poll(10):
            route = init.recv_multipart()[0]
            garbled = Nonsense(rng.randrange(1 << 30), [wire.Refusal("busy")])
            for _ in range(3):
                init.send_multipart([route, b"", *garbled()])
            init.send_multipart([route, b"", *wire.sealed(answer)])
        while alloc.poll(20):
            route, *frames = alloc.recv_multipart()
            said = wire.decode_from_sender(frames)
            if isinstance(said, wire.AllocRequest):
                garbled = Nonsense(rng.randrange(1 << 30), numbered(ANSWERS, said.session, said.number))
                for _ in range(200):
                    alloc.send_multipart([route, *garbled()])
                sent += 200
    for name in names:
        prefill("cancel", name, mad)
    until(lambda: set(names) <= prefill("outcomes").keys() and prefill("quiet"), 15)
    assert "fault" not in prefill("state") and prefill("state")["malformed"] > 2000
    prefill("begin", "after", decode("target"), keys("after", 8))
    assert ended(prefill, "after") == {"after": "stored"}
    prefill.close(), decode.close()
