"""Stand-ins for the engine and for Dynamo's context, for tests without either."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from vllm.outputs import CompletionOutput, RequestOutput

TRACE = 0xA11  # the id of every fake request's trace


def choice(tokens: list[int], *, index: int = 0, finish: str | None = None, logprobs: Any = None) -> CompletionOutput:
    return CompletionOutput(
        index=index, text="", token_ids=tokens, cumulative_logprob=None, logprobs=logprobs, finish_reason=finish
    )


def output(*choices: CompletionOutput, prompt: int = 4, cached: int | None = 0, **more: Any) -> RequestOutput:
    return RequestOutput(
        request_id="r",
        prompt=None,
        prompt_token_ids=list(range(prompt)),
        prompt_logprobs=more.pop("prompt_logprobs", None),
        outputs=list(choices),
        finished=any(entry.finish_reason for entry in choices),
        num_cached_tokens=cached,
        **more,
    )


class FakeContext:
    """A request's context whose client can leave."""

    def __init__(self) -> None:
        self._gone = asyncio.get_running_loop().create_future()
        self.first_tokens = 0

    def id(self) -> str:
        return "request"

    def trace_headers(self) -> dict[str, str]:
        return {"traceparent": f"00-{TRACE:032x}-{7:016x}-01"}

    def notify_first_token(self) -> None:
        self.first_tokens += 1

    def async_killed_or_stopped(self) -> asyncio.Future[bool]:
        return self._gone

    def is_stopped(self) -> bool:
        return self._gone.done()

    def is_killed(self) -> bool:
        return False

    def leave(self) -> None:
        self._gone.set_result(True)


class FakeEngine:
    """Yields prepared outputs, one after each ``step``; an abort ends the stream."""

    def __init__(self, *outputs: RequestOutput | Exception) -> None:
        self.outputs = list(outputs)
        self.calls: list[dict[str, Any]] = []
        self.aborted: list[str] = []
        self.loras: list[int] = []
        self.gate = asyncio.Event()
        self.gate.set()
        self.reset_result = True
        self.resets: list[bool] = []

    def get_tokenizer(self) -> Any:
        return self

    def decode(self, token_ids: list[int]) -> str:
        return "".join(chr(97 + token) for token in token_ids)

    async def generate(self, prompt: Any, params: Any, request_id: str, **more: Any) -> AsyncIterator[RequestOutput]:
        self.calls.append({"prompt": prompt, "params": params, "id": request_id, **more})
        for entry in self.outputs:
            await asyncio.wait_for(self.gate.wait(), timeout=5)
            if request_id in self.aborted:
                yield output(choice([], finish="abort"))
                return
            if isinstance(entry, Exception):
                raise entry
            yield entry
            await asyncio.sleep(0.01)

    async def abort(self, request_id: str) -> None:
        self.aborted.append(request_id)
        self.gate.set()

    async def reset_prefix_cache(self, *, reset_connector: bool = False) -> bool:
        self.resets.append(reset_connector)
        return self.reset_result

    async def add_lora(self, adapter: Any) -> bool:
        self.loras.append(adapter.lora_int_id)
        return True

    async def remove_lora(self, adapter_id: int) -> bool:
        self.loras.remove(adapter_id)
        return True
