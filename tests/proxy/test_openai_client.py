"""The official client, end to end."""

from __future__ import annotations

import asyncio

import openai
import pytest

from tests.proxy.deployments import Deployment, nixl, telemetry
from tests.proxy.fakes import prompts_of, words

MODES = pytest.mark.parametrize("mode", [telemetry, nixl])
HELLO = [{"role": "user", "content": "hello"}]
SAYS = "".join(words(prompts_of({"messages": HELLO})[0], 1, 8))


def client(d: Deployment) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{d.url}/v1", api_key="k", max_retries=0, timeout=10)


@MODES
async def test_chat_and_completions(mode):
    async with mode() as d, client(d) as ai:
        chat = await ai.chat.completions.create(model="fake", messages=HELLO, max_tokens=8, seed=1)
        assert chat.choices[0].message.content == SAYS and chat.usage.completion_tokens == 8
        done = await ai.completions.create(model="fake", prompt="hello", max_tokens=8, seed=1)
        assert done.choices[0].text == "".join(words(prompts_of({"prompt": "hello"})[0], 1, 8))
        assert [model.id async for model in ai.models.list()] == ["fake"]
        assert all(seen.hit for seen in d.decoders[0].seen)


@MODES
async def test_streams_with_usage(mode):
    async with mode() as d, client(d) as ai:
        options = {"include_usage": True}
        stream = await ai.chat.completions.create(
            model="fake", messages=HELLO, max_tokens=8, seed=1, stream=True, stream_options=options
        )
        chunks = [chunk async for chunk in stream]
        assert "".join(chunk.choices[0].delta.content for chunk in chunks if chunk.choices) == SAYS
        assert chunks[-1].usage.completion_tokens == 8
        assert stream.response.headers["x-request-id"] == chunks[0].id.removeprefix("chatcmpl-")


async def test_the_first_chunk_is_there_before_the_second_is_made():
    async with telemetry() as d, client(d) as ai:
        gate = d.decoders[0].chunk_gate = asyncio.Event()
        stream = await ai.completions.create(model="fake", prompt="x", max_tokens=3, stream=True)
        chunks = aiter(stream)
        await asyncio.wait_for(anext(chunks), 5)
        gate.set()
        assert len([chunk async for chunk in chunks]) == 2


@MODES
async def test_errors_are_the_clients_own_exceptions(mode):
    async with mode() as d, client(d) as ai:
        d.decoders[0].status = (404, {"error": {"message": "no such model", "type": "NotFoundError", "code": 404}})
        with pytest.raises(openai.NotFoundError, match="no such model"):
            await ai.completions.create(model="other", prompt="x")
        d.decoders[0].status = None
        d.decoders[0].break_after = 2
        stream = await ai.completions.create(model="fake", prompt="x", stream=True)
        with pytest.raises(openai.APIError, match="did not finish"):
            async for _ in stream:
                pass
        await d.decoders[0].die()
        with pytest.raises(openai.InternalServerError, match="no decoder is up") as raised:
            await ai.completions.create(model="fake", prompt="x")
        assert raised.value.status_code == 503


async def test_the_clients_own_retries_meet_a_restarted_engine():
    async with telemetry() as d:
        await d.decoders[0].die()
        async with openai.AsyncOpenAI(base_url=f"{d.url}/v1", api_key="k", max_retries=5, timeout=10) as ai:
            asking = asyncio.ensure_future(ai.completions.create(model="fake", prompt="x", max_tokens=2))
            await asyncio.sleep(0.2)
            await d.decoders[0].start()
            assert (await asyncio.wait_for(asking, 15)).usage.completion_tokens == 2


async def test_a_client_that_closes_its_stream_stops_the_engine():
    async with telemetry() as d, client(d) as ai:
        d.decoders[0].hang_after = 1
        stream = await ai.completions.create(model="fake", prompt="x", stream=True)
        await anext(aiter(stream))
        await stream.close()
        for _ in range(500):
            if d.decoders[0].cancelled:
                break
            await asyncio.sleep(0.01)
        assert d.decoders[0].cancelled == 1
