"""Our log lines inside vLLM: its handlers and format, with our name in front (it prints only file names)."""

from __future__ import annotations

import logging
from collections.abc import MutableMapping
from typing import Any

from vllm.logger import init_logger


class _Ours(logging.LoggerAdapter[logging.Logger]):
    def process(self, msg: Any, kwargs: MutableMapping[str, Any]) -> tuple[Any, MutableMapping[str, Any]]:
        return f"lmcache_ext: {msg}", kwargs


def get_logger(name: str) -> logging.LoggerAdapter[logging.Logger]:
    """A logger below vLLM's."""
    return _Ours(init_logger(f"vllm.lmcache_ext.{name}"), {})


def show_core_logs() -> None:
    """The core logs under `lmcache_ext`; give that name vLLM's handlers and level, once."""
    ours, theirs = logging.getLogger("lmcache_ext"), logging.getLogger("vllm")
    if not ours.handlers and theirs.handlers:
        ours.handlers = list(theirs.handlers)
        ours.setLevel(theirs.level)
        ours.propagate = False
