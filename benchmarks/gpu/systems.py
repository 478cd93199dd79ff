"""The engines that the benchmarks compare, each in a process of its own, told what to do by lines of JSON.

All of them have the same model, the same KV memory, vLLM's own prefix cache, and CUDA graphs. They live at once on one
GPU and take turns, so that the figures of a pair were measured within seconds of each other.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

LLAMA_8B = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
    "vocab_size": 128256, "max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "rope_theta": 500000.0,
    "torch_dtype": "bfloat16", "bos_token_id": 128000, "eos_token_id": 128001, "hidden_act": "silu",
    "tie_word_embeddings": False,
}  # fmt: skip
OURS = {
    "kv_connector": "LMCacheConnectorV1",
    "kv_role": "kv_both",
    "kv_connector_module_path": "lmcache_ext.integration.vllm",
}
NAMES = {
    "none": "no connector",
    "native": "vLLM OffloadingConnector",
    "lmcache": "upstream LMCache",
    "ours": "this project",
    "disk": "this project, with a disk tier",
}
START_SECONDS = 400


def arguments(name: str, options: dict[str, Any]) -> dict[str, Any]:
    """What `LLM` gets for one of NAMES."""
    made: dict[str, Any] = {
        "load_format": "dummy", "skip_tokenizer_init": True, "dtype": "bfloat16", "max_model_len": 40000, "seed": 0,
        "disable_log_stats": True, "enable_prefix_caching": True, **options.get("llm", {}),
    }  # fmt: skip
    if name == "native":
        made.update(kv_offloading_size=options["pool_gb"], kv_offloading_backend="native")
    elif name == "lmcache":
        made["kv_transfer_config"] = {"kv_connector": "LMCacheConnectorV1", "kv_role": "kv_both"}
    elif name in ("ours", "disk"):
        made["kv_transfer_config"] = dict(OURS)
    return made


class Served:
    """Child: one engine and what it can be asked."""

    def __init__(self, name: str, model: str, options: dict[str, Any]) -> None:
        from vllm import LLM
        from vllm.config import KVTransferConfig

        made = arguments(name, options)
        if "kv_transfer_config" in made:
            made["kv_transfer_config"] = KVTransferConfig(**made["kv_transfer_config"])
        self.llm = LLM(model=model, **made)
        self.vocabulary = self.llm.llm_engine.model_config.get_vocab_size()

    def prompt(self, seed: int, length: int, head: int = 0, head_length: int = 0) -> dict[str, list[int]]:
        """`length` token ids that no other seed has, behind `head_length` ids of the seed `head`. A longer prompt of
        the same seeds begins with the shorter one."""
        ids = [
            rng.randrange(10, self.vocabulary - 10)
            for rng, count in ((random.Random(head), head_length), (random.Random(seed), length))
            for _ in range(count)
        ]
        return {"prompt_token_ids": ids}

    def generate(self, prompts: list[list[int]], tokens: int = 1) -> dict[str, Any]:
        """Seconds for all of them, sent at once, and how many tokens were not computed."""
        from vllm import SamplingParams

        params = SamplingParams(temperature=0, max_tokens=tokens, min_tokens=tokens, ignore_eos=True, detokenize=False)
        made = [self.prompt(*spec) for spec in prompts]
        began = time.perf_counter()
        answers = self.llm.generate(made, params, use_tqdm=False)
        seconds = time.perf_counter() - began
        return {"seconds": seconds, "cached": sum(a.num_cached_tokens or 0 for a in answers)}

    def stream(self, prompts: list[list[int]], at_once: int, tokens: int) -> dict[str, Any]:
        """Send `prompts` with `at_once` under way: seconds from sending each to its first token, seconds for all, and
        how many of their tokens were not computed."""
        from vllm import SamplingParams

        engine = self.llm.llm_engine
        params = SamplingParams(temperature=0, max_tokens=tokens, min_tokens=tokens, ignore_eos=True, detokenize=False)
        waiting = [self.prompt(*spec) for spec in prompts]
        total = sum(len(p["prompt_token_ids"]) for p in waiting)
        sent: dict[str, float] = {}
        first: dict[str, float] = {}
        cached, began, live = 0, time.perf_counter(), 0
        while waiting or live:
            while waiting and live < at_once:
                name = f"{len(sent)}-{time.time_ns()}"
                sent[name] = time.perf_counter()
                engine.add_request(name, waiting.pop(0), params)
                live += 1
            for output in engine.step():
                first.setdefault(output.request_id, time.perf_counter() - sent[output.request_id])
                if output.finished:
                    live -= 1
                    cached += output.num_cached_tokens or 0
        seconds = time.perf_counter() - began
        return {"first": list(first.values()), "seconds": seconds, "cached": cached, "tokens": total}

    def forget(self) -> dict[str, Any]:
        """Empty vLLM's own prefix cache. It refuses while a connector still reads blocks."""
        deadline = time.perf_counter() + 20
        while not self.llm.reset_prefix_cache():
            if time.perf_counter() > deadline:
                return {"error": "blocks are still in use"}
            time.sleep(0.01)
        return {}

    def decode(self, runners: list[list[int]], tokens: int, others: list[list[int]], every: int) -> dict[str, Any]:
        """Seconds until `runners` have decoded `tokens` each, with one of `others` (one token each) sent every `every`
        steps from the moment that all of them decode; and the tokens of `others` that were not computed."""
        from vllm import SamplingParams

        engine = self.llm.llm_engine
        long = SamplingParams(temperature=0, max_tokens=tokens, min_tokens=tokens, ignore_eos=True, detokenize=False)
        short = SamplingParams(temperature=0, max_tokens=1, detokenize=False)
        made = [self.prompt(*spec) for spec in others]
        for i, spec in enumerate(runners):
            engine.add_request(f"runner{i}-{time.time_ns()}", self.prompt(*spec), long)
        started: set[str] = set()
        began, steps, cached, longest, last = 0.0, 0, 0, 0.0, 0.0
        left = len(runners)
        while left:
            if began and made and steps % every == 0:
                engine.add_request(f"other-{time.time_ns()}", made.pop(), short)
            for output in engine.step():
                if output.request_id.startswith("runner"):
                    started.add(output.request_id)
                    left -= output.finished
                elif output.finished:
                    cached += output.num_cached_tokens or 0
            now = time.perf_counter()
            if began:
                steps += 1
                longest = max(longest, now - last)
            elif len(started) == len(runners):
                began = now
            last = now
        seconds = time.perf_counter() - began
        unsent = len(made)
        while engine.has_unfinished_requests():
            engine.step()
        return {"seconds": seconds, "cached": cached, "longest": longest, "unsent": unsent}


def serve(name: str, model: str, options: dict[str, Any]) -> None:
    """Child's loop."""
    out = os.fdopen(int(os.environ["BENCH_FD"]), "w")

    def say(answer: dict[str, Any]) -> None:
        out.write(json.dumps(answer) + "\n")
        out.flush()

    began = time.perf_counter()
    try:
        served = Served(name, model, options)
    except Exception as error:
        say({"error": f"{type(error).__name__}: {error}"})
        raise
    say({"start": time.perf_counter() - began})
    for line in sys.stdin:
        call = json.loads(line)
        try:
            say(getattr(served, call.pop("do"))(**call))
        except Exception as error:
            say({"error": f"{type(error).__name__}: {error}"})
            raise


class System:
    """One engine in a process of its own."""

    def __init__(self, name: str, model: Path, options: dict[str, Any], log: Path) -> None:
        read, write = os.pipe()
        env = {
            **os.environ, "BENCH_FD": str(write), "HF_HUB_OFFLINE": "1", "VLLM_LOGGING_LEVEL": "INFO",
            "LMCACHE_MAX_LOCAL_CPU_SIZE": str(options["pool_gb"]), "LMCACHE_CHUNK_SIZE": "256",
            "LMCACHE_LOCAL_CPU": "True", "LMCACHE_TRACK_USAGE": "false", **options.get("env", {}),
        }  # fmt: skip
        if name == "disk":
            folder = options.get("disk") or f"{tempfile.gettempdir()}/lmcache-ext-bench/"
            env |= {"LMCACHE_LOCAL_DISK": folder, "LMCACHE_MAX_LOCAL_DISK_SIZE": str(options.get("disk_gb", 40))}
        command = [sys.executable, __file__, name, str(model), json.dumps(options)]
        self.name = name
        self.log = log / f"{name}.log"
        with self.log.open("w") as file:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=file, stderr=file, pass_fds=[write], env=env, text=True
            )
        os.close(write)
        self._answers = os.fdopen(read)

    def hear(self) -> dict[str, Any]:
        """The next answer. Raises RuntimeError if the engine is gone or says so."""
        line = self._answers.readline()
        answer: dict[str, Any] = json.loads(line) if line else {"error": "the process ended"}
        if "error" in answer:
            raise RuntimeError(f"{self.name}: {answer['error']}; its last words:\n{self.log.read_text()[-3000:]}")
        return answer

    def ask(self, do: str, **how: Any) -> dict[str, Any]:
        """Tell it what to do and wait for the answer."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"do": do, **how}) + "\n")
        self._process.stdin.flush()
        return self.hear()

    @property
    def grown(self) -> bool:
        """Whether all of our host memory is there, says its log."""
        return "is complete after" in self.log.read_text()

    def close(self) -> None:
        """End the engine."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(timeout=10)


if __name__ == "__main__":
    serve(sys.argv[1], sys.argv[2], json.loads(sys.argv[3]))
