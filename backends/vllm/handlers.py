"""Request handlers: one for each role. Dynamo calls ``generate(request, context)`` and streams what it yields."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from dynamo.health_check import HEALTH_CHECK_KEY
from dynamo.llm.exceptions import EngineShutdown
from vllm.inputs.engine import TokensInput
from vllm.lora.request import LoRARequest
from vllm.outputs import RequestOutput
from vllm.sampling_params import SamplingParams
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError

from dynamo_lmcache.vllm import hits
from dynamo_lmcache.vllm.errors import as_http_errors
from dynamo_lmcache.vllm.lora import Adapters
from dynamo_lmcache.vllm.outputs import Chunk, ChunkBuilder
from dynamo_lmcache.vllm.sampling import build_prompt, build_sampling, set_transfer_params
from dynamo_lmcache.vllm.shutdown import InFlight

logger = logging.getLogger(__name__)

Request = dict[str, Any]

# An abort waits for the first token on decode, rather than risk the engine: NIXL may be writing into
# the request's blocks until then. Who waits for longer than this is said in the log.
_ABORT_DEFERRAL_S = 60.0
_CLEAR_S, _CLEAR_PAUSE_S = 2.0, 0.02


@dataclass
class Services:
    """What every handler of a worker shares."""

    engine: AsyncLLM
    adapters: Adapters
    sampling_defaults: Mapping[str, Any]
    max_model_len: int
    first_dp_rank: int
    dp_ranks: int
    on_engine_dead: Callable[[str], None]
    reports_hits: bool = False  # whether our connector is there to be asked
    in_flight: InFlight = field(default_factory=InFlight)
    first_token_source: Any = None

    def local_dp_rank(self, routing: Mapping[str, Any]) -> int | None:
        """Return the rank within this worker that the router asks for, or None for any."""
        rank = routing.get("dp_rank")
        if rank is None:
            return None
        local = int(rank) - self.first_dp_rank
        if 0 <= local < self.dp_ranks:
            return local
        logger.warning("data-parallel rank %s is not one of this worker's; any of its ranks will do", rank)
        return None


@dataclass(frozen=True)
class Job:
    """One request, ready for the engine."""

    id: str
    prompt: TokensInput
    params: SamplingParams
    lora: LoRARequest | None
    priority: int
    dp_rank: int | None


class AggregatedHandler:
    """Prefill and decode on this worker."""

    # Whether an abort before the first token would cut a KV transfer that the engine is pulling.
    pulls_kv = False

    def __init__(self, services: Services) -> None:
        self._services = services
        self._engine = services.engine

    async def generate(self, request: Request, context: Any) -> AsyncGenerator[Chunk, None]:
        """Stream the answer to one request. Dynamo finds the second parameter by its name.

        Raises:
            HttpError: for a request that cannot be served as it is, with the client's status.
        """
        async for chunk in as_http_errors(self._guarded(request, context)):
            yield chunk

    async def clear_kv_blocks(self, request: Any = None) -> AsyncGenerator[Chunk, None]:
        """The endpoint form of ``clear``."""
        yield await self.clear(request)

    async def clear(self, body: Any = None) -> dict[str, str]:
        """Forget vLLM's prefix cache, and with ``{"reset_connector": true}`` what the connector holds, too.

        vLLM refuses while blocks are in use. A store that follows the last answer uses some for milliseconds, so we
        ask again for a while.
        """
        connector = isinstance(body, dict) and bool(body.get("reset_connector"))
        try:
            deadline = time.monotonic() + _CLEAR_S
            while not (done := await self._engine.reset_prefix_cache(reset_connector=connector)):
                if time.monotonic() > deadline:
                    break
                await asyncio.sleep(_CLEAR_PAUSE_S)
        except EngineDeadError as error:
            self._services.on_engine_dead(str(error))
            raise
        if done:
            return {"status": "success", "message": "KV cache cleared"}
        return {"status": "error", "message": "blocks are in use: nothing was cleared; try again when idle"}

    def prepare(self, request: Request, request_id: str) -> Job:
        """Check a request and translate it for the engine."""
        params = self._sampling(request)
        routing = request.get("routing") or {}
        return Job(
            id=request_id,
            prompt=build_prompt(request),
            params=params,
            lora=self._services.adapters.resolve(request.get("model")),
            # Dynamo: higher is sooner. vLLM: lower is sooner.
            priority=-int(routing.get("priority") or 0),
            dp_rank=self._services.local_dp_rank(routing),
        )

    def _sampling(self, request: Request) -> SamplingParams:
        services = self._services
        params = build_sampling(request, services.sampling_defaults, max_model_len=services.max_model_len)
        transfer = transfer_params(request)
        if transfer is not None:
            set_transfer_params(params, transfer)
        elif services.reports_hits and params.n == 1:
            hits.ask(params)
        return params

    async def _guarded(self, request: Request, context: Any) -> AsyncIterator[Chunk]:
        with self._services.in_flight.track():
            try:
                async for chunk in self._serve(request, context):
                    yield chunk
            except EngineDeadError as error:
                self._services.on_engine_dead(str(error))
                raise

    async def _serve(self, request: Request, context: Any) -> AsyncIterator[Chunk]:
        job = self.prepare(request, context.id())
        source = self._services.first_token_source
        if source is not None:
            source.bind(context, (request.get("routing") or {}).get("dp_rank"))
        builder = ChunkBuilder(self._decode, cached_tokens=cached_by_prefill(request))
        first_token = asyncio.Event()
        if not self._defers_abort(request):
            first_token.set()
        async with self._services.adapters.using(job.lora), self._abort_when_stopped(context, job.id, first_token):
            notified = False
            async for output in self._outputs(job, context):
                first_token.set()
                refuse_foreign_abort(output, context)
                note_hits(request, output, builder, context)
                for chunk in builder.chunks(output):
                    if not notified and chunk["token_ids"]:
                        notified = True
                        context.notify_first_token()
                    yield chunk

    def _defers_abort(self, request: Request) -> bool:
        """Whether an abort could meet a pull: NIXL writes into the request's blocks until its first token."""
        return self.pulls_kv and bool((transfer_params(request) or {}).get("do_remote_prefill"))

    def _outputs(self, job: Job, context: Any) -> AsyncIterator[Any]:
        outputs: AsyncIterator[Any] = self._engine.generate(
            job.prompt,
            job.params,
            job.id,
            lora_request=job.lora,
            priority=job.priority,
            data_parallel_rank=job.dp_rank,
            trace_headers=context.trace_headers(),
        )
        return outputs

    def _decode(self, token_ids: list[int]) -> str:
        return str(self._engine.get_tokenizer().decode(token_ids))

    @contextlib.asynccontextmanager
    async def _abort_when_stopped(self, context: Any, request_id: str, allowed: asyncio.Event) -> AsyncIterator[None]:
        """Abort the engine's request when the client goes away, but not before ``allowed``."""
        task = asyncio.create_task(self._abort(context, request_id, allowed))
        try:
            yield
        finally:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task

    async def _abort(self, context: Any, request_id: str, allowed: asyncio.Event) -> None:
        # Lives no longer than the request: the context manager above cancels it.
        await asyncio.ensure_future(context.async_killed_or_stopped())
        while not allowed.is_set():  # nor does this: the first token comes, or the request ends
            try:
                await asyncio.wait_for(allowed.wait(), timeout=_ABORT_DEFERRAL_S)
            except asyncio.TimeoutError:
                logger.warning("request %s waits for KV or its turn: it is aborted once it has either", request_id)
        logger.debug("aborting request %s: its client is gone", request_id)
        # The request ends with this abort, which cancels this task: let the abort finish.
        await asyncio.shield(self._engine.abort(request_id))


class DecodeHandler(AggregatedHandler):
    """Decode on this worker what a prefill worker computed: NIXL pulls the KV before the first token."""

    pulls_kv = True


class PrefillHandler(AggregatedHandler):
    """Prefill only: one token, and where a decode worker finds the KV."""

    def _sampling(self, request: Request) -> SamplingParams:
        services = self._services
        params = build_sampling(
            request, services.sampling_defaults, max_model_len=services.max_model_len, single_token=True
        )
        if not request.get(HEALTH_CHECK_KEY):  # nobody would come for a probe's KV
            set_transfer_params(params, remote_decode_params())
            if services.reports_hits:
                hits.ask(params)
        return params

    async def _serve(self, request: Request, context: Any) -> AsyncIterator[Chunk]:
        job = self.prepare(request, context.id())
        allowed = asyncio.Event()
        allowed.set()
        builder = ChunkBuilder()
        async with self._services.adapters.using(job.lora), self._abort_when_stopped(context, job.id, allowed):
            async for output in self._outputs(job, context):
                refuse_foreign_abort(output, context)
                note_hits(request, output, builder, context)
                for chunk in builder.chunks(output):
                    if output.kv_transfer_params is not None:
                        chunk["disaggregated_params"] = {"kv_transfer_params": output.kv_transfer_params}
                        if builder.prompt_tokens is not None:
                            chunk["disaggregated_params"][hits.KEY] = builder.prompt_tokens.to_dict()
                    # The frontend takes the first chunk for the whole answer; "length" would end the request there.
                    chunk.pop("finish_reason", None)
                    yield chunk


def note_hits(request: Request, output: RequestOutput, builder: ChunkBuilder, context: Any) -> None:
    """At the end of a request: where its prompt's KV came from, for the answer and for the trace."""
    if output.finished and (tokens := hits.of(request, output)) is not None:
        builder.prompt_tokens = tokens
        hits.trace(context, tokens)


def refuse_foreign_abort(output: RequestOutput, context: Any) -> None:
    """Raise if the engine gave a request up that its client still waits for.

    That happens when a shutdown runs out of time. Passed on as an end, it would look like a complete
    answer; as this error the frontend moves the request to another worker, or tells the client.
    """
    aborted = any((choice.finish_reason or "").startswith("abort") for choice in output.outputs)
    if aborted and not (context.is_stopped() or context.is_killed()):
        raise EngineShutdown("the worker is shutting down and could not finish this request")


def remote_decode_params() -> dict[str, Any]:
    """Return NIXL's request to keep a prompt's KV for a decode worker."""
    remote = ("remote_engine_id", "remote_block_ids", "remote_host", "remote_port")
    return {"do_remote_decode": True, "do_remote_prefill": False, **dict.fromkeys(remote)}


def transfer_params(request: Request) -> dict[str, Any] | None:
    """Return what the prefill worker told about a request's KV, if there was one."""
    result = request.get("prefill_result")
    params = (result.get("disaggregated_params") or {}) if isinstance(result, dict) else {}
    transfer = params.get("kv_transfer_params")
    return dict(transfer) if transfer is not None else None


def cached_by_prefill(request: Request) -> int | None:
    """Return the prefill worker's count of cached tokens: the decode worker's would count what was pulled."""
    result = request.get("prefill_result")
    details = result.get("prompt_tokens_details") if isinstance(result, dict) else None
    count = details.get("cached_tokens") if isinstance(details, dict) else None
    return None if count is None else int(count)
