"""The official client against a real frontend and a real worker."""

from __future__ import annotations

import json
import time
from typing import Any

import openai
import pytest
from openai import OpenAI
from openai.types.chat import ChatCompletionMessageParam, ChatCompletionToolParam

from tests.e2e.serving import BLOCK, MODEL_NAME, Server, until

pytestmark = pytest.mark.engine

MESSAGES: list[ChatCompletionMessageParam] = [{"role": "user", "content": "hello"}]
TOOL: ChatCompletionToolParam = {
    "type": "function",
    "function": {
        "name": "lamp",
        "parameters": {
            "type": "object",
            "properties": {"on": {"type": "boolean"}},
            "required": ["on"],
            "additionalProperties": False,
        },
    },
}


def chat(client: OpenAI, **options: Any) -> Any:
    values: dict[str, Any] = {"messages": MESSAGES, "max_tokens": 8, "temperature": 0}
    return client.chat.completions.create(model=MODEL_NAME, **{**values, **options})


def complete(client: OpenAI, prompt: str = "abc", **options: Any) -> Any:
    values: dict[str, Any] = {"max_tokens": 8, "temperature": 0}
    return client.completions.create(model=MODEL_NAME, prompt=prompt, **{**values, **options})


def test_the_model_is_listed(client: OpenAI) -> None:
    assert [entry.id for entry in client.models.list()] == [MODEL_NAME]


def test_chat(client: OpenAI) -> None:
    answer = chat(client, extra_body={"ignore_eos": True})
    assert answer.choices[0].message.role == "assistant" and answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == 8
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 8


def test_completion(client: OpenAI) -> None:
    answer = complete(client, extra_body={"ignore_eos": True})
    assert answer.usage.prompt_tokens >= 3 and answer.usage.completion_tokens == 8


def test_streaming_gives_the_same_text(client: OpenAI) -> None:
    whole = chat(client, max_tokens=12).choices[0].message.content or ""
    with chat(client, max_tokens=12, stream=True, stream_options={"include_usage": True}) as stream:
        chunks = list(stream)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole
    assert chunks[-1].usage is not None and chunks[-1].usage.completion_tokens > 0
    assert len(chunks) > 2


def test_a_stream_flows_while_the_engine_is_busy(client: OpenAI) -> None:
    began = time.monotonic()
    with complete(client, max_tokens=1500, stream=True, extra_body={"ignore_eos": True}) as stream:
        times = [time.monotonic() - began for _ in stream]
    assert times[0] < times[-1] / 4 and times[len(times) // 2] < 0.8 * times[-1], times[:: len(times) // 10]


def test_logprobs(client: OpenAI) -> None:
    answer = chat(client, max_tokens=4, logprobs=True, top_logprobs=3, extra_body={"ignore_eos": True})
    positions = answer.choices[0].logprobs.content
    assert len(positions) == 4
    for position in positions:
        assert position.logprob <= 0 and len(position.top_logprobs) >= 3
        best = max(position.top_logprobs, key=lambda entry: entry.logprob)
        assert best.token == position.token  # greedy


def test_completion_logprobs(client: OpenAI) -> None:
    logprobs = complete(client, max_tokens=3, logprobs=2, extra_body={"ignore_eos": True}).choices[0].logprobs
    assert len(logprobs.tokens) == len(logprobs.token_logprobs) == 3


def test_stop_string_ends_before_it(client: OpenAI) -> None:
    texts = ((prompt, complete(client, prompt, max_tokens=16).choices[0].text) for prompt in ("abc", "12", "The ", "x"))
    prompt, whole = next((prompt, text) for prompt, text in texts if len(text) > 1)
    stop = whole[-1]
    cut = complete(client, prompt, max_tokens=16, stop=[stop])
    assert cut.choices[0].finish_reason == "stop"
    assert cut.choices[0].text == whole[: whole.index(stop)]


def test_seeds(client: OpenAI) -> None:
    def sample(seed: int) -> str:
        text: str = (
            complete(client, max_tokens=24, temperature=1.5, seed=seed, extra_body={"ignore_eos": True}).choices[0].text
        )
        return text

    first = sample(1)
    assert sample(1) == first
    assert any(sample(seed) != first for seed in (2, 3, 4))


def test_choices(client: OpenAI) -> None:
    answer = complete(client, n=2, temperature=1.0, max_tokens=4, extra_body={"ignore_eos": True})
    assert sorted(entry.index for entry in answer.choices) == [0, 1]
    assert answer.usage.completion_tokens == 8


def test_penalties_and_min_p(client: OpenAI) -> None:
    body = {"ignore_eos": True, "repetition_penalty": 2.0, "min_p": 0.01, "top_k": 40}
    answer = complete(client, max_tokens=12, presence_penalty=2.0, frequency_penalty=2.0, extra_body=body)
    text = answer.choices[0].text
    assert len(set(text)) > len(text) // 2  # hardly anything twice


def test_min_tokens(client: OpenAI) -> None:
    assert complete(client, max_tokens=20, extra_body={"min_tokens": 20}).usage.completion_tokens == 20


def test_guided_by_a_schema(client: OpenAI) -> None:
    schema = {
        "type": "object",
        "properties": {"answer": {"enum": ["yes", "no"]}},
        "required": ["answer"],
        "additionalProperties": False,
    }
    answer = chat(
        client,
        max_tokens=40,
        response_format={"type": "json_schema", "json_schema": {"name": "a", "schema": schema, "strict": True}},
    )
    assert json.loads(answer.choices[0].message.content)["answer"] in ("yes", "no")


@pytest.mark.parametrize(
    ("guide", "allowed"),
    [({"guided_choice": ["left", "right"]}, {"left", "right"}), ({"guided_regex": "4[2]"}, {"42"})],
)
def test_guided_by_choice_and_regex(client: OpenAI, guide: dict[str, Any], allowed: set[str]) -> None:
    assert complete(client, max_tokens=10, extra_body=guide).choices[0].text in allowed


@pytest.mark.parametrize("tool_choice", ["required", {"type": "function", "function": {"name": "lamp"}}])
def test_tools(client: OpenAI, tool_choice: Any) -> None:
    answer = chat(client, max_tokens=120, tools=[TOOL], tool_choice=tool_choice)
    (call,) = answer.choices[0].message.tool_calls[:1]
    assert call.function.name == "lamp"
    assert json.loads(call.function.arguments)["on"] in (True, False)


def test_tools_streamed(client: OpenAI) -> None:
    choice = {"type": "function", "function": {"name": "lamp"}}
    with chat(client, max_tokens=120, tools=[TOOL], tool_choice=choice, stream=True) as stream:
        deltas = [chunk.choices[0].delta for chunk in stream if chunk.choices]
    calls = [call for delta in deltas for call in delta.tool_calls or []]
    assert "".join(call.function.name or "" for call in calls if call.function) == "lamp"
    arguments = "".join(call.function.arguments or "" for call in calls if call.function)
    assert json.loads(arguments)["on"] in (True, False)


def test_a_client_that_leaves_frees_the_engine(client: OpenAI, server: Server) -> None:
    before = server.metric("vllm:generation_tokens_total")
    with complete(client, max_tokens=1900, stream=True, extra_body={"ignore_eos": True}) as stream:
        next(iter(stream))
        until(lambda: server.metric("vllm:num_requests_running") == 1, 10, "the request is running")
    until(lambda: server.metric("vllm:num_requests_running") == 0, 15, "the request has been aborted")
    assert server.metric("vllm:generation_tokens_total") - before < 1900


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"temperature": -1}, "emperature"),
        ({"top_p": 3}, "op_p"),
        ({"max_tokens": 3, "extra_body": {"min_tokens": 9}}, "min_tokens"),
        ({"extra_body": {"guided_regex": "[0-9"}}, ""),
        ({"prompt": "x" * 3000}, ""),
        ({"prompt": "x" * 2000, "max_tokens": 500}, ""),
        ({"prompt": ""}, "rompt"),
    ],
)
def test_bad_requests_are_400(client: OpenAI, options: dict[str, Any], words: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        complete(client, **options)
    assert words in str(caught.value)


def test_an_unknown_model_is_404(client: OpenAI) -> None:
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="nobody", prompt="a")


def test_cached_tokens_tell_the_prefix_hit(client: OpenAI) -> None:
    prompt = "The quick brown fox jumps over the lazy dog. " * 6
    first, second = (complete(client, prompt, max_tokens=1).usage for _ in range(2))
    assert first.prompt_tokens_details.cached_tokens == 0
    assert second.prompt_tokens_details.cached_tokens == (second.prompt_tokens - 1) // BLOCK * BLOCK


def test_a_salt_separates(client: OpenAI) -> None:
    prompt = "Pack my box with five dozen liquor jugs. " * 6

    def cached(salt: str) -> int:
        usage = complete(client, prompt, max_tokens=1, extra_body={"nvext": {"cache_salt": salt}}).usage
        count: int = usage.prompt_tokens_details.cached_tokens
        return count

    assert [cached("a"), cached("b")] == [0, 0]
    assert cached("a") > 0
