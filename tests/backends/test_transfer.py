"""The synthesis of --kv-transfer-config, against the dictionaries of the integration document."""

from __future__ import annotations

from typing import Any

import pytest

from dynamo_lmcache.vllm.settings import SettingError
from dynamo_lmcache.vllm.transfer import MODULE_PATH, OURS, Role, connector_config, seed_config, uses, walk

# Word for word from the document.
PREFILL = {
    "kv_connector": "MultiConnector",
    "kv_role": "kv_both",
    "kv_connector_extra_config": {
        "connectors": [
            {"kv_connector": "LMCacheConnectorV1", "kv_role": "kv_both"},
            {"kv_connector": "NixlConnector", "kv_role": "kv_both"},
        ]
    },
}
AGGREGATED = {"kv_connector": "LMCacheConnectorV1", "kv_role": "kv_both"}
FALLBACK = {"kv_connector": "NixlConnector", "kv_role": "kv_both"}


def test_literal_dictionaries_of_the_document() -> None:
    assert seed_config(Role.PREFILL, lmcache=True) == PREFILL
    assert seed_config(Role.AGGREGATED, lmcache=True) == AGGREGATED


@pytest.mark.parametrize("role", list(Role))
def test_fallback_without_lmcache(role: Role) -> None:
    assert seed_config(role, lmcache=False) == FALLBACK
    made = connector_config(role, lmcache=False, nixl_installed=True)
    assert made == {**FALLBACK, "kv_load_failure_policy": "recompute"}, "prefill may die before its KV was fetched"


def test_decode_with_the_cache_asks_nixl_first() -> None:
    children = seed_config(Role.DECODE, lmcache=True)["kv_connector_extra_config"]["connectors"]
    assert [child["kv_connector"] for child in children] == ["NixlConnector", "LMCacheConnectorV1"]


def test_only_ours_gets_our_module_and_the_policy_is_at_the_top() -> None:
    config = connector_config(Role.PREFILL, lmcache=True, nixl_installed=True)
    assert config is not None
    assert config.pop("kv_load_failure_policy") == "recompute"
    ours, nixl = config["kv_connector_extra_config"]["connectors"]
    assert ours.pop("kv_connector_module_path") == MODULE_PATH
    assert config == PREFILL and nixl == FALLBACK
    alone = connector_config(Role.AGGREGATED, lmcache=True)
    assert alone == {**AGGREGATED, "kv_connector_module_path": MODULE_PATH, "kv_load_failure_policy": "recompute"}


def test_no_child_names_an_engine() -> None:
    for role in Role:
        config = connector_config(role, lmcache=True, nixl_installed=True)
        assert config is not None
        assert all("engine_id" not in entry for entry in walk(config))


def test_calls_do_not_share_dictionaries() -> None:
    first = connector_config(Role.PREFILL, lmcache=True, nixl_installed=True)
    assert first is not None
    first["kv_connector_extra_config"]["connectors"].clear()
    assert seed_config(Role.PREFILL, lmcache=True) == PREFILL


def test_without_nixl_aggregated_goes_on_and_disaggregated_does_not() -> None:
    assert connector_config(Role.AGGREGATED, lmcache=False, nixl_installed=False) is None
    for role in (Role.PREFILL, Role.DECODE):
        with pytest.raises(SettingError, match="needs NIXL"):
            connector_config(role, lmcache=False, nixl_installed=False)


@pytest.mark.parametrize(
    ("config", "found"),
    [
        (None, False),
        ({}, False),
        (AGGREGATED, True),
        (PREFILL, True),
        (FALLBACK, False),
        ({"kv_connector": "MultiConnector", "kv_connector_extra_config": {"connectors": "oops"}}, False),
    ],
)
def test_uses_looks_into_children(config: dict[str, Any] | None, found: bool) -> None:
    assert uses(config, OURS) is found
