"""Real engines side by side on one GPU: no connector, vLLM's OffloadingConnector, this project, and upstream LMCache
where it runs. One command, one run, one table.

    python benchmarks/gpu/engines.py [--systems none,native,ours] [--pairs 7] [--out FILE] [--tp 1]

All engines live at once and take turns; the order within a pair alternates. A mark is met when the bound of the 95 %
interval of the paired ratios meets it. Llama-3.1-8B's shape with random weights, 128 KiB of KV a token in bf16.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

from pairs import interval, ratios, shown, verdict  # noqa: E402 - beside this file
from report import say  # noqa: E402 - in the folder above
from systems import LLAMA_8B, NAMES, System  # noqa: E402 - beside this file

Times = dict[tuple[str, str], list[float]]  # (system, what) → seconds, by pair
LONG, SHORT, BATCH, BATCH_LENGTH = 32768, 8192, 12, 16384


def link() -> dict[str, float]:
    """GB/s of large pinned copies, measured in a process of its own, which leaves the GPU as it was."""
    code = (
        f"import json, sys; sys.path.insert(0, {str(HERE)!r}); import plane, torch;"
        "print(json.dumps({**plane.ceiling(), 'gpu': torch.cuda.get_device_name(), 'torch': torch.__version__}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    return json.loads(done.stdout.splitlines()[-1])


class Run:
    """The systems, and what was measured of them."""

    def __init__(self, systems: list[System], pairs: int, scale: float) -> None:
        self.systems = systems
        self.pairs = pairs
        self.times: Times = defaultdict(list)
        self.cached: dict[tuple[str, str], int] = {}
        self.longest: Times = defaultdict(list)
        self._scale = scale
        self._seed = 1000

    def length(self, tokens: int) -> int:
        """`tokens` on a GPU; less where this is only tried out."""
        return max(64, int(tokens * self._scale))

    def fresh(self, count: int, length: int) -> list[list[int]]:
        """Prompts that nobody has seen."""
        self._seed += count
        return [[self._seed - i, self.length(length)] for i in range(count)]

    def turns(self, pair: int) -> list[System]:
        """All systems, the other way round in every second pair."""
        return self.systems[::-1] if pair % 2 else self.systems

    def take(self, system: System, what: str, prompts: list[list[int]], tokens: int = 1) -> None:
        """One figure."""
        answer = system.ask("generate", prompts=prompts, tokens=tokens)
        self.times[system.name, what].append(answer["seconds"])
        self.cached[system.name, what] = answer["cached"]

    def prompts_of(self, what: str, count: int, length: int, colds: int) -> None:
        """cold, gpu hit and warm time to first token; only the first `colds` pairs have prompts of their own."""
        prompts: list[list[int]] = []
        for pair in range(self.pairs):
            if pair < colds:
                prompts = self.fresh(count, length)
                for system in self.turns(pair):
                    self.take(system, f"cold {what}", prompts)
                for system in self.systems:
                    system.ask("generate", prompts=prompts)  # the first hit compiles and captures nothing, but be sure
                time.sleep(0.5)  # let stores end: what follows is to see no other copies
            else:
                for system in self.systems:
                    system.ask("generate", prompts=prompts)
            for system in self.turns(pair):
                self.take(system, f"hit {what}", prompts)
            for system in self.turns(pair):
                if system.name != "none":
                    system.ask("forget")
                    self.take(system, f"warm {what}", prompts)

    def use(self, requests: int) -> None:
        """Serve so many requests of random length first: then a prompt's blocks are scattered, as in an engine that has
        run for a while (benchmarks/fragments.py)."""
        rng = random.Random(0)
        prompts = [[500000 + i, self.length(rng.randint(500, 2000))] for i in range(requests)]
        for system in self.systems:
            system.ask("stream", prompts=prompts, at_once=16, tokens=8)
            system.ask("forget")

    def throughput(self) -> None:
        """Random prompts that hit nothing."""
        for pair in range(self.pairs):
            prompts = self.fresh(24, 2048)
            for system in self.turns(pair):
                self.take(system, "random", prompts, tokens=16)

    def grow(self) -> None:
        """16 sequences that decode while a host pool still grows: the first part, if at all; it needs a large pool."""
        for pair in range(self.pairs):
            runners = self.fresh(16, 512)
            for system in self.turns(pair):
                answer = system.ask("decode", runners=runners, tokens=192, others=[], every=1)
                self.times[system.name, "decode while pools grow"].append(answer["seconds"])
                self.longest[system.name, "decode while pools grow"].append(answer["longest"])
            if all(s.grown for s in self.systems if s.name == "ours"):
                print(f"grow: the pool was complete within pair {pair + 1}", file=sys.stderr, flush=True)
                return

    def decode(self) -> None:
        """16 sequences that decode, while others bring KV to store or to load; and alone."""
        warm = self.fresh(8, SHORT)
        for system in self.systems:
            system.ask("generate", prompts=warm)
        for pair in range(self.pairs):
            runners, cold = self.fresh(16, 512), self.fresh(4, 4096)
            for system in self.turns(pair):
                if system.name != "none":
                    system.ask("forget")
                else:
                    system.ask("generate", prompts=warm)  # hits on the GPU: same work, no copies
                for what, others, every in (("loads", warm, 20), ("stores", cold, 24)):
                    answer = system.ask("decode", runners=runners, tokens=192, others=others, every=every)
                    self.times[system.name, f"decode beside {what}"].append(answer["seconds"])
                    self.longest[system.name, f"decode beside {what}"].append(answer["longest"])
                    self.cached[system.name, f"decode beside {what}"] = answer["cached"]


def floor_ratios(run: Run, system: str, what: str, bytes_a_token: float, speed: float) -> list[float]:
    """warm / (gpu hit + bytes / link), by pair; the hit is the one without a connector where that was measured."""
    transfer = run.cached[system, f"warm {what}"] * bytes_a_token / (speed * 1e9)
    hits = run.times.get(("none", f"hit {what}")) or run.times[system, f"hit {what}"]
    return ratios(run.times[system, f"warm {what}"], [hit + transfer for hit in hits])


def share(run: Run, system: str, what: str, bytes_a_token: float, speed: float) -> list[float]:
    """bytes / seconds / link, by pair: the whole time from sending the prompts to the last first token."""
    moved = run.cached[system, f"warm {what}"] * bytes_a_token
    return [moved / seconds / (speed * 1e9) for seconds in run.times[system, f"warm {what}"]]


def marks(run: Run, bytes_a_token: float, speed: float) -> list[str]:
    """The table of marks, for every system that has a cache."""
    cached = [s.name for s in run.systems if s.name != "none"]
    rows: list[tuple[str, float, bool, dict[str, list[float]]]] = []
    whats = {what for _, what in run.times}

    def floors(what: str) -> dict[str, list[float]]:
        return {name: floor_ratios(run, name, what, bytes_a_token, speed) for name in cached}

    for what, mark in (("32k", 1.10), ("8k", 1.15)):
        if f"warm {what}" in whats:
            rows.append((f"warm {what} / (gpu hit + bytes / link)", mark, True, floors(what)))
    if "warm batch" in whats:
        shares = {name: share(run, name, "batch", bytes_a_token, speed) for name in cached}
        rows.append(("batch of 12 x 16k: bytes / seconds / link", 0.93, False, shares))
        rows.append(("batch of 12 x 16k / (gpu hit + bytes / link)", 1.075, True, floors("batch")))

    def against_none(what: str) -> dict[str, list[float]]:
        return {name: ratios(run.times[name, what], run.times["none", what]) for name in cached}

    if ("none", "cold 32k") in run.times:
        rows.append(("cold 32k / no connector", 1.01, True, against_none("cold 32k")))
    rows += [
        (f"16 sequences decode {what} / no connector", 1.02, True, against_none(f"decode {what}"))
        for what in ("beside loads", "beside stores", "while pools grow")
        if ("none", f"decode {what}") in run.times
    ]
    if ("none", "random") in run.times:
        faster = {name: [1 / r for r in values] for name, values in against_none("random").items()}
        rows.append(("random prompts: throughput / no connector", 0.99, False, faster))
    lines = [f"| what | mark | {' | '.join(NAMES[name] for name in cached)} |", f"|---|---|{'---|' * len(cached)}"]
    for what, mark, at_most, values in rows:
        cells = [f"{shown(values[name])} {verdict(values[name], mark, at_most)}" for name in cached]
        lines.append(f"| {what} | {'at most' if at_most else 'at least'} {mark} | {' | '.join(cells)} |")
    return lines


def figures(run: Run, bytes_a_token: float) -> list[str]:
    """Mean milliseconds of everything."""
    names = [s.name for s in run.systems]
    whats = list(dict.fromkeys(what for _, what in run.times))
    lines = [f"| ms, mean [95 %] | {' | '.join(NAMES[n] for n in names)} |", f"|---|{'---|' * len(names)}"]
    for what in whats:
        cells = []
        for name in names:
            times = run.times.get((name, what))
            if not times:
                cells.append("")
                continue
            cell = shown([t * 1e3 for t in times], 1)
            if what.startswith("warm"):
                speed = run.cached[name, what] * bytes_a_token / interval(times)[0] / 1e9
                cell += f", {speed:.1f} GB/s"
            if what == "decode beside loads":
                cell += f", {run.cached[name, what]} tokens of others not computed"
            if longest := run.longest.get((name, what)):
                cell += f", longest step {max(longest) * 1e3:.0f}"
            cells.append(cell)
        lines.append(f"| {what} | {' | '.join(cells)} |")
    return lines


def main() -> None:
    """Start the engines, measure, report."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--systems", default="none,native,ours")
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--colds", type=int, default=None, help="pairs with cold prompts of their own; default: all")
    parser.add_argument("--parts", default="32k,8k,batch,random,decode", help="also grow, first and with a large pool")
    parser.add_argument("--pool-gb", type=float, default=30)
    parser.add_argument("--kv-gb", type=float, default=26.5, help="KV memory of each engine")
    parser.add_argument("--used", type=int, default=0, help="requests served before anything is measured")
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--llm", default="{}", help="JSON of further arguments to LLM, for all systems")
    parser.add_argument("--scale", type=float, default=1.0, help="lengths, to try it out")
    parser.add_argument("--model", default="", help="JSON that changes the model's shape, to try it out")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--logs", type=Path, default=None)
    options = parser.parse_args()
    limit = link() if options.scale == 1 else {"load": 9.0, "store": 9.0, "both": 9.0, "gpu": "no GPU", "torch": ""}
    folder = Path(tempfile.mkdtemp())
    shape = {**LLAMA_8B, **(json.loads(options.model) if options.model else {})}
    (folder / "config.json").write_text(json.dumps(shape))
    llm = {
        "tensor_parallel_size": options.tp, "max_num_batched_tokens": 8192, "gpu_memory_utilization": 0.3,
        "kv_cache_memory_bytes": int(options.kv_gb * 1e9 / options.tp), **json.loads(options.llm),
    }  # fmt: skip
    how = {"llm": llm, "pool_gb": options.pool_gb}
    logs = options.logs or folder
    logs.mkdir(parents=True, exist_ok=True)
    names = options.systems.split(",")
    systems = [System(name, folder, how, logs) for name in names]
    try:
        for system in systems:
            print(f"{system.name}: started in {system.hear()['start']:.0f} s", file=sys.stderr, flush=True)
        run = Run(systems, options.pairs, options.scale)
        for system in systems:  # warm up what the first requests warm up
            for prompts in (run.fresh(1, 2048), run.fresh(3, 4096)):
                system.ask("generate", prompts=prompts, tokens=4)
        run.use(options.used)
        colds = options.colds or options.pairs
        stages = {
            "32k": lambda: run.prompts_of("32k", 1, LONG, colds),
            "8k": lambda: run.prompts_of("8k", 1, SHORT, colds),
            "batch": lambda: run.prompts_of("batch", BATCH, BATCH_LENGTH, 1),
            "random": run.throughput,
            "decode": run.decode,
            "grow": run.grow,
        }
        for part in options.parts.split(","):
            began = time.perf_counter()
            stages[part]()
            print(f"{part}: {time.perf_counter() - began:.0f} s", file=sys.stderr, flush=True)
    finally:
        for system in systems:
            system.close()
    dtype = llm.get("kv_cache_dtype", "bfloat16")
    heads = shape["num_key_value_heads"] * shape["head_dim"] * shape["num_hidden_layers"]
    bytes_a_token = 2 * heads * (1 if "fp8" in str(dtype) else 2) / options.tp
    say(write(run, options, limit, bytes_a_token), options.out)


def write(run: Run, options: argparse.Namespace, limit: dict[str, Any], bytes_a_token: float) -> list[str]:
    """The report, in lines of Markdown."""
    import vllm

    given = f" --llm '{options.llm}'" if options.llm != "{}" else ""
    command = (
        f"python benchmarks/gpu/engines.py --systems {options.systems} --pairs {options.pairs} --parts {options.parts} "
        f"--pool-gb {options.pool_gb:g} --kv-gb {options.kv_gb:g} --used {options.used} --tp {options.tp}{given}"
    )
    return [
        f"# Engines side by side, vLLM {vllm.__version__}",
        "",
        f"`{command}` on {limit['gpu']}, torch {limit['torch']}, {time.strftime('%Y-%m-%d')}. "
        f"Link, measured first: {limit['load']:.1f} GB/s to the GPU, {limit['store']:.1f} back, "
        f"{limit['both']:.1f} both ways. {bytes_a_token / 1024:.0f} KiB of KV a token and rank.",
        "",
        *marks(run, bytes_a_token, limit["load"]),
        "",
        *figures(run, bytes_a_token),
    ]


if __name__ == "__main__":
    main()
