"""What the cache adds to an engine's start, with a large pool. Needs a GPU.

    python benchmarks/gpu/start.py [--pairs 7] [--pool-gb 60] [--out FILE]

A small model, so that a start is short and what is added stands out; without a connector and with ours, in turns. The
pool is taken and pinned behind the start, so the time until it is whole is told, too.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

from pairs import shown, verdict  # noqa: E402 - beside this file
from report import say  # noqa: E402 - in the folder above
from systems import LLAMA_8B, NAMES, System  # noqa: E402 - beside this file

_WHOLE = re.compile(r"is complete after ([0-9.]+) s")


def main() -> None:
    """Start, stop, report."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--pool-gb", type=float, default=60)
    parser.add_argument("--llm", default="{}", help="JSON of further arguments to LLM")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp())
    (folder / "config.json").write_text(json.dumps({**LLAMA_8B, "num_hidden_layers": 2}))
    llm = {"gpu_memory_utilization": 0.3, "kv_cache_memory_bytes": 4 << 30, "max_num_batched_tokens": 8192}
    how = {"llm": {**llm, **json.loads(options.llm)}, "pool_gb": options.pool_gb}
    seconds: dict[str, list[float]] = {"none": [], "ours": []}
    whole: list[float] = []
    for pair in range(-1, options.pairs):  # the first pair fills the compile cache
        for name in ("none", "ours") if pair % 2 else ("ours", "none"):
            system = System(name, folder, how, folder)
            taken = system.hear()["start"]
            system.ask("generate", prompts=[[pair + 2, 300]])
            system.close()
            if pair >= 0:
                seconds[name].append(taken)
                whole += [float(found) for found in _WHOLE.findall(system.log.read_text())]
            print(f"{pair} {name}: {taken:.1f} s", file=sys.stderr, flush=True)
        if pair >= 0:  # after each, because all of it takes a quarter of an hour
            say(report(seconds, whole, options), options.out)


def report(seconds: dict[str, list[float]], whole: list[float], options: argparse.Namespace) -> list[str]:
    """The table, in lines of Markdown."""
    more = [ours - none for ours, none in zip(seconds["ours"], seconds["none"], strict=True)]
    return [
        "# Engine start with a large pool",
        "",
        f"`python benchmarks/gpu/start.py --pairs {len(more)} --pool-gb {options.pool_gb:g} --llm '{options.llm}'`, "
        f"{time.strftime('%Y-%m-%d')}. Two layers of Llama-3.1-8B's shape.",
        "",
        "| what | seconds, mean [95 %] | mark |",
        "|---|---|---|",
        *(f"| {NAMES[name]} | {shown(taken, 2)} | |" for name, taken in seconds.items()),
        f"| more with ours | {shown(more, 2)} | at most 2: {verdict(more, 2.0)} |",
        f"| pool whole after, where the engine lived that long | {shown(whole, 1) if whole else 'never'} | |",
    ]


if __name__ == "__main__":
    main()
