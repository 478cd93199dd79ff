"""Worker and frontend read the commands in compose.yaml and in the manifests as the roles that they should have.

One file, because vLLM's parser takes seconds to import.
"""

from __future__ import annotations

import shlex

import pytest

from lmcache_ext.cli.main import build_parser
from tests.deploy import facts
from tests.deploy.test_compose import SERVICES, load
from tests.deploy.test_kubernetes import SHAPES, containers, environment

OURS, NIXL = "LMCacheConnectorV1", "NixlConnector"
EXPECTED = {
    "agg": {"worker": ("agg", [OURS])},
    "router": {"worker": ("agg", [OURS])},
    "disagg": {"decode": ("decode", [NIXL]), "prefill": ("prefill", [OURS, NIXL])},
    "shared": {"shared": ("agg", ["LMCacheMPConnector"])},
}


@pytest.mark.parametrize("files", [("compose.yaml",), ("compose.yaml", "compose.cuda.yaml")], ids=["cpu", "cuda"])
@pytest.mark.parametrize(
    ("name", "cache", "expected"),
    [("decode", "0", [NIXL]), ("decode", "1", [NIXL, OURS]), ("prefill", "0", [NIXL]), ("prefill", "1", [OURS, NIXL])],
)
def test_compose_workers(files, name, cache, expected):
    env = {"ENABLE_LMCACHE": cache, "DECODE_ENABLE_LMCACHE": cache}
    service = {key: value for file in files for key, value in load(file, env)["services"][name].items()}
    module, flags = facts.parse_command(shlex.split(service["command"]))
    assert module == "dynamo_lmcache.vllm"
    config = facts.worker_config(flags, service["environment"])
    assert config.role.value == name and facts.connectors(config) == expected
    assert (config.runtime.request_plane, config.runtime.event_plane) == ("nats", "nats")


def test_compose_frontend():
    module, flags = facts.parse_command(shlex.split(SERVICES["frontend"]["command"]))
    assert module == "dynamo_lmcache.frontend"
    assert {word for word in flags if word.startswith("--")} <= facts.frontend_flags()


@pytest.mark.parametrize("shape", SHAPES)
def test_kubernetes(shape):
    seen = 0
    for name, container in containers(shape):
        if name == "server":
            assert container["command"][0].endswith("/lmcache-ext") and container["command"][1:] == ["server"]
            flags = build_parser().parse_args(["server", *container["args"]])
            assert (flags.host, flags.port, flags.http_host) == ("127.0.0.1", 5555, "127.0.0.1")
            continue
        module, flags = facts.parse_command([*container["command"], *container["args"]])
        if name == "frontend":
            assert module == "dynamo_lmcache.frontend"
            assert {word for word in flags if word.startswith("--")} <= facts.frontend_flags()
            assert flags[flags.index("--router-mode") + 1] == ("kv" if shape == "router" else "round-robin")
            continue
        config = facts.worker_config(flags, environment(container))
        assert (config.role.value, facts.connectors(config)) == EXPECTED[shape][name]
        seen += 1
    assert seen == 2 * len(EXPECTED[shape]) + (shape == "shared")  # a pod with two, and in Dynamo's form with one
