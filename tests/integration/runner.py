"""Runs scenarios by name, a line each on standard output: for processes whose vLLM is not the tests' own."""

from __future__ import annotations

import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any


def scenarios_of(names: Mapping[str, Any]) -> dict[str, Callable[[], None]]:
    """A module's: its functions called scenario_….

    Args:
        names: the module's globals().
    """
    return {name[len("scenario_") :]: f for name, f in names.items() if name.startswith("scenario_")}


def run(scenarios: Mapping[str, Callable[[], None]], only: Sequence[str]) -> int:
    """Run them, or `only` some. Returns how many failed."""
    import vllm

    failures = 0
    for name, scenario in scenarios.items():
        if only and name not in only:
            continue
        began, verdict = time.monotonic(), "ok"
        try:
            scenario()
        except Exception:
            traceback.print_exc()
            verdict, failures = "FAILED", failures + 1
        sys.stdout.write(f"scenario {name} {verdict} {time.monotonic() - began:.1f}s vllm {vllm.__version__}\n")
        sys.stdout.flush()
    return failures
