"""Prefill and decode apart, and the KV router, under a real Dynamo on this machine. About twelve minutes on two cores.

    python benchmarks/deployments.py [--rounds 7] [--out benchmarks/results/deployments_cpu.md]

Each deployment is a launch script, two workers with half of the cores each, on a model with random weights and the demo
model's tokenizer (a token a character).

*Time to first token* of a prompt of 3000 tokens, streamed: cold behind two aggregated workers, cold with prefill and
decode apart, and apart with the prompt in the prefill worker's host memory (vLLM's own prefix cache is off there).
*Router*: 20 prefixes of 1536 tokens, each asked for several times with another tail, in random order, two at a time,
behind the KV router and behind round-robin. A worker's GPU cache holds a quarter of the prefixes, its host memory all.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
from report import say

ROOT = Path(__file__).resolve().parents[1]
DEMO = ROOT / "launch" / "demo_model"
SHAPE = {
    "hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 8, "num_attention_heads": 12,
    "num_key_value_heads": 4, "head_dim": 64, "max_position_embeddings": 8192,
}  # fmt: skip
LONG, PREFIX, TAIL = 3000, 1536, 64
PREFIXES, ASKED, AT_ONCE = 20, 6, 2
GPU_BLOCKS = PREFIX * PREFIXES // 4 // 32
START_S = 600
ROUTERS = {  # name → flags of the frontend
    "KV router, as our script sets it": "",
    "KV router, with Dynamo's weights": "--router-host-cache-hit-weight 0.75 --router-prefill-load-scale 1",
    "round-robin": "--router-mode round-robin",
}
LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"


@dataclass(frozen=True)
class Answer:
    """Of one request."""

    first: float  # seconds to the first token
    cached: int  # tokens of the prompt that were not computed
    worker: int


def text(seed: int, length: int) -> str:
    """`length` characters that no other seed has; a longer one begins with the shorter one."""
    rng = random.Random(seed)
    return "".join(rng.choice(LETTERS) for _ in range(length))


def model(folder: Path, shape: dict[str, Any] = SHAPE) -> Path:
    """A model with random weights that reads characters."""
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(DEMO / name, folder / name)
    config = json.loads((DEMO / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **shape}))
    return folder


class Deployment:
    """A launch script that serves."""

    def __init__(self, script: str, model: Path, port: int, flags: list[str], env: dict[str, str]) -> None:
        self.port = port
        self._log = Path(tempfile.mkstemp(suffix=".log")[1])
        command = [str(ROOT / "launch" / script), "--load-format", "dummy", "--max-model-len", "4096", *flags]
        variables = {
            **os.environ, "VENV": sys.prefix, "SKIP_SETUP": "1", "DEVICE": "cpu", "MODEL": str(model),
            "HTTP_PORT": str(port), "DYN_SYSTEM_PORT": str(port + 1), "LMCACHE_MAX_LOCAL_CPU_SIZE": "2", **env,
        }  # fmt: skip
        with self._log.open("w") as log:
            self._process = subprocess.Popen(command, env=variables, stdout=log, stderr=log, start_new_session=True)
        deadline = time.monotonic() + START_S
        while "Ctrl-C stops it" not in self._log.read_text():
            if self._process.poll() is not None or time.monotonic() > deadline:
                self.close()
                raise RuntimeError(f"{script} does not serve:\n{self._log.read_text()[-3000:]}")
            time.sleep(0.5)

    def ask(self, prompt: str) -> Answer:
        """One request, streamed."""
        body = {
            "model": "bench", "prompt": prompt, "max_tokens": 2, "temperature": 0, "stream": True,
            "stream_options": {"include_usage": True}, "ignore_eos": True, "nvext": {"extra_fields": ["worker_id"]},
        }  # fmt: skip
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}/v1/completions", json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )  # fmt: skip
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        began, first, cached, worker = time.perf_counter(), 0.0, 0, 0
        with opener.open(request, timeout=120) as lines:
            for line in lines:
                if not line.startswith(b"data: {"):
                    continue
                part: dict[str, Any] = json.loads(line[6:])
                if not first and part.get("choices"):  # one a token, and a token may be no text
                    first = time.perf_counter() - began
                if found := (part.get("nvext") or {}).get("worker_id"):
                    worker = found.get("prefill_worker_id") or found["decode_worker_id"]
                if usage := part.get("usage"):
                    cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
        if not first:
            raise RuntimeError("an answer without a token")
        return Answer(first, cached, worker)

    def close(self) -> None:
        """End the script, and so all that it started."""
        if self._process.poll() is None:
            self._process.terminate()
        self._process.wait(120)


@contextlib.contextmanager
def serving(script: str, folder: Path, port: int, *flags: str, **env: str) -> Iterator[Deployment]:
    """That script until the with block ends."""
    made = Deployment(script, folder, port, ["--served-model-name", "bench", "--block-size", "32", *flags], env)
    try:
        yield made
    finally:
        made.close()


def first_tokens(deployment: Deployment, rounds: int, seed: int, warm: bool) -> tuple[list[float], list[float]]:
    """Seconds to first token of new prompts, and of the same once more if `warm`."""
    cold, again = [], []
    deployment.ask(text(seed, LONG))  # what the first request alone does is not measured
    for i in range(1, rounds + 1):
        prompt = text(seed + i, LONG)
        answer = deployment.ask(prompt)
        if answer.cached:
            raise RuntimeError("a new prompt hit something")
        cold.append(answer.first)
        if warm:
            time.sleep(0.3)  # for the store to end
            answer = deployment.ask(prompt)
            if answer.cached < LONG * 0.9:
                raise RuntimeError(f"only {answer.cached} tokens of a known prompt were found")
            again.append(answer.first)
    return cold, again


def routed(deployment: Deployment, seed: int) -> tuple[float, list[float], float]:
    """(share of requests that went to a worker which had seen their prefix, seconds to first token of each of them,
    share of their prefixes' tokens that were not computed)."""
    rng = random.Random(seed)
    order = [i for i in range(PREFIXES) for _ in range(ASKED)]
    rng.shuffle(order)
    seen: dict[int, set[int]] = {}
    right, first, cached = [], [], 0
    with concurrent.futures.ThreadPoolExecutor(AT_ONCE) as pool:
        waiting = [(i, text(seed + i, PREFIX) + text(seed + 1000 + n, TAIL)) for n, i in enumerate(order)]
        while waiting:
            batch: list[tuple[int, str]] = []
            for each in waiting:  # never the same prefix twice at once: which one is first would be chance
                if len(batch) < AT_ONCE and each[0] not in [i for i, _ in batch]:
                    batch.append(each)
            for each in batch:
                waiting.remove(each)
            for (i, _), answer in zip(batch, pool.map(lambda each: deployment.ask(each[1]), batch), strict=True):
                if i in seen:
                    right.append(answer.worker in seen[i])
                    first.append(answer.first)
                    cached += min(answer.cached, PREFIX)
                seen.setdefault(i, set()).add(answer.worker)
    return statistics.mean(right), first, cached / (PREFIX * len(first))


def milliseconds(seconds: list[float]) -> str:
    """mean (least to most)."""
    return f"{statistics.mean(seconds) * 1e3:.0f} ({min(seconds) * 1e3:.0f} to {max(seconds) * 1e3:.0f})"


def main() -> None:
    """Start the deployments one after the other, measure, report."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--port", type=int, default=18400, help="of the frontends; the next two are the workers'")
    parser.add_argument("--parts", default="first,router", help="which tables")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    folder = model(Path(tempfile.mkdtemp()))
    quick = ["--enforce-eager", "--no-warmup"]
    few = ["--num-gpu-blocks-override", str(GPU_BLOCKS)]
    lines = [
        "# Prefill and decode apart, and the router, on a CPU machine",
        "",
        f"`python benchmarks/deployments.py --rounds {options.rounds} --parts {options.parts}` on {os.cpu_count()} "
        f"cores, {time.strftime('%Y-%m-%d')}. Each time: mean (least to most), in ms.",
    ]
    if "first" in options.parts.split(","):
        with serving("disagg_lmcache.sh", folder, options.port, *quick, "--no-enable-prefix-caching") as apart:
            apart_cold, apart_warm = first_tokens(apart, options.rounds, 10_000, warm=True)
        with serving("agg_router.sh", folder, options.port, *quick) as two:
            together_cold, _ = first_tokens(two, options.rounds, 20_000, warm=False)
        lines += [
            "",
            f"| time to first token, {LONG} tokens | ms |",
            "|---|---|",
            f"| two aggregated workers, cold | {milliseconds(together_cold)} |",
            f"| prefill and decode apart, cold | {milliseconds(apart_cold)} |",
            f"| prefill and decode apart, warm in prefill's host memory | {milliseconds(apart_warm)} |",
        ]
    if "router" in options.parts.split(","):
        lines += [
            "",
            f"| {PREFIXES} prefixes of {PREFIX} tokens, {ASKED} times each, {AT_ONCE} at once | requests that went to "
            "a worker which had their prefix | time to first token, ms | tokens of the prefix that were not computed |",
            "|---|---|---|---|",
        ]
        for name, flags in ROUTERS.items():
            with serving("agg_router.sh", folder, options.port, *quick, *few, ROUTER_FLAGS=flags) as router:
                right, first, found = routed(router, 30_000)
            lines.append(f"| {name} | {right:.1%} | {milliseconds(first)} | {found:.1%} |")
            sys.stderr.write(lines[-1] + "\n")
    say(lines, options.out)


if __name__ == "__main__":
    main()
