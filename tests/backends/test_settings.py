"""Environment defaults: never over something that is set."""

from __future__ import annotations

import socket

import pytest

from dynamo_lmcache.vllm import settings
from dynamo_lmcache.vllm.settings import SettingError, parse_switch


@pytest.mark.parametrize("text", ["1", "true", "YES", " on "])
def test_on(text: str) -> None:
    assert parse_switch("ENABLE_LMCACHE", text, default=False) is True


@pytest.mark.parametrize("text", ["0", "False", "no", "off"])
def test_off(text: str) -> None:
    assert parse_switch("ENABLE_LMCACHE", text, default=True) is False


@pytest.mark.parametrize("text", [None, "", "  "])
def test_unset_is_the_default(text: str | None) -> None:
    assert parse_switch("ENABLE_LMCACHE", text, default=True) is True


@pytest.mark.parametrize("text", ["2", "enabled", "tru", "-1"])
def test_anything_else_is_refused_by_name(text: str) -> None:
    with pytest.raises(SettingError, match=rf"ENABLE_LMCACHE='{text}'.*1/true/yes/on"):
        parse_switch("ENABLE_LMCACHE", text, default=False)


def test_default_discovery_is_files_on_one_machine() -> None:
    env: dict[str, str] = {}
    settings.apply_worker_defaults(env)
    assert env["DYN_DISCOVERY_BACKEND"] == "file"
    assert "DYN_REQUEST_PLANE" not in env  # Dynamo's default is TCP
    assert env["DYN_TCP_RPC_HOST"] == env["VLLM_HOST_IP"] == "127.0.0.1"
    assert env["DYN_TCP_RESPONSE_STREAM_HOST"] == "lo"


def test_etcd_brings_nats_and_leaves_addresses_alone() -> None:
    env = {"DYN_DISCOVERY_BACKEND": "etcd"}
    settings.apply_worker_defaults(env)
    assert env["DYN_REQUEST_PLANE"] == env["DYN_EVENT_PLANE"] == "nats"
    assert "DYN_TCP_RPC_HOST" not in env and "VLLM_HOST_IP" not in env


def test_what_is_set_stays() -> None:
    env = {"DYN_DISCOVERY_BACKEND": "etcd", "DYN_REQUEST_PLANE": "tcp", "VLLM_WORKER_MULTIPROC_METHOD": "fork"}
    settings.apply_worker_defaults(env)
    assert env["DYN_REQUEST_PLANE"] == "tcp" and env["DYN_EVENT_PLANE"] == "nats"
    assert env["VLLM_WORKER_MULTIPROC_METHOD"] == "fork"


@pytest.mark.parametrize("argv", [["--discovery-backend", "etcd"], ["--model", "m", "--discovery-backend=etcd"]])
def test_the_flag_wins_over_the_variable(argv: list[str]) -> None:
    env = {"DYN_DISCOVERY_BACKEND": "file"}
    settings.apply_discovery_defaults(env, backend=settings.backend_from_argv(argv))
    assert env["DYN_DISCOVERY_BACKEND"] == "etcd" and env["DYN_EVENT_PLANE"] == "nats"


def test_no_flag_no_backend() -> None:
    assert settings.backend_from_argv(["--model", "m", "--discovery-backend"]) is None


def nobody() -> str:
    raise AssertionError("was asked")


def test_nixl_tells_workers_elsewhere_where_this_one_is() -> None:
    env = {"DYN_DISCOVERY_BACKEND": "etcd"}
    settings.apply_worker_defaults(env)
    settings.apply_nixl_defaults(env, on_cpu=False, own_address=lambda: "10.0.0.7")
    assert env["VLLM_NIXL_SIDE_CHANNEL_HOST"] == "10.0.0.7"
    env = {}
    settings.apply_worker_defaults(env)
    settings.apply_nixl_defaults(env, on_cpu=False, own_address=nobody)
    assert env["VLLM_NIXL_SIDE_CHANNEL_HOST"] == "127.0.0.1"


def test_an_address_that_is_none_is_not_told_to_others() -> None:
    with pytest.raises(SettingError, match="VLLM_NIXL_SIDE_CHANNEL_HOST is not set"):
        settings.apply_nixl_defaults({}, on_cpu=False, own_address=lambda: "0.0.0.0")


def test_nixl_on_cpu_sleeps_on_loopback_and_on_a_port_of_its_own() -> None:
    env = {"VLLM_NIXL_SIDE_CHANNEL_HOST": "127.0.0.1"}
    settings.apply_nixl_defaults(env, on_cpu=True, own_address=nobody)
    assert env["LMCACHE_NIXL_SLEEP_US"] == "1000" and env["UCX_NET_DEVICES"] == "lo"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", int(env["VLLM_NIXL_SIDE_CHANNEL_PORT"])))


def test_nixl_on_gpu_keeps_its_polling_and_its_network() -> None:
    env = {"VLLM_NIXL_SIDE_CHANNEL_PORT": "5600", "VLLM_NIXL_SIDE_CHANNEL_HOST": "10.0.0.1"}
    settings.apply_nixl_defaults(env, on_cpu=False, own_address=nobody)
    assert env == {"VLLM_NIXL_SIDE_CHANNEL_PORT": "5600", "VLLM_NIXL_SIDE_CHANNEL_HOST": "10.0.0.1"}


@pytest.mark.parametrize("text", ["32768", "42995", "http"])
def test_a_system_port_that_dynamo_cannot_read_is_refused(text: str) -> None:
    with pytest.raises(SettingError, match=f"DYN_SYSTEM_PORT='{text}'"):
        settings.apply_worker_defaults({"DYN_SYSTEM_PORT": text})


@pytest.mark.parametrize("text", ["", "-1", "0", "8081"])
def test_other_system_ports_are_fine(text: str) -> None:
    settings.apply_worker_defaults({"DYN_SYSTEM_PORT": text})
