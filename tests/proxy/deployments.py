"""A proxy over fake engines, with real notifications: what most tests of this folder run."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import aiohttp
import msgspec
import zmq
import zmq.asyncio

from dynamo_lmcache.proxy.app import Proxy
from dynamo_lmcache.proxy.args import Config, parse_args
from dynamo_lmcache.proxy.main import serving
from lmcache_ext.ports import free_port
from tests.proxy.fakes import Cache, Engine, running

QUICK = ("--probe-interval", "0.1", "--connect-timeout", "1", "--notify-timeout", "5", "--drain-timeout", "1")


@dataclass
class Deployment:
    """All that runs."""

    config: Config
    proxy: Proxy
    prefillers: list[Engine]
    decoders: list[Engine]
    http: aiohttp.ClientSession
    rank_done: Callable[[str, str, int], Awaitable[object]] | None = None  # our id, vLLM's, the rank: says it is stored

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.config.port}"

    async def post(self, path: str = "/v1/completions", **body: Any) -> tuple[int, Any]:
        """The status and the JSON of an answer."""
        async with self.http.post(self.url + path, json=body) as answer:
            return answer.status, await answer.json()

    async def stream(self, path: str = "/v1/completions", **body: Any) -> bytes:
        """All bytes of a stream."""
        async with self.http.post(self.url + path, json={**body, "stream": True}) as answer:
            assert answer.status == 200, await answer.text()
            return await answer.read()

    async def get(self, path: str) -> tuple[int, Any]:
        async with self.http.get(self.url + path) as answer:
            return answer.status, await answer.json()

    async def counted(self, name: str, **labels: str) -> float:
        """A sample of /metrics; 0 if there is none yet."""
        async with self.http.get(self.url + "/metrics") as answer:
            text = await answer.text()
        assert f"# TYPE lmcache_proxy_{name.removesuffix('_total')}" in text, name
        return self.proxy.metrics.registry.get_sample_value(f"lmcache_proxy_{name}", labels) or 0.0


async def until(condition: Callable[[], object], within_s: float = 15.0) -> None:
    """Wait for a condition that other tasks bring about."""
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline, "did not come about"
        await asyncio.sleep(0.005)


def reporter(http: aiohttp.ClientSession, port: int, ranks: int = 1) -> Callable[[str, str, int], Awaitable[object]]:
    """One rank's telemetry: upstream's report."""

    async def report(own: str, engine_id: str, rank: int = 0, **more: Any) -> None:
        payload = {"event": "request_store_finished", "request_ids_set": [engine_id], "model_name": "fake"}
        payload |= {"world_size": ranks, "kv_rank": rank, **more}
        async with http.post(f"http://127.0.0.1:{port}/api/v1/telemetry", json=payload) as answer:
            assert answer.status == 200

    return report


def pusher(socket: zmq.asyncio.Socket) -> Callable[[str, str, int], Awaitable[object]]:
    """One NIXL sender's rank: upstream's message."""

    async def push(own: str, engine_id: str, rank: int = 0) -> None:
        await socket.send(msgspec.msgpack.encode({"type": "ProxyNotif", "req_id": own}))

    return push


def all_ranks(done: Callable[[str, str, int], Awaitable[object]], ranks: int) -> Callable[[str, str], Awaitable[None]]:
    """What a prefiller of several ranks says."""

    async def report(own: str, engine_id: str) -> None:
        for rank in range(ranks):
            await done(own, engine_id, rank)

    return report


@asynccontextmanager
async def telemetry(
    flags: Sequence[str] = (), prefillers: int = 1, decoders: int = 1, ranks: int = 1
) -> AsyncIterator[Deployment]:
    """Engines around a shared cache server, whose prefillers report by HTTP."""
    port = free_port()
    argv = ["--telemetry-port", str(port)]
    async with _deployed(argv, flags, prefillers, decoders) as deployment:
        deployment.rank_done = reporter(deployment.http, port, ranks)
        for engine in deployment.prefillers:
            engine.report = all_ranks(deployment.rank_done, ranks)
        yield deployment


@asynccontextmanager
async def nixl(
    flags: Sequence[str] = (), prefillers: int = 1, decoders: int = 1, ranks: int = 1
) -> AsyncIterator[Deployment]:
    """Engines whose prefillers push, and notify by ZMQ."""
    port = free_port()
    init = ";".join(",".join(str(7300 + 10 * d + r) for r in range(ranks)) for d in range(decoders))
    alloc = ";".join(",".join(str(7400 + 10 * d + r) for r in range(ranks)) for d in range(decoders))
    argv = ["--proxy-port", str(port), "--decoder-init-port", init, "--decoder-alloc-port", alloc]
    context = zmq.asyncio.Context()
    socket = context.socket(zmq.PUSH)
    socket.setsockopt(zmq.LINGER, 0)
    try:
        async with _deployed(argv, flags, prefillers, decoders) as deployment:
            socket.connect(f"tcp://127.0.0.1:{port}")
            deployment.rank_done = pusher(socket)
            for engine in deployment.prefillers:
                engine.report = all_ranks(deployment.rank_done, ranks)
            yield deployment
    finally:
        socket.close()
        context.term()


@asynccontextmanager
async def _deployed(
    argv: Sequence[str], flags: Sequence[str], prefillers: int, decoders: int
) -> AsyncIterator[Deployment]:
    cache = Cache()
    first = [Engine(cache, prefiller=True) for _ in range(prefillers)]
    then = [Engine(cache) for _ in range(decoders)]
    ports = {"--prefiller-port": first, "--decoder-port": then}
    where = [text for flag, group in ports.items() for text in (flag, ",".join(str(engine.port) for engine in group))]
    config = parse_args(["--port", str(free_port()), *where, *argv, *QUICK, *flags])
    async with running(*first, *then), aiohttp.ClientSession() as http, serving(config) as proxy:
        yield Deployment(config, proxy, first, then, http)


def said(stream: bytes) -> list[dict[str, Any]]:
    """The events of a stream, without its end."""
    lines = [line.removeprefix("data: ") for line in stream.decode().split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]
