"""How soon the engine's thread gets the interpreter back."""

from __future__ import annotations

import sys

SECONDS = 0.0005  # Python's own is 5 ms


def take_turns_sooner() -> None:
    """Let threads of this process hand over the interpreter every half millisecond.

    While vLLM's input thread takes in long prompts (it decodes and hashes them in Python), the engine's thread waits a
    whole interval each time that a call of it let go of the interpreter, and that happens often where loads are
    planned and submitted. A shorter interval than ours stays.
    """
    sys.setswitchinterval(min(sys.getswitchinterval(), SECONDS))
