"""vLLM may use AMX on CPUs that have it. A vLLM general plugin, loaded in every vLLM process.

Linux gives a process the CPU's tile registers only after it has asked (Documentation/arch/x86/xstate.rst). vLLM's CPU
attention uses them for bf16 wherever the CPU has them, and leaves the asking to torch's compiler or to oneDNN. With
``--enforce-eager`` and a small model neither does it before the first attention, and the worker dies of an illegal
instruction at the first request. So this asks, in advance.
"""

from __future__ import annotations

import ctypes
import logging
import os
import platform
from pathlib import Path

logger = logging.getLogger(__name__)

_ARCH_PRCTL = 158  # the system call's number on x86-64
_REQUEST_PERMISSION = 0x1023
_TILE_DATA = 18


def register() -> None:
    """Entry point of ``vllm.general_plugins``. Idempotent; does nothing elsewhere, or where there is no AMX."""
    from vllm.platforms import current_platform

    if current_platform.is_cpu() and platform.machine() == "x86_64" and has_amx():
        request()


def has_amx() -> bool:
    """Whether Linux lists the CPU's tiles."""
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        return False
    return "amx_tile" in next((line for line in lines if line.startswith("flags")), "").split()


def request() -> None:
    """Ask Linux for the tiles' registers, for this process."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.syscall(_ARCH_PRCTL, _REQUEST_PERMISSION, _TILE_DATA):
        logger.warning("no AMX for this process (%s): bf16 on this CPU may end it", os.strerror(ctypes.get_errno()))
