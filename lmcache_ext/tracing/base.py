"""What traces are to those who are traced. These three classes do nothing: they are tracing when it is off.

One thread, the one that made the first call. Nothing here blocks, and nothing raises.
"""

from __future__ import annotations

from collections.abc import Mapping

Value = str | int | float | bool


class Span:
    """Something that takes time. One that is never ended is never seen."""

    __slots__ = ()

    @property
    def trace(self) -> Trace:
        """Where it belongs, for what it brings about."""
        return NO_TRACE

    def end(self, fault: str = "", **attributes: Value) -> None:
        """It is over; `fault`: what went wrong. Only the first call counts."""


class Trace:
    """One request's trace."""

    __slots__ = ()

    def begin(self, name: str, **attributes: Value) -> Span:
        """A span that starts now. Attributes get the prefix `lmcache.`."""
        return NO_SPAN


class Spans:
    """All traces of one process."""

    def of(self, request_id: str, headers: Mapping[str, str] | None) -> Trace:
        """The trace that a request's headers (`traceparent`, `tracestate`) name; without them one of its own."""
        return NO_TRACE

    def close(self, timeout: float) -> bool:
        """Send what is there, for at most so many seconds. False: it took longer, and what is left is lost."""
        return True


NO_SPAN, NO_TRACE, NO_SPANS = Span(), Trace(), Spans()
