"""Pay for lazy compilation before the first user does.

On the CPU platform vLLM compiles some sampling kernels when a request first needs them. The first
request with penalties or logprobs then waits seconds, once in the life of a worker.
"""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Any

from vllm.inputs.engine import tokens_input
from vllm.sampling_params import RequestOutputKind, SamplingParams
from vllm.v1.engine.async_llm import AsyncLLM

logger = logging.getLogger(__name__)

_LIMIT_S = 120.0
_REQUESTS: tuple[dict[str, Any], ...] = (
    {"temperature": 0.0},
    {"temperature": 0.7, "top_p": 0.9, "top_k": 5, "seed": 1},
    {"temperature": 0.7, "min_p": 0.05, "presence_penalty": 0.1, "frequency_penalty": 0.1, "repetition_penalty": 1.1},
    {"temperature": 0.0, "logprobs": 2, "min_tokens": 2},
)


async def warm_up(engine: AsyncLLM, token_id: int) -> None:
    """Generate a few tokens with each kind of sampling option. Failures are logged, never raised."""
    started = time.monotonic()
    try:
        for number, options in enumerate(_REQUESTS):
            await asyncio.wait_for(_generate(engine, token_id, f"warmup-{number}", options), timeout=_LIMIT_S)
    except Exception:
        logger.warning("warm-up failed; the first requests may be slow", exc_info=True)
        return
    logger.info("warm-up took %.1f s", time.monotonic() - started)


async def _generate(engine: AsyncLLM, token_id: int, request_id: str, options: dict[str, Any]) -> None:
    params = SamplingParams(
        max_tokens=3, ignore_eos=True, detokenize=False, output_kind=RequestOutputKind.FINAL_ONLY, **options
    )
    async for _ in engine.generate(tokens_input([token_id]), params, request_id):
        pass
