"""From Dynamo's request dictionary to vLLM's prompt and ``SamplingParams``.

The frontend has tokenized the prompt and keeps stop strings and detokenization to itself; all
other options are the engine's. Everything is checked by one construction of ``SamplingParams``.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from dynamo.common.utils.guided_json import reject_nonprogressing_guided_json_ref_cycles
from dynamo.common.utils.structural_tag import serialize_structural_tag
from vllm.inputs.engine import TokensInput, tokens_input
from vllm.sampling_params import RequestOutputKind, SamplingParams, StructuredOutputsParams

from dynamo_lmcache.vllm.errors import RequestError

logger = logging.getLogger(__name__)

Request = Mapping[str, Any]

# Dynamo's router recognises salts in KV events by this prefix and strips it again.
CACHE_SALT_PREFIX = "dynamo-cache-salt:"

# The frontend spells "the whole vocabulary" as the largest 32-bit number; vLLM as -1.
_WHOLE_VOCABULARY = 2**32 - 1

_FIELDS = frozenset(SamplingParams.__struct_fields__)
# Handled below, or the frontend's: it stops at strings and turns ids into text.
_NOT_COPIED = frozenset(
    {"stop", "guided_decoding", "stop_token_ids", "include_stop_str_in_output", "detokenize", "output_kind"}
)
_GUIDES = ("json", "regex", "choice", "grammar")


def token_ids_of(request: Request) -> list[int] | None:
    """The prompt's token ids: Dynamo sends a list, or, from 1.6 on, also int32 in little-endian bytes."""
    given = request.get("token_ids")
    if isinstance(given, (bytes, bytearray, memoryview)):
        if len(given) % 4:
            raise ValueError(f"token_ids of {len(given)} bytes are no 32-bit numbers")
        return [int(token) for token in np.frombuffer(given, dtype="<i4")]
    return given if given is None or isinstance(given, list) else [int(token) for token in given]


def build_prompt(request: Request) -> TokensInput:
    """Return the engine's prompt.

    Raises:
        RequestError: if the request holds something other than token ids.
    """
    for field in ("multi_modal_data", "prompt_embeds"):
        if request.get(field):
            raise RequestError(f"{field} is not supported: this worker serves text prompts")
    token_ids = token_ids_of(request)
    if not token_ids:
        raise RequestError("the prompt is empty")
    salt = cache_salt(request)
    return tokens_input(token_ids, cache_salt=CACHE_SALT_PREFIX + salt if salt else None)


def cache_salt(request: Request) -> str | None:
    """Return the salt that separates this request's cache entries from others', if any."""
    for source in (*_extensions(request), request.get("routing") or {}):
        if source.get("cache_salt"):
            return str(source["cache_salt"])
    return None


def build_sampling(
    request: Request, defaults: Mapping[str, Any], *, max_model_len: int, single_token: bool = False
) -> SamplingParams:
    """Return the sampling parameters of a request.

    Args:
        request: Dynamo's request: sampling_options, stop_conditions, output_options.
        defaults: the model's own defaults from its generation_config.json.
        max_model_len: tokens of prompt and answer together; the rest of it is the default answer length.
        single_token: a prefill worker's request: one token exactly, whatever the client wants.

    Raises:
        ValueError, VLLMClientError: for values that vLLM refuses.
    """
    options = {**(request.get("sampling_options") or {}), **_passthrough(request)}
    stops = request.get("stop_conditions") or {}
    values: dict[str, Any] = dict(defaults)
    for source in (options, stops):
        values.update(_copyable(source))
    values.update(_logprobs(request.get("output_options") or {}))
    values["structured_outputs"] = _structured_outputs(options.get("guided_decoding"))
    values["stop_token_ids"] = _stop_token_ids(stops)
    if stops.get("max_thinking_tokens") is not None:
        values["thinking_token_budget"] = stops["max_thinking_tokens"]
    if "logit_bias" in values:
        values["logit_bias"] = {int(token): float(bias) for token, bias in values["logit_bias"].items()}
    values["max_tokens"] = _max_tokens(request, stops, defaults, max_model_len)
    if single_token:
        values.update(max_tokens=1, min_tokens=1, n=1)
    values.update(detokenize=False, output_kind=RequestOutputKind.DELTA)
    bad_words = values.pop("_bad_words_token_ids", None)
    params = SamplingParams(**values)
    if bad_words:
        params._bad_words_token_ids = bad_words
    return params


def set_transfer_params(params: SamplingParams, transfer: Mapping[str, Any]) -> None:
    """Hand ``kv_transfer_params`` to the connector of this request."""
    params.extra_args = {**(params.extra_args or {}), "kv_transfer_params": dict(transfer)}


def _extensions(request: Request) -> Iterator[Mapping[str, Any]]:
    """Yield the request's nvext mappings, wherever the frontend put them."""
    extra = request.get("extra_args")
    for source in (request.get("nvext"), extra.get("nvext") if isinstance(extra, dict) else None):
        if isinstance(source, dict):
            yield source


def _passthrough(request: Request) -> Mapping[str, Any]:
    """Options that the frontend does not model but carries along for the engine."""
    extra = request.get("extra_args")
    options = extra.get("sampling_options") if isinstance(extra, dict) else None
    return options if isinstance(options, dict) else {}


def _copyable(source: Mapping[str, Any]) -> dict[str, Any]:
    copied: dict[str, Any] = {}
    for key, value in source.items():
        if value is None or key in _NOT_COPIED:
            continue
        if key == "bad_words_token_ids":
            copied["_bad_words_token_ids"] = value
        elif key in _FIELDS and not key.startswith("_"):
            copied[key] = value
        else:
            logger.debug("sampling option %s has no counterpart in vLLM", key)
    return copied


def _stop_token_ids(stops: Mapping[str, Any]) -> list[int]:
    # Hidden are the model's own ends, which ignore_eos is about; the others are the client's.
    names = ["stop_token_ids", "stop_token_ids_visible"]
    if not stops.get("ignore_eos"):
        names.append("stop_token_ids_hidden")
    return sorted({token for name in names for token in stops.get(name) or ()})


def _max_tokens(request: Request, stops: Mapping[str, Any], defaults: Mapping[str, Any], max_model_len: int) -> int:
    if stops.get("max_tokens") is not None:
        return int(stops["max_tokens"])
    room = max(1, max_model_len - len(token_ids_of(request) or []))
    return min(int(defaults.get("max_tokens", room)), room)


def _logprobs(output: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in ("logprobs", "prompt_logprobs"):
        width = output.get(name)
        if width is not None:
            found[name] = -1 if int(width) == _WHOLE_VOCABULARY else int(width)
    if "prompt_logprobs" in found:
        # Logprobs of cached positions don't exist: the prompt must be computed.
        found["skip_reading_prefix_cache"] = True
    return found


def _structured_outputs(guide: Any) -> StructuredOutputsParams | None:
    if not isinstance(guide, Mapping):
        return None
    given = {name: guide[name] for name in (*_GUIDES, "whitespace_pattern") if guide.get(name) is not None}
    if "json" in given:
        # A schema that refers to itself without consuming anything would hang the grammar compiler.
        reject_nonprogressing_guided_json_ref_cycles(given["json"])
    tag = serialize_structural_tag(guide.get("structural_tag"))
    if tag is not None:
        given["structural_tag"] = tag
    if not any(name in given for name in (*_GUIDES, "structural_tag")):
        return None
    return StructuredOutputsParams(**given)
