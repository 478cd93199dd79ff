"""One client's request: its id, what it costs, and what of it the prefiller is sent."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import msgspec
from multidict import CIMultiDict

from dynamo_lmcache.proxy.errors import Refusal

COMPLETIONS = "/v1/completions"
CHAT = "/v1/chat/completions"

# Of one connection, not of the request (RFC 9110, 7.6.1), or written anew for each engine.
_NOT_PASSED = {
    *("connection", "keep-alive", "proxy-authenticate", "proxy-authorization", "proxy-connection", "te", "trailer"),
    *("transfer-encoding", "upgrade", "host", "content-length", "content-encoding", "content-type", "accept-encoding"),
    *("expect", "x-request-id"),
}

# What only matters for tokens that the prefiller does not produce, and would cost time or be refused with one token.
_OF_OUTPUT = {
    *("stream_options", "min_tokens", "n", "best_of", "use_beam_search", "echo", "response_format"),
    *("structured_outputs", "logprobs", "top_logprobs", "prompt_logprobs", "logprob_token_ids"),
}

# With any of these a prompt is not the same thing as its token ids.
_NEEDS_TEXT = ("echo", "suffix", "truncate_prompt_tokens", "prompt_embeds", "return_prompt_text")

_BYTES_PER_TOKEN = 4  # an estimate, for the choice of engines only
_OUTPUT_TOKENS = 256  # where the client names no number
_MAX_OUTPUT_TOKENS = 1 << 20


@dataclass(frozen=True)
class Part:
    """One prompt of a request: most have one. `id` is the request's own if so."""

    id: str
    prompt: Any  # None: the request's messages
    tokens: int


@dataclass(frozen=True)
class Order:
    """A request on its way. `raw` is what the decoder gets unless `body` was changed."""

    id: str
    path: str
    headers: CIMultiDict[str]
    raw: bytes
    body: dict[str, Any]
    session: str | None

    @property
    def prompt_tokens(self) -> int:
        """All prompts together, as estimated."""
        if self.path == CHAT or self.body.get("prompt") is None:
            return 1 + len(self.raw) // _BYTES_PER_TOKEN
        return _prompt_tokens(self.body["prompt"])

    @property
    def output_tokens(self) -> int:
        """The most that the client allows."""
        limit = self.body.get("max_completion_tokens") or self.body.get("max_tokens")
        return min(limit, _MAX_OUTPUT_TOKENS) if type(limit) is int and limit > 0 else _OUTPUT_TOKENS

    def with_prompt(self, prompt: Any) -> Order:
        """The same request with its prompt in another form."""
        body = {**self.body, "prompt": prompt}
        return Order(self.id, self.path, self.headers, msgspec.json.encode(body), body, self.session)

    def parts(self) -> list[Part]:
        """Its prompts, each of which is prefilled on its own."""
        prompt: Any = self.body.get("prompt") if self.path == COMPLETIONS else None
        if _is_batch(prompt) and len(prompt) > 1:
            return [Part(f"{self.id}.{i}", one, _prompt_tokens(one)) for i, one in enumerate(prompt)]
        return [Part(self.id, prompt, self.prompt_tokens)]

    def prefill_body(self, part: Part) -> dict[str, Any]:
        """The request that makes a prefiller compute `part`'s KV and one token, which is thrown away."""
        body = {name: value for name, value in self.body.items() if name not in _OF_OUTPUT}
        if part.prompt is not None:
            body["prompt"] = part.prompt
        if "max_completion_tokens" in body:
            body["max_completion_tokens"] = 1
        return {**body, "max_tokens": 1, "stream": False}

    def texts(self) -> list[str] | None:
        """Its prompts if they are text that may as well be token ids, otherwise None."""
        if self.path != COMPLETIONS or any(self.body.get(name) for name in _NEEDS_TEXT):
            return None
        prompt: Any = self.body.get("prompt")
        prompts: list[Any] = prompt if isinstance(prompt, list) else [prompt]
        return prompts if prompts and all(isinstance(one, str) for one in prompts) else None


def _is_batch(prompt: Any) -> bool:
    return isinstance(prompt, list) and bool(prompt) and isinstance(prompt[0], str | list)


def _prompt_tokens(prompt: Any) -> int:
    if isinstance(prompt, str):
        return 1 + len(prompt) // _BYTES_PER_TOKEN
    if _is_batch(prompt):
        return sum(_prompt_tokens(one) for one in prompt)
    return max(1, len(prompt)) if isinstance(prompt, list) else 1


def take_order(path: str, raw: bytes, headers: Mapping[str, str], session: str | None, api_key: str | None) -> Order:
    """Read a request and give it an id that no other has, whatever the client calls it.

    Raises:
        Refusal: 400, if it is not a JSON object.
    """
    try:
        body = msgspec.json.decode(raw)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise Refusal(400, f"the body is not JSON: {error}") from None
    if not isinstance(body, dict):
        raise Refusal(400, "the body must be a JSON object")
    request_id = uuid.uuid4().hex
    return Order(request_id, path, _passed_on(headers, request_id, api_key), raw, body, session)


def _passed_on(headers: Mapping[str, str], request_id: str, api_key: str | None) -> CIMultiDict[str]:
    named = {name.strip().lower() for name in headers.get("Connection", "").split(",")}
    passed = CIMultiDict(
        (name, value)
        for name, value in headers.items()
        if (low := name.lower()) not in _NOT_PASSED and low not in named
    )
    passed["X-Request-Id"] = request_id
    passed["Content-Type"] = "application/json"
    if api_key is not None:
        passed.setdefault("Authorization", f"Bearer {api_key}")
    return passed
