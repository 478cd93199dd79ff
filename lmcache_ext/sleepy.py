"""NIXL agents whose progress thread sleeps: its Python API fixes the thread's delay at 0, which is a core for each."""

from __future__ import annotations

from typing import Any


def sleepy(original: Any, delay_us: int) -> Any:
    """NIXL's class of an agent's configuration, with the one assignment turned around that we disagree with.

    Args:
        original: nixlAgentConfig.
        delay_us: microseconds between two polls where the API says 0.
    """

    class SleepyAgentConfig(original):  # type: ignore[misc,unused-ignore]
        """The configuration."""

        @property
        def pthrDelay(self) -> int:
            """Microseconds between two polls of the progress thread."""
            return int(original.pthrDelay.__get__(self))

        @pthrDelay.setter
        def pthrDelay(self, value: int) -> None:
            original.pthrDelay.__set__(self, value or delay_us)

    return SleepyAgentConfig
