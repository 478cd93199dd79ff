"""Hit rate and time of every eviction policy, beside the best that any could do.

python benchmarks/policies.py [--scale 1] [--seed 0] [--trace FILE.jsonl ...] [--out FILE.md]

Requests go through the real directory one after the other, touched as the connector touches them. `--trace` replays
files in the format of the Mooncake traces (github.com/kvcache-ai/Mooncake, FAST25-release/traces) instead of the
generated workloads, which have their shape: see docs/policies.md.
"""

from __future__ import annotations

import argparse
import heapq
import itertools
import json
import math
import os
import platform
import random
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from lmcache_ext.engine import Chunk, Directory
from lmcache_ext.policies import POLICIES, EvictionPolicy

sys.path.insert(0, str(Path(__file__).resolve().parent))
from report import say

BLOCK, CHUNK = 512, 256  # tokens
STEP = 32  # chunks that an engine computes, and stores, at a time: 8,192 tokens
TIMED = 3_000  # requests
SIZES = (1_000, 4_000, 16_000, 64_000)  # chunks: 0.26 to 16.4 million tokens
Trace = list[list[int]]  # one request: the ids of its blocks, a prefix's ids are equal in all requests that have it

# -- workloads -------------------------------------------------------------------------------------------------------


class Blocks:
    """Hands out fresh block ids."""

    def __init__(self) -> None:
        self._next = itertools.count()

    def fresh(self, tokens: float) -> list[int]:
        """Blocks for `tokens`, at least one."""
        return list(itertools.islice(self._next, max(1, math.ceil(tokens / BLOCK))))


def sessions(
    requests: int,
    rng: random.Random,
    blocks: Blocks,
    rate: float,
    first: Callable[[], list[int]],
    again: float,
    growth: tuple[float, float],
    pause: tuple[float, float],
) -> Trace:
    """Sessions that begin at random, `rate` a second, with the blocks that `first` makes. Each request is followed by
    another with probability `again`, after a `pause` in seconds, that appends `growth` tokens; both are the median and
    the width of a log-normal distribution. A request's last block is not full, so the next has another in its place.
    """
    due: list[tuple[float, int, list[int]]] = []  # when, tie breaker, the history
    clock = 0.0
    trace: Trace = []
    while len(trace) < requests:
        if not due or due[0][0] > clock:
            clock += rng.expovariate(rate)
            heapq.heappush(due, (clock, len(trace), first()))
        when, _, history = heapq.heappop(due)
        trace.append(history)
        if rng.random() < again:
            grown = history[:-1] + blocks.fresh(BLOCK + rng.lognormvariate(math.log(growth[0]), growth[1]))
            heapq.heappush(due, (when + rng.lognormvariate(math.log(pause[0]), pause[1]), len(trace), grown))
    return trace


def conversation(requests: int, rng: random.Random) -> Trace:
    """Chats: a shared block, a heavy-tailed first prompt, turns that append, minutes apart; 3.4 requests a second."""
    blocks = Blocks()
    system = blocks.fresh(BLOCK)

    def first() -> list[int]:
        return system + blocks.fresh(min(rng.lognormvariate(math.log(5_000), 1.3), 120_000))

    return sessions(requests, rng, blocks, 2.0, first, 0.41, (700, 1.2), (170, 1.2))


def tool_agent(requests: int, rng: random.Random) -> Trace:
    """Agents: a tool's long prompt, shared by all who use it (Zipf), then own input, and steps that append soon."""
    blocks = Blocks()
    system = blocks.fresh(BLOCK)
    tools = [blocks.fresh(min(rng.lognormvariate(math.log(3_500), 0.7), 20_000)) for _ in range(200)]
    weights = [1 / (rank + 1) for rank in range(len(tools))]

    def first() -> list[int]:
        own = blocks.fresh(min(rng.lognormvariate(math.log(2_000), 1.3), 60_000))
        shared = rng.choices(tools, weights)[0] if rng.random() < 0.65 else system
        return shared + own

    return sessions(requests, rng, blocks, 5.0, first, 0.25, (400, 1.0), (20, 1.5))


def synthetic(requests: int, rng: random.Random) -> Trace:
    """Long documents that are asked about again at any time, and short chats without a shared block; Poisson."""
    blocks = Blocks()
    documents = [blocks.fresh(rng.uniform(2_000, 45_000)) for _ in range(requests // 6)]
    trace: Trace = []
    while len(trace) < requests:
        if rng.random() < 0.35:
            trace.append(blocks.fresh(rng.lognormvariate(math.log(60), 1.2)))
        else:
            trace.append(rng.choice(documents) + blocks.fresh(rng.lognormvariate(math.log(200), 1.0)))
    return trace


def scans(requests: int, rng: random.Random) -> Trace:
    """Assistants with long instructions (Zipf over 400), and as many long documents that are read once."""
    blocks = Blocks()
    assistants = [blocks.fresh(rng.uniform(2_000, 14_000)) for _ in range(400)]
    weights = [1 / (rank + 1) ** 0.8 for rank in range(len(assistants))]
    trace: Trace = []
    while len(trace) < requests:
        if rng.random() < 0.5:
            trace.append(blocks.fresh(rng.uniform(8_000, 60_000)))
        else:
            trace.append(rng.choices(assistants, weights)[0] + blocks.fresh(rng.lognormvariate(math.log(300), 1.0)))
    return trace


def loop(requests: int, rng: random.Random) -> Trace:
    """400 documents of about 8k tokens, asked one question each, round after round."""
    blocks = Blocks()
    documents = [blocks.fresh(rng.uniform(4_000, 12_000)) for _ in range(400)]
    return [documents[i % len(documents)] + blocks.fresh(BLOCK) for i in range(requests)]


def recorded(file: Path) -> Trace:
    """A trace in Mooncake's format: JSON lines with `hash_ids`."""
    return [json.loads(line)["hash_ids"] for line in file.read_text().splitlines() if line.strip()]


WORKLOADS: dict[str, tuple[Callable[[int, random.Random], Trace], int]] = {
    "conversation": (conversation, 12_031),
    "tool & agent": (tool_agent, 23_608),
    "synthetic": (synthetic, 3_993),
    "scans": (scans, 4_000),
    "loop": (loop, 4_000),
}


def chunked(trace: Trace) -> list[list[bytes]]:
    """Keys of chunks, head first: a block is BLOCK / CHUNK chunks."""
    parts = BLOCK // CHUNK
    names: dict[int, list[bytes]] = {}
    for request in trace:
        for block in request:
            if block not in names:
                names[block] = [(block * parts + i).to_bytes(32, "little") for i in range(parts)]
    return [[key for block in request for key in names[block]] for request in trace]


# -- measuring -------------------------------------------------------------------------------------------------------


def hits(trace: list[list[bytes]], policy: EvictionPolicy, size: int) -> int:
    """Chunks found, a chain only up to its first miss, in a pool of `size` chunks."""
    directory = Directory(policy)
    directory.grow(size)
    total = 0
    for keys in trace:
        found = directory.match(keys)
        held = directory.lease(keys[:found])
        assert held is not None
        for start in range(0, len(keys), STEP):
            step = [directory.prepare_store(key, CHUNK) for key in keys[start : start + STEP]]
            for chunk in step:
                if isinstance(chunk, Chunk):
                    directory.complete_store(chunk, True)
        directory.release(held)
        directory.touch(reversed(keys))
        total += found
    return total


def optimum(trace: list[list[bytes]], size: int) -> int:
    """Chunks that Belady's policy finds: it evicts what is needed latest, or does not store it at all.

    A bound for every policy here, and not a tight one: it may find a chunk whose chain's head is gone.
    """
    flat = [key for keys in trace for key in keys]
    never = len(flat)
    upcoming, seen = [never] * never, dict[bytes, int]()
    for i in range(never - 1, -1, -1):
        upcoming[i] = seen.get(flat[i], never)
        seen[flat[i]] = i
    pool: dict[bytes, int] = {}  # key → when it is needed next
    latest: list[tuple[int, bytes]] = []  # heap of (-when, key), also of pairs that are out of date
    total = 0
    for key, when in zip(flat, upcoming, strict=True):
        total += pool.pop(key, None) is not None
        if when < never:
            pool[key] = when
            heapq.heappush(latest, (-when, key))
        while len(pool) > size:
            then, victim = heapq.heappop(latest)
            if pool.get(victim) == -then:
                del pool[victim]
    return total


class Recorder(EvictionPolicy):
    """Writes down what the directory asks of a policy."""

    def __init__(self, policy: EvictionPolicy) -> None:
        self._policy = policy
        self.calls: list[tuple[str, bytes]] = []

    def insert(self, key: bytes) -> None:
        self.calls.append(("insert", key))
        self._policy.insert(key)

    def touch(self, key: bytes) -> None:
        self.calls.append(("touch", key))
        self._policy.touch(key)

    def remove(self, key: bytes) -> None:
        self.calls.append(("remove", key))
        self._policy.remove(key)

    def victims(self) -> Iterator[bytes]:
        self.calls.append(("victims", b""))
        return self._policy.victims()

    def __len__(self) -> int:
        return len(self._policy)


def first_victim(policy: EvictionPolicy, _: bytes) -> bytes:
    """Whom the policy would evict."""
    return next(iter(policy.victims()))


def nanoseconds(calls: list[tuple[str, bytes]], new: type[EvictionPolicy]) -> float:
    """Mean CPU time of one call, the loop around it included; the best of three rounds."""
    best = math.inf
    for _ in range(3):
        policy = new()
        verbs: dict[str, Callable[[bytes], object]] = {
            "insert": policy.insert,
            "touch": policy.touch,
            "remove": policy.remove,
            "victims": partial(first_victim, policy),
        }
        bound = [(verbs[verb], key) for verb, key in calls]
        began = time.thread_time()
        for call, key in bound:
            call(key)
        best = min(best, time.thread_time() - began)
    return best / len(calls) * 1e9


# -- reporting -------------------------------------------------------------------------------------------------------


def table(head: str, rows: dict[str, list[str]]) -> list[str]:
    """Markdown with one column for each pool size."""
    columns = [f"{size:,} chunks" for size in SIZES]
    lines = [f"| {' | '.join([head, *columns])} |", "|" + "---|" * (len(columns) + 1)]
    return [*lines, *(f"| {' | '.join([name, *cells])} |" for name, cells in rows.items())]


def workload(name: str, blocks: Trace) -> list[str]:
    """Hit rates of one workload."""
    trace = chunked(blocks)
    total = sum(map(len, trace))
    unique = len({key for keys in trace for key in keys})
    ceiling = optimum(trace, unique) / total
    rows = {
        policy: [f"{hits(trace, POLICIES.get(policy)(), size) / total:.1%}" for size in SIZES] for policy in POLICIES
    }
    rows["optimum"] = [f"{optimum(trace, size) / total:.1%}" for size in SIZES]
    return [
        f"## {name}",
        "",
        f"{len(trace):,} requests of {total * CHUNK / len(trace):,.0f} tokens on average, {unique:,} chunks in all; "
        f"a pool without end finds {ceiling:.1%}.",
        "",
        *table("hit rate", rows),
        "",
    ]


def times(name: str, blocks: Trace) -> list[str]:
    """Nanoseconds of one call."""
    trace = chunked(blocks[:TIMED])
    rows: dict[str, list[str]] = {policy: [] for policy in POLICIES}
    for policy, size in itertools.product(rows, SIZES):
        recorder = Recorder(POLICIES.get(policy)())
        hits(trace, recorder, size)
        rows[policy].append(f"{nanoseconds(recorder.calls, POLICIES.get(policy)):.0f} ns")
    return [
        "## Time of one call",
        "",
        f'The calls that the directory makes in the first {len(blocks[:TIMED]):,} requests of "{name}", replayed '
        "without the directory. CPU time, the loop around the calls included, best of three rounds.",
        "",
        *table("mean of insert, touch, remove, victims", rows),
    ]


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--scale", type=float, default=1.0, help="share of the requests")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--trace", type=Path, nargs="*", default=[])
    parser.add_argument("--out", type=Path, default=None)
    options = parser.parse_args()
    traces = {file.stem: recorded(file) for file in options.trace} or {
        name: make(max(1, int(count * options.scale)), random.Random(options.seed))
        for name, (make, count) in WORKLOADS.items()
    }
    said = " ".join(["--trace", *traces]) if options.trace else f"--scale {options.scale:g} --seed {options.seed}"
    lines = [
        "# Eviction policies",
        "",
        f"`python benchmarks/policies.py {said}` on {platform.machine()}, {os.cpu_count()} "
        f"cores, Python {platform.python_version()}, {time.strftime('%Y-%m-%d')}. Chunks of {CHUNK} tokens. A hit is a "
        "chunk that is found and whose chain is found up to it. What the workloads are and what follows from the "
        "figures: [docs/policies.md](../../docs/policies.md).",
        "",
    ]
    for name, trace in traces.items():
        lines += workload(name, trace)
    say([*lines, *times(*next(iter(traces.items())))], options.out)


if __name__ == "__main__":
    main()
