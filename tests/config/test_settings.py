"""Settings: which source wins, what is refused, and with which words."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from lmcache_ext.config import EngineConfig, default_pool_gb, load_config, memory, require_pool_fits
from lmcache_ext.errors import ConfigError


def test_built_in_defaults_are_upstreams() -> None:
    config = load_config({}, {})
    assert (config.chunk_size, config.local_cpu, config.cache_policy) == (256, True, "LRU")
    assert (config.save_decode_cache, config.min_retrieve_tokens) == (False, 0)


def test_sources_from_lowest_to_highest(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("chunk_size: 64\nmin_retrieve_tokens: 1\ncache_policy: lru\n")
    env = {"LMCACHE_CONFIG_FILE": str(path), "LMCACHE_MIN_RETRIEVE_TOKENS": "2", "LMCACHE_MAX_TOKENS_PER_LOAD": "3"}
    config = load_config({"lmcache.max_tokens_per_load": 4, "other": 5}, env, defaults={"chunk_size": 32})
    assert (config.chunk_size, config.min_retrieve_tokens, config.max_tokens_per_load) == (64, 2, 4)
    assert load_config({}, {}, defaults={"chunk_size": 32}).chunk_size == 32


@pytest.mark.parametrize("text", ["True", "true", "1", "yes", "on"])
def test_true_in_the_environment(text: str) -> None:
    assert load_config({}, {"LMCACHE_SAVE_DECODE_CACHE": text}).save_decode_cache is True
    assert load_config({}, {"LMCACHE_LOCAL_CPU": "False"}).local_cpu is False


@pytest.mark.parametrize(
    ("extra", "env", "words"),
    [
        ({"lmcache.chunk_size": -1}, {}, ["lmcache.chunk_size", "-1", "greater than 0"]),
        ({}, {"LMCACHE_CHUNK_SIZE": "many"}, ["LMCACHE_CHUNK_SIZE", "many", "integer"]),
        ({}, {"LMCACHE_MAX_LOCAL_CPU_SIZE": "-5"}, ["LMCACHE_MAX_LOCAL_CPU_SIZE", "-5", "greater than 0"]),
        ({}, {"LMCACHE_CACHE_POLICY": "BEST"}, ["LMCACHE_CACHE_POLICY", "BEST", "LRU"]),
        ({}, {"LMCACHE_ENABLE_BLENDING": "True"}, ["LMCACHE_ENABLE_BLENDING", "CacheBlend"]),
        ({"lmcache.store_timeout_secs": 0}, {}, ["lmcache.store_timeout_secs", "greater than 0"]),
    ],
)
def test_bad_values_are_refused_by_the_name_they_were_given_under(
    extra: dict[str, object], env: dict[str, str], words: list[str]
) -> None:
    with pytest.raises(ConfigError) as refused:
        load_config(extra, env)
    for word in words:
        assert word in str(refused.value)


@pytest.mark.parametrize("value", ["False", "0", "off"])
def test_blending_may_be_said_to_be_off(value: str) -> None:
    assert load_config({}, {"LMCACHE_ENABLE_BLENDING": value}).enable_blending is False


def test_unknown_keys_warn_and_known_ones_of_upstream_say_so(caplog: pytest.LogCaptureFixture) -> None:
    logging.getLogger("lmcache_ext").propagate = True
    with caplog.at_level(logging.WARNING):
        load_config({"lmcache.colour": "red"}, {"LMCACHE_P2P_HOST": "x", "LMCACHE_CONTROLLER_URL": "y"})
    said = "\n".join(record.getMessage() for record in caplog.records)
    assert "lmcache.colour" in said and "not a setting" in said
    assert "LMCACHE_P2P_HOST=x" in said and "has no effect" in said
    assert "LMCACHE_CONTROLLER_URL=y" in said  # upstream's alias of controller_pull_url


@pytest.mark.parametrize(
    ("text", "words"),
    [("chunk_size: [1", "not valid YAML"), ("- 1\n- 2\n", "mapping"), (None, "can't be read")],
)
def test_broken_yaml_is_refused(tmp_path: Path, text: str | None, words: str) -> None:
    path = tmp_path / "c.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError, match=words) as refused:
        load_config({}, {"LMCACHE_CONFIG_FILE": str(path)})
    assert str(path) in str(refused.value)


def test_an_empty_yaml_file_says_nothing(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("")
    assert load_config({}, {"LMCACHE_CONFIG_FILE": str(tmp_path / "c.yaml")}) == load_config({}, {})


def test_settings_are_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        load_config({}, {}).chunk_size = 1  # type: ignore[misc]


def test_every_setting_is_documented() -> None:
    text = (Path(__file__).parents[2] / "docs" / "settings.md").read_text()
    for name in EngineConfig.model_fields:
        assert f"`{name}`" in text, name


def test_pool_that_cannot_fit_is_refused_with_what_would_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "memory_limit", lambda: 8 << 30)
    require_pool_fits(4, 2, "LMCACHE_MAX_LOCAL_CPU_SIZE")
    with pytest.raises(ConfigError, match=r"LMCACHE_MAX_LOCAL_CPU_SIZE=5.*at most 4\.0 would do"):
        require_pool_fits(5, 2, "LMCACHE_MAX_LOCAL_CPU_SIZE")


def test_default_pool_is_a_quarter_of_what_is_left_per_worker_and_at_most_20_gb(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(memory, "memory_available", lambda: 16 << 30)
    assert (default_pool_gb(1), default_pool_gb(2)) == (4.0, 2.0)
    monkeypatch.setattr(memory, "memory_available", lambda: 1000 << 30)
    assert default_pool_gb(1) == 20.0


def test_the_cgroup_bounds_what_is_left(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    limit, usage, stat = tmp_path / "max", tmp_path / "current", tmp_path / "stat"
    limit.write_text(f"{1 << 30}\n")
    usage.write_text(f"{1 << 29}\n")
    monkeypatch.setattr(memory, "_CGROUPS", ((limit, usage, stat),))
    assert memory.memory_available() == 1 << 29
    stat.write_text(f"anon 5\nactive_file 7\ninactive_file {1 << 28}\n")  # the kernel gives those back
    assert memory.memory_available() == (1 << 29) + (1 << 28)
    assert memory.memory_limit() == 1 << 30
    limit.write_text("max\n")
    assert memory.memory_available() > 1 << 29
