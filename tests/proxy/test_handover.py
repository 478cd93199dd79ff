"""Both modes: KV is stored when the decoder starts, ids are exact, and the text is an aggregated server's."""

from __future__ import annotations

import asyncio
import io
import json
import time

import pytest

from tests.proxy.deployments import nixl, said, telemetry, until
from tests.proxy.fakes import Engine, events, prompts_of, running, tokenize, whole

MODES = pytest.mark.parametrize("mode", [telemetry, nixl])
PATHS = pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"prompt": "once upon"}),
        ("/v1/completions", {"prompt": [5, 6, 7]}),
        ("/v1/completions", {"prompt": ["one", "another", "a third"]}),
        ("/v1/completions", {"prompt": [[1, 2], [3, 4]]}),
        ("/v1/completions", {"prompt": "with echo", "echo": True}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "hello"}]}),
    ],
    ids=["text", "ids", "texts", "ids of two", "echo", "chat"],
)


@MODES
@PATHS
async def test_an_answer_is_the_one_an_aggregated_server_gives(mode, path, body):
    body = {"model": "fake", "max_tokens": 6, "seed": 3, **body}
    async with mode() as d:
        d.prefillers[0].store_s = 0.02
        status, answer = await d.post(path, **body)
        assert status == 200
        assert answer == whole(body, prompts_of(body), answer["id"])
        (decode,) = d.decoders[0].seen
        assert decode.hit, "the decoder started before the KV was stored"
        assert len(d.proxy.waits) == 0


@MODES
@PATHS
async def test_a_stream_passes_byte_by_byte(mode, path, body):
    body = {"model": "fake", "max_tokens": 6, "seed": 3, "stream_options": {"include_usage": True}, **body}
    async with mode() as d:
        stream = await d.stream(path, **body)
        engine_id = said(stream)[0]["id"]
        assert stream == b"".join(events(body, prompts_of(body), engine_id, "messages" in body))
        assert d.decoders[0].seen[0].hit


@MODES
async def test_both_engines_see_one_id_and_the_client_is_told_it(mode):
    async with mode() as d:
        async with d.http.post(d.url + "/v1/completions", json={"prompt": "x"}) as answer:
            request_id = answer.headers["X-Request-Id"]
        prefills = [seen for seen in d.prefillers[0].seen if seen.path != "/tokenize"]
        assert [seen.request_id for seen in prefills] == d.decoders[0].ids == [request_id]


@MODES
async def test_requests_that_share_a_client_id_share_nothing_else(mode):
    async with mode() as d:

        async def ask(number: int) -> str:
            body = {"prompt": f"number {number}", "max_tokens": 3}
            headers = {"X-Request-Id": "mine"}
            async with d.http.post(d.url + "/v1/completions", json=body, headers=headers) as answer:
                assert (await answer.json())["choices"] == whole(body, prompts_of(body), "")["choices"]
                return answer.headers["X-Request-Id"]

        ids = await asyncio.gather(*(ask(number) for number in range(20)))
        assert len(set(ids)) == 20 and "mine" not in ids
        assert sorted(d.decoders[0].ids) == sorted(ids)


@MODES
async def test_fifty_streams_at_once_each_get_their_own_answer(mode):
    """Recall: every request's KV is found, under its own id, with words coming in any order."""
    async with mode(["--notify-timeout", "60", "--connect-timeout", "30"], prefillers=2, decoders=2) as d:
        for number, engine in enumerate(d.prefillers):
            engine.store_s = 0.01 * number
            engine.report_first = bool(number)
        for engine in d.decoders:
            engine.pause_s = 0.002

        async def ask(number: int) -> str:
            body = {"prompt": f"prompt {number} " * (number + 1), "max_tokens": 8}
            stream = await d.stream(**body)
            engine_id = said(stream)[0]["id"]
            assert stream == b"".join(events(body, prompts_of(body), engine_id, False))
            return str(engine_id).removeprefix("cmpl-")

        ids = await asyncio.gather(*(ask(number) for number in range(50)))
        assert len(set(ids)) == 50
        decodes = [seen for engine in d.decoders for seen in engine.seen]
        assert sorted(seen.request_id or "" for seen in decodes) == sorted(ids)
        assert all(seen.hit for seen in decodes)
        assert all(10 <= len(engine.seen) <= 40 for engine in d.decoders)
        assert await d.counted("handovers_total", outcome="stored") == 50


@MODES
@pytest.mark.parametrize("first", [True, False], ids=["before the answer", "after it"])
async def test_word_may_come_before_or_after_the_prefills_answer(mode, first):
    async with mode() as d:
        d.prefillers[0].report_first = first
        d.prefillers[0].store_s = 0.1
        d.prefillers[0].pause_s = 0.1 if first else 0.0
        status, _ = await d.post(prompt="hello")
        assert status == 200 and d.decoders[0].seen[0].hit
        assert await d.counted("handovers_total", outcome="stored") == 1


@MODES
async def test_all_ranks_are_waited_for(mode):
    async with mode(ranks=4) as d:
        late, told = asyncio.Event(), []
        assert d.rank_done is not None

        async def slow(own: str, engine_id: str) -> None:
            for rank in range(3):
                await d.rank_done(own, engine_id, rank)
            if mode is telemetry:  # said twice, counted once
                await d.rank_done(own, engine_id, 0)
            told.append(own)
            await asyncio.wait_for(late.wait(), 10)
            await d.rank_done(own, engine_id, 3)

        d.prefillers[0].report = slow
        asking = asyncio.ensure_future(d.post(prompt="hello"))
        await until(lambda: told)
        await asyncio.sleep(0.1)
        assert not d.decoders[0].seen, "started with three of four ranks"
        late.set()
        status, _ = await asking
        assert status == 200 and d.decoders[0].seen[0].hit


@MODES
async def test_a_silent_prefiller_delays_but_never_stops(mode):
    async with mode(["--notify-timeout", "2"]) as d:
        d.prefillers[0].report = None
        took = []
        for _ in range(6):
            start = time.monotonic()
            status, answer = await d.post(prompt="hello", max_tokens=2)
            took.append(time.monotonic() - start)
            body = {"prompt": "hello", "max_tokens": 2}
            assert status == 200 and answer == whole(body, prompts_of(body), answer["id"])
        assert took[0] >= 2
        assert took[5] < 1.5, "waits in vain get shorter"
        assert await d.counted("handovers_total", outcome="timeout") == 6


async def test_a_prefiller_that_reports_again_is_waited_for_again():
    async with telemetry(["--notify-timeout", "0.6"]) as d:
        engine = d.prefillers[0]
        report, engine.report = engine.report, None
        for _ in range(4):
            await d.post(prompt="hello")
        engine.report = report
        for _ in range(20):
            await d.post(prompt="hello")
            if not d.proxy.prefillers.engines[0].unheard:
                break
        engine.store_s = 0.3
        await d.post(prompt="another")
        assert d.decoders[0].seen[-1].hit


async def test_a_store_that_failed_is_not_waited_for():
    async with telemetry(ranks=8) as d:

        async def failed(own: str, engine_id: str) -> None:
            assert d.rank_done is not None
            await d.rank_done(own, engine_id, 2, status="failed")

        d.prefillers[0].report = failed
        start = time.monotonic()
        status, _ = await d.post(prompt="hello")
        assert status == 200 and time.monotonic() - start < 10
        assert await d.counted("handovers_total", outcome="failed") == 1


async def test_the_prefill_is_one_token_and_otherwise_the_clients_request():
    body = {
        "model": "fake",
        "messages": [{"role": "user", "content": "hi"}],
        "tools": [{"type": "function"}],
        "max_completion_tokens": 50,
        "max_tokens": 60,
        "min_tokens": 5,
        "n": 2,
        "logprobs": True,
        "stream": True,
        "top_logprobs": 3,
        "stream_options": {"include_usage": True},
        "cache_salt": "s",
        "temperature": 0.5,
        "kv_transfer_params": {"lmcache.tag.user": "u"},
        "response_format": {"type": "json_object"},
    }
    async with telemetry() as d:
        headers = {"Authorization": "Bearer k", "X-Data-Parallel-Rank": "1", "traceparent": "00-1-2-3"}
        async with d.http.post(d.url + "/v1/chat/completions", json=body, headers=headers) as answer:
            await answer.read()
        (prefill,), (decode,) = d.prefillers[0].seen, d.decoders[0].seen
        assert decode.body == body
        assert prefill.body == {
            "model": "fake",
            "messages": body["messages"],
            "tools": body["tools"],
            "cache_salt": "s",
            "max_completion_tokens": 1,
            "max_tokens": 1,
            "stream": False,
            "temperature": 0.5,
            "kv_transfer_params": {"lmcache.tag.user": "u"},
        }
        for seen in (prefill, decode):
            assert {name: seen.headers[name] for name in headers} == headers


async def test_nixl_prefills_carry_upstreams_transfer_params():
    async with nixl(decoders=2, ranks=2) as d:
        await d.post(prompt="hello", max_tokens=4, kv_transfer_params={"lmcache.tag.user": "u"})
        tokenized, prefill = d.prefillers[0].seen
        number, decode = next((i, engine.seen[0]) for i, engine in enumerate(d.decoders) if engine.seen)
        assert tokenized.path == "/tokenize" and tokenized.body == {"prompt": "hello"}
        assert prefill.body["prompt"] == decode.body["prompt"] == tokenize("hello")
        assert prefill.body["max_tokens"] == 1 and decode.body["max_tokens"] == 4
        base = 10 * number
        assert prefill.body["kv_transfer_params"] == {
            "lmcache.tag.user": "u",
            "ret_first_tok": True,
            "disagg_spec": {
                "req_id": prefill.request_id,
                "receiver_host": "127.0.0.1",
                "receiver_init_port": [7300 + base, 7301 + base],
                "receiver_alloc_port": [7400 + base, 7401 + base],
            },
        }
        assert decode.body["kv_transfer_params"] == {"lmcache.tag.user": "u"}


async def test_a_clients_disagg_spec_does_not_reach_the_prefiller():
    async with nixl() as d:
        evil = {"disagg_spec": {"req_id": "x", "receiver_host": "10.0.0.1"}}
        await d.post(prompt="hello", kv_transfer_params=evil)
        assert d.prefillers[0].seen[-1].body["kv_transfer_params"]["disagg_spec"]["receiver_host"] == "127.0.0.1"


async def test_big_requests_pass_whole():
    messages = [{"role": "user", "content": "ä" * 1_500_000}]
    text = io.BytesIO(json.dumps({"messages": messages, "max_tokens": 1}).encode())
    async with telemetry() as d, d.http.post(d.url + "/v1/chat/completions", data=text) as answer:
        assert answer.status == 200
        assert (await answer.json())["usage"]["prompt_tokens"] == 3_000_006
        assert d.decoders[0].seen[0].hit


async def test_one_server_alone_says_the_same():
    """The fakes' own check: an engine asked directly, as an aggregated server is."""
    engine = Engine()
    body = {"prompt": "once upon", "max_tokens": 6, "seed": 3}
    async with running(engine), telemetry() as d:
        async with d.http.post(f"http://127.0.0.1:{engine.port}/v1/completions", json=body) as answer:
            direct = await answer.json()
        _, through = await d.post(**body)
        assert direct["choices"] == through["choices"] and direct["usage"] == through["usage"]
