"""How fast the engine computes, so that a slower tier is not waited for."""

from __future__ import annotations

import time
from collections import deque

from lmcache_ext.metrics import smoothed

_LARGE = 256  # tokens; smaller steps say little about prefill


class Pace:
    """Tokens/s of steps that computed many. vLLM may begin a step before the one before has ended."""

    def __init__(self) -> None:
        self.rate = 0.0  # 0: not known
        self._steps: deque[tuple[float, int]] = deque(maxlen=8)  # begun and not ended: when, tokens
        self._last_end = 0.0

    def step(self, tokens: int) -> None:
        """A step of so many tokens begins."""
        if tokens:
            self._steps.append((time.monotonic(), tokens))

    def ended(self) -> None:
        """The oldest step that computes has ended."""
        if not self._steps:
            return
        now = time.monotonic()
        began, tokens = self._steps.popleft()
        seconds, self._last_end = now - max(began, self._last_end), now
        if tokens >= _LARGE and seconds > 0:
            self.rate = smoothed(self.rate, tokens / seconds)
