"""vLLM's processes end with the worker, also when it is killed. A vLLM general plugin, loaded in every vLLM process.

vLLM's engine does not notice that the process which started it is gone: it would keep its GPU memory, and the cache's
host memory, for ever. The worker says who it is in `WORKER_PID`; without it nothing is watched.
"""

from __future__ import annotations

import logging
import os
import select
import signal
import threading
import time

logger = logging.getLogger(__name__)

WORKER_PID = "LMCACHE_WORKER_PID"
_GRACE_S = 10.0  # to end in order
_LOOK_MS = 60_000
_watched: set[int] = set()


def adopt() -> None:
    """Called by the worker, before it starts vLLM: this is the process that must live."""
    os.environ[WORKER_PID] = str(os.getpid())


def register() -> None:
    """Entry point of ``vllm.general_plugins``. Idempotent; does nothing in the worker itself, nor without one."""
    pid = os.environ.get(WORKER_PID, "")
    if not pid.isdecimal() or int(pid) == os.getpid() or os.getpid() in _watched:
        return
    _watched.add(os.getpid())  # by process: a forked child inherits the set, but not the thread
    try:
        worker = os.pidfd_open(int(pid))
    except ProcessLookupError:
        _end()
        return
    except OSError as error:  # Linux before 5.3
        logger.warning("the end of the worker can't be watched: %s", error)
        return
    threading.Thread(target=_watch, args=(worker,), name="lmcache-worker-watch", daemon=True).start()


def _watch(worker: int) -> None:
    poller = select.poll()
    poller.register(worker, select.POLLIN)
    while not poller.poll(_LOOK_MS):
        pass
    _end()
    time.sleep(_GRACE_S)
    os.kill(os.getpid(), signal.SIGKILL)


def _end() -> None:
    logger.error("the worker is gone: process %d ends, too", os.getpid())
    os.kill(os.getpid(), signal.SIGTERM)
