"""What one check of `lmcache-ext doctor` found."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Level(str, Enum):
    """How bad it is: `fail` means that serving would not work or not as asked."""

    OK = "ok"
    WARN = "warn"
    FAIL = "fail"


@dataclass(frozen=True)
class Finding:
    """One line: what was looked at, how it is, and what to do about it."""

    check: str
    level: Level
    text: str
    advice: str = ""

    def as_dict(self) -> dict[str, str]:
        """The same for `--json`."""
        return {"check": self.check, "level": self.level.value, "text": self.text, "advice": self.advice}


def ok(check: str, text: str) -> Finding:
    """Nothing to do."""
    return Finding(check, Level.OK, text)


def warn(check: str, text: str, advice: str) -> Finding:
    """Works, but not as well as it could, or not in every case."""
    return Finding(check, Level.WARN, text, advice)


def fail(check: str, text: str, advice: str) -> Finding:
    """Does not work."""
    return Finding(check, Level.FAIL, text, advice)
