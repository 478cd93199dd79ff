"""What each HTTP path does. Paths and shapes are upstream's where it has them; docs/server.md says what differs."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Callable
from typing import Any, TypeVar

from aiohttp import web

from lmcache_ext import __version__
from lmcache_ext.engine import Chunk, Want
from lmcache_ext.keys import Chain
from lmcache_ext.server import figures
from lmcache_ext.server.config import ServerConfig
from lmcache_ext.server.directory import group_of
from lmcache_ext.server.loop import Loop
from lmcache_ext.server.memory import GIB, Group, Stake, parts_of
from lmcache_ext.server.openapi import MOST_GB, MOST_KEYS
from lmcache_ext.server.protocol import KEY_BYTES, salt_digest
from lmcache_ext.tiers import header

T = TypeVar("T")

_ANSWER_SECONDS = 2.0  # for the service to do one thing
_PREFETCH_SECONDS, _LOOK_SECONDS, _KEPT = 30.0, 0.01, 1000
_NO_SALT = "_default"  # upstream's name for "" in a path


class BadRequest(Exception):
    """What was asked makes no sense; the message says why."""

    status = 400


class NotFound(BadRequest):
    """There is no such thing."""

    status = 404


class Conflict(BadRequest):
    """This server can't do that."""

    status = 409


class Api:
    """The handlers, in HTTP's event loop. Each asks the service's thread for what it needs."""

    def __init__(self, config: ServerConfig, loop: Loop) -> None:
        self._config, self._loop, self._service = config, loop, loop.service
        self._salts: dict[bytes, str] = {}  # digest → the salt, of those that got a limit here
        self._prefetches: dict[str, dict[str, Any]] = {}
        self._numbers = itertools.count(1)
        self._tasks: set[asyncio.Task[None]] = set()

    async def do(self, work: Callable[[], T]) -> T:
        """`work`, done in the service's thread."""
        return await asyncio.wait_for(asyncio.wrap_future(self._loop.call(work)), _ANSWER_SECONDS)

    # -- looking ----------------------------------------------------------------------------------------------------

    async def healthcheck(self, request: web.Request) -> Any:
        """Whether the server answers its clients."""
        if not self._loop.alive:
            return web.json_response({"status": "unhealthy", "reason": "its thread has ended"}, status=503)
        await self.do(lambda: None)
        return {"status": "healthy"}

    async def status(self, request: web.Request) -> Any:
        """Memory, tiers, groups, clients, counters. With `check=1` also `faults`: broken invariants, O(chunks)."""

        def work() -> Any:
            found = figures.status(self._service, self._config.instance_id)
            return {**found, "faults": self._service.check()} if check == "1" else found

        if (check := request.query.get("check", "0")) not in ("0", "1"):
            raise BadRequest("check must be 0 or 1")
        return await self.do(work)

    async def config(self, request: web.Request) -> Any:
        """The flags that it was started with."""
        config = self._config
        return {
            "host": config.host, "port": config.port, "http_host": config.http_host, "http_port": config.http_port,
            "l1_size_gb": config.l1_size_gb, "l1_use_lazy": config.l1_use_lazy, "chunk_size": config.chunk_size,
            "eviction_policy": config.eviction_policy, "extent_mb": config.extent_bytes / (1 << 20),
            "silence_seconds": config.silence_seconds, "instance_id": config.instance_id,
            "l2_adapters": [adapter.type for adapter in config.adapters],
        }  # fmt: skip

    async def version(self, request: web.Request) -> Any:
        """The version of this package."""
        return {"version": __version__}

    async def objects(self, request: web.Request) -> Any:
        """Chunks in host memory, in the order in which they became known: `offset`, `limit` (at most 1000)."""
        offset, limit = _number(request, "offset", 0), min(_number(request, "limit", 100), 1000)

        def work() -> Any:
            chunks = self._service.directory.chunks()
            return {"total": len(chunks), "objects": [_told(chunk) for chunk in chunks[offset : offset + limit]]}

        return await self.do(work)

    async def checksums(self, request: web.Request) -> Any:
        """xxh3-128 of each chunk's bytes; null for those that are not there."""
        keys = _keys(await _body(request))
        directory, segment = self._service.directory, self._service.segment

        chunks: list[Chunk | None] = []

        def hold() -> None:
            chunks.extend(c if (c := directory.ready(key)) and directory.hold(c) else None for key in keys)

        def sum_of(chunk: Chunk) -> str:
            return header.digest(parts_of(segment, _stake(chunk), chunk.slot, chunk.tokens)).hex()

        def compute() -> list[str | None]:
            return [None if chunk is None else sum_of(chunk) for chunk in chunks]

        try:
            await self.do(hold)
            sums = await asyncio.get_running_loop().run_in_executor(None, compute)
        finally:  # behind `hold`, which may be late
            self._loop.call(lambda: directory.release([chunk for chunk in chunks if chunk]))
        return {"status": "success", "num_chunks": len(sums), "chunk_checksums": sums, "algorithm": "xxh3-128"}

    # -- changing ---------------------------------------------------------------------------------------------------

    async def delete_objects(self, request: web.Request) -> Any:
        """Forget these keys: `tier` l1, l2 or all. What is leased stays readable for those who hold it."""
        body = await _body(request)
        keys, tier = _keys(body), body.get("tier", "l2")
        if tier not in ("l1", "l2", "all"):
            raise BadRequest("tier must be l1, l2 or all")

        def work() -> int:
            count = 0
            for key in keys if tier != "l2" else ():
                count += self._service.directory.ready(key) is not None
                self._service.directory.drop(key)
            for level in self._service.setup.levels if tier != "l1" else ():
                level.tier.delete(keys)
            return count

        return {"status": "ok", "deleted_l1": await self.do(work), "requested": len(keys)}

    async def clear(self, request: web.Request) -> Any:
        """Forget all chunks in host memory, or those of one group (`root`)."""
        body = await _body(request, optional=True)
        if body.get("tier", "l1") != "l1":
            raise BadRequest("only tier l1 can be cleared")

        def work() -> int:
            return self._service.directory.forget(self._of_root(body["root"]) if "root" in body else None)

        return {"status": "ok", "cleared": await self.do(work)}

    async def prefetch(self, request: web.Request) -> Any:
        """Bring chunks from tiers into host memory: by `root` and `keys`, or `model_name` and `token_ids`."""
        body = await _body(request)
        if not self._service.lower:
            raise Conflict("there is no tier below host memory")
        group, keys = await self.do(lambda: self._wanted(body))
        name = f"prefetch-{next(self._numbers)}"
        while len(self._prefetches) >= _KEPT:
            del self._prefetches[next(iter(self._prefetches))]
        self._prefetches[name] = {"id": name, "status": "pending", "requested": len(keys), "ready": 0}
        task = asyncio.create_task(self._fetch(name, group, keys))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return web.json_response(self._prefetches[name], status=202)

    def _wanted(self, body: dict[str, Any]) -> tuple[Group, list[bytes]]:
        if "keys" in body:
            return self._of_root(body.get("root")), _keys(body)
        tokens, groups = body.get("token_ids"), list(self._service.groups.values())
        named = [g for g in groups if g.model == body.get("model_name")]
        fitting = [g for g in named if body.get("world_size") in (None, len(g.parts))]
        if len(fitting) != 1:
            raise NotFound(f"{len(fitting)} groups are called so: name the root and the keys instead")
        if body.get("cache_salt"):
            raise BadRequest("chunks with a salt can only be named by root and keys")
        if not isinstance(tokens, list) or not all(isinstance(t, int) and 0 <= t < 1 << 32 for t in tokens):
            raise BadRequest("token_ids must be a list of token ids")
        return fitting[0], Chain(fitting[0].root, fitting[0].tokens).extend(tokens, len(tokens))[:MOST_KEYS]

    async def _fetch(self, name: str, group: Group, keys: list[bytes]) -> None:
        lower, entry = self._service.lower, self._prefetches[name]
        assert lower is not None
        wants = [Want(key, group.tokens, Stake(group)) for key in keys]
        until = time.monotonic() + _PREFETCH_SECONDS
        try:
            while await self.do(lambda: lower.fetch(name, wants, _PREFETCH_SECONDS)) and time.monotonic() < until:
                await asyncio.sleep(_LOOK_SECONDS)
            entry["ready"] = await self.do(lambda: self._service.directory.match(keys))
            entry["status"] = "completed"
        except asyncio.TimeoutError:
            entry["status"] = "failed"
        finally:
            self._loop.call(lambda: lower.release(name))

    async def prefetched(self, request: web.Request) -> Any:
        """How a prefetch fares: pending, completed or failed."""
        if (entry := self._prefetches.get(request.match_info["id"])) is None:
            raise NotFound("there is no such prefetch")
        return entry

    def _of_root(self, root: object) -> Group:
        for group in self._service.groups.values():
            if group.root.hex() == root:
                return group
        raise NotFound(f"no group has the root {root!r}")

    # -- shares of salts --------------------------------------------------------------------------------------------

    async def put_quota(self, request: web.Request) -> Any:
        """Bound a salt's bytes in host memory: `{"limit_gb": 4}`."""
        salt, body = _salt(request), await _body(request)
        limit = body.get("limit_gb")
        if not isinstance(limit, (int, float)) or isinstance(limit, bool) or not 0 <= limit <= MOST_GB:
            raise BadRequest(f"limit_gb must be a number, 0 to {MOST_GB:.0e}")
        digest = salt_digest(salt)
        await self.do(lambda: self._service.directory.limit(digest, int(limit * GIB)))
        self._salts[digest] = salt
        return {"cache_salt": salt or _NO_SALT, "limit_gb": limit, "status": "ok"}

    async def get_quota(self, request: web.Request) -> Any:
        """A salt's bound and use."""
        salt = _salt(request)
        limits, used = await self._shares()
        digest = salt_digest(salt)
        return {
            "cache_salt": salt or _NO_SALT, "limit_gb": limits.get(digest, 0) / GIB,
            "current_usage_gb": used.get(digest, 0) / GIB, "exists": digest in limits,
        }  # fmt: skip

    async def delete_quota(self, request: web.Request) -> Any:
        """A salt is bounded no more."""
        salt = _salt(request)
        digest = salt_digest(salt)
        known = digest in (await self._shares())[0]
        await self.do(lambda: self._service.directory.limit(digest, None))
        return {"cache_salt": salt or _NO_SALT, "status": "removed" if known else "not_found"}

    async def quotas(self, request: web.Request) -> Any:
        """All bounds. Salts that clients bounded are named by their digest: the server does not know them."""
        limits, used = await self._shares()
        return {"users": {
            (self._salts.get(digest, digest.hex()) or _NO_SALT): {
                "limit_gb": limit / GIB, "current_usage_gb": used.get(digest, 0) / GIB,
            } for digest, limit in limits.items()
        }}  # fmt: skip

    async def _shares(self) -> tuple[dict[bytes, int], dict[bytes, int]]:
        directory = self._service.directory
        return await self.do(lambda: (directory.limits, dict(directory.arena.by_salt)))


def _told(chunk: Chunk) -> dict[str, Any]:
    group = group_of(chunk)
    return {
        "key": chunk.key.hex(), "model": group.model, "group": group.number, "tokens": chunk.tokens,
        "bytes": group.slot_bytes, "leases": chunk.leases, "uses": chunk.uses, "salt": _stake(chunk).salt.hex(),
    }  # fmt: skip


def _stake(chunk: Chunk) -> Stake:
    assert isinstance(chunk.note, Stake)
    return chunk.note


async def _body(request: web.Request, optional: bool = False) -> dict[str, Any]:
    raw = await asyncio.wait_for(request.read(), 10.0)
    if optional and not raw:
        return {}
    try:
        body = await request.json()
    except ValueError:
        raise BadRequest("the body must be JSON") from None
    if not isinstance(body, dict):
        raise BadRequest("the body must be a JSON object")
    return body


def _keys(body: dict[str, Any]) -> list[bytes]:
    keys = body.get("keys")
    if not isinstance(keys, list) or not 0 < len(keys) <= MOST_KEYS:
        raise BadRequest(f"keys must be a list of 1 to {MOST_KEYS} keys")
    try:
        found = [bytes.fromhex(key) for key in keys]
    except (TypeError, ValueError):
        found = []
    if not found or any(len(key) != KEY_BYTES for key in found):
        raise BadRequest(f"a key is {2 * KEY_BYTES} hexadecimal digits")
    return found


def _number(request: web.Request, name: str, default: int) -> int:
    text = request.query.get(name, str(default))
    if not text.isdecimal() or len(text) > 12:
        raise BadRequest(f"{name} must be a number")
    return int(text)


def _salt(request: web.Request) -> str:
    salt = request.match_info["cache_salt"]
    return "" if salt == _NO_SALT else salt
