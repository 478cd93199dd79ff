"""The first token from disk after a restart, beside what the disk and the link allow. Takes some minutes.

    python benchmarks/gpu/disk.py [--device cuda|cpu] [--folder /tmp/lmcache-ext-bench/] [--prompts 7] [--out FILE]

One engine computes the prompts and writes them to the disk tier; another one, started afterwards, answers each of them
for the first time (disk) and once more (its own prefix cache). Between those two, as many files are read with bare
O_DIRECT calls, and an engine without any cache computes the prompt. The mark: at most 1.2 times the larger of disk time
and link time, plus the hit. Where there is no GPU, the link is one core that copies memory.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import mmap
import os
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

from engines import link  # noqa: E402 - beside this file
from pairs import shown, verdict  # noqa: E402 - beside this file
from report import say  # noqa: E402 - in the folder above
from systems import LLAMA_8B, System  # noqa: E402 - beside this file

MARK = 1.2
SMALL = {
    **LLAMA_8B, "hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 8, "num_attention_heads": 12,
    "num_key_value_heads": 4, "head_dim": 64, "vocab_size": 1024, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
# device → (shape of the model, tokens of a prompt, arguments to LLM, GB of host memory)
DEVICES: dict[str, tuple[dict[str, Any], int, dict[str, Any], float]] = {
    "cuda": (LLAMA_8B, 32768, {"kv_cache_memory_bytes": int(12e9), "gpu_memory_utilization": 0.4}, 30),
    "cpu": (SMALL, 4096, {"dtype": "float32", "enforce_eager": True, "block_size": 32, "max_model_len": 8192}, 2),
}
THREADS = 8
SETTLE_SECONDS = 120


def files(folder: Path) -> list[Path]:
    """The tier's objects, without those that are being written."""
    return [path for path in folder.rglob("*") if path.is_file() and path.suffix != ".tmp" and path.parent != folder]


def settle(folder: Path, count: int) -> None:
    """Wait until so many objects are there."""
    deadline = time.monotonic() + SETTLE_SECONDS
    while len(files(folder)) < count:
        if time.monotonic() > deadline:
            raise RuntimeError(f"{len(files(folder))} of {count} chunks are on disk after {SETTLE_SECONDS} s")
        time.sleep(0.2)


def grown(system: System) -> None:
    """Wait until all of the engine's host memory is there: what does not fit yet is not stored."""
    deadline = time.monotonic() + SETTLE_SECONDS
    while not system.grown:
        if time.monotonic() > deadline:
            raise RuntimeError(f"the pool is not complete after {SETTLE_SECONDS} s")
        time.sleep(0.2)


def copied() -> dict[str, Any]:
    """The link's figures where there is none."""
    source, target = np.ones(256 << 20, np.uint8), np.ones(256 << 20, np.uint8)
    times = []
    for _ in range(5):
        began = time.perf_counter()
        target[:] = source
        times.append(time.perf_counter() - began)
    return {"load": len(source) / statistics.median(times) / 1e9, "gpu": f"{os.cpu_count()} CPU cores"}


def raw_read(paths: list[Path]) -> float:
    """Seconds to read these files with O_DIRECT, eight at once."""

    def read(path: Path) -> int:
        size = path.stat().st_size // 4096 * 4096
        buffer = mmap.mmap(-1, size)
        fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
        try:
            return os.preadv(fd, [buffer], 0)
        finally:
            os.close(fd)

    began = time.perf_counter()
    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(read, paths))
    return time.perf_counter() - began


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "lmcache-ext-bench")
    parser.add_argument("--prompts", type=int, default=7)
    parser.add_argument("--device", choices=DEVICES, default="cuda")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    shape, tokens, llm, pool = DEVICES[options.device]
    shutil.rmtree(options.folder, ignore_errors=True)
    limit = link() if options.device == "cuda" else copied()
    model = Path(tempfile.mkdtemp())
    (model / "config.json").write_text(json.dumps(shape))
    llm = {"max_num_batched_tokens": 8192, **llm}
    env = {"VLLM_CPU_KVCACHE_SPACE": "2"} if options.device == "cpu" else {}
    how = {"llm": llm, "pool_gb": pool, "disk": f"{options.folder}/", "env": env}
    prompts = [[1000 + i, tokens] for i in range(options.prompts)]
    chunks = tokens // 256
    writer = System("disk", model, how, model)
    writer.hear()
    writer.ask("generate", prompts=[[1, 64]])  # a pool grows once its engine has started
    if options.device == "cuda":
        grown(writer)
    for i, prompt in enumerate(prompts):
        writer.ask("generate", prompts=[prompt])
        settle(options.folder, chunks * (i + 1))
    writer.close()
    reader = System("disk", model, how, model)
    reader.hear()
    bare = System("none", model, {**how, "llm": {**llm, "enable_prefix_caching": False}}, model)
    bare.hear()
    for system in (reader, bare):
        system.ask("generate", prompts=[[1, 2048]], tokens=4)
    if options.device == "cuda":
        grown(reader)
    there = files(options.folder)
    times: dict[str, list[float]] = {"first": [], "hit": [], "disk": [], "bare": []}
    cached = 0
    for i, prompt in enumerate(prompts):
        answer = reader.ask("generate", prompts=[prompt])
        cached = answer["cached"]
        times["first"].append(answer["seconds"])
        times["disk"].append(raw_read(there[i * chunks : (i + 1) * chunks]))
        times["bare"].append(bare.ask("generate", prompts=[prompt])["seconds"])
        times["hit"].append(reader.ask("generate", prompts=[prompt])["seconds"])
        print(
            f"{prompt[0]}: {[f'{v[-1]:.3f}' for v in times.values()]} s, {cached} cached", file=sys.stderr, flush=True
        )
    reader.close()
    bare.close()
    shutil.rmtree(options.folder, ignore_errors=True)
    each = 4 if llm.get("dtype") == "float32" else 2
    nbytes = cached * shape["num_hidden_layers"] * shape["num_key_value_heads"] * shape["head_dim"] * 2 * each
    copy = nbytes / (limit["load"] * 1e9)
    ratios = [
        (first - hit) / max(disk, copy)
        for first, hit, disk in zip(times["first"], times["hit"], times["disk"], strict=True)
    ]
    rate = nbytes / statistics.mean(times["first"]) / 1e9
    say(
        [
            "# The first token from disk, after a restart",
            "",
            f"`python benchmarks/gpu/disk.py --device {options.device} --prompts {options.prompts}` on {limit['gpu']}, "
            f"{time.strftime('%Y-%m-%d')}; {cached} tokens of each prompt, {nbytes / 1e9:.2f} GB, were not computed.",
            "",
            "| what | s, mean [95 %] |",
            "|---|---|",
            f"| first token from disk | {shown(times['first'])}, {rate:.2f} GB/s |",
            f"| computed, without any cache | {shown(times['bare'])} |",
            f"| hit in vLLM's own cache | {shown(times['hit'])} |",
            f"| bare O_DIRECT reads of as many bytes, {THREADS} at once | {shown(times['disk'])} |",
            f"| the link | {copy:.3f} |",
            f"| (first token - hit) / max(disk, link) | {shown(ratios)}: at most {MARK}: {verdict(ratios, MARK)} |",
        ],
        options.out,
    )


if __name__ == "__main__":
    main()
