"""vLLM's processes wait for each other asleep on the CPU platform. A vLLM general plugin, loaded in every vLLM process.

On CPUs vLLM's engine and its worker are two processes, and each calls ``sched_yield`` in a loop while it waits for the
other, and for a second more. Linux 6.18 may leave everybody else on such a core waiting for as long as that lasts: on
two cores a frontend got its first token when the last one was computed, 6 s later, or gave the request up. And where
all cores compute, such a loop takes from the very forward pass that it waits for.

Here they sleep instead, each time for a twentieth of what they have waited so far: 50 microseconds to a millisecond.

GPUs: nothing is changed; vLLM's workers have cores of their own there. ``VLLM_PLUGINS`` without this one leaves it out.
"""

from __future__ import annotations

import logging
import threading
import time

logger = logging.getLogger(__name__)

_FIRST_S, _MOST_S, _GROWTH = 50e-6, 1e-3, 1.05
_SAME_WAIT_S = 200e-6  # between two sleeps of one wait; who has found something takes longer until the next
_ours = threading.local()


def register() -> None:
    """Entry point of ``vllm.general_plugins``. Idempotent; does nothing on another platform."""
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    from vllm.distributed import utils
    from vllm.distributed.device_communicators import shm_broadcast

    for module in (utils, shm_broadcast):
        if hasattr(module, "sched_yield"):
            module.sched_yield = nap
        else:
            logger.warning("%s does not wait as we know it: vLLM's processes may starve others", module.__name__)


def nap() -> None:
    """One look has found nothing: sleep until the next."""
    again = time.monotonic() - getattr(_ours, "woke", 0.0) < _SAME_WAIT_S
    _ours.delay = min(_ours.delay * _GROWTH, _MOST_S) if again else _FIRST_S
    time.sleep(_ours.delay)
    _ours.woke = time.monotonic()
