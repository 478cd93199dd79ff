"""One server for all tests of this folder that only talk to it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from openai import OpenAI

from tests.e2e import tiny_model
from tests.e2e.serving import BLOCK, ROOT, Server, serving

CHUNK = 2 * BLOCK


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    demo = ROOT / "launch" / "demo_model"
    if (demo / "model.safetensors").exists():
        return demo
    return tiny_model.make(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def server(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A worker with the cache on. Its chunk size comes from a YAML file, which the defaults must not override."""
    folder = tmp_path_factory.mktemp("server")
    settings = folder / "lmcache.yaml"
    settings.write_text(f"chunk_size: {CHUNK}\nmax_local_cpu_size: 0.25\n")
    with serving(folder, model, env={"ENABLE_LMCACHE": "1", "LMCACHE_CONFIG_FILE": str(settings)}) as running:
        yield running


@pytest.fixture
def client(server: Server) -> Iterator[OpenAI]:
    with server.client() as client:
        yield client
