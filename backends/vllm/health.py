"""Is the worker well? A probe that generates, a watchdog on the engine, and the way out when it is dead."""

from __future__ import annotations

import asyncio
import logging
import os
import threading
from typing import Any, NoReturn

from dynamo.health_check import HEALTH_CHECK_KEY, HealthCheckPayload
from vllm.v1.engine.async_llm import AsyncLLM

logger = logging.getLogger(__name__)

_CHECK_EVERY_S = 2.0
_LOG_EVERY_S = 10.0
_LAST_WORDS_S = 5.0


class ProbePayload(HealthCheckPayload):
    """What Dynamo's canary sends through ``generate``: one token in, one real token out.

    It passes the scheduler and the model, so its answer says that both work. A prompt of one token
    fills no block: nothing of it is cached, and the next probe computes again. The environment's
    DYN_HEALTH_CHECK_PAYLOAD replaces it.
    """

    def __init__(self, token_id: int) -> None:
        self.default_payload = {
            "token_ids": [token_id],
            "sampling_options": {"temperature": 0.0},
            "stop_conditions": {"max_tokens": 1, "ignore_eos": True},
            "output_options": {},
        }
        super().__init__()

    def to_dict(self) -> dict[str, Any]:
        """Return the request, marked as a probe: a prefill worker must not offer its KV to anyone."""
        return {**super().to_dict(), HEALTH_CHECK_KEY: True}


def probe_payload(engine: AsyncLLM, override: str | None = None) -> dict[str, Any]:
    """Return the canary's request for a model.

    Args:
        engine: for a token that the model knows.
        override: ``--health-check-payload``: a JSON object, or ``@file``.
    """
    if override:
        os.environ["DYN_HEALTH_CHECK_PAYLOAD"] = override
    tokenizer = engine.get_tokenizer()
    token = tokenizer.bos_token_id
    return ProbePayload(0 if token is None else int(token)).to_dict()


class Watchdog:
    """Ends the worker when its engine has died: a worker without engine must not stay in discovery."""

    def __init__(self, engine: AsyncLLM, runtime: Any) -> None:
        self._engine = engine
        self._runtime = runtime
        self._leaving = False

    def expect_end(self) -> None:
        """From now on an engine that ends has been told to."""
        self._leaving = True

    async def run(self) -> None:
        """Look at the engine every 2 s, and have vLLM write its statistics line every 10 s, until cancelled."""
        since_log = 0.0
        while not self._leaving:
            if self._engine.errored:
                self.engine_died("the engine process has ended")
                return
            await asyncio.sleep(_CHECK_EVERY_S)
            since_log += _CHECK_EVERY_S
            if since_log >= _LOG_EVERY_S:
                since_log = 0.0
                await self._engine.do_log_stats()

    def engine_died(self, reason: str) -> None:
        """Leave with status 1, at once, unless the worker is on its way out anyway."""
        if not self._leaving:
            self._leaving = True
            logger.error(  # Dynamo shows critical as INFO
                "vLLM's engine is dead (%s): this worker ends with status 1; see the engine's log above", reason
            )
            # Leaving discovery is worth a few seconds; a hang there is not.
            threading.Timer(_LAST_WORDS_S, leave, args=(1,)).start()
            self._runtime.shutdown()
            leave(1)


def leave(status: int) -> NoReturn:
    """End the process now. Interpreter shutdown would wait for threads of a dead engine."""
    logging.shutdown()
    os._exit(status)
