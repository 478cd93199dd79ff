"""The HTTP side: what is served, to how many at once, and what each request goes through."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Any

import aiohttp
import msgspec
from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST, Histogram, generate_latest

from dynamo_lmcache.proxy import relay
from dynamo_lmcache.proxy.args import Config
from dynamo_lmcache.proxy.engines import Engine, Pool
from dynamo_lmcache.proxy.errors import Broken, EngineFault, EngineRefusal, Refusal, Unreachable, error_body
from dynamo_lmcache.proxy.metrics import Metrics
from dynamo_lmcache.proxy.notify import Waits
from dynamo_lmcache.proxy.order import CHAT, COMPLETIONS, Order, take_order
from dynamo_lmcache.proxy.prefill import Prefill

logger = logging.getLogger(__name__)

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Proxy:
    """Requests in, answers out. One event loop only."""

    def __init__(self, config: Config, http: aiohttp.ClientSession, metrics: Metrics) -> None:
        limits = config.limits
        self.config = config
        self.metrics = metrics
        self.waits = Waits(metrics)
        self.prefillers, self.decoders = (
            Pool(role, [Engine(role, backend, http, limits) for backend in backends], limits, metrics)
            for role, backends in (("prefiller", config.prefillers), ("decoder", config.decoders))
        )
        self.under_way = 0
        metrics.under_way.set_function(lambda: float(self.under_way))
        self._prefill = Prefill(config, self.prefillers, self.waits, metrics)
        self._relay = relay.Relay(limits, metrics)

    def app(self) -> web.Application:
        """The server's application."""
        app = web.Application(client_max_size=self.config.limits.max_body, middlewares=[self._errors])
        app.router.add_post(COMPLETIONS, self._generate)
        app.router.add_post(CHAT, self._generate)
        app.router.add_get("/v1/models", self._models)
        app.router.add_get("/health", self._health)
        app.router.add_get("/metrics", self._metrics)
        return app

    @web.middleware
    async def _errors(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Whatever goes wrong before an answer began gets an error body and the right status."""
        path = request.path if request.match_info.http_exception is None else "other"
        try:
            answer = await handler(request)
        except asyncio.CancelledError:
            self.metrics.hangups.inc()
            self.metrics.requests.labels(path, 499).inc()
            raise
        except Exception as error:
            if isinstance(error, relay.Gone) or request.transport is None or request.transport.is_closing():
                self.metrics.hangups.inc()
                relay.hang_up(request)
                answer = web.Response(status=499)  # nobody gets it
            else:
                answer = _as_answer(error, self.decoders.retry_after)
        self.metrics.requests.labels(path, answer.status).inc()
        return answer

    async def _generate(self, request: web.Request) -> web.StreamResponse:
        if self.under_way >= self.config.limits.max_requests:
            raise Refusal(429, f"{self.under_way} requests are under way, as many as --max-requests", retry_after=1)
        self.under_way += 1
        arrived = time.monotonic()
        try:
            order = await self._take(request)
            return await self._carry_out(request, order, arrived)
        finally:
            self.under_way -= 1

    async def _take(self, request: web.Request) -> Order:
        limits, header = self.config.limits, self.config.session_header
        try:
            raw = await asyncio.wait_for(request.read(), limits.client_timeout)
        except asyncio.TimeoutError:
            raise Refusal(408, f"the body did not come within {limits.client_timeout:g} s") from None
        session = request.headers.get(header) if header else None
        return take_order(request.path, raw, request.headers, session, self.config.api_key)

    async def _carry_out(self, request: web.Request, order: Order, arrived: float) -> web.StreamResponse:
        decoder = self.decoders.choose(order.session)
        if decoder is None:
            raise self.decoders.none_up()
        tokens = order.prompt_tokens + order.output_tokens
        with contextlib.ExitStack() as load:
            load.enter_context(decoder.carrying(tokens))
            order = await self._prefill.run(order, decoder)
            engine, answer = await self._decode(order, decoder)
            if engine is not decoder:
                load.close()
                load.enter_context(engine.carrying(tokens))
            try:
                return await self._answer(request, order, engine, answer, arrived)
            finally:
                answer.close()

    async def _decode(self, order: Order, decoder: Engine) -> tuple[Engine, aiohttp.ClientResponse]:
        """The beginning of a decoder's answer: `decoder`'s, or if it can't be reached another's.

        After a connection that broke, one more engine is asked and no further: a request that ends engines must not
        end them all.
        """
        tried: list[Engine] = []
        broken = 0
        engine: Engine | None = decoder if decoder.up else self.decoders.choose(order.session)
        while engine is not None:
            try:
                return engine, await engine.call("POST", order.path, headers=order.headers, data=order.raw)
            except (Unreachable, Broken) as error:
                logger.warning("request %s: %s", order.id, error)
                broken += isinstance(error, Broken)
                if broken > 1:
                    raise
                tried.append(engine)
                # The connection may have been an idle one that the engine just closed: itself is better than none.
                again = engine if isinstance(error, Broken) else None
                engine = self.decoders.choose(order.session, tried) or again
                self.metrics.retries.labels("decoder").inc()
        raise self.decoders.none_up()

    async def _answer(
        self, request: web.Request, order: Order, engine: Engine, answer: aiohttp.ClientResponse, arrived: float
    ) -> web.StreamResponse:
        headers = {"X-Request-Id": order.id}
        if relay.is_stream(answer):
            out = web.StreamResponse(status=answer.status, headers=headers)
            relay.pass_headers(answer, out)
            await self._relay.stream(request, answer, out, _Once(self.metrics.first_byte_s, arrived))
            return out
        content = await engine.read(answer)
        self.metrics.first_byte_s.observe(time.monotonic() - arrived)
        if answer.status >= 500:
            engine.suspect()
        if answer.status >= 400 and answer.content_type != "application/json":
            raise EngineRefusal(answer.status, content, answer.content_type, answer.headers.get("Retry-After"))
        whole = web.Response(body=content, status=answer.status, headers=headers)
        relay.pass_headers(answer, whole)
        if answer.status == 503:
            whole.headers.setdefault("Retry-After", str(self.decoders.retry_after))
        return whole

    async def _models(self, request: web.Request) -> web.Response:
        """What the decoders serve, each model once."""
        headers = {"Authorization": given} if (given := request.headers.get("Authorization")) else {}
        if not headers and self.config.api_key is not None:
            headers = {"Authorization": f"Bearer {self.config.api_key}"}
        lists = await asyncio.gather(*(self._models_of(engine, headers) for engine in self.decoders.up))
        refused = [found for found in lists if isinstance(found, EngineRefusal)]
        models: dict[Any, Any] = {}
        for found in lists:
            if isinstance(found, list):
                for model in found:
                    models.setdefault(model.get("id"), model)
        if not models:
            raise refused[0] if refused else self.decoders.none_up()
        return web.json_response({"object": "list", "data": list(models.values())})

    async def _models_of(self, engine: Engine, headers: dict[str, str]) -> list[dict[str, Any]] | EngineRefusal | None:
        try:
            limit_s = self.config.limits.connect_timeout
            answer = await engine.call("GET", "/v1/models", headers=headers, limit_s=limit_s)
            content = await engine.read(answer)
            if 400 <= answer.status < 500:
                return EngineRefusal(answer.status, content, answer.content_type)
            return msgspec.json.decode(content, type=_Models).data
        except (EngineFault, msgspec.MsgspecError) as error:
            logger.warning("models of %s: %s", engine.url, error)
            return None

    async def _health(self, request: web.Request) -> web.Response:
        """200 if requests can be answered as configured; each engine's state either way."""
        able = self.decoders.up and (self.prefillers.up or self.config.prefill_fallback)
        all_up = len(self.decoders.up + self.prefillers.up) == len(self.decoders.engines + self.prefillers.engines)
        state = {
            "status": ("ok" if all_up else "degraded") if able else "unavailable",
            "mode": self.config.mode,
            "requests": self.under_way,
            "prefillers": [engine.state() for engine in self.prefillers.engines],
            "decoders": [engine.state() for engine in self.decoders.engines],
        }
        return web.json_response(state, status=200 if able else 503)

    async def _metrics(self, request: web.Request) -> web.Response:
        return web.Response(body=generate_latest(self.metrics.registry), headers={"Content-Type": CONTENT_TYPE_LATEST})


class _Once:
    """Observes the time since `start` the first time it is called."""

    def __init__(self, histogram: Histogram, start: float) -> None:
        self._histogram = histogram
        self._start: float | None = start

    def __call__(self) -> None:
        if self._start is not None:
            self._histogram.observe(time.monotonic() - self._start)
            self._start = None


class _Models(msgspec.Struct):
    data: list[dict[str, Any]]


def _as_answer(error: Exception, retry_after: int) -> web.Response:
    headers = {"Content-Type": "application/json"}
    body: bytes | None = None
    message = ""
    if isinstance(error, EngineRefusal):
        status, body = error.status, error.body
        if error.retry_after is not None:
            headers["Retry-After"] = error.retry_after
    elif isinstance(error, Refusal):
        status, message = error.status, error.message
        if error.retry_after is not None:
            headers["Retry-After"] = str(error.retry_after)
    elif isinstance(error, EngineFault):
        status, message = error.status, str(error)
    elif isinstance(error, web.HTTPException):
        status, message = error.status, error.reason
        headers |= {"Allow": error.headers["Allow"]} if "Allow" in error.headers else {}
    else:
        logger.error("a request failed in the proxy itself", exc_info=error)
        status, message = 500, "the proxy failed; its log says how"
    if status == 503:
        headers.setdefault("Retry-After", str(retry_after))
    return web.Response(body=body or error_body(status, message), status=status, headers=headers)
