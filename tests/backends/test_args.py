"""The command line: roles, connectors, refusals. Needs vLLM's parser, but no engine."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from dynamo_lmcache.vllm.args import WorkerConfig, parse_args, resolve_role
from dynamo_lmcache.vllm.settings import SettingError
from dynamo_lmcache.vllm.transfer import MODULE_PATH, Role

MODEL = str(Path(__file__).resolve().parents[2] / "launch" / "demo_model")


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith(("DYN_", "ENABLE_LMCACHE", "LMCACHE_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("DYN_DISCOVERY_BACKEND", "file")


def parse(*argv: str, lmcache: str | None = None) -> WorkerConfig:
    if lmcache is not None:
        os.environ["ENABLE_LMCACHE"] = lmcache
    try:
        return parse_args(["--model", MODEL, *argv])
    finally:
        os.environ.pop("ENABLE_LMCACHE", None)


def connectors(config: WorkerConfig) -> list[str]:
    entry: Any = config.engine_args.kv_transfer_config
    if entry is None:
        return []
    children = entry.kv_connector_extra_config.get("connectors")
    return [child["kv_connector"] for child in children] if children else [entry.kv_connector]


def test_dynamos_runtime_hears_of_the_request_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DYN_ENGINE_REQUEST_LIMIT", raising=False)
    parse("--engine-request-limit", "8")
    assert os.environ["DYN_ENGINE_REQUEST_LIMIT"] == "8"


def test_offloading_by_vllms_own_flag_leaves_no_place_for_nixl() -> None:
    assert connectors(parse("--kv-offloading-size", "1", lmcache="1")) == []
    with pytest.raises(SettingError, match="MultiConnector"):
        parse("--kv-offloading-size", "1", "--is-prefill-worker", lmcache="1")


@pytest.mark.parametrize(
    ("argv", "lmcache", "expected"),
    [
        ([], "1", ["LMCacheConnectorV1"]),
        (["--disaggregation-mode", "agg"], "true", ["LMCacheConnectorV1"]),
        (["--is-prefill-worker"], "1", ["LMCacheConnectorV1", "NixlConnector"]),
        (["--disaggregation-mode", "prefill"], "on", ["LMCacheConnectorV1", "NixlConnector"]),
        (["--disaggregation-mode", "decode"], "yes", ["NixlConnector", "LMCacheConnectorV1"]),
        (["--is-decode-worker"], None, ["NixlConnector"]),
        (["--disaggregation-mode", "prefill"], "0", ["NixlConnector"]),
        ([], None, ["NixlConnector"]),
        ([], "off", ["NixlConnector"]),
    ],
)
def test_connectors_of_role_and_switch(argv: list[str], lmcache: str | None, expected: list[str]) -> None:
    assert connectors(parse(*argv, lmcache=lmcache)) == expected


def test_ours_is_loaded_from_our_module_and_recomputes() -> None:
    config: Any = parse(lmcache="1").engine_args.kv_transfer_config
    assert config.kv_connector_module_path == MODULE_PATH
    assert config.kv_load_failure_policy == "recompute"
    assert config.kv_role == "kv_both"


def test_an_explicit_transfer_config_wins() -> None:
    given = {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}
    config: Any = parse("--kv-transfer-config", json.dumps(given), lmcache="1").engine_args.kv_transfer_config
    assert config.kv_connector == "ExampleConnector" and config.kv_connector_module_path is None


@pytest.mark.parametrize(("said", "policy"), [({}, "recompute"), ({"kv_load_failure_policy": "fail"}, "fail")])
def test_an_explicit_config_of_ours_recomputes_unless_it_says_otherwise(said: dict[str, str], policy: str) -> None:
    given = {"kv_connector": "LMCacheConnectorV1", "kv_role": "kv_both", **said}
    config: Any = parse("--kv-transfer-config", json.dumps(given)).engine_args.kv_transfer_config
    assert config.kv_load_failure_policy == policy


def test_a_file_of_settings_may_say_otherwise(tmp_path: Path) -> None:
    file = tmp_path / "vllm.yaml"
    given = {"kv_connector": "LMCacheConnectorV1", "kv_role": "kv_both"}
    for said, policy in (({}, "recompute"), ({"kv_load_failure_policy": "fail"}, "fail")):
        file.write_text(json.dumps({"kv-transfer-config": {**given, **said}}))
        config: Any = parse("--config", str(file)).engine_args.kv_transfer_config
        assert config.kv_load_failure_policy == policy


def test_a_strange_switch_is_refused() -> None:
    with pytest.raises(SettingError, match="ENABLE_LMCACHE='perhaps'"):
        parse(lmcache="perhaps")


@pytest.mark.parametrize(
    ("mode", "prefill", "decode", "role"),
    [
        (None, False, False, Role.AGGREGATED),
        ("pd", False, False, Role.AGGREGATED),
        ("prefill", True, False, Role.PREFILL),
        (None, False, True, Role.DECODE),
    ],
)
def test_roles(mode: str | None, prefill: bool, decode: bool, role: Role) -> None:
    assert resolve_role(mode, prefill=prefill, decode=decode) is role


@pytest.mark.parametrize(
    ("mode", "prefill", "decode"), [("decode", True, False), ("agg", True, False), (None, True, True)]
)
def test_contradicting_roles_are_refused(mode: str | None, prefill: bool, decode: bool) -> None:
    with pytest.raises(SettingError, match="contradict"):
        resolve_role(mode, prefill=prefill, decode=decode)


def test_encode_is_refused() -> None:
    with pytest.raises(SettingError, match="encode"):
        parse("--disaggregation-mode", "encode")


def test_addresses() -> None:
    assert parse().endpoint_path() == "dynamo.backend.generate"
    assert parse("--is-prefill-worker").endpoint_path() == "dynamo.prefill.generate"
    assert parse("--namespace", "blue").endpoint_path("clear_kv_blocks") == "blue.backend.clear_kv_blocks"
    assert parse("--endpoint", "dyn://a.b.c").endpoint_path() == "a.b.c"
    with pytest.raises(SettingError, match=r"--endpoint .a\.b."):
        parse("--endpoint", "a.b")


def test_names_and_aliases() -> None:
    config = parse("--served-model-name", "one", "two,three")
    assert (config.served_name, config.aliases) == ("one", ("two", "three"))
    assert parse().served_name == MODEL


def test_parsers_and_template_reach_the_card(tmp_path: Path) -> None:
    template = tmp_path / "chat.jinja"
    template.write_text("x")
    config = parse(
        "--dyn-tool-call-parser", "hermes", "--dyn-reasoning-parser", "qwen3", "--custom-jinja-template", str(template)
    )
    assert config.runtime.dyn_tool_call_parser == "hermes"
    assert config.runtime.dyn_reasoning_parser == "qwen3"
    assert config.runtime.custom_jinja_template == str(template)
    with pytest.raises(SettingError, match="--custom-jinja-template"):
        parse("--custom-jinja-template", str(tmp_path / "absent"))


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--connector", "lmcache"], "ENABLE_LMCACHE=1"),
        (["--migration-limit", "3"], "frontend --migration-limit 3"),
        (["--embedding-worker"], "--embedding-worker True"),
        (["--drain-timeout", "-1"], "--drain-timeout"),
    ],
)
def test_refusals_say_what_to_do(argv: list[str], message: str) -> None:
    with pytest.raises(SettingError, match=message):
        parse(*argv)


def test_a_refused_variable_is_refused_like_its_flag(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DYN_VLLM_CLASSIFY_WORKER", "true")
    with pytest.raises(SettingError, match="--classify-worker"):
        parse()


def test_a_missing_model_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(SettingError, match="--model 'no/such-model'"):
        parse_args(["--model", "no/such-model"])


def test_own_options(monkeypatch: pytest.MonkeyPatch) -> None:
    config = parse("--no-publish-kv-events", "--no-publish-load", "--no-warmup", "--drain-timeout", "2.5")
    assert (config.publish_kv_events, config.publish_load) == (False, False)
    assert (config.warmup, config.drain_timeout_s) == (False, 2.5)
    assert parse().warmup is None
    monkeypatch.setenv("DYN_VLLM_DRAIN_TIMEOUT_S", "soon")
    with pytest.raises(SettingError, match="DYN_VLLM_DRAIN_TIMEOUT_S='soon'"):
        parse()


def test_router_advertisement() -> None:
    assert parse().router_config is None
    assert parse("--router-mode", "kv").router_config is not None
