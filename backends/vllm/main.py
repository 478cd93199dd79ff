"""Entry point of a worker: environment first, then the imports that read it, then the worker."""

from __future__ import annotations

import logging
import os
import sys
from typing import TYPE_CHECKING

from dynamo_lmcache.vllm import settings
from lmcache_ext.errors import ConfigError

if TYPE_CHECKING:
    from dynamo_lmcache.vllm.args import WorkerConfig

logger = logging.getLogger(__name__)

_PROGRAM = "dynamo_lmcache.vllm"


def main(argv: list[str] | None = None) -> None:
    """Run a worker until it is told to stop.

    Exits with 0 after a signal, 1 when the engine could not start or died or Dynamo gave up, 2 for a bad setting.
    """
    words = sys.argv[1:] if argv is None else argv
    try:
        # Before anything of Dynamo or vLLM is imported: both read the environment at import.
        settings.apply_worker_defaults(os.environ, backend=settings.backend_from_argv(words))
        config = _configure(words)
    except (ValueError, ConfigError) as error:
        sys.stderr.write(f"{_PROGRAM}: {error}\n")
        sys.exit(2)
    _run(config)


def _run(config: WorkerConfig) -> None:
    import uvloop

    from dynamo_lmcache.vllm.health import leave
    from dynamo_lmcache.vllm.shutdown import RuntimeLost
    from dynamo_lmcache.vllm.worker import run_worker

    # Not by returning: Dynamo's threads are still running then, and one that asks for the
    # interpreter while it goes down aborts the process ("exception not rethrown").
    try:
        uvloop.run(run_worker(config))
    except RuntimeLost as lost:
        logger.error("%s", lost)
        leave(1)
    except Exception:
        logger.exception("the worker could not start, or failed")
        leave(1)
    leave(0)


def _configure(words: list[str]) -> WorkerConfig:
    from dynamo.runtime.logging import configure_dynamo_logging

    from dynamo_lmcache.vllm.args import parse_args

    configure_dynamo_logging()
    config = parse_args(words)
    _complete_environment(config)
    return config


def _complete_environment(config: WorkerConfig) -> None:
    """Set what vLLM's processes are to find: LMCACHE_* defaults, NIXL's settings, and whose they are."""
    from vllm.platforms import current_platform
    from vllm.utils.network_utils import get_ip

    from dynamo_lmcache.vllm import lmcache_env, nixl_cpu, orphans, transfer

    orphans.adopt()
    connectors = config.transfer_config
    if transfer.uses(connectors, transfer.OURS):
        lmcache_env.apply_defaults(os.environ, connectors)
    if transfer.uses(connectors, {transfer.NIXL}):
        settings.apply_nixl_defaults(os.environ, on_cpu=current_platform.is_cpu(), own_address=get_ip)
        if os.environ.get(nixl_cpu.SLEEP_VARIABLE) and not nixl_cpu.plugin_installed():
            logger.warning(
                "%s has no effect: this project is not installed, so vLLM has no plugin", nixl_cpu.SLEEP_VARIABLE
            )
