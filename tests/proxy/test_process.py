"""The program itself: started, listening on loopback only, told to stop."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import sys
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import aiohttp
import psutil

from lmcache_ext.ports import free_port
from tests.proxy.deployments import all_ranks, reporter, until
from tests.proxy.fakes import Cache, Engine, running


@contextlib.asynccontextmanager
async def program(port: int, flags: Sequence[str]) -> AsyncIterator[asyncio.subprocess.Process]:
    argv = [sys.executable, "-m", "dynamo_lmcache.proxy", "--port", str(port), "--probe-interval", "0.2", *flags]
    root = Path(__file__).resolve().parents[2]
    process = await asyncio.create_subprocess_exec(*argv, cwd=root, stderr=asyncio.subprocess.PIPE)
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await asyncio.wait_for(process.communicate(), 10)


async def ready(http: aiohttp.ClientSession, port: int) -> None:
    for _ in range(600):
        with contextlib.suppress(aiohttp.ClientError):
            async with http.get(f"http://127.0.0.1:{port}/health") as answer:
                if answer.status == 200:
                    return
        await asyncio.sleep(0.05)
    raise AssertionError("did not start")


async def test_it_serves_on_loopback_and_lets_requests_finish_when_told_to_stop():
    cache, port, heard = Cache(), free_port(), free_port()
    prefiller, decoder = Engine(cache, prefiller=True), Engine(cache)
    flags = [
        "--prefiller-port",
        str(prefiller.port),
        "--decoder-port",
        str(decoder.port),
        "--telemetry-port",
        str(heard),
    ]
    async with running(prefiller, decoder), aiohttp.ClientSession() as http, program(port, flags) as process:
        await ready(http, port)
        prefiller.report = all_ranks(reporter(http, heard), 1)
        listening = [c.laddr for c in psutil.Process(process.pid).net_connections("tcp") if c.status == "LISTEN"]
        assert sorted(listening) == sorted([("127.0.0.1", port), ("127.0.0.1", heard)])
        gate = decoder.chunk_gate = asyncio.Event()
        body = {"prompt": "hello", "max_tokens": 4, "stream": True}
        async with http.post(f"http://127.0.0.1:{port}/v1/completions", json=body) as answer:
            await answer.content.readuntil(b"\n\n")
            assert decoder.seen[0].hit
            process.send_signal(signal.SIGTERM)
            await until(lambda: refused(port))
            await asyncio.sleep(0.3)
            gate.set()
            assert (await answer.read()).endswith(b"data: [DONE]\n\n")
        assert await asyncio.wait_for(process.wait(), 10) == 0


def refused(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0


async def test_a_port_that_is_taken_is_named():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        number = taken.getsockname()[1]
        for port, flags in (
            (number, ["--telemetry-port", str(free_port())]),
            (free_port(), ["--proxy-port", str(number)]),
        ):
            async with program(port, flags) as process:
                _, log = await asyncio.wait_for(process.communicate(), 30)
                assert process.returncode == 1 and str(number).encode() in log and b"Traceback" not in log
