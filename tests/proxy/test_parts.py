"""The small parts: cutting streams, choosing engines, sessions, the key for engines."""

from __future__ import annotations

import random

import pytest

from dynamo_lmcache.proxy.args import parse_args
from dynamo_lmcache.proxy.engines import Engine, Pool, open_session
from dynamo_lmcache.proxy.errors import Refusal
from dynamo_lmcache.proxy.metrics import Metrics
from dynamo_lmcache.proxy.order import CHAT, COMPLETIONS, take_order
from dynamo_lmcache.proxy.relay import Events
from tests.proxy.deployments import telemetry


@pytest.mark.parametrize("end", [b"\n\n", b"\r\n\r\n"], ids=["lf", "crlf"])
def test_a_stream_cut_anywhere_is_passed_unchanged_and_in_whole_events(end):
    rng = random.Random(5)
    whole = b"".join(b"data: " + rng.randbytes(rng.randrange(60)).hex().encode() + end for _ in range(200))
    for _ in range(50):
        events, passed, rest = Events(), b"", whole
        while rest:
            cut = rng.randrange(1, 200)
            ready = events.feed(rest[:cut])
            assert not ready or ready.endswith(end)
            passed, rest = passed + ready, rest[cut:]
        assert passed + events.rest() == whole


def test_whole_events_are_never_held():
    events = Events()
    assert [events.feed(b"data: 1\n\n"), events.feed(b"data: 2\n\nda"), events.feed(b"ta: 3\n\n")] == [
        *(b"data: 1\n\n", b"data: 2\n\n", b"data: 3\n\n")
    ]


def test_what_is_no_event_at_all_is_not_held_for_ever():
    events = Events()
    assert events.feed(b"x" * (1 << 20)) == b""
    assert len(events.feed(b"x")) == (1 << 20) + 1


def order(path: str = COMPLETIONS, raw: bytes = b"{}", **headers: str):
    return take_order(path, raw, headers, None, "key")


@pytest.mark.parametrize(
    ("raw", "tokens", "parts"),
    [
        (b'{"prompt": "12345678"}', 3, 1),
        (b'{"prompt": [1, 2, 3, 4, 5]}', 5, 1),
        (b'{"prompt": [[1, 2], [3]]}', 3, 2),
        (b'{"prompt": ["1234", "1234", "1234"]}', 6, 3),
        (b'{"prompt": ["1234"]}', 2, 1),
        (b'{"prompt": []}', 1, 1),
        (b'{"prompt": 7}', 1, 1),
        (b'{"prompt": null}', 5, 1),
        (b'{"prompt": [null]}', 1, 1),
        (b'{"prompt": ["a", 3]}', 2, 2),
    ],
)
def test_tokens_and_parts_of_any_prompt(raw, tokens, parts):
    taken = order(raw=raw)
    assert taken.prompt_tokens == tokens and len(taken.parts()) == parts
    assert len({part.id for part in taken.parts()}) == parts
    for part in taken.parts():
        taken.prefill_body(part)


@pytest.mark.parametrize(
    ("raw", "texts"),
    [
        (b'{"prompt": "a"}', ["a"]),
        (b'{"prompt": ["a", "b"]}', ["a", "b"]),
        (b'{"prompt": [1]}', None),
        (b'{"prompt": ["a", 1]}', None),
        (b'{"prompt": []}', None),
        (b'{"prompt": "a", "echo": true}', None),
        (b'{"prompt": "a", "echo": false}', ["a"]),
        (b'{"prompt": "a", "truncate_prompt_tokens": 5}', None),
    ],
)
def test_text_becomes_ids_only_where_that_changes_nothing(raw, texts):
    assert order(raw=raw).texts() == texts
    assert order(CHAT, raw).texts() is None


@pytest.mark.parametrize(
    ("raw", "tokens"),
    [(b'{"max_tokens": 7}', 7), (b'{"max_completion_tokens": 8, "max_tokens": 7}', 8)]
    + [(raw, 256) for raw in (b"{}", b'{"max_tokens": true}', b'{"max_tokens": -1}', b'{"max_tokens": "x"}')],
)
def test_output_tokens(raw, tokens):
    assert order(raw=raw).output_tokens == tokens


def test_headers_of_the_connection_are_not_passed_on():
    given = {"Connection": "close, X-Mine", "X-Mine": "1", "X-Yours": "2", "Transfer-Encoding": "chunked", "Host": "h"}
    given |= {"X-Request-Id": "theirs", "Accept-Encoding": "gzip", "Content-Length": "5", "Content-Encoding": "gzip"}
    taken = take_order(COMPLETIONS, b"{}", given, None, None)
    assert dict(taken.headers) == {"X-Yours": "2", "X-Request-Id": taken.id, "Content-Type": "application/json"}


def test_the_proxys_key_is_for_clients_without_one():
    assert order().headers["Authorization"] == "Bearer key"
    assert order(Authorization="Bearer mine").headers["Authorization"] == "Bearer mine"


def test_no_two_requests_share_an_id():
    assert len({order().id for _ in range(10_000)}) == 10_000


async def test_the_engine_with_the_fewest_tokens_is_chosen():
    config = parse_args(["--decoder-port", "1,2,3"])
    async with open_session() as http:
        engines = [Engine("decoder", backend, http, config.limits) for backend in config.decoders]
        pool = Pool("decoder", engines, config.limits, Metrics())
        a, b, c = engines
        with a.carrying(100), b.carrying(10), c.carrying(50):
            assert pool.choose() is b and pool.choose(without=[b]) is c
            b.mark_down("test")
            assert pool.choose() is c
            c.mark_down("test")
            a.mark_down("test")
            assert pool.choose() is None
            with pytest.raises(Refusal, match="no decoder is up"):
                raise pool.none_up()
        assert a.tokens == b.tokens == c.tokens == 0


async def test_equals_take_turns():
    config = parse_args(["--decoder-port", "1,2,3"])
    async with open_session() as http:
        pool = Pool("decoder", [Engine("d", b, http, config.limits) for b in config.decoders], config.limits, Metrics())
        chosen = []
        for _ in range(6):
            engine = pool.choose()
            assert engine is not None
            with engine.carrying(1):
                chosen.append(engine.url)
        assert chosen[:3] == chosen[3:] and len(set(chosen)) == 3


async def test_a_session_stays_with_its_engines_and_only_theirs_move():
    config = parse_args(["--decoder-port", "1,2,3,4"])
    async with open_session() as http:
        engines = [Engine("decoder", backend, http, config.limits) for backend in config.decoders]
        pool = Pool("decoder", engines, config.limits, Metrics())
        before = {str(n): pool.choose(str(n)) for n in range(200)}
        assert all(30 <= list(before.values()).count(engine) <= 70 for engine in engines)
        engines[0].mark_down("test")
        after = {name: pool.choose(name) for name in before}
        assert all(after[name] is engine for name, engine in before.items() if engine is not engines[0])


async def test_sessions_are_bound_by_header_and_others_are_spread():
    async with telemetry(["--session-header", "session"], decoders=2) as d:
        for n in range(6):
            async with d.http.post(
                d.url + "/v1/completions", json={"prompt": f"{n}"}, headers={"session": "s"}
            ) as answer:
                await answer.read()
        assert sorted(len(engine.seen) for engine in d.decoders) == [0, 6]
        for n in range(6):
            await d.post(prompt=f"{n}")
        assert all(len(engine.seen) >= 2 for engine in d.decoders)
