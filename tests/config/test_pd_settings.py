"""Settings of a hand-over: upstream's names and files, and what is refused."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

from lmcache_ext.config import Handover, handover, load_config, no_gpu_buffer, pool_gb
from lmcache_ext.errors import ConfigError

RECEIVER = {
    "enable_pd": True, "pd_role": "receiver", "pd_peer_host": "localhost", "pd_peer_init_port": 7300,
    "pd_peer_alloc_port": 7400,
}  # fmt: skip
SENDER = {"enable_pd": True, "pd_role": "sender", "pd_proxy_host": "localhost", "pd_proxy_port": 7500}


def part(kv_role: str = "kv_both", writers: tuple[int, ...] = (0,), ranks: int = 1, **given: Any) -> Handover | None:
    config = load_config({f"lmcache.{name}": value for name, value in given.items()}, {})
    return handover(config, kv_role, list(writers), ranks)


def test_without_enable_pd_nothing_else_counts() -> None:
    assert part(**{**RECEIVER, "enable_pd": False}) is None


def test_upstreams_files_mean_what_they_say(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "decoder.yaml"
    path.write_text(
        "local_cpu: False\nmax_local_cpu_size: 0\nmax_local_disk_size: 0\nremote_serde: NULL\nenable_nixl: True\n"
        "enable_xpyd: True\nnixl_role: receiver\nnixl_peer_host: localhost\nnixl_peer_init_port: 7300\n"
        "nixl_peer_alloc_port: 7400\nnixl_buffer_size: 2147483648\nnixl_buffer_device: cuda\nnixl_backends: [UCX]\n"
        "transfer_channel: nixl\n"
    )
    logging.getLogger("lmcache_ext").propagate = True
    with caplog.at_level(logging.WARNING):
        config = load_config({}, {"LMCACHE_CONFIG_FILE": str(path)})
    assert not caplog.records
    found = handover(config, "kv_consumer", [0], 1)
    assert found is not None and found.receives and found.backends == ("UCX",)
    assert (found.listens[0].host, found.listens[0].init_port, found.listens[0].alloc_port) == ("localhost", 7300, 7400)
    assert pool_gb(config) == 2.0


@pytest.mark.parametrize("ports", [[7300, 7301], "7300,7301", "7300, 7301"])
def test_ports_of_several_ranks(ports: Any) -> None:
    given = {**RECEIVER, "pd_peer_init_port": ports, "pd_peer_alloc_port": [7400, 7401]}
    found = part(writers=(0, 1), ranks=2, **given)
    assert found is not None
    assert [(each.rank, each.init_port, each.alloc_port) for each in found.listens] == [
        (0, 7300, 7400),
        (1, 7301, 7401),
    ]
    one = part(writers=(0,), ranks=2, **given)  # MLA: one pool for both
    assert one is not None and [each.init_port for each in one.listens] == [7300]


def test_how_much_host_memory() -> None:
    def gb(**given: Any) -> float | None:
        return pool_gb(load_config({f"lmcache.{name}": value for name, value in given.items()}, {}))

    assert gb(max_local_cpu_size=5) == 5
    assert gb(max_local_cpu_size=5, pd_buffer_size=1 << 30) == 5  # not without enable_pd
    assert gb(max_local_cpu_size=5, pd_buffer_size=1 << 30, enable_pd=True) == 6
    assert gb(max_local_cpu_size=5, pd_buffer_size=1 << 30, enable_pd=True, local_cpu=False) == 1
    assert gb(max_local_cpu_size=0, enable_pd=True) is None
    with pytest.raises(ConfigError, match="max_local_cpu_size"):
        gb(max_local_cpu_size=0)


@pytest.mark.parametrize(
    ("kv_role", "given", "words"),
    [
        ("kv_both", {"enable_pd": True}, ["pd_role", "sender", "receiver"]),
        ("kv_both", {"enable_pd": True, "pd_role": "both"}, ["pd_role", "both", "'sender' or 'receiver'"]),
        ("kv_consumer", SENDER, ["pd_role", "sender", "kv_consumer", "kv_producer or kv_both"]),
        ("kv_producer", RECEIVER, ["pd_role", "receiver", "kv_producer", "kv_consumer or kv_both"]),
        ("kv_both", {**SENDER, "pd_proxy_host": None}, ["pd_proxy_host", "pd_skip_proxy_notification"]),
        ("kv_both", {**SENDER, "pd_proxy_port": 0}, ["pd_proxy_port", "0", "greater than or equal to 1"]),
        ("kv_both", {**RECEIVER, "pd_peer_host": None}, ["pd_peer_host", "address"]),
        ("kv_both", {**RECEIVER, "pd_peer_init_port": [1, 2]}, ["pd_peer_init_port", "[1, 2]", "it has 1"]),
        ("kv_both", {**RECEIVER, "pd_peer_init_port": "a"}, ["pd_peer_init_port", "integer"]),
        ("kv_both", {**RECEIVER, "pd_peer_alloc_port": 7300}, ["pd_peer_alloc_port", "7300", "differ"]),
        ("kv_both", {**RECEIVER, "pd_buffer_size": 0}, ["pd_buffer_size", "0", "greater than 0"]),
        ("kv_both", {**RECEIVER, "pd_buffer_device": "tpu"}, ["pd_buffer_device", "tpu", "cpu"]),
        ("kv_both", {**RECEIVER, "pd_allocation_timeout_sec": "inf"}, ["pd_allocation_timeout_sec", "inf", "3600"]),
        ("kv_both", {**RECEIVER, "nixl_backends": ""}, ["nixl_backends", "at least 1"]),
        ("kv_both", {**RECEIVER, "transfer_channel": "mock_memory"}, ["transfer_channel", "nixl"]),
    ],
)
def test_what_contradicts_itself_is_refused(kv_role: str, given: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ConfigError) as refused:
        part(kv_role, **given)
    for word in words:
        assert word in str(refused.value)


def test_nobody_need_be_told() -> None:
    found = part(**{**SENDER, "pd_proxy_host": None, "pd_proxy_port": None, "pd_skip_proxy_notification": True})
    assert found is not None and found.proxy is None and not found.receives
    told = part(**SENDER)
    assert told is not None and told.proxy == "localhost:7500"


GPU = {**SENDER, "local_cpu": False, "pd_buffer_size": 1 << 30, "pd_buffer_device": "cuda"}


@pytest.mark.parametrize(
    ("changed", "ranks", "own_process", "why"),
    [
        ({}, 1, False, ""),
        ({"pd_buffer_device": "cpu"}, 2, True, ""),
        ({"enable_pd": False}, 2, True, ""),
        ({"pd_buffer_size": None}, 1, False, "pd_buffer_size is unset"),
        ({"local_cpu": True}, 1, False, "local_cpu keeps chunks in host memory"),
        ({"remote_url": "redis://h:1", "local_disk": "/x"}, 1, False, "local_disk and remote_url take chunks"),
        ({}, 2, False, "workers have processes of their own"),
        ({}, 1, True, "workers have processes of their own"),
    ],
)
def test_why_a_buffer_is_not_on_the_gpu(changed: dict[str, Any], ranks: int, own_process: bool, why: str) -> None:
    config = load_config({f"lmcache.{name}": value for name, value in {**GPU, **changed}.items()}, {})
    said = no_gpu_buffer(config, ranks, own_process)
    assert (why in said) if why else said == ""
