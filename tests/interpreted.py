"""Triton's kernels without a GPU: in its interpreter, slowly."""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
from collections.abc import Iterator
from typing import Any

NAME = "lmcache_ext.transfer.kernel"


@contextlib.contextmanager
def kernels() -> Iterator[Any]:
    """The module, decorated for the interpreter; others in this process get one of their own."""
    before = sys.modules.pop(NAME, None), os.environ.get("TRITON_INTERPRET")
    os.environ["TRITON_INTERPRET"] = "1"
    try:
        yield importlib.import_module(NAME)
    finally:
        sys.modules.pop(NAME)
        if before[0] is not None:
            sys.modules[NAME] = before[0]
        os.environ.pop("TRITON_INTERPRET")
        if before[1] is not None:
            os.environ["TRITON_INTERPRET"] = before[1]
