"""Health, metrics and the control route on the worker's system port."""

from __future__ import annotations

import json

import pytest
from openai import OpenAI

from tests.e2e.conftest import CHUNK
from tests.e2e.serving import BLOCK, MODEL_NAME, Server, get

pytestmark = pytest.mark.engine


def test_health_is_ready(server: Server) -> None:
    status, text = get(f"{server.system_url}/health")
    assert status == 200
    endpoints = json.loads(text)["endpoints"]
    assert endpoints["generate"] == "ready" and endpoints["clear_kv_blocks"] == "ready"


def test_metrics_of_vllm_and_dynamo_carry_their_labels(server: Server, client: OpenAI) -> None:
    client.completions.create(model=MODEL_NAME, prompt="abc", max_tokens=1)
    _, text = get(f"{server.system_url}/metrics")
    assert "vllm:prompt_tokens_total{" in text and "dynamo_component_total_blocks{" in text
    line = next(line for line in text.splitlines() if line.startswith("vllm:prompt_tokens_total{"))
    assert 'dynamo_component="backend"' in line and f'model_name="{MODEL_NAME}"' in line
    assert server.metric("dynamo_component_total_blocks") > 0


def test_what_vllm_forgets_the_cache_gives_back(server: Server, client: OpenAI) -> None:
    prompt = "Sphinx of black quartz, judge my vow. " * 10

    def ask() -> tuple[int, int, str]:
        answer = client.completions.create(model=MODEL_NAME, prompt=prompt, max_tokens=8, temperature=0)
        assert answer.usage is not None and answer.usage.prompt_tokens_details is not None
        cached = answer.usage.prompt_tokens_details.cached_tokens or 0
        return answer.usage.prompt_tokens, cached, answer.choices[0].text

    length, cached, cold = ask()
    assert cached == 0
    assert ask()[1] == (length - 1) // BLOCK * BLOCK  # vLLM's own prefix cache
    server.clear_gpu_cache()
    hits = server.metric("lmcache:num_hit_tokens_total")
    _, cached, warm = ask()
    full = (length - 1) // CHUNK * CHUNK
    # Whole chunks, or also the blocks of the last, partial one.
    assert full <= cached < length and cached % BLOCK == 0
    assert server.metric("lmcache:num_hit_tokens_total") - hits >= full
    assert warm == cold
