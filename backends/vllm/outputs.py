"""From vLLM's ``RequestOutput`` to the chunks that Dynamo's frontend reads."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from vllm.logprobs import Logprob
from vllm.outputs import CompletionOutput, RequestOutput

from dynamo_lmcache.vllm import hits

Chunk = dict[str, Any]
Decode = Callable[[list[int]], str]

# JSON has no infinity, and the frontend would drop all logprobs of a chunk for one of them.
_IMPOSSIBLE = -1e30


class ChunkBuilder:
    """Turns one request's outputs into chunks, and counts its tokens. Not shared between requests."""

    def __init__(self, decode: Decode | None = None, *, cached_tokens: int | None = None) -> None:
        """Take the tokenizer's decode for the text of logprobs, and the prefill worker's cached count, if any."""
        self._decode = decode
        self._cached_elsewhere = cached_tokens
        self._completion_tokens = 0
        self._reported: set[int] = set()
        self._prompt_logprobs: list[Any] | None = None
        self.prompt_tokens: hits.PromptTokens | None = None  # for the last chunk

    def chunks(self, output: RequestOutput) -> Iterator[Chunk]:
        """Yield the chunks of one output: one for each choice that has something new."""
        if self._prompt_logprobs is None and output.prompt_logprobs is not None:
            self._prompt_logprobs = prompt_logprobs(output.prompt_logprobs)
        for choice in output.outputs:
            tokens = list(choice.token_ids)
            if tokens or choice.finish_reason:
                self._completion_tokens += len(tokens)
                yield self._chunk(output, choice, tokens)

    def _chunk(self, output: RequestOutput, choice: CompletionOutput, tokens: list[int]) -> Chunk:
        chunk: Chunk = {"index": choice.index, "token_ids": tokens}
        if choice.logprobs and tokens:
            chunk.update(self._logprobs(tokens, choice.logprobs))
        if choice.finish_reason or choice.index not in self._reported:
            self._reported.add(choice.index)
            chunk["completion_usage"] = self._usage(output)
        if choice.finish_reason:
            chunk["finish_reason"] = finish_reason(choice.finish_reason)
            if data := self._engine_data():
                chunk["engine_data"] = data
        if choice.stop_reason is not None:
            chunk["stop_reason"] = choice.stop_reason
        return chunk

    def _engine_data(self) -> dict[str, Any]:
        """What a client sees that asks for nvext's extra field `engine_data`."""
        data: dict[str, Any] = {}
        if self._prompt_logprobs is not None:
            data["prompt_logprobs"] = self._prompt_logprobs
        if self.prompt_tokens is not None:
            data[hits.KEY] = self.prompt_tokens.to_dict()
            if self._cached_elsewhere is None:  # else the prefill worker has told the router
                data["kv_cache_hit"] = self.prompt_tokens.to_dynamo()
        return data

    def _usage(self, output: RequestOutput) -> dict[str, Any]:
        prompt = len(output.prompt_token_ids or ())
        cached = output.num_cached_tokens if self._cached_elsewhere is None else self._cached_elsewhere
        return usage(prompt, self._completion_tokens, cached)

    def _logprobs(self, tokens: list[int], positions: Sequence[Mapping[int, Logprob] | None]) -> Chunk:
        """Return log_probs and top_logprobs; nothing unless every token has its own."""
        chosen: list[float] = []
        top: list[list[dict[str, Any]]] = []
        for token, candidates in zip(tokens, positions, strict=False):
            if candidates is None or token not in candidates:
                return {}
            chosen.append(_finite(candidates[token].logprob))
            top.append([self._candidate(token_id, entry) for token_id, entry in candidates.items()])
        return {"log_probs": chosen, "top_logprobs": top} if len(chosen) == len(tokens) else {}

    def _candidate(self, token_id: int, entry: Logprob) -> dict[str, Any]:
        text = entry.decoded_token
        if text is None and self._decode is not None:
            text = self._decode([token_id])
        return {
            "rank": entry.rank or 0,
            "token_id": token_id,
            "token": text,
            "logprob": _finite(entry.logprob),
            "bytes": list(text.encode("utf-8", "replace")) if text else None,
        }


def usage(prompt_tokens: int, completion_tokens: int, cached_tokens: int | None) -> dict[str, Any]:
    """Return OpenAI's usage. A cached count of None is unknown, which is not zero."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": None if cached_tokens is None else {"cached_tokens": cached_tokens},
    }


def finish_reason(reason: str) -> str:
    """Translate vLLM's reason: an abort is a cancellation to Dynamo."""
    return "cancelled" if reason.startswith("abort") else reason


def prompt_logprobs(positions: Sequence[Mapping[int, Logprob] | None]) -> list[Any]:
    """Return prompt logprobs with string keys; with integer keys the chunk would be lost in transport."""
    return [None if entries is None else _position(entries) for entries in positions]


def _position(entries: Mapping[int, Logprob]) -> dict[str, dict[str, Any]]:
    position: dict[str, dict[str, Any]] = {}
    for token_id, entry in entries.items():
        fields = {"logprob": _finite(entry.logprob), "rank": entry.rank, "decoded_token": entry.decoded_token}
        position[str(token_id)] = {name: value for name, value in fields.items() if value is not None}
    return position


def _finite(value: float) -> float:
    return float(value) if math.isfinite(value) else _IMPOSSIBLE
