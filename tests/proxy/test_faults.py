"""Engines that are down, dead, slow or wrong; clients that leave; too much of everything."""

from __future__ import annotations

import asyncio
import io
import json
import time
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from tests.proxy.deployments import nixl, said, telemetry, until
from tests.proxy.fakes import prompts_of, whole

MODES = pytest.mark.parametrize("mode", [telemetry, nixl])
ERROR = {"message": "bad", "type": "BadRequestError", "param": "prompt", "code": 400}


def kinds(answer: Any) -> tuple[str, int]:
    assert set(answer) == {"error"} and set(answer["error"]) == {"message", "type", "param", "code"}
    return answer["error"]["type"], answer["error"]["code"]


@MODES
async def test_without_a_decoder_the_answer_is_503_and_comes_at_once(mode):
    async with mode() as d:
        await d.decoders[0].die()
        for _ in range(2):
            async with d.http.post(d.url + "/v1/completions", json={"prompt": "x"}) as answer:
                assert answer.status == 503 and int(answer.headers["Retry-After"]) >= 1
                assert kinds(await answer.json()) == ("ServiceUnavailableError", 503)
        assert await d.get("/health") == (503, await health(d))
        assert await d.counted("engine_up", role="decoder", engine=f"http://127.0.0.1:{d.decoders[0].port}") == 0


async def health(d: Any) -> Any:
    _, state = await d.get("/health")
    return state


@MODES
async def test_a_decoder_that_comes_back_is_used_again(mode):
    async with mode() as d:
        await d.decoders[0].die()
        await until(lambda: not d.proxy.decoders.up)
        await d.decoders[0].start()
        await until(lambda: d.proxy.decoders.up)
        status, _ = await d.post(prompt="x")
        assert status == 200 and (await health(d))["status"] == "ok"


async def test_engines_are_probed_now_and_then_whether_up_or_down():
    async with telemetry() as d:
        d.decoders[0].health = 503
        await until(lambda: not d.proxy.decoders.up)
        for engine in (d.proxy.decoders.engines[0], d.proxy.prefillers.engines[0]):
            engine.suspect()
        before = [engine.probes for engine in (d.decoders[0], d.prefillers[0])]
        await asyncio.sleep(0.55)  # at an interval of 0.1 s
        assert all(1 <= e.probes - b <= 7 for e, b in zip((d.decoders[0], d.prefillers[0]), before, strict=True))


async def test_a_decoder_that_says_503_to_probes_is_left_out():
    async with telemetry(decoders=2) as d:
        d.decoders[0].health = 503
        await until(lambda: len(d.proxy.decoders.up) == 1)
        await asyncio.gather(*(d.post(prompt=f"{n}") for n in range(6)))
        assert not d.decoders[0].seen and len(d.decoders[1].seen) == 6
        assert (await health(d))["status"] == "degraded"


@MODES
async def test_a_dead_decoder_costs_nobody_an_answer_while_another_lives(mode):
    async with mode(["--probe-interval", "30"], decoders=2) as d:
        await d.decoders[0].die()  # no probe will tell
        answers = await asyncio.gather(*(d.post(prompt=f"{n}", max_tokens=2) for n in range(8)))
        assert [status for status, _ in answers] == [200] * 8


async def test_load_is_counted_where_a_request_ended_up():
    async with telemetry(["--probe-interval", "30"], decoders=2) as d:
        await d.decoders[0].die()
        d.decoders[1].chunk_gate = asyncio.Event()
        asking = asyncio.ensure_future(d.stream(prompt="hello", max_tokens=50))
        await until(lambda: d.decoders[1].seen)
        first, other = d.proxy.decoders.engines
        await until(lambda: (first.requests, other.requests, other.tokens) == (0, 1, 52))
        d.decoders[1].chunk_gate.set()
        await asking
        assert (other.requests, other.tokens) == (0, 0)


@MODES
async def test_without_a_prefiller_the_decoder_computes_the_prompt(mode):
    async with mode() as d:
        await d.prefillers[0].die()
        body = {"prompt": "hello", "max_tokens": 3}
        status, answer = await d.post(**body)
        assert status == 200 and answer == whole(body, prompts_of(body), answer["id"])
        assert (await health(d))["status"] == "degraded"
        assert await d.counted("handovers_total", outcome="no_prefiller") == 1


@MODES
async def test_without_a_prefiller_and_without_fallback_the_answer_is_503(mode):
    async with mode(["--no-prefill-fallback"]) as d:
        await d.prefillers[0].die()
        status, answer = await d.post(prompt="hello")
        assert status == 503 and kinds(answer)[1] == 503 and not d.decoders[0].seen
        assert (await d.get("/health"))[0] == 503


@MODES
async def test_a_prefiller_that_fails_within_a_request_leaves_it_to_the_decoder(mode):
    async with mode() as d:
        d.prefillers[0].break_after = 0
        d.prefillers[0].report = None
        assert (await d.post(prompt="hello"))[0] == 200
        d.prefillers[0].break_after = None
        d.prefillers[0].status = (500, {"error": {"message": "no"}})
        assert (await d.post(prompt="hello"))[0] == 200
        assert await d.counted("handovers_total", outcome="broken") == 2


@pytest.mark.parametrize("who", ["prefillers", "decoders"])
async def test_an_engines_own_refusal_is_passed_on(who):
    async with telemetry() as d:
        (engine,) = getattr(d, who)
        for status in (400, 401, 404, 422):
            engine.status = (status, {"error": {**ERROR, "code": status}})
            assert await d.post(prompt="hello", stream=True) == (status, {"error": {**ERROR, "code": status}})


async def test_what_a_prefiller_says_in_plain_text_becomes_an_error_body():
    async with telemetry() as d:
        d.prefillers[0].status = (404, "Not Found")
        status, answer = await d.post(prompt="hello")
        assert status == 404 and kinds(answer) == ("NotFoundError", 404)


async def test_connections_to_engines_are_kept():
    async with telemetry() as d:
        for n in range(10):
            assert (await d.post(prompt=f"{n}", max_tokens=2))[0] == 200
            await d.stream(prompt=f"{n}", max_tokens=2)
        assert len(d.decoders[0].peers) <= 3 and len(d.prefillers[0].peers) <= 3  # one more is the probes'


async def test_a_decoders_500_is_passed_on_and_text_becomes_an_error_body():
    async with telemetry() as d:
        d.decoders[0].status = (500, {"error": {**ERROR, "code": 500}})
        assert await d.post(prompt="hello") == (500, {"error": {**ERROR, "code": 500}})
        d.decoders[0].status = (500, "Internal Server Error")
        status, answer = await d.post(prompt="hello")
        assert status == 500 and kinds(answer) == ("InternalServerError", 500)


async def test_an_engines_own_503_says_when_to_come_again():
    async with telemetry() as d:
        d.decoders[0].status = (503, {"error": {**ERROR, "code": 503}})
        async with d.http.post(d.url + "/v1/completions", json={"prompt": "x"}) as answer:
            assert answer.status == 503 and answer.headers["Retry-After"] == "1"


async def test_a_request_of_very_many_prompts_goes_to_the_decoder_alone():
    async with telemetry() as d:
        body = {"prompt": [[n] for n in range(1025)], "max_tokens": 1}
        status, answer = await d.post(**body)
        assert status == 200 and answer["choices"] == whole(body, prompts_of(body), "")["choices"]
        assert not d.prefillers[0].seen


@MODES
@pytest.mark.parametrize("within", [False, True], ids=["between events", "within one"])
async def test_a_stream_whose_engine_dies_ends_in_an_error_event(mode, within):
    async with mode() as d:
        d.decoders[0].break_after, d.decoders[0].break_within = 3, within
        stream = await asyncio.wait_for(d.stream(prompt="hello", max_tokens=10), 5)
        *good, last = said(stream)
        assert len(good) == 3 and all(event["choices"] for event in good)
        assert kinds(last) == ("BadGatewayError", 502)
        assert await d.counted("stream_errors_total") == 1
        d.decoders[0].break_after = None
        assert (await d.post(prompt="hello"))[0] == 200


async def test_an_engine_that_is_killed_ends_all_its_streams_at_once():
    async with telemetry() as d:
        d.decoders[0].chunk_gate = asyncio.Event()
        streams = [asyncio.ensure_future(d.stream(prompt=f"{n}")) for n in range(20)]
        await until(lambda: d.decoders[0].now == 20)
        await asyncio.sleep(0.1)
        await d.decoders[0].die()
        for stream in await asyncio.wait_for(asyncio.gather(*streams), 5):
            assert kinds(said(stream)[-1])[1] == 502


async def test_an_engine_that_falls_silent_within_a_stream_is_given_up():
    async with telemetry(["--read-timeout", "0.3"]) as d:
        d.decoders[0].hang_after = 2
        start = time.monotonic()
        events = said(await d.stream(prompt="hello"))
        assert kinds(events[-1]) == ("GatewayTimeoutError", 504) and len(events) == 3
        assert 0.3 <= time.monotonic() - start < 10
        await until(lambda: d.decoders[0].cancelled == 1)


async def test_a_slow_beginning_is_not_a_silent_engine():
    async with telemetry(["--read-timeout", "0.5", "--answer-timeout", "10"]) as d:
        d.decoders[0].first_s = d.decoders[0].pause_s = 0.7
        assert (await d.post(prompt="hello"))[0] == 200
        d.decoders[0].pause_s = 0
        assert len(said(await d.stream(prompt="hello", max_tokens=6))) == 6


@MODES
async def test_a_prefiller_that_is_found_down_is_not_waited_for(mode):
    async with mode() as d:
        (prefiller,) = d.prefillers
        prefiller.pause_s = 20
        start = time.monotonic()
        asking = asyncio.ensure_future(d.post(prompt="hello"))
        await until(lambda: prefiller.now)
        prefiller.health = 503
        assert (await asking)[0] == 200 and time.monotonic() - start < 10
        await until(lambda: prefiller.cancelled == 1)
        assert await d.counted("handovers_total", outcome="broken") == 1
        prefiller.health, prefiller.pause_s = 200, 0.0
        await until(lambda: d.proxy.prefillers.up)
        assert (await d.post(prompt="hello"))[0] == 200
        assert await d.counted("handovers_total", outcome="stored") == 1


async def test_an_engine_that_does_not_answer_in_time_is_504():
    async with telemetry(["--answer-timeout", "0.3"]) as d:
        d.decoders[0].pause_s = 5
        status, answer = await d.post(prompt="hello")
        assert status == 504 and kinds(answer) == ("GatewayTimeoutError", 504)
        await until(lambda: d.decoders[0].cancelled == 1)


async def test_a_request_that_breaks_engines_meets_two_of_them_at_most():
    async with telemetry(decoders=4) as d:
        for engine in d.decoders:
            engine.break_after = 0
        status, answer = await d.post(prompt="poison")
        assert status == 502 and kinds(answer)[1] == 502
        assert sum(len(engine.seen) for engine in d.decoders) == 2


async def test_a_connection_that_the_engine_just_closed_is_made_again():
    async with telemetry() as d:
        d.decoders[0].break_first = 1
        assert (await d.post(prompt="hello"))[0] == 200
        assert len(d.decoders[0].seen) == 2 and len(set(d.decoders[0].ids)) == 1


async def test_a_fault_of_our_own_within_a_stream_cuts_it(monkeypatch, caplog):
    async with telemetry() as d:

        def broken(*_: Any) -> Any:
            raise AssertionError("a bug")

        monkeypatch.setattr("dynamo_lmcache.proxy.relay.Events.feed", broken)
        with pytest.raises(aiohttp.ClientPayloadError):
            await d.stream(prompt="hello")
        assert "a bug" in caplog.text
        await until(lambda: hangups(d) == 1 and d.proxy.under_way == 0)


@MODES
@pytest.mark.parametrize("stage", ["prefill", "hand-over", "stream", "answer"])
async def test_a_client_that_hangs_up_stops_the_engines(mode, stage):
    async with mode() as d:
        prefiller, decoder = d.prefillers[0], d.decoders[0]
        if stage == "prefill":
            prefiller.pause_s = 20
        elif stage == "hand-over":
            prefiller.report = None
        elif stage == "answer":
            decoder.pause_s = 20
        else:
            decoder.hang_after = 2
        asking = asyncio.ensure_future(d.post(prompt="hello", stream=stage == "stream"))
        where = {"prefill": lambda: prefiller.now, "hand-over": lambda: d.proxy.waits and prefiller.seen}
        await until(where.get(stage, lambda: decoder.now))
        await asyncio.sleep(0.1)
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
        await until(lambda: prefiller.now == decoder.now == d.proxy.under_way == len(d.proxy.waits) == 0)
        assert prefiller.cancelled == (stage == "prefill")
        assert decoder.cancelled == (stage in ("stream", "answer"))
        await until(lambda: hangups(d) == 1)
        assert all(engine.tokens == engine.requests == 0 for engine in (*d.proxy.prefillers.up, *d.proxy.decoders.up))


async def test_a_client_found_gone_when_it_is_written_to_is_no_error_in_the_log(monkeypatch, caplog):
    write = web.StreamResponse.write

    async def gone(response: web.StreamResponse, data: bytes) -> None:
        if "X-Request-Id" in response.headers:  # the proxy's, not an engine's
            response._req.transport.abort()
        await write(response, data)

    monkeypatch.setattr(web.StreamResponse, "write", gone)
    async with telemetry() as d:
        with pytest.raises(aiohttp.ClientError):
            await d.stream(prompt="hello")
        await until(lambda: hangups(d) == 1 and d.proxy.under_way == d.decoders[0].now == 0)
        assert await d.counted("requests_total", endpoint="/v1/completions", status="499") == 1
    assert not [record for record in caplog.records if record.levelname == "ERROR"], caplog.text


def hangups(d: Any) -> Any:
    return d.proxy.metrics.registry.get_sample_value("lmcache_proxy_client_disconnects_total")


async def test_a_client_that_does_not_read_is_disconnected():
    async with telemetry(["--client-timeout", "0.5"]) as d:
        d.decoders[0].repeat = 2000
        body = json.dumps({"prompt": "hello", "max_tokens": 100, "stream": True})
        reader, writer = await asyncio.open_connection("127.0.0.1", d.config.port, limit=1024)
        writer.write(f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode())
        await reader.readexactly(100)
        await until(lambda: d.decoders[0].cancelled == 1 and d.proxy.under_way == 0, 15)
        writer.transport.abort()


async def test_a_client_that_does_not_send_its_body_is_told_so():
    async with telemetry(["--client-timeout", "0.3"]) as d:
        reader, writer = await asyncio.open_connection("127.0.0.1", d.config.port)
        writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\n{")
        assert b" 408 " in await asyncio.wait_for(reader.readline(), 5)
        writer.close()


async def test_what_is_not_a_json_object_is_400():
    bodies = [b"", b"{", b"[]", b'"x"', b"{'a': 1}", b"\xff", b"[" * 200_000, b'{"prompt": NaN}']
    async with telemetry() as d:
        for body in bodies:
            async with d.http.post(d.url + "/v1/completions", data=body) as answer:
                assert answer.status == 400, body[:20]
                assert kinds(await answer.json()) == ("BadRequestError", 400)
        assert not d.prefillers[0].seen


async def test_a_body_over_the_limit_is_413():
    async with telemetry(["--max-body-mib", "1"]) as d:
        for size, status in (((1 << 20) - 100, 200), (1 << 20, 413), (8 << 20, 413)):
            data = io.BytesIO(json.dumps({"prompt": "x" * size, "max_tokens": 1}).encode())
            async with d.http.post(d.url + "/v1/completions", data=data) as answer:
                assert answer.status == status
                assert status == 200 or kinds(await answer.json())[1] == 413


async def test_more_requests_than_allowed_are_429():
    async with telemetry(["--max-requests", "3"]) as d:
        d.decoders[0].chunk_gate = asyncio.Event()
        streams = [asyncio.ensure_future(d.stream(prompt=f"{n}", max_tokens=2)) for n in range(3)]
        await until(lambda: d.decoders[0].now == 3)
        async with d.http.post(d.url + "/v1/completions", json={"prompt": "x"}) as answer:
            assert answer.status == 429 and answer.headers["Retry-After"] == "1"
            assert kinds(await answer.json()) == ("RateLimitError", 429)
        assert (await d.get("/health"))[0] == 200
        d.decoders[0].chunk_gate.set()
        await asyncio.gather(*streams)
        assert (await d.post(prompt="x"))[0] == 200


async def test_unknown_paths_and_methods_get_error_bodies():
    unknown = [("GET", "/"), ("POST", "/v1/embeddings"), ("POST", "/api/v1/telemetry"), ("GET", "/../etc/passwd")]
    wrong = [("GET", "/v1/completions"), ("DELETE", "/v1/models")]
    async with telemetry() as d:
        for method, path in unknown + wrong:
            async with d.http.request(method, d.url + path) as answer:
                assert answer.status == (404 if (method, path) in unknown else 405), path
                assert kinds(await answer.json())[1] == answer.status


async def test_models_are_merged():
    async with telemetry(decoders=3) as d:
        d.decoders[0].models, d.decoders[1].models = ["fake", "lora-a"], ["lora-b", "fake"]
        await d.decoders[2].die()
        _, answer = await d.get("/v1/models")
        assert sorted(model["id"] for model in answer["data"]) == ["fake", "lora-a", "lora-b"]
        await d.decoders[0].die()
        await d.decoders[1].die()
        await until(lambda: not d.proxy.decoders.up)
        status, answer = await d.get("/v1/models")
        assert status == 503 and kinds(answer)[1] == 503


async def test_a_fault_of_our_own_is_500_with_a_body(monkeypatch, caplog):
    async with telemetry() as d:

        def broken(*_: Any) -> Any:
            raise AssertionError("a bug")

        monkeypatch.setattr(d.proxy.decoders, "choose", broken)
        status, answer = await d.post(prompt="x")
        assert status == 500 and "a bug" not in answer["error"]["message"]
        assert "a bug" in caplog.text and d.proxy.under_way == 0


async def test_no_cookie_of_one_client_reaches_another():
    async with telemetry() as d:
        assert isinstance(d.proxy.decoders.engines[0]._http.cookie_jar, aiohttp.DummyCookieJar)
