"""What the code really has, to hold deployments against: flags, variables, files."""

from __future__ import annotations

import functools
import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lmcache_ext.config import EngineConfig
from lmcache_ext.config.names import NOT_SETTINGS
from tests.static.rules import ROOT

MODULES = ("dynamo_lmcache.frontend", "dynamo_lmcache.vllm")
INSTALLED = "/opt/lmcache-ext"  # where the image has this repository
DEMO_MODEL = str(ROOT / "launch" / "demo_model")
# Read by huggingface_hub, by NVIDIA's container runtime, by Python, by Grafana, by setup.sh and make.
OTHERS = {
    "HF_TOKEN",
    "HF_TOKEN_PATH",
    "NVIDIA_VISIBLE_DEVICES",
    "NVIDIA_DRIVER_CAPABILITIES",
    "PYTHONUNBUFFERED",
    "PATH",
}


def parse_command(words: list[str]) -> tuple[str, list[str]]:
    """(module, its flags) of `… python -P -m MODULE FLAGS`, and that Python is the image's."""
    assert words[0] in ("python", f"{INSTALLED}/.venv/bin/python"), words
    assert words[1:3] == ["-P", "-m"] and words[3] in MODULES, words
    return words[3], words[4:]


@functools.cache
def frontend_flags() -> set[str]:
    """Of the installed Dynamo's frontend, which ours hands its flags to."""
    command = [sys.executable, "-m", "dynamo.frontend", "--help"]
    text = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    return set(re.findall(r"--[a-z][a-z-]+", text))


def worker_config(flags: list[str], env: Mapping[str, object]) -> Any:
    """The worker's own reading of its flags under `env`. Models of the hub stand for the demo model here."""
    from dynamo_lmcache.vllm import settings
    from dynamo_lmcache.vllm.args import parse_args

    words = [DEMO_MODEL if word in (f"{INSTALLED}/launch/demo_model", "Qwen/Qwen3-0.6B") else word for word in flags]
    before = dict(os.environ)
    for name in list(os.environ):
        if name.startswith(("DYN_", "LMCACHE_", "ENABLE_LMCACHE", "VLLM_NIXL")):
            del os.environ[name]
    os.environ.update({name: str(value) for name, value in env.items()})
    try:
        settings.apply_worker_defaults(os.environ, backend=settings.backend_from_argv(words))
        return parse_args(words)
    finally:
        os.environ.clear()
        os.environ.update(before)


def connectors(config: Any) -> list[str]:
    """Names of a worker's KV connectors."""
    entry = config.engine_args.kv_transfer_config
    children = entry.kv_connector_extra_config.get("connectors")
    return [child["kv_connector"] for child in children] if children else [entry.kv_connector]


def unknown_variables(env: Mapping[str, str]) -> set[str]:
    """Those that nobody reads."""
    return {name for name in env if not _is_read(name)}


def _is_read(name: str) -> bool:
    if name in OTHERS or name.startswith("GF_"):
        return True
    if name.startswith("LMCACHE_"):
        key = name.removeprefix("LMCACHE_").lower()
        return key in EngineConfig.model_fields or key in NOT_SETTINGS
    if name.startswith("VLLM_"):
        return name in _vllm_variables()
    # Dynamo's strings stand side by side without a gap, so the next name may begin where one ends.
    whole = re.compile(name.encode() + rb"(?![A-Z_0-9])|" + name.encode() + rb"(?=DYN_|ETCD_|NATS_)")
    return any(whole.search(text) for text in _texts())


@functools.cache
def _vllm_variables() -> set[str]:
    spec = importlib.util.find_spec("vllm")
    assert spec is not None and spec.origin is not None
    return set(re.findall(r'^    "(VLLM_[A-Z_0-9]+)"', (Path(spec.origin).parent / "envs.py").read_text(), re.M))


@functools.cache
def _texts() -> tuple[bytes, ...]:
    """Our sources and launch scripts, and Dynamo's runtime."""
    spec = importlib.util.find_spec("dynamo")
    assert spec is not None and spec.submodule_search_locations is not None
    core = Path(next(iter(spec.submodule_search_locations))) / "_core.abi3.so"
    return tuple(file.read_bytes() for file in (*_ours(), core))


def _ours() -> Iterator[Path]:
    for folder in ("backends", "components", "lmcache_ext", "launch"):
        yield from (ROOT / folder).rglob("*.py")
        yield from (ROOT / folder).rglob("*.sh")
