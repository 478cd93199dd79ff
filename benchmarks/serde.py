"""What coding a chunk costs: each stage of `serde` alone and in one thread, beside others' code for the same.

python benchmarks/serde.py [--sizes 32,4] [--rounds 20] [--out FILE]

Rates are of a chunk's own bytes, not of what they become, by the thread's processor time: what one core does, whoever
else is there. In each round all ways take turns in another order. torch has one thread, and no scales: it casts to
float8_e4m3fn and back. AESGCM is cryptography's call for a whole message.
"""

from __future__ import annotations

import argparse
import os
import platform
import random
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from lmcache_ext.cli.rounds import MIB, buffers, interval
from lmcache_ext.tiers import Options, Parts
from lmcache_ext.tiers.header import digest
from lmcache_ext.tiers.serde import Serde

sys.path.insert(0, str(Path(__file__).resolve().parent))
from report import say

CHAINS = ("aesgcm", "fp8", "fp8,aesgcm")
KEY = bytes(32)


def core_seconds(call: Callable[[], object]) -> float:
    """Processor time of this thread."""
    began = time.thread_time()
    call()
    return time.thread_time() - began


def numbers(nbytes: int) -> memoryview:
    """KV as it might be, bf16."""
    (view,) = buffers(1, nbytes)
    tensor = torch.frombuffer(view, dtype=torch.bfloat16)
    tensor.copy_(torch.randn(nbytes // 2))
    return view


def ways_of(serde: Serde, parts: Parts) -> tuple[Callable[[], float], Callable[[], float]]:
    """(encode, decode); what is decoded is copied into place first, as a medium does, which is not measured."""
    coded = [bytes(part) for part in serde.encode(KEY, parts)]
    into = [memoryview(bytearray(part.nbytes)) for part in parts]

    def decode() -> float:
        room = serde.room(into)
        for view, data in zip(room, coded, strict=True):
            view[:] = data
        return core_seconds(lambda: serde.decode(KEY, room, into))

    return lambda: core_seconds(lambda: serde.encode(KEY, parts)), decode


def others(parts: Parts) -> dict[tuple[str, str], Callable[[], float]]:
    """The same by other code."""
    seal, nonce, whole = AESGCM(KEY), bytes(12), b"".join(parts)
    sealed = seal.encrypt(nonce, whole, KEY)
    wide = torch.frombuffer(bytearray(whole), dtype=torch.bfloat16)
    narrow = wide.to(torch.float8_e4m3fn)
    return {
        ("AESGCM", "encode"): lambda: core_seconds(lambda: seal.encrypt(nonce, whole, KEY)),
        ("AESGCM", "decode"): lambda: core_seconds(lambda: seal.decrypt(nonce, sealed, KEY)),
        ("torch's cast", "encode"): lambda: core_seconds(lambda: wide.to(torch.float8_e4m3fn)),
        ("torch's cast", "decode"): lambda: core_seconds(lambda: narrow.to(torch.bfloat16)),
        ("sum, xxh3-128", "encode"): lambda: core_seconds(lambda: digest(parts)),
    }


def rows_of(size: float, rounds: int, secret: str) -> list[str]:
    """Lines of the table."""
    view = numbers(int(size * MIB))
    half = view.nbytes // 2
    parts = [view[:half], view[half:]]
    ways = others(parts)
    for chain in CHAINS:
        serde = Serde.of(Options(serde=chain, serde_dtype="bf16", serde_key_file=secret))
        ways[chain, "encode"], ways[chain, "decode"] = ways_of(serde, parts)
    rates: dict[tuple[str, str], list[float]] = {way: [] for way in ways}
    for number in range(rounds + 1):
        for way in random.sample(list(ways), len(ways)):
            seconds = ways[way]()
            if number:
                rates[way].append(view.nbytes / seconds / 1e9)
    names = [*CHAINS, "AESGCM", "torch's cast", "sum, xxh3-128"]
    cells = {way: interval(values) for way, values in rates.items()}
    return [
        f"| {name}, {size:g} MiB | {cells[name, 'encode']} | {cells.get((name, 'decode'), 'the same')} |"
        for name in names
    ]


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sizes", default="32,4", help="MiB of a chunk")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--out", type=Path, default=None)
    options = parser.parse_args()
    random.seed(0)
    torch.set_num_threads(1)
    with tempfile.NamedTemporaryFile("w") as secret:
        secret.write("00" * 32)
        secret.flush()
        rows = [row for size in options.sizes.split(",") for row in rows_of(float(size), options.rounds, secret.name)]
    say(
        [
            f"`python benchmarks/serde.py {' '.join(sys.argv[1:])}` on {platform.machine()}, {os.cpu_count()} cores, "
            f"load {os.getloadavg()[0]:.0f}, {time.strftime('%Y-%m-%d')}; one thread, {options.rounds} rounds, bf16, "
            "chunks of two parts.",
            "",
            "| stage | store, GB/s of one core | load, GB/s of one core |",
            "|---|---|---|",
            *rows,
        ],
        options.out,
    )


if __name__ == "__main__":
    main()
