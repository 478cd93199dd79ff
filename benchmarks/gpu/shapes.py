"""Two shapes of real traffic on the engines that `engines.py` compares: long documents with questions, at hit rates
from 0 to 100 %, and chats of several rounds that no longer fit the GPU's own cache. Needs a GPU; about five minutes.

    python benchmarks/gpu/shapes.py [--systems none,native,ours] [--out FILE]

*Long documents*: each question brings a document of 10,000 tokens; a share of the documents was asked about before, and
vLLM's own cache was emptied since. Eight questions are under way at once.
*Chats*: more users than the GPU's cache holds, each with a history of 8,000 tokens that grows by 300 a round, in turns.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

from engines import link  # noqa: E402 - beside this file
from report import say  # noqa: E402 - in the folder above
from systems import LLAMA_8B, NAMES, System  # noqa: E402 - beside this file

DOCUMENT, QUESTION, DOCUMENTS, AT_ONCE = 10000, 100, 16, 8
HISTORY, GROWTH, ROUNDS, USERS = 8000, 300, 3, 24
SHARES = (0, 25, 50, 75, 100)
Rows = dict[str, dict[str, dict[str, Any]]]  # row → system → answer


def documents(systems: list[System], scale: float) -> Rows:
    """Mean time to first token and throughput at each hit rate."""
    rows: Rows = {}
    seed = 50000
    for share in SHARES:
        seed += 2 * DOCUMENTS
        known = [seed + i for i in range(DOCUMENTS * share // 100)]
        # [seed of the question, its length, seed of the document, its length], known ones spread among the others
        asked = [
            [seed + 1000 + i, int(QUESTION * scale), seed + i, int(DOCUMENT * scale)]
            for i in sorted(range(DOCUMENTS), key=lambda i: (i * 7) % DOCUMENTS)
        ]
        row = rows.setdefault(f"long documents, {share} % known", {})
        for system in systems:
            if known:
                warm = [[1, int(QUESTION * scale), document, int(DOCUMENT * scale)] for document in known]
                system.ask("generate", prompts=warm)
            system.ask("forget")
            row[system.name] = system.ask("stream", prompts=asked, at_once=AT_ONCE, tokens=16)
    return rows


def chats(systems: list[System], scale: float) -> Rows:
    """Mean time to first token by round. A round's prompt is the last round's and what came since."""
    rows: Rows = {}
    for round_ in range(ROUNDS):
        row = rows.setdefault(f"chat of {USERS} users, round {round_ + 1}", {})
        for system in systems:
            asked = [
                [90000 + user, int((HISTORY + GROWTH * round_) * scale), 0, 0] for user in range(USERS)
            ]  # one seed: a longer prompt begins with the shorter one
            row[system.name] = system.ask("stream", prompts=asked, at_once=AT_ONCE, tokens=16)
    return rows


def main() -> None:
    """Start the engines, run both shapes, report."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--systems", default="none,native,ours")
    parser.add_argument("--pool-gb", type=float, default=40)
    parser.add_argument("--kv-gb", type=float, default=22, help="KV memory of each engine: too small for all chats")
    parser.add_argument("--llm", default="{}", help="JSON of further arguments to LLM, for all systems")
    parser.add_argument("--scale", type=float, default=1.0, help="lengths, to try it out")
    parser.add_argument("--model", default="{}", help="JSON that changes the model's shape, to try it out")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    limit = link() if options.scale == 1 else {"load": 9.0, "gpu": "no GPU"}
    folder = Path(tempfile.mkdtemp())
    (folder / "config.json").write_text(json.dumps({**LLAMA_8B, **json.loads(options.model)}))
    llm = {
        "max_num_batched_tokens": 8192, "gpu_memory_utilization": 0.3,
        "kv_cache_memory_bytes": int(options.kv_gb * 1e9), **json.loads(options.llm),
    }  # fmt: skip
    how = {"llm": llm, "pool_gb": options.pool_gb}
    systems = [System(name, folder, how, folder) for name in options.systems.split(",")]
    try:
        for system in systems:
            system.hear()
            system.ask("generate", prompts=[[5, 2000], [6, 2000]], tokens=4)
        rows = {**documents(systems, options.scale), **chats(systems, options.scale)}
    finally:
        for system in systems:
            system.close()
    names = [system.name for system in systems]
    lines = [
        "# Two shapes of traffic",
        "",
        f"`python benchmarks/gpu/shapes.py --systems {options.systems} --pool-gb {options.pool_gb:g} "
        f"--kv-gb {options.kv_gb:g}` on {limit['gpu']}, link {limit['load']:.1f} GB/s, {time.strftime('%Y-%m-%d')}. "
        f"One run. Mean time to first token in ms (its largest), seconds for all, share of prompt tokens not computed.",
        "",
        f"| what | {' | '.join(NAMES[name] for name in names)} |",
        f"|---|{'---|' * len(names)}",
    ]
    for what, row in rows.items():
        cells = []
        for name in names:
            answer = row[name]
            first = [t * 1e3 for t in answer["first"]]
            share = answer["cached"] / answer["tokens"]
            cells.append(
                f"{statistics.mean(first):.0f} ({max(first):.0f}) ms, {answer['seconds']:.2f} s, {share:.0%} cached"
            )
        lines.append(f"| {what} | {' | '.join(cells)} |")
    say(lines, options.out)


if __name__ == "__main__":
    main()
