"""Engines that behave like ``vllm serve`` at their HTTP side, with a text that is a pure function of the request."""

from __future__ import annotations

import asyncio
import contextlib
import json
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

from lmcache_ext.ports import free_port

Body = dict[str, Any]


def tokenize(text: str) -> list[int]:
    return list(text.encode())


def prompts_of(body: Body) -> list[list[int]]:
    """All prompts of a request as token ids, however they are given."""
    if "messages" in body:
        return [tokenize("".join(f"<{m['role']}>{m['content']}" for m in body["messages"]))]
    prompt = body["prompt"]
    if isinstance(prompt, str):
        return [tokenize(prompt)]
    if isinstance(prompt[0], int):
        return [prompt]
    return [tokenize(one) if isinstance(one, str) else one for one in prompt]


def words(prompt: list[int], seed: int | None, count: int) -> list[str]:
    """The model: what an aggregated server would say."""
    state, said = sum((i + 1) * t for i, t in enumerate(prompt)) + (seed or 0) * 7919, []
    for _ in range(count):
        state = (state * 1103515245 + 12345) % 2**31
        said.append(f"w{state % 1000} é")
    return said


@dataclass
class Cache:
    """The KV that prefillers have stored, shared by a test's engines."""

    stored: set[tuple[int, ...]] = field(default_factory=set)


@dataclass
class Seen:
    """One request at an engine."""

    path: str
    request_id: str | None
    body: Body
    headers: dict[str, str]
    hit: bool  # all its prompts' KV was there when it came


Reporter = Callable[[str, str], Awaitable[None]]
"""Called with our id and vLLM's for it, once KV is stored."""


class Engine:
    """A fake engine. Knobs are plain fields; what happened is in `seen`, `cancelled` and `most`."""

    def __init__(self, cache: Cache | None = None, *, prefiller: bool = False) -> None:
        self.port = free_port()
        self.cache = cache or Cache()
        self.prefiller = prefiller
        self.report: Reporter | None = None
        self.report_first = False  # before the HTTP answer rather than after it
        self.store_s = 0.0
        self.models = ["fake"]
        self.status: tuple[int, Any] | None = None  # answer this to everything
        self.health = 200
        self.probes = 0
        self.first_s = 0.0  # before the first chunk
        self.pause_s = 0.0  # before each chunk, and before an answer that is not streamed
        self.repeat = 1  # how often each event is written
        self.pace_s = 0.0  # before each chunk, too, and nothing else
        self.chunk_gate: asyncio.Event | None = None  # waited for before the second chunk
        self.break_after: int | None = None  # chunks, then the connection is cut
        self.break_within = False  # ... in the middle of an event
        self.break_first = 0  # so many requests, before anything is answered
        self.hang_after: int | None = None
        self.seen: list[Seen] = []
        self.cancelled = 0
        self.peers: set[object] = set()  # addresses that requests came from: one a connection
        self.now = self.most = 0
        self._runner: web.AppRunner | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._requests: list[web.Request] = []

    async def start(self) -> None:
        app = web.Application(client_max_size=1 << 28)
        for path in ("/v1/completions", "/v1/chat/completions"):
            app.router.add_post(path, self._generate)
        app.router.add_post("/tokenize", self._tokenize)
        app.router.add_get("/v1/models", self._models)
        app.router.add_get("/health", self._health)
        self._runner = web.AppRunner(app, handler_cancellation=True, access_log=None, shutdown_timeout=0.1)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", self.port, reuse_address=True).start()

    async def die(self) -> None:
        """End as if killed: nobody listens, every connection is cut."""
        runner, self._runner = self._runner, None
        if runner is None:
            return
        for site in list(runner.sites):
            await site.stop()
        for request in list(self._requests):
            if request.transport is not None:
                request.transport.abort()
        await runner.cleanup()

    @property
    def ids(self) -> list[str | None]:
        return [seen.request_id for seen in self.seen]

    async def _health(self, request: web.Request) -> web.Response:
        self.probes += 1
        return web.Response(status=self.health)

    async def _models(self, request: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": [{"id": name, "object": "model"} for name in self.models]})

    async def _tokenize(self, request: web.Request) -> web.Response:
        body = await request.json()
        self.seen.append(Seen("/tokenize", request.headers.get("X-Request-Id"), body, dict(request.headers), False))
        tokens = tokenize(body["prompt"])
        return web.json_response({"tokens": tokens, "count": len(tokens), "max_model_len": 1 << 20})

    async def _generate(self, request: web.Request) -> web.StreamResponse:
        self.now += 1
        if request.transport is not None:
            self.peers.add(request.transport.get_extra_info("peername"))
        self.most = max(self.most, self.now)
        self._requests.append(request)
        try:
            return await self._answer(request, await request.json())
        except (asyncio.CancelledError, ConnectionError):
            self.cancelled += 1
            raise
        finally:
            self._requests[:] = [other for other in self._requests if other is not request]
            self.now -= 1

    async def _answer(self, request: web.Request, body: Body) -> web.StreamResponse:
        own = request.headers.get("X-Request-Id") or secrets.token_hex(16)
        prompts = prompts_of(body)
        hit = all(tuple(prompt) in self.cache.stored for prompt in prompts)
        self.seen.append(Seen(request.path, own, body, dict(request.headers), hit))
        if self.status is not None:
            status, content = self.status
            if isinstance(content, str):
                return web.Response(status=status, text=content)
            return web.json_response(content, status=status)
        if self.break_first:
            self.break_first -= 1
            assert request.transport is not None
            request.transport.abort()
        chat = "messages" in body
        engine_id = f"chatcmpl-{own}" if chat else f"cmpl-{own}"
        if self.prefiller:
            task = asyncio.ensure_future(self._store(prompts, own, engine_id + ("" if chat else "-0")))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
            if self.report_first:
                await task
        if body.get("stream"):
            return await self._stream(request, body, prompts, engine_id, chat)
        await asyncio.sleep(self.pause_s)
        if self.break_after is not None:
            assert request.transport is not None
            request.transport.abort()
        return web.json_response(whole(body, prompts, engine_id))

    async def _store(self, prompts: list[list[int]], own: str, engine_id: str) -> None:
        await asyncio.sleep(self.store_s)
        self.cache.stored |= {tuple(prompt) for prompt in prompts}
        if self.report is not None:
            await self.report(own, f"{engine_id}-{secrets.token_hex(4)}")

    async def _stream(
        self, request: web.Request, body: Body, prompts: list[list[int]], engine_id: str, chat: bool
    ) -> web.StreamResponse:
        out = web.StreamResponse(headers={"Content-Type": "text/event-stream; charset=utf-8"})
        await out.prepare(request)
        for number, event in enumerate(events(body, prompts, engine_id, chat)):
            if number == 1 and self.chunk_gate is not None:
                await asyncio.wait_for(self.chunk_gate.wait(), 20)
            if number == self.hang_after:
                await asyncio.sleep(20)
            if number == self.break_after:
                if self.break_within:
                    await out.write(event[: len(event) // 2])
                    await asyncio.sleep(0.05)
                assert request.transport is not None
                request.transport.abort()
            await asyncio.sleep(self.pause_s + self.pace_s + (0 if number else self.first_s))
            await out.write(event * self.repeat)
        return out


def whole(body: Body, prompts: list[list[int]], engine_id: str) -> Body:
    """An answer in one piece."""
    count = body.get("max_tokens") or 16
    chat = "messages" in body
    choices = []
    for index, prompt in enumerate(prompts):
        text = "".join(words(prompt, body.get("seed"), count))
        said: Body = {"message": {"role": "assistant", "content": text}} if chat else {"text": text}
        choices.append({"index": index, "finish_reason": "length", "logprobs": None, **said})
    kind = "chat.completion" if chat else "text_completion"
    asked = sum(map(len, prompts))
    usage = {"prompt_tokens": asked, "completion_tokens": count, "total_tokens": asked + count}
    return {"id": engine_id, "object": kind, "created": 1, "model": "fake", "choices": choices, "usage": usage}


def events(body: Body, prompts: list[list[int]], engine_id: str, chat: bool) -> list[bytes]:
    """An answer as the events of a stream."""
    answer = whole(body, prompts, engine_id)
    head = {**answer, "object": "chat.completion.chunk" if chat else "text_completion"}
    usage = head.pop("usage")
    found = []
    for index, prompt in enumerate(prompts):
        said = words(prompt, body.get("seed"), body.get("max_tokens") or 16)
        for number, word in enumerate(said):
            text: Body = {"delta": {"content": word}} if chat else {"text": word}
            finish = "length" if number == len(said) - 1 else None
            found.append({**head, "choices": [{"index": index, "finish_reason": finish, **text}]})
    if (body.get("stream_options") or {}).get("include_usage"):
        found.append({**head, "choices": [], "usage": usage})
    lines = [json.dumps(event, ensure_ascii=False) for event in found]
    return [f"data: {line}\n\n".encode() for line in [*lines, "[DONE]"]]


@contextlib.asynccontextmanager
async def running(*engines: Engine) -> AsyncIterator[None]:
    """Engines that listen, for the length of an async with block."""
    for engine in engines:
        await engine.start()
    try:
        yield
    finally:
        for engine in engines:
            await engine.die()
