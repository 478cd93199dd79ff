"""Manifests: valid by Kubernetes' own schemas and by what Dynamo's CRD has, and they name only what there is."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from lmcache_ext.config import load_config
from tests.deploy import facts
from tests.static.rules import ROOT

needed = "needs kubernetes-validate of requirements/dev.in"
kubernetes_validate = pytest.importorskip("kubernetes_validate", reason=needed)
FOLDER = ROOT / "deploy" / "kubernetes"
VERSIONS = ("1.30", "1.37")  # the oldest and the newest that are checked
PLAIN = {path.stem: list(yaml.safe_load_all(path.read_text())) for path in sorted(FOLDER.glob("*.yaml"))}
GRAPHS = {path.stem: yaml.safe_load(path.read_text()) for path in sorted((FOLDER / "dynamo").glob("*.yaml"))}
SHAPES = ("agg", "router", "disagg", "shared")
CACHE_FILE = "/etc/lmcache/lmcache.yaml"

TEXTS = {"type": "object", "additionalProperties": {"type": "string"}}
AMOUNTS = {  # quantities are strings there, a GPU count too
    "type": "object",
    "additionalProperties": False,
    "properties": {**{name: {"type": "string"} for name in ("cpu", "memory", "gpu", "gpuType")}, "custom": TEXTS},
}
# What of nvidia.com/v1alpha1 is used: names, types and enums of Dynamo's operator, deploy/operator/api/v1alpha1.
SERVICE_SCHEMA = {
    "type": "object",
    "required": ["componentType", "extraPodSpec"],
    "additionalProperties": False,
    "properties": {
        "componentType": {"enum": ["frontend", "worker"]},
        "subComponentType": {"enum": ["prefill", "decode"]},
        "replicas": {"type": "integer", "minimum": 0},
        "envFromSecret": {"type": "string"},
        "sharedMemory": {
            "type": "object",
            "additionalProperties": False,
            "properties": {"disabled": {"type": "boolean"}, "size": {"type": "string"}},
        },
        "resources": {
            "type": "object",
            "additionalProperties": False,
            "properties": {"requests": AMOUNTS, "limits": AMOUNTS},
        },
        "extraPodSpec": {"type": "object", "required": ["mainContainer"]},
    },
}
GRAPH_SCHEMA = {
    "type": "object",
    "required": ["apiVersion", "kind", "metadata", "spec"],
    "additionalProperties": False,
    "properties": {
        "apiVersion": {"const": "nvidia.com/v1alpha1"},
        "kind": {"const": "DynamoGraphDeployment"},
        "metadata": {"type": "object", "required": ["name"]},
        "spec": {
            "type": "object",
            "additionalProperties": False,
            "properties": {
                "backendFramework": {"enum": ["sglang", "vllm", "trtllm"]},
                "services": {"type": "object", "maxProperties": 25, "additionalProperties": SERVICE_SCHEMA},
            },
        },
    },
}


def containers(shape: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """(name, container) of frontend, workers and server, plain and in Dynamo's form."""
    for document in PLAIN[shape]:
        if document["kind"] == "Deployment":
            for container in document["spec"]["template"]["spec"]["containers"]:
                name = "server" if container["name"] == "server" else document["metadata"]["name"]
                yield name, container
    for name, service in GRAPHS[shape]["spec"]["services"].items():
        yield name.lower().removeprefix("vllm"), service["extraPodSpec"]["mainContainer"]
        for container in service["extraPodSpec"].get("containers", ()):
            yield container["name"], container


def environment(container: dict[str, Any]) -> dict[str, str]:
    """A container's variables, those of the ConfigMap included."""
    shared = {}
    if container.get("envFrom"):
        assert container["envFrom"] == [{"configMapRef": {"name": "lmcache-ext-network"}}]
        shared = config_map("lmcache-ext-network")
    return shared | {entry["name"]: entry.get("value", "") for entry in container.get("env", ())}


def config_map(name: str) -> dict[str, str]:
    (found,) = [d for d in PLAIN["common"] if d["kind"] == "ConfigMap" and d["metadata"]["name"] == name]
    return found["data"]


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("name", PLAIN)
def test_kubernetes_schemas_take_every_manifest(name, version):
    for document in PLAIN[name]:
        kubernetes_validate.validate(document, version, strict=True)


def test_a_field_that_does_not_exist_is_noticed():
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate({**PLAIN["common"][0], "dataa": {}}, VERSIONS[-1], strict=True)


@pytest.mark.parametrize("name", SHAPES)
def test_dynamos_form_has_the_fields_of_its_crd(name):
    graph = GRAPHS[name]
    jsonschema.validate(graph, GRAPH_SCHEMA)
    for service in graph["spec"]["services"].values():
        extra = dict(service["extraPodSpec"])
        main = {"name": "main", **extra.pop("mainContainer")}  # the operator names it
        spec = {**extra, "containers": [main, *extra.get("containers", ())]}
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}, "spec": spec}
        kubernetes_validate.validate(pod, VERSIONS[-1], strict=True)


def test_the_files_are_what_their_script_writes():
    spec = importlib.util.spec_from_file_location("generate_kubernetes", FOLDER / "generate.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert {path.stem for path in module.files()} == set(SHAPES)
    for path, text in module.files().items():
        assert Path(path).read_text() == text, "run: python deploy/kubernetes/generate.py"


@pytest.mark.parametrize("shape", SHAPES)
def test_somebody_reads_each_variable(shape):
    for _, container in containers(shape):
        assert not facts.unknown_variables(environment(container))


def test_the_caches_settings_are_taken_without_a_warning(tmp_path, caplog):
    path = tmp_path / "lmcache.yaml"
    path.write_text(config_map("lmcache-ext-cache")[Path(CACHE_FILE).name])
    logging.getLogger("lmcache_ext").propagate = True
    with caplog.at_level(logging.WARNING):
        assert load_config({}, {"LMCACHE_CONFIG_FILE": str(path)}).max_local_cpu_size == 20
    assert not caplog.records


@pytest.mark.parametrize("shape", SHAPES)
def test_workers_mount_their_settings_and_shared_memory_and_the_pool_fits(shape):
    for document in PLAIN[shape]:
        if document["kind"] != "Deployment" or document["metadata"]["name"] == "frontend":
            continue
        pod = document["spec"]["template"]["spec"]
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        for container in pod["containers"]:
            memory = int(container["resources"]["limits"]["memory"].removesuffix("Gi"))
            if container["name"] == "server":
                flags = container["args"]
                assert memory >= int(flags[flags.index("--l1-size-gb") + 1]) + 2
                assert "--no-l1-use-lazy" in flags, "else whoever touches a page first pays for it"
                continue
            mounts = {mount["mountPath"]: volumes[mount["name"]] for mount in container["volumeMounts"]}
            assert mounts["/dev/shm"]["emptyDir"] == {"medium": "Memory", "sizeLimit": "1Gi"}
            assert mounts["/etc/lmcache"]["configMap"]["name"] == "lmcache-ext-cache"
            assert environment(container)["LMCACHE_CONFIG_FILE"] == CACHE_FILE
            assert memory >= 1 + 8 + (0 if shape == "shared" else 20)


def test_a_shared_server_and_its_workers_see_each_other_and_have_ports_of_their_own():
    (document,) = [d for d in PLAIN["shared"] if d["kind"] == "Deployment" and d["metadata"]["name"] == "shared"]
    pod = document["spec"]["template"]["spec"]
    graph = GRAPHS["shared"]["spec"]["services"]["VllmShared"]["extraPodSpec"]
    assert pod["shareProcessNamespace"] and graph["shareProcessNamespace"]
    names = [container["name"] for container in pod["containers"]]
    assert names == ["server", "worker", "worker-1"]
    ports = [environment(container)["DYN_SYSTEM_PORT"] for container in pod["containers"][1:]]
    assert ports == ["8081", "8082"]


@pytest.mark.parametrize("shape", SHAPES)
def test_pods_have_no_rights_and_no_secret_in_the_clear(shape):
    for document in PLAIN[shape]:
        if document["kind"] != "Deployment":
            continue
        pod = document["spec"]["template"]["spec"]
        assert pod["securityContext"]["runAsNonRoot"] and pod["securityContext"]["runAsUser"] == 10001
        assert pod["automountServiceAccountToken"] is False
        assert pod["enableServiceLinks"] is False  # a service called nats would set NATS_PORT
        for container in pod["containers"]:
            security = container["securityContext"]
            assert security == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
    for _, container in containers(shape):
        for entry in container.get("env", ()):
            assert "TOKEN" not in entry["name"] or "secretKeyRef" in entry["valueFrom"]


def test_probes_ask_ports_that_there_are_and_services_find_their_pods():
    for name in ("discovery", *SHAPES):
        pods = {}
        for document in PLAIN[name]:
            if document["kind"] in ("Deployment", "StatefulSet"):
                template = document["spec"]["template"]
                containers = template["spec"]["containers"]
                listed = [port["name"] for container in containers for port in container.get("ports", ())]
                pods[template["metadata"]["labels"]["app"]] = ports = set(listed)
                assert len(listed) == len(ports)
                assert document["spec"]["selector"]["matchLabels"].items() <= template["metadata"]["labels"].items()
                for container in containers:
                    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
                        if "httpGet" in container.get(probe, {}):
                            assert container[probe]["httpGet"]["port"] in ports
        for document in PLAIN[name]:
            if document["kind"] == "Service":
                assert document["spec"]["selector"]["app"] in pods


def test_policies_select_the_pods_that_there_are_and_let_in_what_they_need():
    labels = [
        document["spec"]["template"]["metadata"]["labels"]
        for name in ("discovery", *SHAPES)
        for document in PLAIN[name]
        if document["kind"] in ("Deployment", "StatefulSet")
    ]
    policies = {d["metadata"]["name"]: d["spec"] for d in PLAIN["common"] if d["kind"] == "NetworkPolicy"}
    reached = {name: [pod for pod in labels if selects(spec["podSelector"], pod)] for name, spec in policies.items()}
    assert len(reached["lmcache-ext-deny"]) == len(labels)
    assert {pod["app"] for pod in reached["lmcache-ext-api"]} == {"frontend"}
    assert {pod["app"] for pod in reached["lmcache-ext-discovery"]} == {"etcd", "nats"}
    among = {"frontend", "worker", "prefill", "decode", "shared"}
    assert {pod["app"] for pod in reached["lmcache-ext-among"]} == among
    assert {pod["app"] for pod in reached["lmcache-ext-metrics"]} == among
    (rule,) = policies["lmcache-ext-discovery"]["ingress"]
    assert {pod["app"] for pod in labels if selects(rule["from"][0]["podSelector"], pod)} == among
    network = config_map("lmcache-ext-network")
    ports = {int(network[name].rsplit(":", 1)[1]) for name in ("ETCD_ENDPOINTS", "NATS_SERVER")}
    assert {entry["port"] for entry in rule["ports"]} == ports


def selects(selector: dict[str, Any], labels: dict[str, str]) -> bool:
    """Kubernetes' meaning of a label selector, as far as it is used here."""
    if not selector.get("matchLabels", {}).items() <= labels.items():
        return False
    terms = selector.get("matchExpressions", ())
    assert all(term["operator"] == "In" for term in terms)
    return all(labels.get(term["key"]) in term["values"] for term in terms)
