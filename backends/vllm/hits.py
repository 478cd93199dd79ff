"""Where a prompt's KV came from, for whoever looks at a request: vLLM's own cache, host memory, or computation."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

from opentelemetry.trace import get_tracer
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from vllm.outputs import RequestOutput
from vllm.sampling_params import SamplingParams

from lmcache_ext.integration.vllm.requests import REPORT_HITS

KEY = "prompt_tokens_from"  # in nvext.engine_data, and beside the prefill worker's transfer parameters
_SPAN, _SPAN_PREFIX = "lmcache.prompt", "lmcache.prompt_tokens."


@dataclass(frozen=True)
class PromptTokens:
    """Tokens of one prompt, by where their KV came from."""

    gpu_cache: int
    host_memory: int
    computed: int

    @property
    def cached(self) -> int:
        """Those that were not computed."""
        return self.gpu_cache + self.host_memory

    def to_dict(self) -> dict[str, int]:
        """As it travels."""
        return asdict(self)

    def to_dynamo(self) -> dict[str, int]:
        """As Dynamo's workers tell its router under `kv_cache_hit`."""
        return {"prompt_tokens": self.cached + self.computed, "reused_tokens": self.cached}


def ask(params: SamplingParams) -> None:
    """Have our connector report on this request."""
    extra = params.extra_args or {}
    transfer = {**(extra.get("kv_transfer_params") or {}), REPORT_HITS: True}
    params.extra_args = {**extra, "kv_transfer_params": transfer}


def of(request: dict[str, Any], output: RequestOutput) -> PromptTokens | None:
    """What is known once a request has ended: from our connector, or from the prefill worker if that did the work.

    The connector's report leaves the output's transfer parameters, which are for a decode worker.
    """
    transfer = output.kv_transfer_params or {}
    report = transfer.get(REPORT_HITS)
    if report is not None:
        output.kv_transfer_params = {k: v for k, v in transfer.items() if k != REPORT_HITS} or None
    said = _disaggregated(request).get(KEY)
    if isinstance(said, dict):
        return PromptTokens(*(int(said.get(field.name) or 0) for field in fields(PromptTokens)))
    if report is None:
        return None
    return PromptTokens(**report, computed=len(output.prompt_token_ids or ()) - sum(report.values()))


def trace(context: Any, tokens: PromptTokens) -> None:
    """Add a span to the request's trace. It goes where vLLM's own spans go (``--otlp-traces-endpoint``), else nowhere:
    Dynamo's span of a request can't be reached from a worker that serves endpoints of its own."""
    headers = context.trace_headers()
    if headers:
        parent = TraceContextTextMapPropagator().extract(headers)
        attributes = {_SPAN_PREFIX + name: count for name, count in tokens.to_dict().items()}
        get_tracer("dynamo_lmcache").start_span(_SPAN, context=parent, attributes=attributes).end()


def _disaggregated(request: dict[str, Any]) -> dict[str, Any]:
    result = request.get("prefill_result")
    return (result.get("disaggregated_params") or {}) if isinstance(result, dict) else {}
