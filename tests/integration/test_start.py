"""What is refused at the start, with which words; and models that are served without caching."""

from __future__ import annotations

import logging
import sys
from typing import Any

import pytest
import torch
from vllm.config import KVTransferConfig
from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole
from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheGroupSpec, SlidingWindowSpec

from lmcache_ext.errors import ConfigError, LayoutError
from lmcache_ext.integration import vllm as ours
from lmcache_ext.integration.vllm import plugin
from lmcache_ext.integration.vllm.metadata import StepMeta
from tests.integration import harness
from tests.integration.harness import BLOCK, Setup

WORKER, SCHEDULER = KVConnectorRole.WORKER, KVConnectorRole.SCHEDULER


def connector(setup: Setup, role: KVConnectorRole = WORKER, kv: Any = None, cls: Any = ours.LMCacheConnectorV1) -> Any:
    return cls(harness.vllm_config(setup), role, kv or harness.kv_cache_config(setup))


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        ({"lmcache.chunk_size": 100}, ["CHUNK_SIZE", "100", f"multiple of the engine's block size of {BLOCK}", "96"]),
        ({"lmcache.max_local_cpu_size": 100000}, ["MAX_LOCAL_CPU_SIZE", "100000", "would do"]),
        ({"lmcache.max_local_cpu_size": -1}, ["max_local_cpu_size", "-1", "greater than 0"]),
        ({"lmcache.max_local_cpu_size": 1e-9}, ["MAX_LOCAL_CPU_SIZE", "holds no chunk"]),
        ({"lmcache.enable_blending": True}, ["enable_blending", "CacheBlend"]),
    ],
)
def test_bad_settings_end_the_start(extra: dict[str, Any], words: list[str]) -> None:
    kv = torch.zeros(harness.LAYERS, 64, 1, BLOCK, harness.WIDTH, dtype=torch.int8)
    with pytest.raises(ConfigError) as refused:
        connector(Setup(extra=extra)).register_kv_caches({f"l{i}": kv[i] for i in range(harness.LAYERS)})
    for word in words:
        assert word in str(refused.value)


def test_skip_last_must_be_a_number_of_tokens() -> None:
    with harness_pool(Setup()), pytest.raises(ConfigError, match="skip_last_n_tokens"):
        connector(Setup(extra={"skip_last_n_tokens": -1}), SCHEDULER)


def harness_pool(setup: Setup) -> Any:
    """The scheduler side looks for its workers' pools: let it find none at once."""
    from unittest import mock

    from lmcache_ext.integration.vllm import impl

    return mock.patch.object(impl.rendezvous, "find", lambda *_: None)


def test_a_scheduler_that_finds_no_pool_serves_without_caching(caplog: pytest.LogCaptureFixture) -> None:
    logging.getLogger("vllm").propagate = True
    with harness_pool(Setup()):
        made = connector(Setup(), SCHEDULER)
    assert made._impl.scheduler.directory.capacity == 0
    assert any("nothing will be cached" in record.getMessage() for record in caplog.records)


def test_an_unknown_layout_ends_the_start() -> None:
    heads_outermost = torch.zeros(2, 64, BLOCK, harness.WIDTH, dtype=torch.int8).permute(1, 0, 2, 3)
    with pytest.raises(LayoutError, match=r"layer9.*not one dense run|not one dense run.*layer9"):
        connector(Setup()).register_kv_caches({"layer9": heads_outermost})


def test_hybrid_models_are_served_without_caching(caplog: pytest.LogCaptureFixture) -> None:
    logging.getLogger("vllm").propagate = True
    setup = Setup()
    full = harness.kv_cache_config(setup).kv_cache_groups[0]
    window = SlidingWindowSpec(
        **harness._accepted(
            SlidingWindowSpec, block_size=BLOCK, num_kv_heads=1, head_size=4, dtype=torch.int8, sliding_window=64
        )
    )
    groups = [full, KVCacheGroupSpec(["window"], window)]
    hybrid = KVCacheConfig(
        **harness._accepted(KVCacheConfig, num_blocks=64, kv_cache_tensors=[], kv_cache_groups=groups)
    )
    side, worker = connector(setup, SCHEDULER, hybrid), connector(setup, WORKER, hybrid)
    said = [r.getMessage() for r in caplog.records if "served without" in r.getMessage()]
    assert len(said) == 1 and "2 KV cache groups (a hybrid model)" in said[0]
    worker.register_kv_caches({})
    assert side.get_num_new_matched_tokens(None, 0) == (0, False)
    assert side.update_state_after_alloc(None, None, 0) is None
    meta = side.build_connector_meta(None)
    assert isinstance(meta, StepMeta) and not meta.loads and not meta.stores
    worker.bind_connector_metadata(meta)
    assert worker.get_finished(set()) == (None, None)
    assert side.request_finished_all_groups(None, ([], [])) == (False, None)
    assert not side.has_pending_push_work() and list(side.take_events()) == []


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("port", "many"), ("port", 0), ("host", "tcp://10.0.0.7"), ("autostart", "yes"), ("autostart.flags", ""),
        ("autostart.wait_timeout", -1), ("mp_transfer_mode", "lmcache_driven"), ("hash_algorithm", "sha256"),
        ("server_urls", ["tcp://127.0.0.1:1", "tcp://127.0.0.1:2"]), ("lazy_offload", True), ("hosts", "localhost"),
        ("save_decode_cache", 1),
    ],
)  # fmt: skip
def test_a_wrong_key_of_the_cache_server_is_refused_by_name(key: str, value: object) -> None:
    setup = Setup()
    config = harness.vllm_config(setup)
    extra = {"lmcache.mp.host": "tcp://localhost", f"lmcache.mp.{key}": value}
    config.kv_transfer_config.kv_connector_extra_config.update(extra)
    with pytest.raises(ConfigError, match=rf"lmcache\.mp\.{key}"):
        ours.LMCacheMPConnector(config, WORKER, harness.kv_cache_config(setup))


def test_a_hand_over_at_a_cache_server_is_refused() -> None:
    setup = Setup()
    config = harness.vllm_config(setup)
    config.kv_transfer_config.kv_connector_extra_config |= {
        "lmcache.mp.host": "tcp://localhost", "lmcache.enable_pd": True, "lmcache.pd_role": "sender",
        "lmcache.pd_skip_proxy_notification": True,
    }  # fmt: skip
    with pytest.raises(ConfigError, match=r"enable_pd.*cache server"):
        ours.LMCacheMPConnector(config, WORKER, harness.kv_cache_config(setup))


def test_bare_names_are_ours_with_the_plugin_and_vllms_without(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(KVConnectorFactory, "_registry", dict(KVConnectorFactory._registry))
    before = KVConnectorFactory._registry.pop("LMCacheConnectorV1")
    monkeypatch.setenv("LMCACHE_DISABLE_PLUGIN", "1")
    plugin.register()
    assert "LMCacheConnectorV1" not in KVConnectorFactory._registry
    monkeypatch.delenv("LMCACHE_DISABLE_PLUGIN")
    plugin.register()
    plugin.register()
    for name in plugin.NAMES:
        bare = KVTransferConfig(kv_connector=name, kv_role="kv_both")
        assert KVConnectorFactory.get_connector_class(bare) is getattr(ours, name)
    assert before is not None


def test_the_installed_package_registers_the_plugin() -> None:
    from importlib.metadata import entry_points

    found = {e.name: e.load() for e in entry_points(group="vllm.general_plugins") if e.name == "lmcache_ext"}
    assert found == {"lmcache_ext": plugin.register}


def test_threads_hand_over_the_interpreter_sooner() -> None:
    """While long prompts are taken in, each call of ours that lets go of the GIL would wait 5 ms to have it back."""
    interval = sys.getswitchinterval()
    try:
        for before, after in ((0.005, 0.0005), (0.0001, 0.0001)):
            sys.setswitchinterval(before)
            connector(Setup())
            assert sys.getswitchinterval() == pytest.approx(after, rel=0.02)
    finally:
        sys.setswitchinterval(interval)
