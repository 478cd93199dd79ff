"""Time to first token on a CPU machine: cold, vLLM's own prefix-cache hit, and warm through us, side by side.

    python benchmarks/ttft.py [--pairs 6] [--out benchmarks/results/ttft_cpu.md]

Three engines live at once and take turns, so that every pair of figures was measured within seconds of each other:
`plain` (no connector, prefix caching off), `prefix` (no connector, prefix caching on) and `ours` (our connector, prefix
caching off). Same random model of 181M parameters, same block size, same KV layout, both cores in all of them
(`VLLM_CPU_OMP_THREADS_BIND=0-1`: left alone, vLLM takes another number of threads with a connector than without).

The second prompt of a pair is the first and one more block, so that it ends in the middle of a chunk; its cold time is
not measured, because the caches hold its beginning.

A hit of vLLM's own prefix cache moves no byte; ours copies the prefix. What that must cost at least is bytes / memory
speed, which is measured in every pair, too: both cores copying, between two arrays that no cache holds.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))
from report import say

MODEL = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 1024, "intermediate_size": 2816,
    "num_hidden_layers": 16, "num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 64, "vocab_size": 2048,
    "max_position_embeddings": 16384, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "torch_dtype": "float32",
    "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu", "tie_word_embeddings": False,
}  # fmt: skip
BLOCK = 128
LENGTH = 5889
ENGINES: dict[str, dict[str, Any]] = {
    "plain": {"enable_prefix_caching": False},
    "prefix": {"enable_prefix_caching": True},
    "ours": {
        "enable_prefix_caching": False,
        "kv_transfer_config": {
            "kv_connector": "LMCacheConnectorV1",
            "kv_role": "kv_both",
            "kv_connector_module_path": "lmcache_ext.integration.vllm",
        },
    },
}
_SERVER = {"lmcache.mp.host": "127.0.0.1", "lmcache.mp.port": int(os.environ.get("TTFT_PORT", "0"))}
OTHERS: dict[str, dict[str, Any]] = {  # other benchmarks' systems
    "joined": {
        "enable_prefix_caching": False,
        "kv_transfer_config": {
            "kv_connector": "LMCacheMPConnector",
            "kv_role": "kv_both",
            "kv_connector_module_path": "lmcache_ext.integration.vllm",
            "kv_connector_extra_config": _SERVER,
        },
    },
    "upstream": {  # vLLM's own class of that name
        "enable_prefix_caching": False,
        "kv_transfer_config": {
            "kv_connector": "LMCacheMPConnector",
            "kv_role": "kv_both",
            "kv_connector_extra_config": {**_SERVER, "lmcache.mp.mq_timeout": 20},
        },
    },
}
COLUMNS = (
    "cold plain", "cold ours", "prefix hit", "warm ours", "prefix hit and copy", "prefix hit +1 block",
    "warm ours +1 block", "prefix hit and copy +1 block",
)  # fmt: skip
RATIOS = (
    ("warm ours", "prefix hit", "at most 1.10"),
    ("warm ours +1 block", "prefix hit +1 block", "at most 1.10"),
    ("warm ours", "prefix hit and copy", "the limit is 1"),
    ("warm ours +1 block", "prefix hit and copy +1 block", "the limit is 1"),
    ("cold ours", "cold plain", "at most 1.03"),
)
REPEATS = 3
SETTLE_S = 1.5  # vLLM's processes look for work all the time for a second after a request, at the next engine's cost


def serve(name: str, model: str) -> None:
    """Child: one engine; a line of JSON token ids in, a line with seconds and cached tokens out."""
    from vllm import LLM, SamplingParams
    from vllm.config import KVTransferConfig

    options = dict({**ENGINES, **OTHERS}[name])
    if "kv_transfer_config" in options:
        options["kv_transfer_config"] = KVTransferConfig(**options["kv_transfer_config"])
    llm = LLM(
        model=model, load_format="dummy", skip_tokenizer_init=True, dtype=os.environ["TTFT_DTYPE"],
        max_model_len=8192, seed=0,
        block_size=BLOCK, max_num_batched_tokens=2048, enforce_eager=True, disable_log_stats=True, **options,
    )  # fmt: skip
    one = SamplingParams(temperature=0, max_tokens=1, detokenize=False)
    out = os.fdopen(int(os.environ["TTFT_FD"]), "w")
    out.write("ready\n")
    out.flush()
    for line in sys.stdin:
        ids = json.loads(line)
        began = time.perf_counter()
        answer = llm.generate([{"prompt_token_ids": ids}], one, use_tqdm=False)[0]
        out.write(json.dumps([time.perf_counter() - began, answer.num_cached_tokens or 0]) + "\n")
        out.flush()


class Child:
    """An engine in a process of its own."""

    def __init__(self, name: str, model: str, dtype: str, more: dict[str, str] | None = None) -> None:
        read, write = os.pipe()
        env = {
            **os.environ, "TTFT_FD": str(write), "VLLM_CPU_OMP_THREADS_BIND": "0-1", "VLLM_CPU_KVCACHE_SPACE": "1",
            "HF_HUB_OFFLINE": "1", "LMCACHE_MAX_LOCAL_CPU_SIZE": "3", "TTFT_DTYPE": dtype,
            "VLLM_LOGGING_LEVEL": "WARNING", **(more or {}),
        }  # fmt: skip
        command = [sys.executable, __file__, "--child", name, "--model", model]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            pass_fds=[write], env=env, text=True,
        )  # fmt: skip
        os.close(write)
        self._answers = os.fdopen(read)

    def wait(self) -> None:
        """Until the engine serves."""
        if self._answers.readline() != "ready\n":
            raise RuntimeError("an engine did not start; run this file with --child to see why")

    def ask(self, ids: list[int]) -> tuple[float, int]:
        """(seconds to the first token, cached tokens)."""
        assert self._process.stdin is not None
        time.sleep(SETTLE_S)
        self._process.stdin.write(json.dumps(ids) + "\n")
        self._process.stdin.flush()
        seconds, cached = json.loads(self._answers.readline())
        return float(seconds), int(cached)

    def close(self) -> None:
        """End the engine."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(timeout=10)


def copy_seconds(nbytes: int) -> float:
    """Least seconds of five that both cores take to copy `nbytes`."""
    source, target = np.ones(nbytes, dtype=np.uint8), np.zeros(nbytes, dtype=np.uint8)
    half = nbytes // 2
    least = float("inf")
    with ThreadPoolExecutor(2) as pool:
        for _ in range(5):
            began = time.perf_counter()
            parts = [pool.submit(np.copyto, target[p], source[p]) for p in (slice(0, half), slice(half, nbytes))]
            for part in parts:
                part.result(60)
            least = min(least, time.perf_counter() - began)
    return least


def bytes_of(tokens: int, dtype: str) -> int:
    """KV of the whole blocks before a prompt's last token."""
    token = 2 * MODEL["num_hidden_layers"] * MODEL["num_key_value_heads"] * MODEL["head_dim"]  # type: ignore[operator]
    return (tokens - 1) // BLOCK * BLOCK * int(token) * (4 if dtype == "float32" else 2)


def measure(children: dict[str, Child], pairs: int, dtype: str) -> dict[str, list[float]]:
    """Seconds by name, `pairs` of each, in turns; the order within a turn alternates."""
    taken: dict[str, list[float]] = {name: [] for name in COLUMNS}
    for i in range(pairs):
        rng = random.Random(i)
        ids = [rng.randrange(10, 2000) for _ in range(LENGTH + BLOCK)]
        for name in ("plain", "ours") if i % 2 else ("ours", "plain"):
            seconds, cached = children[name].ask(ids[:LENGTH])
            assert cached == 0
            taken[f"cold {name}"].append(seconds)
        children["prefix"].ask(ids[:LENGTH])
        for length, suffix in ((LENGTH, ""), (LENGTH + BLOCK, " +1 block")):
            if suffix:
                for name in ("prefix", "ours"):
                    children[name].ask(ids[:length])
            copy = copy_seconds(bytes_of(length, dtype))
            for _ in range(REPEATS):
                for name in ("prefix", "ours") if i % 2 else ("ours", "prefix"):
                    seconds, cached = children[name].ask(ids[:length])
                    assert cached == (length - 1) // BLOCK * BLOCK, (name, cached)
                    taken[{"prefix": "prefix hit", "ours": "warm ours"}[name] + suffix].append(seconds)
                taken["prefix hit and copy" + suffix].append(taken["prefix hit" + suffix][-1] + copy)
        sys.stderr.write(f"pair {i}: { {k: round(v[-1], 3) for k, v in taken.items()} }\n")
    return taken


def ratio(a: list[float], b: list[float]) -> str:
    """Median of the pairs' ratios, and their range."""
    ratios = sorted(x / y for x, y in zip(a, b, strict=True))
    return f"{statistics.median(ratios):.3f} [{ratios[0]:.3f}, {ratios[-1]:.3f}]"


def table(taken: dict[str, list[float]], pairs: int, dtype: str) -> list[str]:
    """The report, in lines of Markdown."""
    lines = [
        "# Time to first token on two CPU cores",
        "",
        f"`python benchmarks/ttft.py --pairs {pairs} --dtype {dtype}` on {platform.machine()}, {os.cpu_count()} cores, "
        f"{time.strftime('%Y-%m-%d')}. Random model of 181M parameters, block {BLOCK}, chunk 256, one request at a "
        f"time. {LENGTH} tokens end one token after a chunk, one more block ends in the middle of one. "
        f"Every engine was asked {REPEATS} times a pair when warm. A prefix of {bytes_of(LENGTH, dtype) >> 20} MiB.",
        "",
        "| what | seconds, median [least, most] |",
        "|---|---|",
    ]
    for name, seconds in taken.items():
        lines.append(f"| {name} | {statistics.median(seconds):.3f} [{min(seconds):.3f}, {max(seconds):.3f}] |")
    lines += ["", "| ratio of pairs | median [least, most] | mark |", "|---|---|---|"]
    for a, b, mark in RATIOS:
        lines.append(f"| {a} / {b} | {ratio(taken[a], taken[b])} | {mark} |")
    return lines


def main() -> None:
    """Parent or child."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--pairs", type=int, default=6)
    parser.add_argument("--dtype", default="bfloat16", help="float32 is faster on a processor without avx512_bf16")
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--child", choices=sorted({**ENGINES, **OTHERS}))
    parser.add_argument("--model")
    options = parser.parse_args()
    if options.child:
        serve(options.child, options.model)
        return
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(MODEL))
        children = {name: Child(name, folder, options.dtype) for name in ENGINES}
        try:
            for child in children.values():
                child.wait()
                child.ask(list(range(10, 310)))  # compile what the first request compiles
            taken = measure(children, options.pairs, options.dtype)
        finally:
            for child in children.values():
                child.close()
    say(table(taken, options.pairs, options.dtype), options.out)


if __name__ == "__main__":
    main()
