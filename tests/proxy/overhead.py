"""What the proxy costs a request: ``python -m tests.proxy.overhead``.

Fake engines in one process, the proxy in another. Latencies are one client's, one request after another: an engine
asked directly, and the proxy, which asks a prefiller, hears its report and asks a decoder. CPU time is the proxy's own.
"""

from __future__ import annotations

import asyncio
import statistics
import sys
import time
from collections.abc import Awaitable, Callable

import aiohttp
import psutil

from lmcache_ext.ports import free_port
from tests.proxy.deployments import all_ranks, reporter
from tests.proxy.fakes import Cache, Engine
from tests.proxy.test_process import program, ready

REQUESTS, STREAMS, CHUNKS = 500, 40, 250


async def engines(first: int, then: int, telemetry: int) -> None:
    """Run two fake engines until killed."""
    cache = Cache()
    prefiller, decoder = Engine(cache, prefiller=True), Engine(cache)
    prefiller.port, decoder.port = first, then
    decoder.pace_s = 0.02  # as a decode step's: each event comes alone
    async with aiohttp.ClientSession() as http:
        prefiller.report = all_ranks(reporter(http, telemetry), 1)
        await prefiller.start()
        await decoder.start()
        await asyncio.sleep(600)


async def latencies(http: aiohttp.ClientSession, url: str) -> list[float]:
    took = []
    for number in range(REQUESTS):
        start = time.perf_counter()
        async with http.post(f"{url}/v1/completions", json={"prompt": f"{number} " * 20, "max_tokens": 1}) as answer:
            await answer.read()
            assert answer.status == 200
        took.append(1e3 * (time.perf_counter() - start))
    return took


async def streams(http: aiohttp.ClientSession, url: str) -> None:
    async def one(number: int) -> None:
        body = {"prompt": f"{number}", "max_tokens": CHUNKS, "stream": True}
        async with http.post(f"{url}/v1/completions", json=body) as answer:
            async for _ in answer.content.iter_any():
                pass

    await asyncio.gather(*(one(number) for number in range(STREAMS)))


async def cpu_ms(process: psutil.Process, work: Callable[[], Awaitable[object]]) -> float:
    before = process.cpu_times()
    await work()
    after = process.cpu_times()
    return 1e3 * (after.user + after.system - before.user - before.system)


async def main() -> None:
    ports = [free_port() for _ in range(4)]
    first, then, telemetry, port = ports
    argv = [sys.executable, "-m", "tests.proxy.overhead", *map(str, ports[:3])]
    fakes = await asyncio.create_subprocess_exec(*argv)
    flags = ["--prefiller-port", str(first), "--decoder-port", str(then), "--telemetry-port", str(telemetry)]
    direct, proxied = f"http://127.0.0.1:{then}", f"http://127.0.0.1:{port}"
    try:
        async with aiohttp.ClientSession() as http, program(port, [*flags, "--no-prefill-fallback"]) as process:
            await ready(http, then)
            await ready(http, port)
            watched = psutil.Process(process.pid)
            await latencies(http, proxied)
            alone = statistics.median(await latencies(http, direct))
            took: list[float] = []

            async def measured() -> None:
                took.extend(await latencies(http, proxied))

            busy = await cpu_ms(watched, measured) / REQUESTS
            print(f"one engine, directly: median {alone:.2f} ms")
            print(f"through the proxy: median {statistics.median(took):.2f} ms, its CPU {busy:.2f} ms a request")
            start = time.perf_counter()
            busy = await cpu_ms(watched, lambda: streams(http, proxied)) / (STREAMS * CHUNKS)
            rate = STREAMS * CHUNKS / (time.perf_counter() - start)
            print(f"{STREAMS} streams of {CHUNKS} events: {rate:.0f} events/s, its CPU {1e3 * busy:.0f} µs an event")
    finally:
        fakes.kill()
        await fakes.wait()


if __name__ == "__main__":
    asyncio.run(engines(*map(int, sys.argv[1:])) if len(sys.argv) > 1 else main())
