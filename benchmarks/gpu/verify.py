"""Is what comes back right? Real weights, cold against warm by log-probabilities, beside a control that must differ.

    python benchmarks/gpu/verify.py [--systems none,native,ours] [--out FILE]
    python benchmarks/gpu/verify.py --matrix            # ours alone, with other KV types, blocks, runners, and MLA

The model is launch/demo_model, which answers questions about its prompt: right only if the KV of the far prefix is
right. For each prompt the 20 best log-probabilities of the first token are kept: cold, from vLLM's own prefix cache
(hit), through the connector after that cache was emptied (warm), and for a prompt whose first half is another one
(control). A move is the largest difference of one token's log-probability. Hit and warm compute the same tokens over
what should be the same bytes, so they should agree to the last bit; cold computes in other steps, so it moves a
little, with a connector or without.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
MODEL = ROOT / "launch" / "demo_model"
sys.path[:0] = [str(HERE), str(ROOT)]

from systems import NAMES, arguments  # noqa: E402 - beside this file

CONTEXT_TOKENS, CONTEXTS, QUERIES = 1024, 12, 4
MLA = {
    "architectures": ["DeepseekV2ForCausalLM"], "model_type": "deepseek_v2", "hidden_size": 512,
    "intermediate_size": 512, "moe_intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 16,
    "num_key_value_heads": 16, "vocab_size": 128, "max_position_embeddings": 4096, "q_lora_rank": None,
    "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0, "n_routed_experts": 8, "n_shared_experts": 1, "num_experts_per_tok": 2,
    "first_k_dense_replace": 3,
    "torch_dtype": "bfloat16", "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu",
    "tie_word_embeddings": False,
}  # fmt: skip
# name → (arguments to LLM, environment, configuration of a model with random weights instead of the demo model)
MATRIX: dict[str, tuple[dict[str, Any], dict[str, str], dict[str, Any] | None]] = {
    "bf16, block 16": ({"block_size": 16}, {}, None),
    "fp8": ({"block_size": 16, "kv_cache_dtype": "fp8"}, {}, None),
    "block 32": ({"block_size": 32}, {}, None),
    "block 64": ({"block_size": 64}, {}, None),
    "block 128": ({"block_size": 128}, {}, None),
    "V1 runner": ({}, {"VLLM_USE_V2_MODEL_RUNNER": "0"}, None),
    "V2 runner": ({}, {"VLLM_USE_V2_MODEL_RUNNER": "1"}, None),
    "MLA": ({}, {}, MLA),
}


def recall() -> Any:
    """The demo model's questions."""
    spec = importlib.util.spec_from_file_location("recall", MODEL / "recall.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["recall"] = module
    spec.loader.exec_module(module)
    return module


def move(a: list[dict[int, float]], b: list[dict[int, float]]) -> float:
    """The largest difference of one token's log-probability over all prompts; tokens that only one side names count
    with the least that the other side named."""
    largest = 0.0
    for one, two in zip(a, b, strict=True):
        low = min(*one.values(), *two.values())
        for token in one.keys() | two.keys():
            largest = max(largest, abs(one.get(token, low) - two.get(token, low)))
    return largest


class Check:
    """One engine under test, in this process' child."""

    def __init__(self, name: str, options: dict[str, Any]) -> None:
        from vllm import LLM
        from vllm.config import KVTransferConfig

        made = arguments(name, options)
        model = options.get("model", str(MODEL))
        self.knows = model == str(MODEL)  # whether its answers mean anything
        if self.knows:
            made.update(load_format="auto", skip_tokenizer_init=False)
        if "kv_transfer_config" in made:
            made["kv_transfer_config"] = KVTransferConfig(**made["kv_transfer_config"])
        self.name = name
        self.llm = LLM(model=model, **made)

    def ask(self, prompts: list[list[int]], tokens: int = 3) -> tuple[list[dict[int, float]], list[list[int]], int]:
        """(log-probabilities of the first token, answers, tokens not computed), one prompt at a time."""
        from vllm import SamplingParams

        params = SamplingParams(temperature=0, max_tokens=tokens, logprobs=20, ignore_eos=True, detokenize=self.knows)
        first, answers, cached = [], [], 0
        for ids in prompts:
            output = self.llm.generate([{"prompt_token_ids": ids}], params, use_tqdm=False)[0]
            first.append({token: p.logprob for token, p in output.outputs[0].logprobs[0].items()})
            answers.append(list(output.outputs[0].token_ids))
            cached += output.num_cached_tokens or 0
        return first, answers, cached

    def forget(self) -> None:
        """Empty vLLM's own prefix cache."""
        deadline = time.monotonic() + 20
        while not self.llm.reset_prefix_cache():
            assert time.monotonic() < deadline, "blocks are still in use"
            time.sleep(0.01)

    def run(self) -> dict[str, Any]:
        """All that is to be known of this engine."""
        questions = recall()
        rng = random.Random(11)
        asked = []
        for _ in range(CONTEXTS):
            asked += questions.queries(questions.make_context(rng, CONTEXT_TOKENS), rng, QUERIES)
        prompts = [q.token_ids for q in asked]
        half = CONTEXT_TOKENS // 2
        control = [prompts[(i + QUERIES) % len(prompts)][:half] + ids[half:] for i, ids in enumerate(prompts)]
        heads = [[*ids[:CONTEXT_TOKENS], ids[0]] for ids in prompts[::QUERIES]]

        def right(answers: list[list[int]]) -> float | None:
            return float(questions.score(asked, answers).exact) if self.knows else None

        cold = []
        cold_answers: list[list[int]] = []
        for ids in prompts:  # each from nothing, and stored by nobody before
            first, answers, _ = self.ask([ids])
            cold += first
            cold_answers += answers
            self.forget_all()
        self.ask(heads)
        hit, hit_answers, hit_cached = self.ask(prompts)
        result: dict[str, Any] = {"cold right": right(cold_answers), "hit right": right(hit_answers)}
        result |= {"hit tokens": hit_cached, "hit move": move(cold, hit)}
        if self.name != "none":
            self.forget()
            self.ask(heads)  # so that vLLM's cache holds what it held before the hits, now through the connector
            warm, warm_answers, warm_cached = self.ask(prompts)
            result |= {"warm right": right(warm_answers), "warm tokens": warm_cached}
            result |= {"warm move": move(cold, warm), "warm against hit": move(hit, warm)}

        result["pages"] = self.pages(prompts[0]) if self.name == "ours" else None
        self.forget_all()
        changed, _, _ = self.ask(control)
        result["control move"] = move(cold, changed)
        return result

    def forget_all(self) -> None:
        """Empty the connector's cache, too."""
        deadline = time.monotonic() + 20
        while not self.llm.reset_prefix_cache(reset_connector=self.name != "none"):
            assert time.monotonic() < deadline, "blocks are still in use"
            time.sleep(0.01)

    def pages(self, ids: list[int]) -> list[list[int]]:
        """[pages stored, of which differ], [pages loaded, of which differ], byte by byte between GPU and pool, of all
        ranks."""
        from tests.engines import engines

        self.forget_all()
        self.llm.collective_rpc(engines.spy)
        self.ask([ids], tokens=1)
        time.sleep(1)
        self.ask([ids[:8]], tokens=4)  # some steps, in which it is seen that all is stored: a reset cuts a store off
        self.forget()
        stored = [rank["store"] for rank in self.llm.collective_rpc(engines.differing_pages)]
        self.ask([ids], tokens=1)
        loaded = [rank["load"] for rank in self.llm.collective_rpc(engines.differing_pages)]
        return [[sum(column) for column in zip(*ranks, strict=True)] for ranks in (stored, loaded)]


def table(results: dict[str, dict[str, Any]]) -> list[str]:
    """The report's table."""
    names = list(results)
    heads = [NAMES.get(name, name) for name in names]
    lines = [f"| {CONTEXTS * QUERIES} prompts | {' | '.join(heads)} |", f"|---|{'---|' * len(names)}"]
    rows = ("cold right", "hit right", "warm right", "hit tokens", "warm tokens", "hit move", "warm move")
    for row in (*rows, "warm against hit", "control move", "pages"):
        cells = []
        for name in names:
            value = results[name].get(row)
            if value is None:
                cells.append("")
            elif row == "pages":
                (stored, bad), (loaded, worse) = value
                cells.append(f"{stored} stored, {bad} differ; {loaded} loaded, {worse} differ")
            else:
                cells.append(f"{value:.6f}" if "move" in row or "against" in row else f"{value:g}")
        lines.append(f"| {row} | {' | '.join(cells)} |")
    return lines


def judge(ours: dict[str, Any], own: float | None) -> list[str]:
    """What is wrong with it; [] if all is well. `own`: how far vLLM's own prefix cache moves without a connector."""
    faults = []
    own = ours["hit move"] if own is None else own
    if ours["warm move"] > max(own, ours["hit move"]):
        faults.append(f"warm moves by {ours['warm move']}, vLLM's own prefix cache by {own}")
    if ours["cold right"] is not None and ours["warm right"] < ours["cold right"] - 0.02:
        faults.append(f"warm answers {ours['warm right']} right, cold {ours['cold right']}")
    if ours["cold right"] is not None and ours["control move"] <= 2 * own:
        faults.append(f"the control moved by {ours['control move']} only: it shows nothing")
    for what, (compared, differ) in zip(("stored", "loaded"), ours["pages"], strict=True):
        if not compared or differ:
            faults.append(f"{differ} of {compared} pages {what} differ")
    if not ours["warm tokens"]:
        faults.append("nothing was loaded")
    return faults


def child(name: str, options: dict[str, Any], out: str) -> None:
    """One system, one process."""
    try:
        result = Check(name, options).run()
    except Exception as error:
        Path(out).write_text(json.dumps({"error": f"{type(error).__name__}: {error}"}))
        raise
    Path(out).write_text(json.dumps(result))


def measure(cases: dict[str, tuple[str, dict[str, Any], dict[str, str]]], folder: Path) -> dict[str, dict[str, Any]]:
    """Every case (system, options, environment) in a process of its own, all at once: nothing here is timed."""
    base = {
        **os.environ, "HF_HUB_OFFLINE": "1", "VLLM_ALLOW_INSECURE_SERIALIZATION": "1", "LMCACHE_CHUNK_SIZE": "256",
        "LMCACHE_LOCAL_CPU": "True", "LMCACHE_MAX_LOCAL_CPU_SIZE": "2", "LMCACHE_TRACK_USAGE": "false",
    }  # fmt: skip
    running, results = {}, {}
    for i, (case, (system, how, env)) in enumerate(cases.items()):
        file = folder / f"verify-{i}.json"
        with file.with_suffix(".log").open("w") as log:
            command = [sys.executable, __file__, "--child", system, json.dumps(how), str(file)]
            running[case] = subprocess.Popen(command, stdout=log, stderr=log, env={**base, **env}), file
    for case, (process, file) in running.items():
        process.wait(timeout=400)
        results[case] = json.loads(file.read_text()) if file.exists() else {"error": f"exit {process.returncode}"}
    return results


def matrix(folder: Path, llm: dict[str, Any]) -> dict[str, tuple[str, dict[str, Any], dict[str, str]]]:
    """The cases of MATRIX."""
    shape = folder / "mla"
    shape.mkdir(exist_ok=True)
    (shape / "config.json").write_text(json.dumps(MLA))
    return {
        name: ("ours", {"llm": {**llm, **more}, "pool_gb": 2, **({"model": str(shape)} if other else {})}, env)
        for name, (more, env, other) in MATRIX.items()
    }


def main() -> int:
    """Check all systems; 1 if ours is wrong."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--systems", default="none,native,ours")
    parser.add_argument("--llm", default="{}", help="JSON of further arguments to LLM, for all systems")
    parser.add_argument("--matrix", action="store_true", help="ours alone, in many configurations")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--logs", type=Path, default=None)
    parser.add_argument("--child", nargs=3)
    options = parser.parse_args()
    if options.child:
        child(options.child[0], json.loads(options.child[1]), options.child[2])
        return 0
    folder = options.logs or Path(tempfile.mkdtemp())
    folder.mkdir(parents=True, exist_ok=True)
    llm = {
        "max_model_len": 2048, "gpu_memory_utilization": 0.2, "kv_cache_memory_bytes": 1 << 30,
        "max_num_batched_tokens": 2048, **json.loads(options.llm),
    }  # fmt: skip
    if options.matrix:
        cases = matrix(folder, {**llm, "gpu_memory_utilization": 0.05})
    else:
        cases = {name: (name, {"llm": llm, "pool_gb": 2}, {}) for name in options.systems.split(",")}
    results = measure(cases, folder)
    report, wrong = write(results, options)
    sys.stdout.write(report)
    if options.out:
        options.out.write_text(report)
    return int(wrong)


def write(results: dict[str, dict[str, Any]], options: argparse.Namespace) -> tuple[str, bool]:
    """(the report as Markdown, whether ours is wrong anywhere)."""
    import vllm

    given = f" --llm '{options.llm}'" if options.llm != "{}" else ""
    what = "--matrix" if options.matrix else f"--systems {options.systems}"
    lines = [
        f"# Is what comes back right? vLLM {vllm.__version__}",
        "",
        f"`python benchmarks/gpu/verify.py {what}{given}`, {time.strftime('%Y-%m-%d')}. "
        "Moves are of log-probabilities.",
        "",
    ]
    failed = {name: result["error"] for name, result in results.items() if "error" in result}
    lines += [f"{NAMES.get(name, name)} did not run: `{error[:300]}`\n" for name, error in failed.items()]
    ran = {name: result for name, result in results.items() if name not in failed}
    lines += [*table(ran), ""]
    own = ran.get("none", {}).get("hit move")
    faults = []
    for name, result in ran.items():
        if result["pages"]:
            faults += [f"{NAMES.get(name, name)}: {fault}" for fault in judge(result, own)]
    faults += [f"{name} did not run" for name in failed if options.matrix or name == "ours"]
    lines.append("Ours: " + ("; ".join(faults) if faults else "passes") + ".")
    return "\n".join(lines) + "\n", bool(faults)


if __name__ == "__main__":
    sys.exit(main())
