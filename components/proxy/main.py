"""Start, serve, drain."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import sys
from collections.abc import AsyncIterator, Coroutine, Sequence
from typing import Any

import zmq
import zmq.asyncio
from aiohttp import web

from dynamo_lmcache.proxy import notify
from dynamo_lmcache.proxy.app import Proxy
from dynamo_lmcache.proxy.args import BadFlag, Config, parse_args
from dynamo_lmcache.proxy.engines import open_session
from dynamo_lmcache.proxy.metrics import Metrics

logger = logging.getLogger(__name__)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the proxy until SIGTERM or SIGINT. Its exit code: 2 for a bad flag, 1 if it can't listen."""
    try:
        config = parse_args(argv)
    except BadFlag as error:
        sys.stderr.write(f"proxy: {error}\n")
        return 2
    logging.basicConfig(level=config.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    loop = _new_loop()
    asyncio.set_event_loop(loop)
    try:
        loop.run_until_complete(_until_told(config))
    except (OSError, zmq.ZMQError) as error:
        logger.error("can't listen: %s", error)
        return 1
    finally:
        loop.close()
    return 0


def _new_loop() -> asyncio.AbstractEventLoop:
    try:
        import uvloop
    except ImportError:
        return asyncio.new_event_loop()
    loop: asyncio.AbstractEventLoop = uvloop.new_event_loop()
    return loop


async def _until_told(config: Config) -> None:
    told = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, told.set)
    async with serving(config):
        await told.wait()  # no deadline: the process's own life
        logger.info("told to stop: requests under way get %g s", config.limits.drain_timeout)


@contextlib.asynccontextmanager
async def serving(config: Config) -> AsyncIterator[Proxy]:
    """A proxy that listens, for the length of an async with block; at its end, requests under way are let finish.

    Raises:
        OSError, zmq.ZMQError: if one of its ports can't be bound.
    """
    async with contextlib.AsyncExitStack() as stack:
        proxy = Proxy(config, await stack.enter_async_context(open_session()), Metrics())
        engines = (*proxy.prefillers.engines, *proxy.decoders.engines)
        await asyncio.gather(*(engine.probe() for engine in engines))
        _in_background(stack, [engine.watch() for engine in engines])
        if config.mode == "nixl":
            _listen_zmq(stack, config, proxy.waits)
        else:
            app = notify.telemetry_app(proxy.waits)
            await _listen(stack, app, config.notify_host, config.notify_port, drain_s=1.0)
        await _listen(stack, proxy.app(), config.host, config.port, drain_s=config.limits.drain_timeout)
        where = (config.mode, config.host, config.port, config.notify_host, config.notify_port)
        logger.info("%s mode: clients at %s:%d, prefillers report to %s:%d", *where)
        yield proxy


def _in_background(stack: contextlib.AsyncExitStack, coroutines: Sequence[Coroutine[Any, Any, None]]) -> None:
    """Run coroutines for as long as the stack lasts."""
    tasks = [asyncio.ensure_future(coroutine) for coroutine in coroutines]

    async def end() -> None:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    stack.push_async_callback(end)


def _listen_zmq(stack: contextlib.AsyncExitStack, config: Config, waits: notify.Waits) -> None:
    context = zmq.asyncio.Context()
    stack.callback(context.term)
    socket = notify.bind_notifications(context, config.notify_host, config.notify_port)
    stack.callback(socket.close)
    _in_background(stack, [notify.receive_notifications(socket, waits)])


async def _listen(
    stack: contextlib.AsyncExitStack, app: web.Application, host: str, port: int, *, drain_s: float
) -> None:
    # handler_cancellation: a client that hangs up ends its handler, and with it the calls of the engines.
    runner = web.AppRunner(app, handler_cancellation=True, access_log=None, shutdown_timeout=drain_s)
    await runner.setup()
    stack.push_async_callback(runner.cleanup)
    await web.TCPSite(runner, host, port, backlog=1024).start()
