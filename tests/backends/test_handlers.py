"""Handlers with a fake engine: streaming, cancellation, prefill and decode, errors."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from dynamo.health_check import HEALTH_CHECK_KEY
from dynamo.llm.exceptions import EngineShutdown, HttpError, InvalidArgument
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from vllm.v1.engine.exceptions import EngineDeadError

from dynamo_lmcache.vllm import handlers
from dynamo_lmcache.vllm.handlers import (
    AggregatedHandler,
    DecodeHandler,
    PrefillHandler,
    Services,
)
from dynamo_lmcache.vllm.lora import Adapters
from tests.backends.fakes import TRACE, FakeContext, FakeEngine, choice, output

REMOTE = {"do_remote_prefill": True, "remote_block_ids": [[1, 2]], "remote_engine_id": "p"}


def request(**more: Any) -> dict[str, Any]:
    return {"token_ids": [1, 2, 3], "stop_conditions": {"max_tokens": 4}, "model": "base", **more}


def services(engine: FakeEngine, **more: Any) -> Services:
    fake: Any = engine
    values: dict[str, Any] = {
        "engine": fake,
        "adapters": Adapters(fake, base_names=("base",), enabled=True),
        "sampling_defaults": {},
        "max_model_len": 64,
        "first_dp_rank": 2,
        "dp_ranks": 2,
        "on_engine_dead": lambda reason: None,
    }
    return Services(**{**values, **more})


async def collect(handler: AggregatedHandler, body: dict[str, Any], context: FakeContext | None = None) -> list[Any]:
    return [chunk async for chunk in handler.generate(body, context or FakeContext())]


async def until(condition: Any) -> None:
    for _ in range(1500):
        if condition():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("it did not happen within 15 s")


async def test_tokens_stream_and_nothing_stays_in_flight() -> None:
    engine = FakeEngine(output(choice([7])), output(choice([8], finish="stop")))
    shared = services(engine)
    context = FakeContext()
    chunks = await collect(AggregatedHandler(shared), request(), context)
    assert [chunk["token_ids"] for chunk in chunks] == [[7], [8]]
    assert context.first_tokens == 1 and len(shared.in_flight) == 0 and engine.aborted == []


async def test_priority_and_rank_are_translated() -> None:
    engine = FakeEngine(output(choice([7], finish="stop")))
    await collect(AggregatedHandler(services(engine)), request(routing={"priority": 3, "dp_rank": 3}))
    assert engine.calls[0]["priority"] == -3 and engine.calls[0]["data_parallel_rank"] == 1


@pytest.mark.parametrize("rank", [None, 0, 4])
async def test_a_foreign_rank_means_any(rank: int | None) -> None:
    engine = FakeEngine(output(choice([7], finish="stop")))
    await collect(AggregatedHandler(services(engine)), request(routing={"dp_rank": rank}))
    assert engine.calls[0]["data_parallel_rank"] is None


async def test_a_client_that_leaves_aborts_the_engine() -> None:
    engine = FakeEngine(*[output(choice([7])) for _ in range(1500)])
    context = FakeContext()
    shared = services(engine)
    task = asyncio.ensure_future(collect(AggregatedHandler(shared), request(), context))
    await until(lambda: context.first_tokens)
    context.leave()
    chunks = await asyncio.wait_for(task, timeout=5)
    assert chunks[-1]["finish_reason"] == "cancelled"
    assert engine.aborted == ["request"] and len(shared.in_flight) == 0


@pytest.mark.parametrize("patience", [handlers._ABORT_DEFERRAL_S, 0.05])
async def test_decode_aborts_only_after_the_first_token(monkeypatch: pytest.MonkeyPatch, patience: float) -> None:
    """However late that is."""
    monkeypatch.setattr(handlers, "_ABORT_DEFERRAL_S", patience)
    engine = FakeEngine(*[output(choice([7])) for _ in range(1500)])
    engine.gate.clear()  # the KV is being pulled
    context = FakeContext()
    body = request(prefill_result={"disaggregated_params": {"kv_transfer_params": REMOTE}})
    task = asyncio.ensure_future(collect(DecodeHandler(services(engine)), body, context))
    await until(lambda: engine.calls)
    context.leave()
    await asyncio.sleep(0.2)
    assert engine.aborted == []
    engine.gate.set()
    await asyncio.wait_for(task, timeout=5)
    assert engine.aborted == ["request"]


async def test_decode_that_prefills_by_itself_aborts_at_once() -> None:
    engine = FakeEngine(*[output(choice([7])) for _ in range(1500)])
    engine.gate.clear()
    context = FakeContext()
    body = request(annotations=["x-bypass-remote-prefill"])
    task = asyncio.ensure_future(collect(DecodeHandler(services(engine)), body, context))
    await until(lambda: engine.calls)
    context.leave()
    await asyncio.wait_for(task, timeout=5)
    assert engine.aborted == ["request"]


async def test_decode_hands_the_prefills_parameters_to_the_connector() -> None:
    engine = FakeEngine(output(choice([7], finish="stop"), cached=3))
    result = {"disaggregated_params": {"kv_transfer_params": REMOTE}, "prompt_tokens_details": {"cached_tokens": 1}}
    chunks = await collect(DecodeHandler(services(engine)), request(prefill_result=result))
    assert engine.calls[0]["params"].extra_args == {"kv_transfer_params": REMOTE}
    assert chunks[0]["completion_usage"]["prompt_tokens_details"] == {"cached_tokens": 1}


async def test_prefill_answers_with_where_the_kv_is() -> None:
    engine = FakeEngine(output(choice([7], finish="length"), kv_transfer_params=REMOTE))
    chunks = await collect(
        PrefillHandler(services(engine)), request(stop_conditions={"max_tokens": 9, "min_tokens": 5})
    )
    params = engine.calls[0]["params"]
    assert (params.max_tokens, params.min_tokens) == (1, 1)
    asked = params.extra_args["kv_transfer_params"]
    assert asked["do_remote_decode"] is True and asked["do_remote_prefill"] is False and asked["remote_host"] is None
    assert chunks[0]["disaggregated_params"] == {"kv_transfer_params": REMOTE}
    assert "finish_reason" not in chunks[0] and chunks[0]["token_ids"] == [7]


async def test_a_probe_of_a_prefill_worker_offers_no_kv() -> None:
    engine = FakeEngine(output(choice([7], finish="length")))
    await collect(PrefillHandler(services(engine)), request(**{HEALTH_CHECK_KEY: True}))
    assert engine.calls[0]["params"].extra_args is None


REPORT = {"lmcache.report_hits": {"gpu_cache": 1, "host_memory": 2}}
SOURCES = {"gpu_cache": 1, "host_memory": 2, "computed": 1}
DATA = {"prompt_tokens_from": SOURCES, "kv_cache_hit": {"prompt_tokens": 4, "reused_tokens": 3}}
BOTH = {**REMOTE, **REPORT}


@pytest.fixture
def spans(monkeypatch: pytest.MonkeyPatch) -> InMemorySpanExporter:
    """Spans that the worker ended."""
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr("dynamo_lmcache.vllm.hits.get_tracer", provider.get_tracer)
    return exporter


async def test_hits_by_tier_are_in_the_answer_and_in_the_trace(spans: InMemorySpanExporter) -> None:
    engine = FakeEngine(output(choice([7])), output(choice([8], finish="stop"), kv_transfer_params=REPORT))
    chunks = await collect(AggregatedHandler(services(engine, reports_hits=True)), request())
    assert engine.calls[0]["params"].extra_args == {"kv_transfer_params": {"lmcache.report_hits": True}}
    assert [chunk.get("engine_data") for chunk in chunks] == [None, DATA]
    (span,) = spans.get_finished_spans()
    assert span.name == "lmcache.prompt" and span.context.trace_id == TRACE
    assert span.attributes == {f"lmcache.prompt_tokens.{name}": count for name, count in SOURCES.items()}


@pytest.mark.parametrize("more", [{"sampling_options": {"n": 2}}, {}])
async def test_nobody_is_asked_where_the_answer_would_mean_nothing(more: dict[str, Any]) -> None:
    engine = FakeEngine(output(choice([7], finish="stop")))
    chunks = await collect(AggregatedHandler(services(engine, reports_hits=bool(more))), request(**more))
    assert engine.calls[0]["params"].extra_args is None and "engine_data" not in chunks[0]


async def test_prefills_hits_reach_decode(spans: InMemorySpanExporter) -> None:
    engine = FakeEngine(output(choice([7], finish="length"), kv_transfer_params=BOTH))
    chunk, *_ = await collect(PrefillHandler(services(engine, reports_hits=True)), request())
    assert engine.calls[0]["params"].extra_args["kv_transfer_params"]["lmcache.report_hits"] is True
    assert chunk["disaggregated_params"] == {"kv_transfer_params": REMOTE, "prompt_tokens_from": SOURCES}

    engine = FakeEngine(output(choice([7], finish="stop")))
    usage = chunk["completion_usage"]["prompt_tokens_details"]
    body = request(
        prefill_result={"disaggregated_params": chunk["disaggregated_params"], "prompt_tokens_details": usage}
    )
    chunks = await collect(DecodeHandler(services(engine, reports_hits=True)), body)
    assert engine.calls[0]["params"].extra_args == {"kv_transfer_params": REMOTE}
    assert chunks[-1]["engine_data"] == {"prompt_tokens_from": SOURCES}
    assert len(spans.get_finished_spans()) == 2


@pytest.mark.parametrize(
    ("body", "error"),
    [
        (request(sampling_options={"temperature": -1}), InvalidArgument),
        (request(token_ids=[]), InvalidArgument),
        (request(model="nobody"), HttpError),
    ],
)
async def test_bad_requests_are_the_clients_fault(body: dict[str, Any], error: type[Exception]) -> None:
    shared = services(FakeEngine())
    with pytest.raises(error) as caught:
        await collect(AggregatedHandler(shared), body)
    assert getattr(caught.value, "code", 400) in (400, 404) and len(shared.in_flight) == 0


async def test_an_answer_cut_by_a_shutdown_is_an_error_and_no_end() -> None:
    engine = FakeEngine(output(choice([7])), output(choice([], finish="abort")))
    with pytest.raises(EngineShutdown):
        await collect(AggregatedHandler(services(engine)), request())


async def test_a_dead_engine_is_reported() -> None:
    reasons: list[str] = []
    shared = services(FakeEngine(EngineDeadError()), on_engine_dead=reasons.append)
    with pytest.raises(EngineDeadError):
        await collect(AggregatedHandler(shared), request())
    assert len(reasons) == 1


async def test_clear_keeps_the_connector_unless_told() -> None:
    engine = FakeEngine()
    handler = AggregatedHandler(services(engine))
    assert (await handler.clear({}))["status"] == "success"
    assert [a["status"] async for a in handler.clear_kv_blocks({"reset_connector": True})] == ["success"]
    assert engine.resets == [False, True]
    engine.reset_result = False
    assert (await handler.clear(None))["status"] == "error"
