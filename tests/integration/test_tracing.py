"""Under vLLM's real Scheduler: what the cache does for a request lies in its trace."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode

from lmcache_ext.integration.vllm import impl as impl_module
from lmcache_ext.tracing import NO_TRACE, Spans
from lmcache_ext.tracing.otel import OtelSpans
from tests.integration.harness import Engine, Setup, prompt
from tests.integration.scenarios import Failing, engine
from tests.integration.tier_scenarios import forget_memory, on_disk


def headers(i: int) -> dict[str, str]:
    return {"traceparent": f"00-{i:032x}-{i:016x}-01"}


class Kept:
    """Spans of an engine, by the trace that `headers` made."""

    def __init__(self) -> None:
        self.exporter = InMemorySpanExporter()
        self.asked: tuple[object, ...] = ()

    def start(self, *asked: object) -> Spans:
        self.asked = asked
        return OtelSpans(self.exporter)

    def of(self, e: Engine, i: int) -> dict[str, list[ReadableSpan]]:
        e.scheduler.connector._impl.scheduler._spans._provider.force_flush(10_000)
        found: dict[str, list[ReadableSpan]] = {}
        for span in self.exporter.get_finished_spans():
            if span.context.trace_id == i:
                assert span.parent is not None and span.parent.span_id == i
                found.setdefault(span.name, []).append(span)
        return found


@contextmanager
def traced() -> Iterator[Kept]:
    kept = Kept()
    with mock.patch.object(impl_module, "start_spans", kept.start):
        yield kept


def told(span: ReadableSpan, *names: str) -> list[object]:
    return [(span.attributes or {})[f"lmcache.{name}"] for name in names]


def test_a_prompt_that_is_stored_and_comes_back_from_disk() -> None:
    with traced() as kept:
        e = engine(on_disk())
    p = prompt(1, 300)
    e.ask(p, trace_headers=headers(1))
    first = kept.of(e, 1)
    assert set(first) == {
        "lmcache.lookup",
        "lmcache.fetch",
        "lmcache.tier.lookup",
        "lmcache.store",
        "lmcache.tier.store",
    }
    assert told(first["lmcache.lookup"][0], "tokens", "gpu", "found") == [300, 0, 0]
    assert sum(told(span, "tokens")[0] for span in first["lmcache.store"]) == 288
    assert [told(span, "tier", "outcome") for span in first["lmcache.tier.store"]] == [["disk", "ok=1"]] * 5
    forget_memory(e)
    e.ask(p, trace_headers=headers(2))
    second = kept.of(e, 2)
    assert set(second) == {
        "lmcache.lookup",
        "lmcache.fetch",
        "lmcache.tier.lookup",
        "lmcache.tier.load",
        "lmcache.load",
    }
    assert told(second["lmcache.fetch"][0], "found", "came") == [5, 5]
    (load,) = second["lmcache.load"]
    assert told(load, "tokens", "request_id") == [288, "r2"] and told(load, "bytes")[0] > 0
    wait = second["lmcache.fetch"][0]
    jobs = second["lmcache.tier.lookup"] + second["lmcache.tier.load"]
    assert all(wait.start_time <= job.start_time <= job.end_time <= load.start_time for job in jobs)
    assert kept.of(e, 1) == first
    e.close()


def test_a_load_that_fails_is_a_fault_in_its_trace() -> None:
    failing = Failing()
    with traced() as kept:
        e = engine(Setup(), failing)
    p = prompt(1, 300)
    failing.on = False
    cold, _ = e.ask(p)
    e.forget_gpu()
    failing.on = True
    assert e.ask(p, trace_headers=headers(1))[0] == cold
    (load,) = kept.of(e, 1)["lmcache.load"]
    assert load.status.status_code is StatusCode.ERROR
    e.close()


def test_off_by_default_and_what_starts_it() -> None:
    e = engine()
    e.ask(prompt(1, 300), trace_headers=headers(1))
    assert e.side._spans.of("r", headers(1)) is NO_TRACE
    e.close()
    with traced() as kept:
        engine(Setup(extra={"lmcache.enable_tracing": True})).close()
    assert kept.asked[:2] == (True, None)
