"""Hooks must not raise: an exception in one of them would end vLLM's engine core."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

R = TypeVar("R")
Hook = Callable[..., R]


class Guarded(Protocol):
    """What has such hooks."""

    scheduler: Any  # None: this half has none of them

    def faulted(self, hook: str) -> None:
        """A hook raised what is being handled."""


def guarded(miss: Callable[[], R]) -> Callable[[Hook[R]], Hook[R]]:
    """Decorator for scheduler-side hooks: on any fault log it, count it, and answer `miss()`."""

    def wrap(hook: Hook[R]) -> Hook[R]:
        @functools.wraps(hook)
        def call(self: Guarded, *args: Any) -> R:
            if self.scheduler is None:
                return miss()
            try:
                return hook(self, *args)
            except Exception:
                self.faulted(hook.__name__)
                return miss()

        return call

    return wrap
