"""Spans land in the request's trace, go out by both protocols, and cost nothing when off."""

from __future__ import annotations

import http.server
import logging
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent import futures
from contextlib import contextmanager

import grpc
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode

from lmcache_ext.errors import ConfigError
from lmcache_ext.tracing import NO_SPAN, NO_SPANS, NO_TRACE, start_spans
from lmcache_ext.tracing.otel import OtelSpans

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
HEADERS = {"traceparent": f"00-{TRACE}-{PARENT}-01"}
UNSAMPLED = {"traceparent": f"00-{TRACE}-{PARENT}-00"}


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ENDPOINT", "TRACES_ENDPOINT", "PROTOCOL", "TRACES_PROTOCOL"):
        monkeypatch.delenv(f"OTEL_EXPORTER_OTLP_{name}", raising=False)


@contextmanager
def memory() -> Iterator[tuple[OtelSpans, InMemorySpanExporter]]:
    kept = InMemorySpanExporter()
    spans = OtelSpans(kept, "engine-7")
    yield spans, kept
    assert spans.close(10)


def test_a_span_is_a_child_in_the_requests_trace_with_its_time_and_attributes():
    with memory() as (spans, kept):
        before = time.time_ns()
        span = spans.of("r1", HEADERS).begin("lmcache.load", tokens=512)
        time.sleep(0.01)
        span.end(bytes=7)
        span.end(bytes=8)
    (sent,) = kept.get_finished_spans()
    assert sent.name == "lmcache.load"
    assert f"{sent.context.trace_id:032x}" == TRACE and f"{sent.parent.span_id:016x}" == PARENT
    assert dict(sent.attributes) == {"lmcache.tokens": 512, "lmcache.bytes": 7, "lmcache.request_id": "r1"}
    assert before <= sent.start_time <= sent.end_time - 10_000_000 <= time.time_ns()
    assert sent.status.status_code is StatusCode.UNSET
    resource = sent.resource.attributes
    assert resource["service.name"] == "lmcache" and resource["service.instance.id"] == "engine-7"


def test_a_fault_is_the_spans_status():
    with memory() as (spans, kept):
        spans.of("r1", HEADERS).begin("lmcache.store").end("late")
    (sent,) = kept.get_finished_spans()
    assert (sent.status.status_code, sent.status.description) == (StatusCode.ERROR, "late")


def test_spans_of_a_request_without_a_trace_share_one_of_its_own():
    with memory() as (spans, kept):
        for _ in range(2):
            spans.of("r1", None).begin("lmcache.load").end()
        spans.of("r2", {}).begin("lmcache.load").end()
        spans.of("r3", {"traceparent": "nonsense"}).begin("lmcache.load").end()
    sent = kept.get_finished_spans()
    assert [span.parent for span in sent] == [None] * 4
    traces = [span.context.trace_id for span in sent]
    assert traces[0] == traces[1] and len(set(traces)) == 3


def test_what_the_caller_does_not_sample_is_not_sent_nor_what_never_ended():
    with memory() as (spans, kept):
        spans.of("r1", UNSAMPLED).begin("lmcache.load").end()
        spans.of("r1", HEADERS).begin("lmcache.load")
    assert kept.get_finished_spans() == ()


def test_a_span_knows_its_trace():
    with memory() as (spans, _):
        trace = spans.of("r1", HEADERS)
        assert trace.begin("lmcache.store").trace is trace
    assert NO_SPAN.trace is NO_TRACE


def test_off_is_one_object_that_does_nothing():
    assert start_spans(None) is NO_SPANS and start_spans(False, "http://127.0.0.1:1") is NO_SPANS
    trace = NO_SPANS.of("r1", HEADERS)
    assert trace is NO_TRACE and trace.begin("x", a=1) is NO_SPAN
    NO_SPAN.end("why", b=2)
    assert NO_SPANS.close(0)


def test_a_fault_in_tracing_turns_it_off_and_is_said_once(caplog):
    with memory() as (spans, kept):
        spans.tracer = None  # type: ignore[assignment]
        with caplog.at_level(logging.ERROR):
            spans.of("r1", HEADERS).begin("lmcache.load").end()
            assert spans.of("r2", HEADERS) is NO_TRACE
    assert kept.get_finished_spans() == ()
    assert [record.getMessage() for record in caplog.records] == ["a fault in tracing: it is off from now on"]


def test_a_collector_that_hangs_delays_nobody():
    class Hangs(SpanExporter):
        entered = threading.Event()
        over = threading.Event()

        def export(self, spans: object) -> SpanExportResult:
            self.entered.set()
            self.over.wait(30)
            return SpanExportResult.SUCCESS

        def shutdown(self) -> None:
            pass

    exporter = Hangs()
    spans = OtelSpans(exporter)
    began = time.monotonic()
    for _ in range(600):  # more than a batch, so that the SDK's thread is in `export`
        spans.of("r1", HEADERS).begin("lmcache.load").end()
    assert exporter.entered.wait(10)
    for _ in range(3000):  # more than its queue holds
        spans.of("r1", HEADERS).begin("lmcache.load").end()
    assert not spans.close(0.1)
    assert time.monotonic() - began < 5
    exporter.over.set()


def test_a_protocol_that_we_cannot_speak_is_refused_by_name_if_tracing_was_asked_for(monkeypatch, caplog):
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", "http/json")
    with pytest.raises(ConfigError, match=r"LMCACHE_ENABLE_TRACING.*OTEL_EXPORTER_OTLP_PROTOCOL='http/json'"):
        start_spans(True)
    assert start_spans(None, "http://127.0.0.1:4317") is NO_SPANS
    assert "the cache is not traced" in caplog.text


def test_without_the_package_it_is_said_how_to_get_it(monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "lmcache_ext.tracing.otel", None)
    with pytest.raises(ConfigError, match="pip install opentelemetry-sdk"):
        start_spans(True)
    assert start_spans(None, "http://127.0.0.1:4317") is NO_SPANS
    assert "pip install opentelemetry-sdk" in caplog.text


def test_nothing_of_it_is_imported_while_it_is_off():
    code = (
        "import sys, lmcache_ext.tracing as t; t.start_spans(None); print([m for m in sys.modules if 'telemetry' in m])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"


# -- a collector on this machine: what arrives is what OTLP's own messages say --------------------------------------


class Collector:
    """Keeps what it is sent."""

    def __init__(self) -> None:
        self.got: queue.Queue[tuple[str, ExportTraceServiceRequest]] = queue.Queue()

    def spans(self) -> tuple[str, str, list[tuple[str, str, str]]]:
        """Where the first batch came in, whose it is, and (name, trace, parent) of each span."""
        path, batch = self.got.get(timeout=20)
        (group,) = batch.resource_spans
        service = {entry.key: entry.value.string_value for entry in group.resource.attributes}["service.name"]
        (scope,) = group.scope_spans
        return path, service, [(span.name, span.trace_id.hex(), span.parent_span_id.hex()) for span in scope.spans]


@contextmanager
def http_collector() -> Iterator[tuple[Collector, str]]:
    collector = Collector()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            collector.got.put((self.path, ExportTraceServiceRequest.FromString(body)))
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *args: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield collector, f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join(10)


@contextmanager
def grpc_collector() -> Iterator[tuple[Collector, str]]:
    collector = Collector()

    def export(batch: ExportTraceServiceRequest, context: object) -> ExportTraceServiceResponse:
        collector.got.put(("grpc", batch))
        return ExportTraceServiceResponse()

    server = grpc.server(futures.ThreadPoolExecutor(1))
    method = grpc.unary_unary_rpc_method_handler(
        export, ExportTraceServiceRequest.FromString, ExportTraceServiceResponse.SerializeToString
    )
    service = "opentelemetry.proto.collector.trace.v1.TraceService"
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, {"Export": method}),))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield collector, f"http://127.0.0.1:{port}"
    finally:
        server.stop(0).wait(10)


EXPECTED = [("lmcache.load", TRACE, PARENT), ("lmcache.store", TRACE, PARENT)]


def send(wanted: bool | None, endpoint: str | None) -> None:
    spans = start_spans(wanted, endpoint)
    for name, *_ in EXPECTED:
        spans.of("r1", HEADERS).begin(name).end()
    assert spans.close(10)


def test_grpc_is_what_vllms_endpoint_means():
    with grpc_collector() as (collector, url):
        send(None, url)
        assert collector.spans() == ("grpc", "lmcache", EXPECTED)


def test_vllms_endpoint_is_taken_as_it_is_where_http_is_named(monkeypatch):
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "http/protobuf")
    with http_collector() as (collector, url):
        send(None, f"{url}/somewhere/v1/traces")
        assert collector.spans() == ("/somewhere/v1/traces", "lmcache", EXPECTED)


@pytest.mark.parametrize("protocol", ["grpc", "http/protobuf"])
def test_the_variables_of_opentelemetry_are_enough(monkeypatch, protocol):
    with http_collector() if "http" in protocol else grpc_collector() as (collector, url):
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", url)
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", protocol)
        monkeypatch.setenv("OTEL_SERVICE_NAME", "mine")
        send(True, None)
        assert collector.spans() == ("/v1/traces" if "http" in protocol else "grpc", "mine", EXPECTED)
