"""The first half of a request: a prefiller computes the prompt's KV, and somebody says that it is stored."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from typing import Any

import msgspec

from dynamo_lmcache.proxy.args import Config
from dynamo_lmcache.proxy.engines import Engine, Pool
from dynamo_lmcache.proxy.errors import EngineFault, EngineRefusal, Unreachable
from dynamo_lmcache.proxy.metrics import Metrics
from dynamo_lmcache.proxy.notify import Outcome, Waits
from dynamo_lmcache.proxy.order import Order, Part

logger = logging.getLogger(__name__)

_AT_ONCE = 32  # prompts of one request
_MAX_PARTS = 1024  # prompts of one request; with more of them a prefiller in between is no gain
_TOKENIZE_S = 30.0
_HALVINGS = 4


class Prefill:
    """Runs prefills. Where it can't, and may, it leaves the prompt to the decoder: right, only later."""

    def __init__(self, config: Config, pool: Pool, waits: Waits, metrics: Metrics) -> None:
        self._config = config
        self._pool = pool
        self._waits = waits
        self._metrics = metrics

    async def run(self, order: Order, decoder: Engine) -> Order:
        """Have all prompts of `order` prefilled for `decoder`, and return what the decoder shall be sent.

        Ends within ``--answer-timeout`` and ``--notify-timeout``; cancelled, it lets go of its calls, and the engines
        stop computing.

        Raises:
            EngineRefusal: a prefiller says that the request is wrong (4xx).
            Refusal: 503, if no prefiller is up and decoders may not do without.
        """
        parts = order.parts()
        if len(parts) > _MAX_PARTS:
            self._metrics.handovers.labels("too_many_prompts").inc()
            return order
        if self._config.mode == "nixl":
            order = await self._tokenized(order)
            parts = order.parts()
        turns = asyncio.Semaphore(_AT_ONCE)

        async def one(part: Part) -> None:
            async with turns:
                await self._part(order, part, decoder)

        if len(parts) == 1:
            await self._part(order, parts[0], decoder)
            return order
        tasks = [asyncio.ensure_future(one(part)) for part in parts]
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        return order

    async def _part(self, order: Order, part: Part, decoder: Engine) -> None:
        tried: list[Engine] = []
        while (engine := self._pool.choose(order.session, tried)) is not None:
            try:
                outcome = await self._on(engine, order, part, decoder)
            except Unreachable:
                tried.append(engine)
                self._metrics.retries.labels(self._pool.role).inc()
                continue
            except EngineFault as error:
                logger.warning("prefill of %s: %s; the decoder computes it", part.id, error)
                outcome = None
            self._metrics.handovers.labels(outcome.value if outcome else "broken").inc()
            if outcome is None and not self._config.prefill_fallback:
                raise self._pool.none_up()
            return
        if not self._config.prefill_fallback:
            raise self._pool.none_up()
        self._metrics.handovers.labels("no_prefiller").inc()

    async def _on(self, engine: Engine, order: Order, part: Part, decoder: Engine) -> Outcome | None:
        """Prefill on `engine`; None if it answers with an error of its own (5xx)."""
        body = order.prefill_body(part)
        ranks = None
        if self._config.mode == "nixl":
            ranks = len(decoder.backend.init_ports)
            body["kv_transfer_params"] = _transfer_params(body.get("kv_transfer_params"), part.id, decoder)
        headers = order.headers.copy()
        headers["X-Request-Id"] = part.id
        with engine.carrying(part.tokens), self._waits.open(part.id, ranks) as wait:
            start = time.monotonic()
            answer, content = await engine.ask(order.path, headers=headers, data=msgspec.json.encode(body))
            if 400 <= answer.status < 500:
                retry_after = answer.headers.get("Retry-After")
                raise EngineRefusal(answer.status, content, answer.content_type, retry_after)
            if answer.status != 200:
                logger.warning("prefill of %s: %s answers %d", part.id, engine.url, answer.status)
                return None
            answered = time.monotonic()
            self._metrics.prefill_s.observe(answered - start)
            # A prefiller that never reports must not cost every request all of the time: the next waits are shorter.
            patience = self._config.limits.notify_timeout / 2 ** min(engine.unheard, _HALVINGS)
            outcome = await wait.outcome(patience)
            self._metrics.handover_s.observe(time.monotonic() - answered)
            self._note(engine, part, heard=wait.heard, outcome=outcome)
            return outcome

    def _note(self, engine: Engine, part: Part, *, heard: bool, outcome: Outcome) -> None:
        if heard:
            engine.unheard = 0
        else:
            engine.unheard += 1
            if engine.unheard == 1:
                logger.warning("%s did not say that %s is stored: does it know where to?", engine.url, part.id)
        if outcome is not Outcome.STORED:
            logger.info("hand-over of %s: %s; the decoder starts without", part.id, outcome.value)

    async def _tokenized(self, order: Order) -> Order:
        """`order` with its prompts as token ids, made once for both engines; as it is where that can't be."""
        texts = order.texts()
        if texts is None or (engine := self._pool.choose(order.session)) is None:
            return order
        ids: list[list[int]] = []
        for text in texts:
            tokens = await self._tokenize(engine, order, text)
            if tokens is None:
                return order  # the engines will say what is wrong with it
            ids.append(tokens)
        return order.with_prompt(ids if isinstance(order.body["prompt"], list) else ids[0])

    async def _tokenize(self, engine: Engine, order: Order, text: str) -> list[int] | None:
        body: dict[str, Any] = {"prompt": text}
        body |= {name: order.body[name] for name in ("model", "add_special_tokens") if name in order.body}
        with contextlib.suppress(EngineFault, msgspec.MsgspecError, ValueError):
            data = msgspec.json.encode(body)
            answer = await engine.call("POST", "/tokenize", headers=order.headers, data=data, limit_s=_TOKENIZE_S)
            content = await engine.read(answer)
            if answer.status == 200:
                return msgspec.json.decode(content, type=_Tokens).tokens or None
        return None


class _Tokens(msgspec.Struct):
    tokens: list[int]


def _transfer_params(given: Any, request_id: str, decoder: Engine) -> dict[str, Any]:
    """Upstream's ``kv_transfer_params`` of a prefill, over the client's own."""
    backend = decoder.backend
    return {
        **(given if isinstance(given, dict) else {}),
        "ret_first_tok": True,
        "disagg_spec": {
            "req_id": request_id,
            "receiver_host": backend.host,
            "receiver_init_port": list(backend.init_ports),
            "receiver_alloc_port": list(backend.alloc_ports),
        },
    }
