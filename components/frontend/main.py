"""Start Dynamo's frontend in this process, on the discovery and planes that our workers use."""

from __future__ import annotations

import os
import sys

from dynamo_lmcache.vllm.settings import apply_discovery_defaults, backend_from_argv


def main(argv: list[str] | None = None) -> None:
    """Run ``dynamo.frontend`` with its own flags until it is told to stop.

    Args:
        argv: flags; ``sys.argv[1:]`` when None.
    """
    if argv is not None:
        sys.argv[1:] = argv
    # Before Dynamo is imported: its parsers take their defaults from the environment.
    apply_discovery_defaults(os.environ, backend=backend_from_argv(sys.argv[1:]))
    from dynamo.frontend.main import main as dynamo_main

    dynamo_main()
