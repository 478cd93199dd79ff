"""LoRA adapters: load, unload and list them while the worker serves; requests name them as models."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from dynamo.llm import lora_name_to_id
from vllm.lora.request import LoRARequest
from vllm.v1.engine.async_llm import AsyncLLM

from dynamo_lmcache.vllm.errors import RequestError

logger = logging.getLogger(__name__)

Answer = dict[str, Any]
Publish = Callable[[str, int], Awaitable[None]]
Withdraw = Callable[[str], Awaitable[None]]

# How long an unload waits for requests that still use the adapter.
_UNLOAD_WAIT_S = 60.0


class Adapters:
    """The adapters of one worker. One event loop only; loads and unloads are serialised."""

    def __init__(
        self,
        engine: AsyncLLM,
        *,
        base_names: tuple[str, ...],
        enabled: bool,
        publish: Publish | None = None,
        withdraw: Withdraw | None = None,
    ) -> None:
        """Take the names that mean the base model, and what tells discovery of an adapter."""
        self._engine = engine
        self._base_names = frozenset(base_names)
        self._enabled = enabled
        self._publish = publish
        self._withdraw = withdraw
        self._lock = asyncio.Lock()
        self._loaded: dict[str, LoRARequest] = {}
        self._users: dict[str, int] = {}
        self._idle = asyncio.Condition()

    def resolve(self, model: str | None) -> LoRARequest | None:
        """Return the adapter that a request names, or None for the base model.

        Raises:
            RequestError: with status 404 for a name that is neither.
        """
        if not model or model in self._base_names:
            return None
        if model in self._loaded:
            return self._loaded[model]
        if self._enabled:
            raise RequestError(f"the model {model!r} does not exist: no adapter of that name is loaded", status=404)
        return None

    @contextlib.asynccontextmanager
    async def using(self, adapter: LoRARequest | None) -> AsyncIterator[None]:
        """Keep an adapter loaded for the length of a request."""
        if adapter is None:
            yield
            return
        name = adapter.lora_name
        self._users[name] = self._users.get(name, 0) + 1
        try:
            yield
        finally:
            self._users[name] -= 1
            async with self._idle:
                self._idle.notify_all()

    async def load(self, request: Any = None) -> AsyncGenerator[Answer, None]:
        """Answer ``{"lora_name": str, "source": {"uri": str}}``. Loading a loaded adapter again is no error."""
        async with self._lock:
            yield await self._answer(self._load(request))

    async def unload(self, request: Any = None) -> AsyncGenerator[Answer, None]:
        """Answer ``{"lora_name": str}`` once no request uses the adapter any more."""
        async with self._lock:
            yield await self._answer(self._unload(request))

    async def list(self, request: Any = None) -> AsyncGenerator[Answer, None]:
        """Answer with the names and ids of the loaded adapters."""
        loras = {name: adapter.lora_int_id for name, adapter in self._loaded.items()}
        yield {"status": "success", "loras": loras, "count": len(loras)}

    async def _answer(self, work: Awaitable[Answer]) -> Answer:
        try:
            return {"status": "success", **await work}
        except Exception as error:
            logger.warning("LoRA request failed", exc_info=True)
            return {"status": "error", "message": str(error)}

    async def _load(self, request: Any) -> Answer:
        name = _name(request)
        loaded = self._loaded.get(name)
        if loaded is None:
            path = await local_path((request.get("source") or {}).get("uri"))
            loaded = LoRARequest(lora_name=name, lora_int_id=lora_name_to_id(name), lora_path=path)
            await self._engine.add_lora(loaded)
            self._loaded[name] = loaded
            try:
                if self._publish is not None:
                    await self._publish(name, loaded.lora_int_id)
            except Exception:
                del self._loaded[name]
                await self._engine.remove_lora(loaded.lora_int_id)
                raise
        return {"message": f"LoRA adapter '{name}' loaded", "lora_name": name, "lora_id": loaded.lora_int_id}

    async def _unload(self, request: Any) -> Answer:
        name = _name(request)
        adapter = self._loaded.get(name)
        if adapter is None:
            raise RequestError(f"LoRA adapter '{name}' is not loaded; loaded are {sorted(self._loaded)}", status=404)
        # First out of discovery and out of sight, so that no new request can take it.
        if self._withdraw is not None:
            await self._withdraw(name)
        del self._loaded[name]
        try:
            async with self._idle:
                free = self._idle.wait_for(lambda: not self._users.get(name))
                await asyncio.wait_for(free, timeout=_UNLOAD_WAIT_S)
        except asyncio.TimeoutError:
            logger.warning("LoRA adapter %s is removed while %d requests use it", name, self._users[name])
        await self._engine.remove_lora(adapter.lora_int_id)
        return {"message": f"LoRA adapter '{name}' unloaded", "lora_name": name, "lora_id": adapter.lora_int_id}


async def local_path(uri: Any) -> str:
    """Return the directory of an adapter; files are used where they are, other schemes are fetched by Dynamo.

    Raises:
        RequestError: if there is no such adapter, or it cannot be fetched.
    """
    if not isinstance(uri, str) or not uri:
        raise RequestError('source.uri is missing: give {"lora_name": ..., "source": {"uri": "file:///..."}}')
    parts = urlsplit(uri)
    if parts.scheme in ("", "file"):
        path = Path(unquote(parts.path))
        if not (path / "adapter_config.json").is_file():
            raise RequestError(f"{uri!r} holds no adapter_config.json", status=404)
        return str(path)
    from dynamo.common.lora.manager import get_lora_manager

    manager = get_lora_manager()
    if manager is None:
        raise RequestError(f"{uri!r} must be fetched: set DYN_LORA_ENABLED=true, or give a file:// URI")
    fetched = await manager.download_lora(uri)
    if fetched["status"] != "success":
        raise RequestError(f"{uri!r} cannot be fetched: {fetched.get('message')}")
    return str(fetched["local_path"])


def _name(request: Any) -> str:
    name = request.get("lora_name") if isinstance(request, dict) else None
    if not isinstance(name, str) or not name:
        raise RequestError("lora_name is missing")
    return name
