"""Writes the deployments of this folder: four shapes, each as plain Deployments and in Dynamo's own form.

    python deploy/kubernetes/generate.py

`agg.yaml`, `router.yaml`, `disagg.yaml` and `shared.yaml` are for any cluster, with common.yaml and discovery.yaml;
`dynamo/` is for one with Dynamo's operator. Edit the constants below, or what comes out.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).parent
IMAGE = "lmcache-ext:cuda"
MODEL = "Qwen/Qwen3-0.6B"
MEMORY = "40Gi"  # the pool (20 GB, common.yaml), vLLM, and what it loads
SERVER_GB, SERVER_MEMORY, SERVER_PORT = "20", "24Gi", 5555  # of a shared cache server, and of its workers:
JOINED_MEMORY = "20Gi"
SYSTEM_PORT = 8081
ROOT = "/opt/lmcache-ext"
PYTHON = [f"{ROOT}/.venv/bin/python", "-P", "-m"]
PART_OF = {"app.kubernetes.io/part-of": "lmcache-ext"}

Yaml = dict[str, Any]

# As the launch scripts have it: a KV hit in host memory is worth nearly one on the GPU.
HOST_HITS: dict[str, list[str]] = {
    "kv": ["--router-host-cache-hit-weight", "0.95", "--router-prefill-load-scale", "2"],
    "round-robin": [],
}
# shape → (the frontend's router mode, worker → (flags, cache, replicas))
SHAPES: dict[str, tuple[str, dict[str, tuple[list[str], bool, int]]]] = {
    "agg": ("round-robin", {"worker": ([], True, 1)}),
    "router": ("kv", {"worker": ([], True, 2)}),
    "disagg": (
        "round-robin",
        {"decode": (["--is-decode-worker"], False, 1), "prefill": (["--is-prefill-worker"], True, 1)},
    ),
    "shared": ("round-robin", {}),  # its workers share a pod, below
}
SUB_TYPES = {"decode": "decode", "prefill": "prefill"}
# A shared cache server and its workers: containers of one pod, which must see each other's processes to map its memory.
# The cache outlives each of them but itself. In Dynamo's form a pod has one worker, whose restarts it outlives.
SHARED, SHARED_WORKERS = "shared", 2
_JOIN = {"lmcache.mp.host": "tcp://127.0.0.1", "lmcache.mp.port": SERVER_PORT}
JOIN_FLAGS = [
    "--kv-transfer-config",
    json.dumps(
        {"kv_connector": "LMCacheMPConnector", "kv_role": "kv_both", "kv_connector_extra_config": _JOIN}, sort_keys=True
    ),
]


def env(**values: str) -> list[Yaml]:
    """A container's variables."""
    return [{"name": name, "value": value} for name, value in values.items()]


def pod_ip(name: str) -> Yaml:
    """A variable with the pod's own address."""
    return {"name": name, "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}}


def worker_env(cache: bool) -> list[Yaml]:
    """VLLM_HOST_IP: of the processes of one engine, which are all in one pod. NIXL's handshakes come from others."""
    return [
        *env(ENABLE_LMCACHE="1" if cache else "0", LMCACHE_CONFIG_FILE="/etc/lmcache/lmcache.yaml"),
        *env(VLLM_HOST_IP="127.0.0.1", DYN_HEALTH_CHECK_ENABLED="true"),
        pod_ip("VLLM_NIXL_SIDE_CHANNEL_HOST"),
    ]


def probe(path: str, port: str, period: int, failures: int, timeout: int = 5) -> Yaml:
    """An HTTP probe."""
    return {
        "httpGet": {"path": path, "port": port},
        "periodSeconds": period,
        "timeoutSeconds": timeout,
        "failureThreshold": failures,
    }


# Locked memory: Kubernetes sets no limit, containerd's unit has LimitMEMLOCK=infinity, and CUDA pins past it. Only RDMA
# needs it: `kubectl exec POD -- lmcache-ext doctor` says what a pod has.
CONTAINER_SECURITY: Yaml = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
POD_SECURITY: Yaml = {
    "runAsNonRoot": True,
    "runAsUser": 10001,
    "fsGroup": 10001,
    "seccompProfile": {"type": "RuntimeDefault"},
}


def frontend(router: str) -> Yaml:
    """The frontend's container."""
    return {
        "name": "frontend",
        "image": IMAGE,
        "command": [*PYTHON, "dynamo_lmcache.frontend"],
        "args": ["--http-host", "0.0.0.0", "--http-port", "8000", "--router-mode", router, *HOST_HITS[router]],
        "envFrom": [{"configMapRef": {"name": "lmcache-ext-network"}}],
        "ports": [{"name": "http", "containerPort": 8000}],
        "startupProbe": probe("/live", "http", 5, 60),
        "readinessProbe": probe("/health", "http", 10, 3),
        "livenessProbe": probe("/live", "http", 10, 3),
        "resources": {"requests": {"cpu": "1", "memory": "1Gi"}, "limits": {"memory": "4Gi"}},
        "securityContext": CONTAINER_SECURITY,
    }


def worker(flags: list[str], cache: bool, number: int = 0, memory: str = MEMORY) -> Yaml:
    """A pod's worker. /health generates a token; a large model takes minutes to load (here up to 30)."""
    system, port = ("system", SYSTEM_PORT) if not number else (f"system-{number}", SYSTEM_PORT + number)
    return {
        "name": f"worker-{number}" if number else "worker",
        "image": IMAGE,
        "command": [*PYTHON, "dynamo_lmcache.vllm"],
        "args": ["--model", MODEL, *flags],
        "envFrom": [{"configMapRef": {"name": "lmcache-ext-network"}}],
        "env": [
            *env(DYN_SYSTEM_PORT=str(port), DYN_SYSTEM_HOST="0.0.0.0"),
            *worker_env(cache),
            {
                "name": "HF_TOKEN",
                "valueFrom": {"secretKeyRef": {"name": "hf-token", "key": "HF_TOKEN", "optional": True}},
            },
        ],
        "ports": [{"name": system, "containerPort": port}],
        "startupProbe": probe("/health", system, 10, 180),
        "readinessProbe": probe("/health", system, 10, 3),
        "livenessProbe": probe("/live", system, 10, 6),
        "resources": {
            "requests": {"cpu": "4", "memory": memory},
            "limits": {"memory": memory, "nvidia.com/gpu": "1"},
        },
        "securityContext": CONTAINER_SECURITY,
        "volumeMounts": [
            {"name": "shm", "mountPath": "/dev/shm"},
            {"name": "cache-settings", "mountPath": "/etc/lmcache", "readOnly": True},
            {"name": "models", "mountPath": "/home/lmcache/.cache"},
        ],
    }


WORKER_VOLUMES: list[Yaml] = [
    {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": "1Gi"}},  # counts as the container's memory
    {"name": "cache-settings", "configMap": {"name": "lmcache-ext-cache"}},
    {"name": "models", "emptyDir": {}},
]


def server() -> Yaml:
    """The shared cache server's container. It takes its memory at once, so that it is its own and not a worker's."""
    health = ["python", "-I", "-S", f"{ROOT}/deploy/docker/health.py", "http://127.0.0.1:8080/healthcheck"]
    return {
        "name": "server",
        "image": IMAGE,
        "command": [f"{ROOT}/.venv/bin/lmcache-ext", "server"],
        "args": [
            *("--host", "127.0.0.1", "--port", str(SERVER_PORT), "--http-host", "127.0.0.1", "--http-port", "8080"),
            *("--l1-size-gb", SERVER_GB, "--no-l1-use-lazy", "--eviction-policy", "LRU", "--chunk-size", "256"),
        ],
        "livenessProbe": {"exec": {"command": health}, "periodSeconds": 10, "timeoutSeconds": 5, "failureThreshold": 6},
        "resources": {"requests": {"cpu": "1", "memory": SERVER_MEMORY}, "limits": {"memory": SERVER_MEMORY}},
        "securityContext": CONTAINER_SECURITY,
    }


def deployment(
    name: str, component: str, containers: list[Yaml], replicas: int, volumes: list[Yaml], **spec: Any
) -> Yaml:
    """One Deployment. No surge: a new pod would wait for the GPU of the one that it replaces. `spec`: of its pods."""
    labels = {"app": name, **PART_OF, "app.kubernetes.io/component": component}
    pod = {
        "serviceAccountName": "lmcache-ext",
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "terminationGracePeriodSeconds": 60,  # requests under way get 30 s
        "securityContext": POD_SECURITY,
        **spec,
        "containers": containers,
        **({"volumes": volumes} if volumes else {}),
    }
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": name, "labels": labels},
        "spec": {
            "replicas": replicas,
            "strategy": {"type": "RollingUpdate", "rollingUpdate": {"maxSurge": 0, "maxUnavailable": 1}},
            "selector": {"matchLabels": {"app": name}},
            "template": {"metadata": {"labels": labels}, "spec": pod},
        },
    }


def service() -> Yaml:
    """The OpenAI API inside the cluster."""
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": "frontend", "labels": PART_OF},
        "spec": {"selector": {"app": "frontend"}, "ports": [{"name": "http", "port": 8000, "targetPort": "http"}]},
    }


def plain(shape: str) -> list[Yaml]:
    """Deployments and the frontend's Service."""
    router, workers = SHAPES[shape]
    made = [service(), deployment("frontend", "frontend", [frontend(router)], 1, [])]
    for name, (flags, cache, replicas) in workers.items():
        made.append(deployment(name, "worker", [worker(flags, cache)], replicas, WORKER_VOLUMES))
    if shape == SHARED:
        joined = [worker(JOIN_FLAGS, False, number, JOINED_MEMORY) for number in range(SHARED_WORKERS)]
        pod = [server(), *joined]
        made.append(deployment(shape, "worker", pod, 1, WORKER_VOLUMES, shareProcessNamespace=True))
    return made


def graph(shape: str) -> Yaml:
    """Dynamo's own form. Its operator adds discovery, ports, probes, the system port (9090) and /dev/shm."""
    router, workers = SHAPES[shape]
    args = ["--http-host", "0.0.0.0", "--http-port", "8000", "--router-mode", router, *HOST_HITS[router]]
    front = {"image": IMAGE, "command": [*PYTHON, "dynamo_lmcache.frontend"], "args": args}
    services: Yaml = {
        "Frontend": {"componentType": "frontend", "replicas": 1, "extraPodSpec": {"mainContainer": front}}
    }
    for name, (flags, cache, replicas) in workers.items():
        services[f"Vllm{name.capitalize()}"] = _graph_worker(name, flags, cache, replicas)
    if shape == SHARED:
        services["VllmShared"] = _graph_worker(shape, JOIN_FLAGS, False, 1, JOINED_MEMORY)
        pod = services["VllmShared"]["extraPodSpec"]
        services["VllmShared"]["extraPodSpec"] = {"shareProcessNamespace": True, "containers": [server()], **pod}
    return {
        "apiVersion": "nvidia.com/v1alpha1",
        "kind": "DynamoGraphDeployment",
        "metadata": {"name": f"lmcache-ext-{shape}"},
        "spec": {"backendFramework": "vllm", "services": services},
    }


def _graph_worker(name: str, flags: list[str], cache: bool, replicas: int, memory: str = MEMORY) -> Yaml:
    sub_type = {"subComponentType": SUB_TYPES[name]} if name in SUB_TYPES else {}
    main = {
        "image": IMAGE,
        "command": [*PYTHON, "dynamo_lmcache.vllm"],
        "args": ["--model", MODEL, *flags],
        "env": [*env(DYN_SYSTEM_HOST="0.0.0.0"), *worker_env(cache)],
        "volumeMounts": [{"name": "cache-settings", "mountPath": "/etc/lmcache", "readOnly": True}],
    }
    return {
        "componentType": "worker",
        **sub_type,
        "replicas": replicas,
        "envFromSecret": "hf-token",
        "sharedMemory": {"size": "1Gi"},
        "resources": {"requests": {"cpu": "4", "memory": memory}, "limits": {"memory": memory, "gpu": "1"}},
        "extraPodSpec": {
            "volumes": [{"name": "cache-settings", "configMap": {"name": "lmcache-ext-cache"}}],
            "mainContainer": main,
        },
    }


class _Plain(yaml.SafeDumper):
    """No anchors: a reader may change one place without the others."""

    def ignore_aliases(self, data: Any) -> bool:
        """Write everything out."""
        return True


def files() -> dict[Path, str]:
    """Each file and what it should hold."""
    made = {HERE / f"{shape}.yaml": plain(shape) for shape in SHAPES}
    made |= {HERE / "dynamo" / f"{shape}.yaml": [graph(shape)] for shape in SHAPES}
    head = "# Written by deploy/kubernetes/generate.py.\n"
    return {
        path: head + yaml.dump_all(documents, Dumper=_Plain, sort_keys=False, width=110)
        for path, documents in made.items()
    }


if __name__ == "__main__":
    for path, text in files().items():
        path.write_text(text)
