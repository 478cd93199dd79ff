"""Spans by OpenTelemetry's SDK. Imported only where tracing is on.

A span costs the thread that ends it some 20 microseconds. It then waits in the SDK's queue, which a thread of the SDK's
sends every five seconds; where a collector is away the queue is bounded, and what is too much is dropped.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Mapping

from blake3 import blake3
from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter as GrpcExporter
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter as HttpExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter
from opentelemetry.sdk.trace.id_generator import RandomIdGenerator
from opentelemetry.trace import Status, StatusCode, Tracer, get_current_span
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from lmcache_ext.tracing.base import NO_TRACE, Span, Spans, Trace, Value

logger = logging.getLogger("lmcache_ext.tracing")

_SERVICE = "lmcache"
_PROTOCOLS = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
_TRACE_ID_BYTES = 16


def exporter(endpoint: str | None) -> SpanExporter:
    """As OpenTelemetry's variables say, and as vLLM reads them: gRPC unless they name `http/protobuf`.

    Args:
        endpoint: beats the variables, and is taken as it is, as vLLM takes it.

    Raises:
        ValueError: a protocol that we can't speak.
    """
    name = next((name for name in _PROTOCOLS if os.environ.get(name)), "")
    protocol = os.environ.get(name, "grpc")
    if protocol == "grpc":
        return GrpcExporter(endpoint=endpoint, insecure=True) if endpoint else GrpcExporter()
    if protocol == "http/protobuf":
        return HttpExporter(endpoint=endpoint)
    raise ValueError(f"{name}={protocol!r}: must be grpc or http/protobuf")


class _Ids(RandomIdGenerator):
    """Spans without a parent get the trace that was set last."""

    trace_id = 0

    def generate_trace_id(self) -> int:
        return self.trace_id or super().generate_trace_id()


class OtelSpans(Spans):
    """Spans of one process, with a provider of their own: the global one is vLLM's."""

    def __init__(self, exporter: SpanExporter, instance: str = "") -> None:
        attributes: dict[str, str | int] = {"process.pid": os.getpid()}
        if instance:
            attributes["service.instance.id"] = instance
        if not os.environ.get("OTEL_SERVICE_NAME"):
            attributes["service.name"] = _SERVICE
        self.ids = _Ids()
        self._provider = TracerProvider(
            resource=Resource.create(attributes), id_generator=self.ids, shutdown_on_exit=False
        )
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self.tracer: Tracer = self._provider.get_tracer("lmcache_ext")
        self._propagator = TraceContextTextMapPropagator()
        self._broken = False

    def of(self, request_id: str, headers: Mapping[str, str] | None) -> Trace:
        """See Spans."""
        if self._broken:
            return NO_TRACE
        try:
            context = self._propagator.extract(headers or {}, Context())
            named = get_current_span(context).get_span_context().is_valid
            digest = blake3(request_id.encode()).digest(_TRACE_ID_BYTES)
            return _Trace(self, request_id, context, 0 if named else int.from_bytes(digest, "big"))
        except Exception:
            self.broke()
            return NO_TRACE

    def broke(self) -> None:
        """A fault: rather no spans than faults in each step."""
        if not self._broken:
            logger.exception("a fault in tracing: it is off from now on")
        self._broken = True

    def close(self, timeout: float) -> bool:
        """See Spans. The SDK waits for half a minute, hence the thread."""
        thread = threading.Thread(target=self._provider.shutdown, name="lmcache-last-spans", daemon=True)
        thread.start()
        thread.join(timeout)
        return not thread.is_alive()


class _Trace(Trace):
    __slots__ = ("context", "own", "request_id", "spans")

    def __init__(self, spans: OtelSpans, request_id: str, context: Context, own: int) -> None:
        self.spans, self.request_id, self.context = spans, request_id, context
        self.own = own  # the trace's id, where the request brought none

    def begin(self, name: str, **attributes: Value) -> Span:
        return _Span(self, name, attributes)


class _Span(Span):
    """The SDK hears of it when it is over: what is given up costs nothing and is not sent."""

    __slots__ = ("_attributes", "_began", "_name", "_of", "_over")

    def __init__(self, trace: _Trace, name: str, attributes: dict[str, Value]) -> None:
        self._of, self._name, self._attributes = trace, name, attributes
        self._began = time.time_ns()
        self._over = False

    @property
    def trace(self) -> Trace:
        return self._of

    def end(self, fault: str = "", **attributes: Value) -> None:
        if self._over:
            return
        self._over = True
        try:
            self._send(fault, {**self._attributes, **attributes})
        except Exception:
            self._of.spans.broke()

    def _send(self, fault: str, attributes: dict[str, Value]) -> None:
        trace = self._of
        trace.spans.ids.trace_id = trace.own
        named = {f"lmcache.{name}": value for name, value in attributes.items()}
        named["lmcache.request_id"] = trace.request_id
        span = trace.spans.tracer.start_span(
            self._name, context=trace.context, start_time=self._began, attributes=named
        )
        if fault:
            span.set_status(Status(StatusCode.ERROR, fault))
        span.end(end_time=time.time_ns())
