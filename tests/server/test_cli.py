"""The server's flags, upstream's adapter JSON, and the commands that ask a server."""

from __future__ import annotations

import json

import pytest

from lmcache_ext.cli.main import build_parser, main
from lmcache_ext.cli.server import REFUSED
from lmcache_ext.errors import ConfigError
from lmcache_ext.ports import free_port
from lmcache_ext.server.adapters import parse
from lmcache_ext.server.config import ServerConfig
from lmcache_ext.server.main import segment
from lmcache_ext.tiers import MEDIA, Address, Faults
from tests.server.helpers import attached, keys, spec, store


def adapter(**values: object):
    return parse(json.dumps(values))


MOONCAKE = {
    "type": "mooncake_store", "local_hostname": "10.0.0.1", "metadata_server": "P2PHANDSHAKE", "protocol": "rdma",
    "rdma_devices": "mlx5_0", "global_segment_size": 32212254720, "local_buffer_size": 1073741824,
    "master_server_addr": "127.0.0.1:50051",
}  # fmt: skip


@pytest.mark.parametrize(
    ("values", "kind", "url"),
    [
        (MOONCAKE, "remote", "mooncakestore://127.0.0.1:50051?local_hostname=10.0.0.1&metadata_server=P2PHANDSHAKE&"
         "protocol=rdma&rdma_devices=mlx5_0&global_segment_size=32212254720&local_buffer_size=1073741824"),
        ({"type": "fs", "base_path": "/mnt/kv", "use_odirect": False}, "disk", "fs:///mnt/kv/?odirect=0"),
        ({"type": "fs_native", "base_path": "/a/", "num_workers": 2, "max_capacity_gb": 3, "shared": False}, "disk",
         "fs:///a/?threads=2&capacity_gb=3&shared=0"),
        ({"type": "resp", "host": "h", "port": 1, "username": "u", "password": "p@"}, "remote", "redis://u:p%40@h:1"),
        ({"type": "valkey", "startup_nodes": "a:1,b:2", "ttl_seconds": 60}, "remote", "redis-cluster://a:1,b:2?ttl=60"),
        ({"type": "valkey", "startup_nodes": [{"host": "a", "port": 1}], "database_id": 2, "tls_enable": True,
          "key_prefix": "k", "request_timeout": 1.5}, "remote", "valkey://a:1/2?prefix=k&tls=1&timeout=1.5"),
        ({"type": "nixl_store", "backend": "POSIX", "pool_size": 64,
          "backend_params": {"file_path": "/b", "use_direct_io": "true", "use_uring": True}}, "disk",
         "nixl://posix/b/?odirect=1&backend_params=use_uring%3Atrue"),
        ({"type": "s3", "s3_bucket": "kv", "s3_prefix": "a", "s3_endpoint": "http://h:1", "s3_region": "eu"}, "remote",
         "s3://kv/a?endpoint=http%3A%2F%2Fh%3A1&region=eu"),
        ({"type": "mock", "max_size_gb": 2, "mock_bandwidth_gb": 4, "eviction": {"eviction_policy": "ARC"}}, "remote",
         "fake://?policy=ARC&capacity_gb=2&gb_per_s=4"),
        ({"type": "fault_inject", "inner": {"type": "fs", "base_path": "/c"}, "flip": 0.1, "seed": 7}, "disk",
         "fault+fs:///c/?fault.seed=7&fault.flip=0.1"),
    ],
    ids=lambda value: value["type"] if isinstance(value, dict) else None,
)  # fmt: skip
def test_upstreams_json_is_one_of_our_urls(values, kind, url):
    found = adapter(**values)
    assert (found.type, found.kind, found.url) == (values["type"], kind, url)
    address = Address(found.url)
    address.options({})
    scheme = address.scheme.removeprefix("fault+")
    MEDIA.get(scheme).from_address(address)
    if scheme != address.scheme:
        Faults.from_address(address)
    address.finish()  # the tier knows every parameter


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("{", "no JSON"),
        ("[]", "type"),
        ('{"type": "dax"}', "dax"),
        ('{"type": "fs"}', "base_path"),
        ('{"type": "fs", "base_path": "/a", "colour": 1}', "colour"),
        ('{"type": "fs", "base_path": "/a", "serde": {"type": "fp8"}}', "serde"),
        ('{"type": "nixl_store", "backend": "OBJ"}', "file_path"),
        ('{"type": "fault_inject", "inner": 3}', "inner"),
    ],
)
def test_what_an_adapter_can_t_be_is_named(text, names):
    with pytest.raises(ConfigError, match=names):
        parse(text)


@pytest.mark.parametrize(
    ("values", "flag"),
    [
        ({"host": "0.0.0.0"}, "--host"),
        ({"http_host": "0.0.0.0"}, "LMCACHE_SERVER_TOKEN"),
        ({"port": 70000}, "--port"),
        ({"eviction_policy": "noop"}, "--eviction-policy"),
        ({"l1_size_gb": 0.001}, "--l1-size-gb"),
        ({"l1_size_gb": 1e6}, "--l1-size-gb"),
        ({"chunk_size": 0}, "--chunk-size"),
        ({"silence_seconds": 0}, "--silence-seconds"),
        ({"extent_mb": 5000}, "--extent-mb"),
    ],
)
def test_a_setting_that_does_not_fit_is_refused_by_name(values, flag):
    with pytest.raises(ConfigError, match=flag):
        ServerConfig(**{"l1_size_gb": 1.0, **values})


def test_upstreams_isolated_lru_is_ours():
    assert ServerConfig(1.0, eviction_policy="IsolatedLRU").policy == "LRU"
    assert ServerConfig(1.0).address == "tcp://127.0.0.1:5555"


@pytest.mark.parametrize("flag", sorted(REFUSED))
def test_flags_that_are_not_taken_are_refused_by_name(flag, capsys):
    with pytest.raises(SystemExit):
        build_parser().parse_args(["server", "--l1-size-gb", "1", flag, "5"])
    assert f"{flag}: {REFUSED[flag]}" in capsys.readouterr().err


def test_upstreams_own_command_is_understood():
    words = ["server", "--host", "127.0.0.1", "--port", "5555", "--http-host", "127.0.0.1", "--http-port", "8080",
             "--l1-size-gb", "32", "--eviction-policy", "LRU", "--no-l1-use-lazy",
             "--l2-adapter", json.dumps(MOONCAKE)]  # fmt: skip
    args = build_parser().parse_args(words)
    assert (args.l1_size_gb, args.l1_use_lazy, len(args.l2_adapter)) == (32.0, False, 1)


def test_a_port_that_is_taken_is_named(server, capsys):
    words = ["server", "--l1-size-gb", "0.1", "--port", str(server.port), "--http-port", str(free_port())]
    assert main(words) == 2
    assert "--port" in capsys.readouterr().err


def test_memory_can_be_taken_at_the_start():
    for lazy in (True, False):
        made = segment(ServerConfig(0.02, l1_use_lazy=lazy))
        assert made.resident == (0 if lazy else made.nbytes)
        made.close()


def test_ping_describe_clear_and_quota_ask_the_server(server):
    client = attached(server, spec())
    store(client, spec(), keys(3))
    url = ["--url", server.url]
    assert main(["ping", "kvcache", *url]) == 0
    assert main(["describe", "kvcache", *url]) == 0
    assert main(["quota", "set", "tenant", "--limit-gb", "2", *url]) == 0
    assert server.ask("GET", "/quota/tenant")[1]["limit_gb"] == 2
    assert main(["quota", "get", "tenant", *url]) == 0
    assert main(["quota", "list", *url]) == 0
    assert main(["quota", "delete", "tenant", *url]) == 0
    assert not server.ask("GET", "/quota/tenant")[1]["exists"]
    assert main(["kvcache", "clear", *url]) == 0
    assert server.status()["l1"]["chunks"] == 0
    assert main(["quota", "set", "tenant", "--limit-gb", "-1", *url]) == 1
    assert main(["ping", "engine", "--url", f"http://127.0.0.1:{free_port()}"]) == 1
    client.close()
