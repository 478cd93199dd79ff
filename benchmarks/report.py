"""How a benchmark reports."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path


def say(lines: Sequence[str], out: Path | None) -> None:
    """Print a report, and keep it in `out`."""
    report = "\n".join(lines) + "\n"
    sys.stdout.write(report)
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(report)
