"""Where settings come from, lowest first. Each source is a layer: field → (the name as typed, value)."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from lmcache_ext.config.names import ALIASES, KNOWN_UPSTREAM, NOT_SETTINGS
from lmcache_ext.errors import ConfigError

logger = logging.getLogger("lmcache_ext.config")

Layer = dict[str, tuple[str, Any]]

ENV_PREFIX = "LMCACHE_"
EXTRA_PREFIX = "lmcache."
FILE_VARIABLE = "LMCACHE_CONFIG_FILE"


def layers(extra: Mapping[str, Any], environ: Mapping[str, str] | None, known: set[str]) -> Iterator[Layer]:
    """YAML, environment, extra_config, in rising order."""
    env = os.environ if environ is None else environ
    path = env.get(FILE_VARIABLE)
    if path:
        yield _layer(((key, key, value) for key, value in read_yaml(path).items()), known, f"in {path}")
    yield _layer(_from_environment(env), known, "in the environment")
    given = ((key[len(EXTRA_PREFIX) :], key, value) for key, value in extra.items() if key.startswith(EXTRA_PREFIX))
    yield _layer((item for item in given if not item[0].startswith("mp.")), known, "in kv_connector_extra_config")


def _from_environment(env: Mapping[str, str]) -> Iterator[tuple[str, str, Any]]:
    for key, value in env.items():
        if key.startswith(ENV_PREFIX):
            name = key[len(ENV_PREFIX) :].lower()
            if name not in NOT_SETTINGS and value != "":
                yield name, key, value


def read_yaml(path: str) -> dict[str, Any]:
    """The mapping in a YAML file. Raises ConfigError that says what is wrong with the file."""
    try:
        data = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(FILE_VARIABLE, path, f"can't be read: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(FILE_VARIABLE, path, f"is not valid YAML: {error}") from None
    if data is None:
        return {}
    if not isinstance(data, dict) or not all(isinstance(key, str) for key in data):
        raise ConfigError(FILE_VARIABLE, path, "must hold a mapping of setting names to values")
    return data


def _layer(items: Iterator[tuple[str, str, Any]], known: set[str], where: str) -> Layer:
    layer: Layer = {}
    for raw, typed, value in items:
        name = ALIASES.get(raw, raw)
        if name in known:
            layer[name] = (typed, value)
        elif name in KNOWN_UPSTREAM:
            logger.warning("%s=%s %s has no effect: this version does not have it", typed, _short(value), where)
        else:
            logger.warning("%s %s is not a setting that we know; ignored", typed, where)
    return layer


def _short(value: object) -> str:
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return text if len(text) <= 40 else text[:37] + "..."
