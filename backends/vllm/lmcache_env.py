"""Set an LMCACHE_* default for a key that nothing else names.

The environment outranks the YAML file in the engine's configuration, so a default written here
over a key of that file would silently replace it: hence the look at all three sources first.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import Any

from dynamo_lmcache.vllm.settings import Environment
from dynamo_lmcache.vllm.transfer import SERVERS_CLIENT, walk
from lmcache_ext.config.names import ALIASES
from lmcache_ext.config.sources import read_yaml

logger = logging.getLogger(__name__)

# The integration document also writes LMCACHE_MAX_LOCAL_CPU_SIZE=20. The engine's own default is
# min(20, what the machine can spare), and an explicit value that does not fit is refused, so
# writing it here would stop small machines from starting.
DEFAULTS: Mapping[str, str] = {"chunk_size": "256", "local_cpu": "True"}

_ENV_PREFIX = "LMCACHE_"
_EXTRA_PREFIX = "lmcache."


def missing_defaults(env: Mapping[str, str], transfer_config: Mapping[str, Any]) -> dict[str, str]:
    """Return the LMCACHE_* variables to add to ``env``.

    Args:
        env: the environment as the user left it.
        transfer_config: keyword arguments of ``KVTransferConfig``; children count, too.

    Raises:
        lmcache_ext.errors.ConfigError: if LMCACHE_CONFIG_FILE cannot be read as a YAML mapping.
    """
    # The engine takes an empty variable for one that is not set, and so must this.
    named = _named(key[len(_ENV_PREFIX) :] for key, value in env.items() if value and key.startswith(_ENV_PREFIX))
    path = env.get("LMCACHE_CONFIG_FILE")
    named |= _named(read_yaml(path) if path else ())
    for entry in walk(transfer_config):
        if entry["kv_connector"] == SERVERS_CLIENT:
            named.add("chunk_size")  # the server advises one, which only what the user says may outrank
        extra = entry.get("kv_connector_extra_config") or {}
        named |= _named(key[len(_EXTRA_PREFIX) :] for key in extra if key.startswith(_EXTRA_PREFIX))
    return {_ENV_PREFIX + key.upper(): value for key, value in DEFAULTS.items() if key not in named}


def apply_defaults(env: Environment, transfer_config: Mapping[str, Any]) -> None:
    """Add ``missing_defaults`` to ``env`` and log what was added."""
    added = missing_defaults(env, transfer_config)
    env.update(added)
    if added:
        logger.info("LMCache defaults: %s", ", ".join(f"{key}={value}" for key, value in sorted(added.items())))


def _named(keys: Iterable[str]) -> set[str]:
    lowered = (key.lower() for key in keys)
    return {ALIASES.get(key, key) for key in lowered}
