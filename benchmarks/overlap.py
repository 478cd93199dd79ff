"""The first token of a prompt that only a tier has: copies that begin while the tier still brings, beside copies that
wait for all of it. One engine on CPUs, the two in turns; the tier is memory with a chosen rate. Some minutes.

    python benchmarks/overlap.py [--pairs 12] [--rates 1,2,4,8] [--out FILE]
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE / "gpu")]
os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "2", "HF_HUB_OFFLINE": "1"}

from pairs import ratios, shown  # noqa: E402 - in a folder beside this file
from report import say  # noqa: E402 - beside this file
from systems import LLAMA_8B  # noqa: E402 - as pairs
from vllm import LLM, SamplingParams  # noqa: E402 - after the environment

from lmcache_ext.integration.vllm import fetching  # noqa: E402 - after vllm

TOKENS = 4096
SHAPE = {
    **LLAMA_8B, "hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 32,
    "num_key_value_heads": 32, "head_dim": 64, "vocab_size": 1024, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
TOKEN_BYTES = 4 * 2 * 32 * 64 * 4
WARM_UP = 2


def engine() -> LLM:
    """Much KV a token, little to compute."""
    model = Path(tempfile.mkdtemp())
    (model / "config.json").write_text(json.dumps(SHAPE))
    extra = {
        "lmcache.remote_url": "fake://?threads=1&gb_per_s=1000", "lmcache.max_local_cpu_size": 1.5,
        "lmcache.skip_slow_tiers": False, "lmcache.lookup_timeout_ms": 5000,
    }  # fmt: skip
    connector = {"kv_connector": "LMCacheConnectorV1", "kv_role": "kv_both", "kv_connector_extra_config": extra}
    return LLM(
        str(model), load_format="dummy", skip_tokenizer_init=True, dtype="float32", enforce_eager=True, block_size=32,
        max_model_len=8192, max_num_batched_tokens=8192, kv_transfer_config=connector, disable_log_stats=True,
    )  # fmt: skip


@contextmanager
def ahead(on: bool) -> Iterator[None]:
    """Whether promises are made ahead of the bytes."""
    with mock.patch.object(fetching, "_LEAST_SECONDS", fetching._LEAST_SECONDS if on else math.inf):
        yield


class Bench:
    """One engine and its only prompt."""

    def __init__(self) -> None:
        self.llm = engine()
        core = self.llm.llm_engine.engine_core.engine_core
        self.side: Any = core.scheduler.connector._impl.scheduler
        self.medium = self.side.lower.levels[0].tier.medium
        self.prompt = {"prompt_token_ids": [i % 900 + 10 for i in range(TOKENS + 1)]}
        self.ask()
        deadline = time.monotonic() + 60
        while self.side.busy():  # it is being stored
            self.llm.llm_engine.step()
            assert time.monotonic() < deadline

    def ask(self) -> tuple[float, int]:
        """(seconds to the first token, tokens that were not computed)."""
        began = time.perf_counter()
        (answer,) = self.llm.generate([self.prompt], SamplingParams(max_tokens=1, detokenize=False), use_tqdm=False)
        return time.perf_counter() - began, answer.num_cached_tokens or 0

    def from_tier(self, on: bool) -> float:
        """Neither the engine nor host memory has it."""
        assert self.llm.reset_prefix_cache()
        self.side.directory.clear()
        with ahead(on):
            seconds, cached = self.ask()
        assert cached == TOKENS, f"{cached} tokens came from the tier"
        return seconds

    def from_memory(self) -> float:
        """Host memory has it."""
        self.llm.reset_prefix_cache()
        return self.ask()[0]


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--pairs", type=int, default=12)
    parser.add_argument("--rates", default="1,2,4,8", help="GB/s of the tier, before its own copy and sum")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    bench = Bench()
    nbytes = TOKENS * TOKEN_BYTES
    memory = statistics.median(bench.from_memory() for _ in range(5))
    hit = statistics.median(bench.ask()[0] for _ in range(5))
    rows = []
    for rate in map(float, options.rates.split(",")):
        bench.medium.gb_per_s = rate
        times: dict[bool, list[float]] = {False: [], True: []}
        for i in range(options.pairs + WARM_UP):
            for on in (bool(i % 2), not i % 2):
                times[on].append(bench.from_tier(on))
        whole, early = (each[WARM_UP:] for each in (times[False], times[True]))
        tier = nbytes / bench.side.lower.levels[0].rate
        both = [shown([1e3 * seconds for seconds in each], 0) for each in (whole, early)]
        rows.append(f"| {nbytes / tier / 1e9:.2f} | {both[0]} | {both[1]} | {shown(ratios(early, whole))} |")
    say(
        [
            "# Both legs of a load from a tier at once",
            "",
            f"`python benchmarks/overlap.py --pairs {options.pairs}` on {os.cpu_count()} CPU cores, "
            f"{time.strftime('%Y-%m-%d')}; a prompt of {TOKENS} tokens, {nbytes / 1e6:.0f} MB, in turns. "
            f"Median with the prompt in vLLM's own cache {1e3 * hit:.0f} ms, in host memory {1e3 * memory:.0f} ms. "
            "Means [95 %], in ms; the tier's rate is what fetches reached.",
            "",
            "| tier, GB/s | the copy waits for all | the copy begins before | ratio, pair by pair |",
            "|---|---|---|---|",
            *rows,
        ],
        options.out,
    )


if __name__ == "__main__":
    main()
