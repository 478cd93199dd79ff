"""NIXL where vLLM's own use of it hurts. A vLLM general plugin, loaded in every vLLM process.

NIXL's Python API fixes its progress thread's delay at 0, so each agent polls one core at 100 % for as long as it lives.
That starves the engine and, worse, Dynamo's discovery heartbeat: the worker vanishes from the model list. With a delay
of 1000 microseconds an idle agent costs about 3 % of a core, and a transfer at most that much more latency.

vLLM's NixlConnector binds its worker's main thread to the last core of each NUMA node, so that of several workers all
share one, whatever VLLM_CPU_OMP_THREADS_BIND says. There they spin in turns, and a request waited for 30 s until its KV
was fetched. Here the thread keeps the cores that it had.

``LMCACHE_NIXL_SLEEP_US`` sets the delay; without it neither is changed. The worker sets it to 1000 on the CPU platform.

vLLM's scheduler waits without a deadline for NIXL's side channel to listen, also if it never will because somebody has
its port. Here such an engine ends, with an error.
"""

from __future__ import annotations

import functools
import logging
import os
import signal
import threading
from importlib.metadata import entry_points
from typing import Any

from dynamo_lmcache.vllm.settings import SettingError
from lmcache_ext.sleepy import sleepy

logger = logging.getLogger(__name__)

SLEEP_VARIABLE = "LMCACHE_NIXL_SLEEP_US"
PLUGIN_NAME = "dynamo_lmcache_nixl"
_LISTENER = "nixl_handshake_listener"
_PATCHED = "_dynamo_lmcache_sleep_us"


def register() -> None:
    """Entry point of ``vllm.general_plugins``. Idempotent; without the variable only a deaf side channel is seen to.

    Raises:
        SettingError: if the variable is not a positive whole number. vLLM logs it and goes on.
    """
    _end_if_deaf()
    text = os.environ.get(SLEEP_VARIABLE, "").strip()
    if not text:
        return
    if not text.isdecimal() or int(text) == 0:
        raise SettingError(f"{SLEEP_VARIABLE}={text!r} must be a positive number of microseconds, such as 1000")
    try:
        import nixl._api as api
    except ImportError:
        logger.debug("nixl is not installed: no progress thread to slow down")
        return
    _sleep(api.nixlBind, int(text))
    _keep_cores()


def plugin_installed() -> bool:
    """Tell whether vLLM will find this plugin: it finds installed entry points only."""
    return any(entry.name == PLUGIN_NAME for entry in entry_points(group="vllm.general_plugins"))


def _sleep(bindings: Any, delay_us: int) -> None:
    if getattr(bindings, _PATCHED, None) is not None:
        return
    bindings.nixlAgentConfig = sleepy(bindings.nixlAgentConfig, delay_us)
    setattr(bindings, _PATCHED, delay_us)
    logger.info("NIXL's progress thread sleeps %d us between polls", delay_us)


def _end_if_deaf() -> None:
    original = threading.excepthook
    if getattr(original, _PATCHED, None) is not None:
        return

    @functools.wraps(original)
    def hook(args: threading.ExceptHookArgs) -> None:
        original(args)
        if args.thread is not None and args.thread.name == _LISTENER:
            port = os.environ.get("VLLM_NIXL_SIDE_CHANNEL_PORT", "its default")
            logger.error("NIXL's side channel: VLLM_NIXL_SIDE_CHANNEL_PORT is %s: %s", port, args.exc_value)
            os.kill(os.getpid(), signal.SIGTERM)

    setattr(hook, _PATCHED, True)
    threading.excepthook = hook


def _keep_cores() -> None:
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

    original = KVConnectorFactory.create_connector
    if getattr(original, _PATCHED, None) is not None:
        return

    @functools.wraps(original)
    def create(*args: Any, **options: Any) -> Any:
        cores = os.sched_getaffinity(0)
        try:
            return original(*args, **options)
        finally:
            os.sched_setaffinity(0, cores)

    setattr(create, _PATCHED, True)
    KVConnectorFactory.create_connector = staticmethod(create)
