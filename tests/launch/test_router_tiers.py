"""Dynamo's KV router and what is not in a worker's own memory: a request goes to the worker whose disk holds its
prefix, or that has stored it in a shared cache server."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from tests.launch.routing import BLOCKS, TOKENS, prompt
from tests.launch.script import START_S, STOP_S, serving
from tests.launch.test_router import CHUNKS, EVICTED, POOL_GB, Deployment
from tests.server.helpers import Server

pytestmark = [pytest.mark.engine, pytest.mark.timeout(START_S + STOP_S + 120)]

CHUNKS_OF = TOKENS // 64  # in a prompt
DISK_GB, ON_DISK = "0.013", 240  # chunks, no more


def test_the_router_knows_what_disks_hold(tmp_path: Path) -> None:
    env = {
        "LMCACHE_CHUNK_SIZE": "64", "LMCACHE_MAX_LOCAL_CPU_SIZE": POOL_GB, "LMCACHE_MAX_LOCAL_DISK_SIZE": DISK_GB,
        "LMCACHE_LOCAL_DISK": f"file://{tmp_path}/kv/", "LMCACHE_LOOKUP_TIMEOUT_MS": "5000",
        "LMCACHE_SKIP_SLOW_TIERS": "False",
    }  # fmt: skip
    with serving(tmp_path, "agg_router.sh", "--no-warmup", "--enforce-eager", **env) as script:
        both = Deployment(script)
        texts = [prompt(seed) for seed in range(6)]
        homes = [both.frontend.ask(text).worker for text in texts]
        assert len(set(homes)) == 2, "both workers should hold something"
        both.clear()
        both.told(set(homes), CHUNKS // CHUNKS_OF + 1)  # other prompts push them out of host memory
        assert both.total(EVICTED) >= 6 * CHUNKS_OF
        again = [both.frontend.ask(text) for text in texts]
        assert [(answer.worker, answer.cached) for answer in again] == [(home, TOKENS) for home in homes]
        assert both.frontend.seen()[-6:] == [0] * 6, "host memory holds none of them"
        assert both.frontend.seen("disk_blocks")[-6:] == [BLOCKS] * 6
        assert both.total("lmcache:disk_hit_tokens_total") == 6 * TOKENS

        both.clear()
        both.told(set(homes), ON_DISK // CHUNKS_OF)  # and out of the disks
        assert [both.frontend.ask(text).cached for text in texts] == [0] * 6
        assert both.frontend.seen("disk_blocks")[-6:] == both.frontend.seen()[-6:] == [0] * 6


@pytest.mark.skipif(not os.environ.get("ROUTER_SERVER"), reason="takes 80 s; ROUTER_SERVER=1 runs it")
def test_the_router_knows_what_a_shared_server_holds(tmp_path: Path) -> None:
    """In CI the events alone are looked at: tests/integration/test_shared_server.py."""
    with Server(tmp_path, "--chunk-size", "64") as server:
        extra = {"lmcache.mp.host": "tcp://127.0.0.1", "lmcache.mp.port": server.port}
        connector = {"kv_connector": "LMCacheMPConnector", "kv_role": "kv_both", "kv_connector_extra_config": extra}
        flags = ("--no-warmup", "--enforce-eager", "--kv-transfer-config", json.dumps(connector))
        with serving(tmp_path, "agg_router.sh", *flags, ENABLE_LMCACHE="0") as script:
            both = Deployment(script)
            texts = [prompt(seed) for seed in range(6)]
            homes = [both.frontend.ask(text).worker for text in texts]
            assert len(set(homes)) == 2, "both workers should hold something"
            both.clear()
            both.told(set(homes))
            again = [both.frontend.ask(text) for text in texts]
            assert [(answer.worker, answer.cached) for answer in again] == [(home, TOKENS) for home in homes]
            assert both.frontend.seen()[-6:] == [BLOCKS] * 6
            server.ask("POST", "/cache/clear")
            both.clear()
            both.told(set(homes), 2)
            assert [both.frontend.ask(text).cached for text in texts] == [0] * 6
            assert both.frontend.seen()[-6:] == [0] * 6
