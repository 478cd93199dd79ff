"""The HTTP side: routes, who may ask, errors as JSON, /metrics, /openapi.json and the status page.

On loopback anybody on the host may ask; elsewhere, and where a secret is set, only who brings it, as a bearer or as a
password. Browsers' cross-site requests are refused: where they come from, or the name that they ask for, is not ours.
"""

from __future__ import annotations

import asyncio
import base64
import hmac
import logging
from collections.abc import Awaitable, Callable
from importlib.resources import files
from typing import Any
from urllib.parse import urlsplit

from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from prometheus_client.core import Metric

from lmcache_ext.errors import ConfigError
from lmcache_ext.server import figures
from lmcache_ext.server.api import Api, BadRequest
from lmcache_ext.server.config import ServerConfig, is_loopback
from lmcache_ext.server.loop import Loop
from lmcache_ext.server.openapi import describe

logger = logging.getLogger("lmcache_ext.server")

_MAX_BODY = 8 << 20
_PAGE_MAY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'"
Handler = Callable[[web.Request], Awaitable[Any]]


class Http:
    """One site. `start` and `stop` belong to the same event loop."""

    def __init__(self, config: ServerConfig, loop: Loop) -> None:
        self._config, self._service = config, loop.service
        self._api = Api(config, loop)
        self._runner: web.AppRunner | None = None
        self.address = ""

    def routes(self) -> list[tuple[str, str, Handler]]:
        """(method, path, handler) of all."""
        api = self._api
        return [
            ("GET", "/", self._page),
            ("GET", "/healthcheck", api.healthcheck),
            ("GET", "/status", api.status),
            ("GET", "/config", api.config),
            ("GET", "/version", api.version),
            ("GET", "/metrics", self._metrics),
            ("GET", "/openapi.json", self._openapi),
            ("GET", "/cache/objects", api.objects),
            ("DELETE", "/cache/objects", api.delete_objects),
            ("POST", "/cache/clear", api.clear),
            ("POST", "/cache/checksums", api.checksums),
            ("POST", "/cache/prefetches", api.prefetch),
            ("GET", "/cache/prefetches/{id}", api.prefetched),
            ("GET", "/quota", api.quotas),
            ("PUT", "/quota/{cache_salt}", api.put_quota),
            ("GET", "/quota/{cache_salt}", api.get_quota),
            ("DELETE", "/quota/{cache_salt}", api.delete_quota),
        ]

    async def start(self) -> None:
        """Listen. Raises ConfigError."""
        app = web.Application(client_max_size=_MAX_BODY, middlewares=[self._guard])
        for method, path, handler in self.routes():
            app.router.add_route(method, path, handler)
        self._runner = web.AppRunner(app, access_log=None)
        await self._runner.setup()
        host, port = self._config.http_host, self._config.http_port
        try:
            await web.TCPSite(self._runner, host, port, shutdown_timeout=1.0).start()
        except OSError as error:
            await self._runner.cleanup()
            raise ConfigError("--http-port", f"{host}:{port}", f"can't be bound: {error.strerror}") from None
        self.address = f"http://{host}:{self._runner.addresses[0][1]}"

    async def stop(self) -> None:
        """Listen no more."""
        if self._runner:
            await self._runner.cleanup()

    @web.middleware
    async def _guard(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        if (refusal := self._refusal(request)) is not None:
            return refusal
        try:
            answer = await handler(request)
        except web.HTTPException as error:
            refused = _error(error.status, error.reason)
            if "Allow" in error.headers:
                refused.headers["Allow"] = error.headers["Allow"]
            return refused
        except BadRequest as error:
            return _error(error.status, str(error))
        except (asyncio.TimeoutError, TimeoutError):
            return _error(503, "the server is too busy to answer")
        except Exception as error:
            logger.exception("a fault in %s %s", request.method, request.path)
            return _error(500, type(error).__name__)
        return answer if isinstance(answer, web.StreamResponse) else web.json_response(answer)

    def _refusal(self, request: web.Request) -> web.Response | None:
        origin = request.headers.get("Origin")
        if origin and urlsplit(origin).netloc != request.host:
            return _error(403, "requests from other sites are not served")
        if self._config.token:
            if _brings(request.headers.get("Authorization", ""), self._config.token):
                return None
            answer = _error(401, "bring the server's secret: Authorization: Bearer …, or as the password")
            answer.headers["WWW-Authenticate"] = 'Basic realm="lmcache-ext server"'
            return answer
        if not is_loopback(urlsplit(f"//{request.host}").hostname or ""):
            return _error(403, "this server is asked by a loopback address")
        return None

    async def _page(self, request: web.Request) -> web.Response:
        """The status page: one file, which asks /status."""
        text = files("lmcache_ext.server").joinpath("page.html").read_text("utf-8")
        return web.Response(text=text, content_type="text/html", headers={"Content-Security-Policy": _PAGE_MAY})

    async def _metrics(self, request: web.Request) -> web.Response:
        """Prometheus' text format."""
        snapshot = await self._api.do(lambda: figures.metrics(self._service))
        registry = CollectorRegistry()
        registry.register(_Snapshot(snapshot))
        return web.Response(body=generate_latest(registry), headers={"Content-Type": CONTENT_TYPE_LATEST})

    async def _openapi(self, request: web.Request) -> Any:
        """This description."""
        return describe((method, path, (handler.__doc__ or "").strip()) for method, path, handler in self.routes())


class _Snapshot:
    def __init__(self, families: list[Metric]) -> None:
        self._families = families

    def collect(self) -> list[Metric]:
        return self._families


def _brings(given: str, token: str) -> bool:
    kind, _, value = given.partition(" ")
    if kind == "Basic":
        try:
            value = base64.b64decode(value, validate=True).decode().partition(":")[2]
        except ValueError:
            return False
    return kind in ("Basic", "Bearer") and hmac.compare_digest(value.encode(), token.encode())


def _error(status: int, message: str) -> web.Response:
    return web.json_response({"error": message}, status=status)
