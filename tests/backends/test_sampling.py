"""Every option of a request reaches vLLM."""

from __future__ import annotations

import struct
from typing import Any

import pytest
from vllm.sampling_params import RequestOutputKind, SamplingParams

from dynamo_lmcache.vllm.errors import RequestError, http_status
from dynamo_lmcache.vllm.sampling import build_prompt, build_sampling, cache_salt, set_transfer_params

PROMPT = [5, 6, 7]


def sampling(
    options: dict[str, Any] | None = None,
    stops: dict[str, Any] | None = None,
    output: dict[str, Any] | None = None,
    defaults: dict[str, Any] | None = None,
    **more: Any,
) -> SamplingParams:
    extra = more.pop("extra_args", None)
    request = {
        "token_ids": PROMPT,
        "sampling_options": options or {},
        "stop_conditions": stops or {},
        "output_options": output or {},
        "extra_args": extra,
    }
    return build_sampling(request, defaults or {}, max_model_len=100, **more)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("n", 3),
        ("temperature", 0.5),
        ("top_p", 0.9),
        ("top_k", 7),
        ("min_p", 0.1),
        ("seed", 11),
        ("presence_penalty", 0.5),
        ("frequency_penalty", -0.5),
        ("repetition_penalty", 1.2),
    ],
)
def test_sampling_options(name: str, value: Any) -> None:
    assert getattr(sampling({name: value}), name) == value


def test_null_means_not_given() -> None:
    assert sampling({"temperature": None}, {"max_tokens": None}).temperature == 1.0


def test_model_defaults_yield_to_the_request() -> None:
    defaults = {"temperature": 0.3, "top_p": 0.8}
    params = sampling({"temperature": 0.6}, defaults=defaults)
    assert (params.temperature, params.top_p) == (0.6, 0.8)


def test_the_frontend_detokenizes_and_stops_at_strings() -> None:
    params = sampling({"include_stop_str_in_output": True}, {"stop": ["x"]})
    assert params.detokenize is False and params.output_kind is RequestOutputKind.DELTA
    assert params.stop == [] and params.include_stop_str_in_output is False


def test_stop_conditions() -> None:
    params = sampling(None, {"max_tokens": 9, "min_tokens": 2, "stop_token_ids": [8], "stop_token_ids_hidden": [2]})
    assert (params.max_tokens, params.min_tokens, params.stop_token_ids) == (9, 2, [2, 8])


def test_ignore_eos_drops_the_models_ends_only() -> None:
    params = sampling(None, {"ignore_eos": True, "stop_token_ids_hidden": [2], "stop_token_ids_visible": [8]})
    assert params.ignore_eos is True and params.stop_token_ids == [8]


@pytest.mark.parametrize(("defaults", "expected"), [({}, 97), ({"max_tokens": 10}, 10), ({"max_tokens": 1000}, 97)])
def test_answers_end_with_the_context(defaults: dict[str, Any], expected: int) -> None:
    assert sampling(defaults=defaults).max_tokens == expected


def test_prefill_is_one_token_whatever_is_asked() -> None:
    params = sampling({"n": 4}, {"max_tokens": 50, "min_tokens": 20}, single_token=True)
    assert (params.max_tokens, params.min_tokens, params.n) == (1, 1, 1)


def test_logprobs() -> None:
    params = sampling(output={"logprobs": 0, "prompt_logprobs": 2})
    assert (params.logprobs, params.prompt_logprobs, params.skip_reading_prefix_cache) == (0, 2, True)
    assert sampling(output={"logprobs": 2**32 - 1}).logprobs == -1
    assert sampling().logprobs is None


def test_options_the_frontend_does_not_model() -> None:
    passed = {"logit_bias": {"5": 3}, "bad_words_token_ids": [[4]], "allowed_token_ids": [5, 6]}
    params = sampling(extra_args={"sampling_options": passed})
    assert params.logit_bias == {5: 3.0}
    assert params._bad_words_token_ids == [[4]]
    assert params.allowed_token_ids == [5, 6]


@pytest.mark.parametrize(
    ("guide", "field"),
    [
        ({"json": {"type": "object"}}, "json"),
        ({"regex": "a+"}, "regex"),
        ({"choice": ["a", "b"]}, "choice"),
        ({"grammar": 'root ::= "a"'}, "grammar"),
        ({"structural_tag": {"type": "x"}}, "structural_tag"),
    ],
)
def test_guided_decoding(guide: dict[str, Any], field: str) -> None:
    outputs = sampling({"guided_decoding": guide}).structured_outputs
    assert outputs is not None and getattr(outputs, field) is not None


def test_an_empty_guide_guides_nothing() -> None:
    assert sampling({"guided_decoding": {"json": None, "backend": "xgrammar"}}).structured_outputs is None


def test_thinking_budget() -> None:
    assert sampling(None, {"max_thinking_tokens": 12}).thinking_token_budget == 12


@pytest.mark.parametrize(
    ("options", "stops"),
    [({"temperature": -1.0}, {}), ({"top_p": 2.0}, {}), ({"n": 0}, {}), ({}, {"max_tokens": 3, "min_tokens": 9})],
)
def test_bad_values_are_the_clients_fault(options: dict[str, Any], stops: dict[str, Any]) -> None:
    with pytest.raises(Exception) as caught:
        sampling(options, stops)
    assert http_status(caught.value) == 400


def test_packed_token_ids() -> None:
    packed = struct.pack("<3i", *PROMPT)
    assert build_prompt({"token_ids": packed})["prompt_token_ids"] == PROMPT


@pytest.mark.parametrize("request_", [{"token_ids": []}, {"token_ids": [1], "multi_modal_data": {"image": 1}}])
def test_prompts_we_cannot_serve(request_: dict[str, Any]) -> None:
    with pytest.raises(RequestError):
        build_prompt(request_)


@pytest.mark.parametrize(
    "place",
    [
        {"nvext": {"cache_salt": "s"}},
        {"extra_args": {"nvext": {"cache_salt": "s"}}},
        {"routing": {"cache_salt": "s"}},
    ],
)
def test_salts(place: dict[str, Any]) -> None:
    assert cache_salt(place) == "s"
    assert build_prompt({"token_ids": [1], **place})["cache_salt"] == "dynamo-cache-salt:s"


def test_no_salt() -> None:
    assert "cache_salt" not in build_prompt({"token_ids": [1]})


def test_transfer_params_join_other_extra_args() -> None:
    params = SamplingParams(extra_args={"a": 1})
    set_transfer_params(params, {"do_remote_prefill": True})
    assert params.extra_args == {"a": 1, "kv_transfer_params": {"do_remote_prefill": True}}
