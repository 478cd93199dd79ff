"""An LMCACHE_* default is set only for a key that nothing else names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dynamo_lmcache.vllm.lmcache_env import apply_defaults, missing_defaults
from lmcache_ext.errors import ConfigError

OURS: dict[str, Any] = {"kv_connector": "LMCacheConnectorV1", "kv_connector_extra_config": {}}
ALL = {"LMCACHE_CHUNK_SIZE": "256", "LMCACHE_LOCAL_CPU": "True"}


def write(folder: Path, text: str) -> dict[str, str]:
    path = folder / "lmcache.yaml"
    path.write_text(text)
    return {"LMCACHE_CONFIG_FILE": str(path)}


def test_nothing_named() -> None:
    assert missing_defaults({}, OURS) == ALL


def test_environment_wins() -> None:
    env = {"LMCACHE_CHUNK_SIZE": "64"}
    apply_defaults(env, OURS)
    assert env == {"LMCACHE_CHUNK_SIZE": "64", "LMCACHE_LOCAL_CPU": "True"}


def test_an_empty_variable_names_nothing() -> None:
    assert missing_defaults({"LMCACHE_CHUNK_SIZE": ""}, OURS) == ALL


def test_yaml_survives(tmp_path: Path) -> None:
    env = write(tmp_path, "chunk_size: 64\nlocal_cpu: false\nmax_local_cpu_size: 1\n")
    assert missing_defaults(env, OURS) == {}


def test_a_servers_advice_on_the_chunk_size_is_not_outranked() -> None:
    joined = {"kv_connector": "LMCacheMPConnector", "kv_role": "kv_both"}
    both = {"kv_connector": "MultiConnector", "kv_connector_extra_config": {"connectors": [joined]}}
    for config in (joined, both):
        assert missing_defaults({}, config) == {"LMCACHE_LOCAL_CPU": "True"}


def test_yaml_and_the_engine_agree_on_the_chunk_size(tmp_path: Path) -> None:
    from lmcache_ext.config import load_config

    env = write(tmp_path, "chunk_size: 64\n")
    apply_defaults(env, OURS)
    assert load_config({}, environ=env).chunk_size == 64


def test_extra_config_of_a_child_names_it() -> None:
    child = {"kv_connector": "LMCacheConnectorV1", "kv_connector_extra_config": {"lmcache.chunk_size": 64}}
    multi = {"kv_connector": "MultiConnector", "kv_connector_extra_config": {"connectors": [child]}}
    assert missing_defaults({}, multi) == {"LMCACHE_LOCAL_CPU": "True"}


def test_the_pool_size_is_left_to_the_engine() -> None:
    assert "LMCACHE_MAX_LOCAL_CPU_SIZE" not in missing_defaults({}, OURS)


@pytest.mark.parametrize("text", ["- a\n", "a: [1\n"])
def test_a_broken_file_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError, match="LMCACHE_CONFIG_FILE"):
        missing_defaults(write(tmp_path, text), OURS)


def test_an_empty_file_names_nothing(tmp_path: Path) -> None:
    assert missing_defaults(write(tmp_path, ""), OURS) == ALL
