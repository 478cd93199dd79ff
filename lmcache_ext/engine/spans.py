"""What a tier's job says in a trace."""

from __future__ import annotations

from collections import Counter

from lmcache_ext.tiers import JobResult
from lmcache_ext.tiers import Outcome as Fate
from lmcache_ext.tracing import NO_SPAN, Span

_FINE = frozenset({Fate.OK, Fate.MISS, Fate.EXPIRED, Fate.REFUSED, Fate.FULL})  # no faults


def end_job(span: Span, result: JobResult) -> None:
    """Its span ends with what became of its keys: `ok=1,miss=2`."""
    if span is NO_SPAN:
        return
    fates = Counter(fate.value for fate in result.outcomes)
    text = ",".join(f"{fate}={n}" for fate, n in fates.items())
    fault = "" if _FINE.issuperset(result.outcomes) else text
    span.end(fault, keys=len(result.outcomes), outcome=text, bytes=result.nbytes)
