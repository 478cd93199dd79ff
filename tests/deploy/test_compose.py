"""compose.yaml: valid by the specification, and each command, variable, port and file in it is one that there is."""

from __future__ import annotations

import re
from typing import Any

import pytest
import yaml

from tests.deploy import facts
from tests.static.rules import ROOT

PyCompose = pytest.importorskip("compose_spec", reason="needs compose-spec of requirements/dev.in").PyCompose
DEPLOY = ROOT / "deploy"


def load(name: str, env: dict[str, str] | None = None) -> dict[str, Any]:
    """A compose file after interpolation: `${NAME:-default}`, `$$`."""

    def value(match: re.Match[str]) -> str:
        if match[0] == "$$":
            return "$"
        name, _, default = match[1].partition(":-")
        return (env or {}).get(name) or default

    text = re.sub(r"\$\$|\$\{([^}]+)\}", value, (DEPLOY / name).read_text())
    data = yaml.safe_load(text)
    assert isinstance(data, dict)
    return data


BASE = load("compose.yaml")
SERVICES: dict[str, dict[str, Any]] = BASE["services"]
OURS = ["frontend", "decode", "prefill"]


@pytest.mark.parametrize("name", ["compose.yaml", "compose.cuda.yaml"])
def test_the_specification_takes_it(name):
    data = load(name)
    # Merge keys and fragments are YAML's and Compose's; what is left is what is validated.
    plain = {key: part for key, part in data.items() if not key.startswith("x-")}
    compose = PyCompose.from_yaml(yaml.dump(plain, Dumper=_NoAliases))
    if name == "compose.yaml":
        compose.validate()
    assert set(OURS) <= set(compose.service_names())


class _NoAliases(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True


def test_what_is_no_compose_file_is_noticed():
    with pytest.raises(ValueError, match="imagee"):
        PyCompose.from_yaml("services: {a: {imagee: b}}")


@pytest.mark.parametrize("name", [name for name in SERVICES if "environment" in SERVICES[name]])
def test_somebody_reads_each_variable(name):
    assert not facts.unknown_variables(SERVICES[name]["environment"])


def test_a_variable_that_nobody_reads_is_noticed():
    wrong = dict.fromkeys(("DYN_NO_SUCH", "ETCD_ENDPOINT", "LMCACHE_NO_SUCH", "VLLM_NO_SUCH"), "1")
    assert facts.unknown_variables(wrong | {"ETCD_ENDPOINTS": "1"}) == set(wrong)


def test_ports_are_published_on_loopback_and_only_where_somebody_needs_them():
    published = {name: service["ports"] for name, service in SERVICES.items() if "ports" in service}
    assert set(published) == {"frontend", "prometheus", "grafana"}
    assert all(port.startswith("127.0.0.1:") for ports in published.values() for port in ports)


@pytest.mark.parametrize("name", SERVICES)
def test_each_service_restarts_and_those_that_others_wait_for_have_a_health_check(name):
    service = SERVICES[name]
    assert service["restart"] == "unless-stopped"
    for other, condition in service.get("depends_on", {}).items():
        assert condition == {"condition": "service_healthy"} and "healthcheck" in SERVICES[other]


def test_health_checks_ask_what_listens():
    for name in OURS:
        test = SERVICES[name]["healthcheck"]["test"]
        path, url = test[-2:]
        assert (ROOT / path.removeprefix(f"{facts.INSTALLED}/")).is_file()
        port = "8000" if name == "frontend" else SERVICES[name]["environment"]["DYN_SYSTEM_PORT"]
        assert url == f"http://127.0.0.1:{port}/health"


@pytest.mark.parametrize("name", ["decode", "prefill"])
def test_workers_have_shared_memory_and_may_lock_memory(name):
    from lmcache_ext.cli.machine import SHM_MIB

    service = SERVICES[name]
    assert service["shm_size"] == "1gb" and SHM_MIB < 1024
    assert service["ulimits"] == {"memlock": {"soft": -1, "hard": -1}}
    assert service["environment"]["VLLM_NIXL_SIDE_CHANNEL_HOST"] == service["hostname"] == name  # others connect to it


def test_secrets_are_files_and_no_password_is_in_the_clear():
    assert all(set(secret) == {"file"} for secret in BASE["secrets"].values())
    for name, service in SERVICES.items():
        for variable, value in service.get("environment", {}).items():
            if re.search("PASSWORD|TOKEN|SECRET", variable):
                assert str(value).startswith("/run/secrets/"), (name, variable)
        for secret in service.get("secrets", ()):
            assert f"/run/secrets/{secret}" in str(service) and secret in BASE["secrets"]


def test_nothing_of_ours_runs_as_root():
    assert SERVICES["redis"]["user"] == "999:1000"
    for name in OURS:
        assert SERVICES[name]["cap_drop"] == ["ALL"] and SERVICES[name]["security_opt"] == ["no-new-privileges:true"]
        assert "user" not in SERVICES[name]  # the image's own


def test_what_is_mounted_is_here_and_named_volumes_are_declared():
    for service in SERVICES.values():
        for volume in service.get("volumes", ()):
            source = volume.split(":")[0]
            assert (DEPLOY / source).is_file() if source.startswith("./") else source in BASE["volumes"], volume


def test_prometheus_scrapes_the_services_that_there_are():
    config = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yaml").read_text())
    entries = [entry for job in config["scrape_configs"] for entry in job["static_configs"]]
    targets = {target for entry in entries for target in entry["targets"]}
    assert targets == {"prefill:8081", "decode:8081", "frontend:8000"}
    assert config["rule_files"] == ["/etc/prometheus/rules.yaml"]


def test_one_gpu_for_each_worker():
    services = load("compose.cuda.yaml")["services"]
    ids = [
        device["device_ids"]
        for name in ("decode", "prefill")
        for device in services[name]["deploy"]["resources"]["reservations"]["devices"]
    ]
    assert ids == [["0"], ["1"]]
