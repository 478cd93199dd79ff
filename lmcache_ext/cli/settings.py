"""Doctor's look at ENABLE_LMCACHE and at the engine's settings."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping

from lmcache_ext.cli.finding import Finding, fail, ok, warn
from lmcache_ext.config import EngineConfig, load_config
from lmcache_ext.errors import ConfigError
from lmcache_ext.tiers import Address

ON = ("1", "true", "yes", "on")
OFF = ("0", "false", "no", "off")


def check_switch(env: Mapping[str, str]) -> Iterator[Finding]:
    """ENABLE_LMCACHE, as the worker reads it: unset or empty means off."""
    value = env.get("ENABLE_LMCACHE", "").strip()
    if not value:
        yield ok("ENABLE_LMCACHE", "not set: workers serve without our cache (launch/agg_lmcache.sh sets it to 1)")
    elif value.lower() in ON:
        yield ok("ENABLE_LMCACHE", f"{value}: the cache is on")
    elif value.lower() in OFF:
        yield ok("ENABLE_LMCACHE", f"{value}: the cache is off")
    else:
        text = f"{env['ENABLE_LMCACHE']!r} is neither on nor off"
        yield fail("ENABLE_LMCACHE", text, f"use one of {'/'.join(ON)} or {'/'.join(OFF)}")


class _Collect(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


def read_config(env: Mapping[str, str]) -> tuple[EngineConfig, list[str]]:
    """The engine's settings under `env`, and what was logged about them. Raises ConfigError."""
    logger, collect = logging.getLogger("lmcache_ext.config"), _Collect()
    propagate, logger.propagate = logger.propagate, False
    logger.addHandler(collect)
    try:
        return load_config(environ=env), collect.messages
    finally:
        logger.removeHandler(collect)
        logger.propagate = propagate


def _shown(value: object) -> str:
    """URLs without user, password and parameters."""
    return Address(value).shown if isinstance(value, str) and "://" in value else str(value)


def check_settings(env: Mapping[str, str]) -> Iterator[Finding]:
    """LMCACHE_* and the YAML file behind LMCACHE_CONFIG_FILE: one line, and one for each that has no effect."""
    try:
        config, messages = read_config(env)
    except ConfigError as error:
        yield fail("settings", str(error), "correct that setting; README.md names the others")
        return
    changed = {name: value for name, value in config if name in config.model_fields_set}
    shown = ", ".join(f"{name}={_shown(value)}" for name, value in changed.items())
    yield ok("settings", shown or "all at their defaults")
    for message in messages:
        yield warn("settings", message, "remove it, or look for a misspelling")
