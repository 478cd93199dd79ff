"""Reports and notifications are input from outside: exact ids, and nothing in them can do harm."""

from __future__ import annotations

import asyncio
import io
import json
import random
import time
import uuid
from typing import Any

import msgspec
import pytest
import zmq
import zmq.asyncio

from dynamo_lmcache.proxy.metrics import Metrics
from dynamo_lmcache.proxy.notify import MAX_NOTIFICATION, Outcome, Waits, own_id, take_notification, take_report
from tests.proxy.deployments import nixl, telemetry, until

ID = "0123456789abcdef" * 2


@pytest.mark.parametrize(
    ("engine_id", "ours"),
    [
        (ID, ID),
        (f"cmpl-{ID}-0", ID),
        (f"cmpl-{ID}-0-89abcdef", ID),
        (f"cmpl-{ID}.12-0-89abcdef", f"{ID}.12"),
        (f"chatcmpl-{ID}", ID),
        (f"chatcmpl-{ID}-12345678", ID),
        (f"chatcmpl-{ID}.3", f"{ID}.3"),
        (f"cmpl-{ID}0-0", None),
        (f"cmpl-x{ID}-0", None),
        (f"cmpl-{ID[:-1]}-0", None),
        (f"cmpl-{ID}-0-89abcdef-1", None),
        (f"cmpl-{ID}\n", None),
        (f"x-{ID}", None),
        (f"cmpl-{ID.upper()}-0", None),
        ("", None),
        ("cmpl-", None),
    ],
)
def test_ids_are_matched_whole(engine_id, ours):
    assert own_id(engine_id) == ours


def test_every_id_that_vllm_can_make_is_recognised():
    """vLLM appends 8 hex digits, which may happen to be decimal ones only."""
    rng = random.Random(1)
    for _ in range(2000):
        suffix = f"{rng.getrandbits(32):08x}" if rng.random() < 0.5 else f"{rng.randrange(10**8):08d}"
        for made in (f"cmpl-{ID}-{rng.randrange(100)}", f"chatcmpl-{ID}"):
            assert own_id(made) == own_id(f"{made}-{suffix}") == ID


async def outcome(wait: Any) -> Outcome:
    return await wait.outcome(0.01)


async def test_a_wait_ends_when_all_ranks_are_done():
    waits = Waits(Metrics())
    with waits.open("a") as a, waits.open("b", ranks=2) as b:
        for rank in (0, 0, 1):
            waits.tell("a", True, rank=rank, ranks=3)
        assert await outcome(a) is Outcome.TIMEOUT
        waits.tell("a", True, rank=2, ranks=3)
        assert await outcome(a) is Outcome.STORED
        waits.tell("b", True)
        assert await outcome(b) is Outcome.TIMEOUT
        waits.tell("b", False, rank=7)
        assert await outcome(b) is Outcome.FAILED
        waits.tell("b", True)
        assert await outcome(b) is Outcome.FAILED
    assert not waits.tell("a", True) and len(waits) == 0


async def test_a_cancelled_wait_leaves_nothing_behind():
    waits = Waits(Metrics())

    async def waiting() -> None:
        with waits.open("a") as wait:
            await wait.outcome(30)

    task = asyncio.ensure_future(waiting())
    await until(lambda: len(waits))
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert len(waits) == 0


def mutated(rng: random.Random, message: bytes) -> bytes:
    """`message` with a few bytes changed, cut, doubled or put in."""
    data = bytearray(message)
    for _ in range(rng.randrange(1, 6)):
        at = rng.randrange(len(data) + 1)
        match rng.randrange(5):
            case 0:
                data[at : at + 1] = bytes([rng.randrange(256)])
            case 1:
                del data[at : at + rng.randrange(1, 20)]
            case 2:
                data[at:at] = rng.randbytes(rng.randrange(1, 8))
            case 3:
                data[at:at] = data[at : at + rng.randrange(1, 30)]
            case 4:
                data[at : at + 1] = rng.choice([b"\xdd\xff\xff\xff\xff", b"\xdb\xff\xff\xff\xff", b"\x91" * 2000, b"["])
    return bytes(data)


async def test_five_thousand_mutated_messages_do_no_harm():
    rng, waits = random.Random(7), Waits(Metrics())
    notif = msgspec.msgpack.encode({"type": "ProxyNotif", "req_id": ID, "rank": 1, "status": "stored"})
    report = {"event": "request_store_finished", "request_ids_set": [f"cmpl-{ID}-0"], "model_name": "m"}
    text = json.dumps({**report, "world_size": 2, "kv_rank": 0, "status": "stored"}).encode()
    with waits.open(f"{ID}.1") as bystander:
        for _ in range(5000):
            take_notification([mutated(rng, notif)], waits)
            take_report(mutated(rng, text), waits)
            take_notification([rng.randbytes(rng.randrange(80)) for _ in range(rng.randrange(3))], waits)
        assert await outcome(bystander) is Outcome.TIMEOUT
        for hostile in (b"", b"\x91" * 50_000, b"\xc1", notif + b"\x00"):
            take_notification([hostile], waits)
        for hostile in (b"", b"[" * 100_000, b"{" * 100_000, b'{"event":1}', b"null", b"\xff\xfe"):
            assert take_report(hostile, waits) is None
        take_notification([msgspec.msgpack.encode({"type": "ProxyNotif", "req_id": f"{ID}.1"})], waits)
        assert await outcome(bystander) is Outcome.STORED


@pytest.mark.parametrize("world_size", [0, -1, 10**9])
async def test_an_absurd_world_is_refused(world_size):
    report = {"event": "request_store_finished", "request_ids_set": [ID], "world_size": world_size, "kv_rank": 0}
    assert take_report(json.dumps(report).encode(), Waits(Metrics())) is None


async def test_other_events_tell_nothing():
    waits = Waits(Metrics())
    with waits.open(ID) as wait:
        answer = take_report(json.dumps({"event": "request_started", "request_ids_set": [ID]}).encode(), waits)
        assert answer == {"status": "ok", "notified": 0, "total": 1}
        assert await outcome(wait) is Outcome.TIMEOUT


async def test_one_report_may_tell_of_many():
    waits = Waits(Metrics())
    ids = [uuid.uuid4().hex for _ in range(3)]
    with waits.open(ids[0]) as first, waits.open(ids[2]) as last:
        report = {"event": "request_store_finished", "request_ids_set": [f"cmpl-{own}-0" for own in ids]}
        answer = take_report(json.dumps({**report, "world_size": 1, "kv_rank": 0}).encode(), waits)
        assert answer == {"status": "ok", "notified": 2, "total": 3}
        assert await outcome(first) is await outcome(last) is Outcome.STORED


async def test_garbage_on_the_telemetry_port_does_not_disturb_requests():
    async with telemetry() as d:
        url = f"http://127.0.0.1:{d.config.notify_port}"
        for data, status in (
            (b"garbage", 400),
            (b"x" * (5 << 20), 413),
            (b'{"event": "other", "request_ids_set": []}', 200),
        ):
            async with d.http.post(f"{url}/api/v1/telemetry", data=io.BytesIO(data)) as answer:
                assert answer.status == status
        async with d.http.get(f"{url}/api/v1/telemetry") as answer:
            assert answer.status == 405
        status, _ = await d.post(prompt="hello")
        assert status == 200 and d.decoders[0].seen[0].hit


async def test_garbage_on_the_zmq_port_does_not_disturb_requests():
    rng = random.Random(3)
    async with nixl() as d:
        context = zmq.asyncio.Context()
        socket = context.socket(zmq.PUSH)
        socket.setsockopt(zmq.LINGER, 0)
        try:
            socket.connect(f"tcp://127.0.0.1:{d.config.notify_port}")
            for _ in range(300):
                await socket.send_multipart([rng.randbytes(rng.randrange(200)) for _ in range(rng.randrange(1, 4))])
            await until(lambda: malformed(d) >= 300)
            await socket.send(b"x" * (MAX_NOTIFICATION + 1))  # the connection is cut, and made again
            with d.proxy.waits.open(ID, ranks=1) as wait:
                for _ in range(100):
                    await socket.send(msgspec.msgpack.encode({"type": "ProxyNotif", "req_id": ID}))
                    if await wait.outcome(0.05) is Outcome.STORED:
                        break
                else:
                    pytest.fail("nothing is heard any more")
            assert malformed(d) == 300, "the oversize message was read"
            _, writer = await asyncio.open_connection("127.0.0.1", d.config.notify_port)
            writer.write(rng.randbytes(4096))  # not ZMQ's protocol at all, or an old one's
            await writer.drain()
            writer.close()
        finally:
            socket.close()
            context.term()
        start = time.monotonic()
        status, _ = await d.post(prompt="hello")
        assert status == 200 and d.decoders[0].seen[0].hit and time.monotonic() - start < 10


def malformed(d: Any) -> float:
    return d.proxy.metrics.registry.get_sample_value("lmcache_proxy_notifications_total", {"kind": "malformed"}) or 0
