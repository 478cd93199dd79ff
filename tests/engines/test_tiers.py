"""Each tier as the only holder of a prefix, on a real vLLM, with the engine restarted in between.

A first engine answers and stores, into two tiers at once. Then comes a new one for each tier, which reads that one
only: its GPU and its host memory hold nothing. Answers must be as right as before, and come from the tier. CI runs the
disk and Redis; `ENGINE_TIERS=all` runs the others, too.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.engines import engines
from tests.engines.engines import counter
from tests.engines.test_recall import CONTEXTS, TOKENS, questions, share, warm_up
from tests.tiers import mooncake_server, redis_servers, s3_server

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]
PAIRS = [("disk", "redis"), ("fs", "s3"), ("nixl", "mooncake")]
RECALL = 0.95


@pytest.fixture
def urls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """How to reach a tier of each kind; those with a server start it when asked."""
    running: list[Any] = []

    def redis() -> str:
        running.append(redis_servers.Server(tmp_path / "redis"))
        return f"redis://127.0.0.1:{running[-1].port}"

    def s3() -> str:
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", s3_server.USER)
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", s3_server.PASSWORD)
        return f"s3://{s3_server.BUCKET}/kv?endpoint={s3_server.common().endpoint}&path_style=1&region=us-east-1"

    def mooncake() -> str:
        if missing := mooncake_server.missing():
            pytest.skip(missing)
        master = mooncake_server.Master()
        running.append(master)
        running.append(mooncake_server.Peer(master.settings(512)))  # holds what the engine leaves behind
        return f"mooncakestore://127.0.0.1:{master.port}?global_segment_size=0&local_hostname=127.0.0.1"

    yield {
        "disk": lambda: f"file://{tmp_path}/disk/",
        "fs": lambda: f"fs://{tmp_path}/fs/",
        "nixl": lambda: f"nixl://posix{tmp_path}/nixl/",
        "redis": redis, "s3": s3, "mooncake": mooncake,
    }  # fmt: skip
    for each in reversed(running):
        (each.stop if isinstance(each, redis_servers.Server) else each.kill)()


@pytest.mark.parametrize(("near", "far"), PAIRS if os.environ.get("ENGINE_TIERS") == "all" else PAIRS[:1])
def test_a_restarted_engine_recalls_from_each_tier(near: str, far: str, urls: dict[str, Any]) -> None:
    extra = {
        "lmcache.local_disk": urls[near](), "lmcache.max_local_disk_size": 1, "lmcache.remote_url": urls[far](),
        "lmcache.lookup_timeout_ms": 5000, "lmcache.skip_slow_tiers": False,
    }  # fmt: skip
    asked = questions(11)
    with engines.llm(engines.transfer_config(**extra), num_gpu_blocks_override=65, max_num_seqs=8) as engine:
        cold = share(engine, asked)
        warm_up(engine, asked)
    for kind, name in (("disk", "LocalDiskBackend"), ("remote", "RemoteBackend")):
        only = {"lmcache.retrieve_locations": name, "lmcache.store_location": "LocalCPUBackend"}
        connector = engines.transfer_config(**extra, **only)
        with engines.llm(connector, num_gpu_blocks_override=65, max_num_seqs=8) as engine:
            before = counter(f"lmcache:{kind}_hit_tokens")
            warm = share(engine, asked)
            hits = counter(f"lmcache:{kind}_hit_tokens") - before
        source = near if kind == "disk" else far
        print(f"recall of {len(asked)}: cold {cold:.3f}, from {source} {warm:.3f}; {hits:.0f} tokens came from it")
        assert cold >= RECALL and abs(cold - warm) <= 0.02
        assert hits >= CONTEXTS * TOKENS
