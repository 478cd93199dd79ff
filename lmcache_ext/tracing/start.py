"""Whether there are spans, and where they go."""

from __future__ import annotations

import importlib
import logging
import os

from lmcache_ext.errors import ConfigError
from lmcache_ext.tracing.base import NO_SPANS, Spans

logger = logging.getLogger("lmcache_ext.tracing")

SETTING = "LMCACHE_ENABLE_TRACING"
_INSTALL = "pip install opentelemetry-sdk opentelemetry-exporter-otlp"


def start_spans(wanted: bool | None, endpoint: str | None = None, instance: str = "") -> Spans:
    """Spans that a thread of OpenTelemetry's sends in batches, or none.

    Args:
        wanted: None: only where there is an `endpoint`.
        endpoint: vLLM's `--otlp-traces-endpoint`; without one OpenTelemetry's own variables say where to.
        instance: an engine's id, told with every span.

    Raises:
        ConfigError: tracing was asked for by its setting, and can't be had.
    """
    if wanted is False or (wanted is None and not endpoint):
        return NO_SPANS
    try:
        otel = importlib.import_module("lmcache_ext.tracing.otel")
        spans: Spans = otel.OtelSpans(otel.exporter(endpoint), instance)
    except (ImportError, ValueError) as error:
        reason = f"there is no OpenTelemetry ({_INSTALL}): {error}" if isinstance(error, ImportError) else str(error)
        if wanted:
            raise ConfigError(SETTING, True, reason) from None
        logger.error("the cache is not traced: %s", reason)
        return NO_SPANS
    logger.info("the cache is traced to %s", endpoint or _by_environment())
    return spans


def _by_environment() -> str:
    for name in ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT"):
        if value := os.environ.get(name):
            return value
    return "OpenTelemetry's default endpoint on this machine"
