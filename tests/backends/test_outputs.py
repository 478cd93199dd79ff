"""Chunks as the frontend reads them."""

from __future__ import annotations

import json

import pytest
from vllm.logprobs import Logprob

from dynamo_lmcache.vllm.outputs import ChunkBuilder, finish_reason, prompt_logprobs, usage
from tests.backends.fakes import choice, output


def test_tokens_and_end() -> None:
    builder = ChunkBuilder()
    first, *_ = builder.chunks(output(choice([1, 2]), cached=3))
    last, *_ = builder.chunks(output(choice([3], finish="length"), cached=3))
    assert first["token_ids"] == [1, 2] and "finish_reason" not in first
    assert last["finish_reason"] == "length"
    assert last["completion_usage"] == usage(4, 3, 3)


def test_usage_is_reported_first_and_last_only() -> None:
    builder = ChunkBuilder()
    outputs = [output(choice([1])), output(choice([2])), output(choice([3], finish="stop"))]
    chunks = [chunk for entry in outputs for chunk in builder.chunks(entry)]
    assert ["completion_usage" in chunk for chunk in chunks] == [True, False, True]


def test_unknown_is_not_zero() -> None:
    assert usage(1, 1, None)["prompt_tokens_details"] is None
    assert usage(1, 1, 0)["prompt_tokens_details"] == {"cached_tokens": 0}


def test_the_prefill_workers_count_wins() -> None:
    chunk, *_ = ChunkBuilder(cached_tokens=2).chunks(output(choice([1], finish="stop"), cached=4))
    assert chunk["completion_usage"]["prompt_tokens_details"] == {"cached_tokens": 2}


def test_choices_are_counted_together() -> None:
    builder = ChunkBuilder()
    chunks = list(builder.chunks(output(choice([1], finish="stop"), choice([2, 3], index=1, finish="stop"))))
    assert [chunk["index"] for chunk in chunks] == [0, 1]
    assert chunks[-1]["completion_usage"]["completion_tokens"] == 3


def test_an_empty_step_is_no_chunk() -> None:
    assert list(ChunkBuilder().chunks(output(choice([])))) == []


def test_abort_is_a_cancellation() -> None:
    assert finish_reason("abort") == "cancelled" and finish_reason("stop") == "stop"


def test_logprobs_name_their_tokens() -> None:
    logprobs = [{1: Logprob(-0.5, 1, None), 2: Logprob(float("-inf"), 9, "two")}]
    chunk, *_ = ChunkBuilder(lambda ids: f"<{ids[0]}>").chunks(output(choice([1], logprobs=logprobs)))
    assert chunk["log_probs"] == [-0.5]
    one, two = chunk["top_logprobs"][0]
    assert (one["token"], one["rank"], one["bytes"]) == ("<1>", 1, [60, 49, 62])
    assert (two["token"], two["logprob"]) == ("two", -1e30)
    json.dumps(chunk, allow_nan=False)


@pytest.mark.parametrize("logprobs", [[None], [{2: Logprob(-1.0, 1, None)}], []])
def test_partial_logprobs_are_left_out(logprobs: list[dict[int, Logprob] | None]) -> None:
    chunk, *_ = ChunkBuilder().chunks(output(choice([1], logprobs=logprobs)))
    assert "log_probs" not in chunk and chunk["token_ids"] == [1]


def test_prompt_logprobs_ride_on_the_last_chunk_with_string_keys() -> None:
    builder = ChunkBuilder()
    first, *_ = builder.chunks(output(choice([1]), prompt_logprobs=[None, {5: Logprob(-1.0, 2, "f")}]))
    last, *_ = builder.chunks(output(choice([2], finish="stop")))
    assert "engine_data" not in first
    position = {"5": {"logprob": -1.0, "rank": 2, "decoded_token": "f"}}
    assert last["engine_data"] == {"prompt_logprobs": [None, position]}
    assert prompt_logprobs([]) == []
