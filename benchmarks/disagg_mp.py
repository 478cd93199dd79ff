"""Time to first token through launch/disagg_mp_mooncake.sh: proxy, prefiller, cache server, decoder. Three minutes.

    python benchmarks/disagg_mp.py [--rounds 7] [--l2 none|mooncake] [--out benchmarks/results/disagg_mp_cpu.md]

Prompts of 3000 tokens on a model with random weights, streamed, one at a time, vLLM's own prefix cache off. *Cold*: the
prefiller computes and stores, the decoder loads. *Warm*: both load. *Directly*: the decoder alone is asked, without
proxy and prefiller; it computes with half of the cores, as the prefiller does.
"""

from __future__ import annotations

import argparse
import copy
import os
import re
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from deployments import LONG, Answer, milliseconds, model, serving, text
from report import say

SCRIPT = "disagg_mp_mooncake.sh"
PORTS = ("PREFILL_PORT", "DECODE_PORT", "TELEMETRY_PORT", "SERVER_PORT", "SERVER_HTTP_PORT", "MASTER_PORT",
         "MASTER_METRICS_PORT")  # fmt: skip
MARK = 0.9  # of a prompt that is known, at least so much is loaded


def expect(answer: Answer, known: bool) -> float:
    """Seconds to its first token. Raises RuntimeError if it did not come as it should."""
    if (answer.cached >= LONG * MARK) != known:
        raise RuntimeError(f"{answer.cached} of {LONG} tokens were loaded")
    return answer.first


def measured(rounds: int, ask: Callable[[str], Answer], seed: int, known: tuple[bool, bool]) -> list[list[float]]:
    """Seconds to first token of new prompts, and of the same once more. `known`: which of the two are loaded."""
    ask(text(seed, LONG))  # what the first request alone does is not measured
    times: list[list[float]] = [[], []]
    for i in range(1, rounds + 1):
        for found, loaded in zip(times, known, strict=True):
            found.append(expect(ask(text(seed + i, LONG)), loaded))
            time.sleep(0.5)  # for the store to end
    return times


def mean_of(port: int, name: str) -> float:
    """A histogram's mean, in seconds."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(f"http://127.0.0.1:{port}/metrics", timeout=30) as answer:
        lines = answer.read().decode()
    total, count = (float(re.findall(rf"^{name}_{end} (\S+)$", lines, re.M)[0]) for end in ("sum", "count"))
    return total / count


def main() -> None:
    """Start it, measure, report."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--port", type=int, default=18500, help="the proxy's; the next seven are the others'")
    parser.add_argument("--l2", default="none", help="the script's L2")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    folder = model(Path(tempfile.mkdtemp()))
    ports = {name: str(options.port + 1 + i) for i, name in enumerate(PORTS)}
    env = {**ports, "L2": options.l2, "L1_SIZE_GB": "2"}
    with serving(SCRIPT, folder, options.port, "--enforce-eager", **env) as made:
        cold, warm = measured(options.rounds, made.ask, 10_000, (True, True))
        handover = mean_of(options.port, "lmcache_proxy_handover_seconds")
        prefill = mean_of(options.port, "lmcache_proxy_prefill_seconds")
        alone = copy.copy(made)
        alone.port = int(ports["DECODE_PORT"])
        alone_cold, alone_warm = measured(options.rounds, alone.ask, 20_000, (False, True))
    lines = [
        "# Prefill and decode apart on plain vllm serve, on a CPU machine",
        "",
        f"`python benchmarks/disagg_mp.py --rounds {options.rounds} --l2 {options.l2}` on {os.cpu_count()} cores, "
        f"{time.strftime('%Y-%m-%d')}. Each time: mean (least to most), in ms.",
        "",
        f"| time to first token, {LONG} tokens | ms |",
        "|---|---|",
        f"| through proxy and prefiller, cold | {milliseconds(cold)} |",
        f"| through proxy and prefiller, warm in the server | {milliseconds(warm)} |",
        f"| the decoder directly, cold | {milliseconds(alone_cold)} |",
        f"| the decoder directly, warm in the server | {milliseconds(alone_warm)} |",
        "",
        f"Of a request through the proxy, cold and warm together: {prefill * 1e3:.0f} ms until the prefiller's answer, "
        f"{handover * 1e3:.1f} ms more until its report that all is stored.",
    ]
    say(lines, options.out)


if __name__ == "__main__":
    main()
