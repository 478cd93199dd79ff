"""Start Dynamo's frontend in this process, on the discovery and planes that our workers use."""

from __future__ import annotations

import logging
import os
import sys
from typing import Any

from dynamo_lmcache.vllm.settings import RUNTIME_ENDED, apply_discovery_defaults, backend_from_argv

logger = logging.getLogger(__name__)


def main(argv: list[str] | None = None) -> None:
    """Run ``dynamo.frontend`` with its own flags until it is told to stop.

    Exits with 1 if it ends without: Dynamo would with 0, and whoever supervises it would not start it again.

    Args:
        argv: flags; ``sys.argv[1:]`` when None.
    """
    if argv is not None:
        sys.argv[1:] = argv
    # Before Dynamo is imported: its parsers take their defaults from the environment.
    apply_discovery_defaults(os.environ, backend=backend_from_argv(sys.argv[1:]))
    from dynamo.frontend import main as dynamo

    told = _remember(dynamo, "graceful_shutdown")
    dynamo.main()
    if not told and os.environ["DYN_DISCOVERY_BACKEND"] == "etcd":
        logger.error(RUNTIME_ENDED)
        sys.exit(1)


def _remember(module: Any, name: str) -> list[str]:
    """A list that has `name` in it once that function, which Dynamo's signal handler calls, was called."""
    called: list[str] = []
    function = getattr(module, name)

    def remembering(*args: Any) -> Any:
        called.append(name)
        return function(*args)

    setattr(module, name, remembering)
    return called
