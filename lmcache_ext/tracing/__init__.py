"""Spans of what the cache does for a request, in the request's own trace. Off unless asked for."""

from lmcache_ext.tracing.base import NO_SPAN, NO_SPANS, NO_TRACE, Span, Spans, Trace
from lmcache_ext.tracing.start import start_spans

__all__ = ["NO_SPAN", "NO_SPANS", "NO_TRACE", "Span", "Spans", "Trace", "start_spans"]
