"""The S3 tier beside its bare client, and NIXL's POSIX plugin beside the disk tier and bare O_DIRECT.

python benchmarks/tiers_s3.py [--sizes 32,4] [--threads 8] [--rounds 8] [--folder /var/tmp/...] [--out FILE]

The S3 server is a loopback process that keeps bodies in memory and checks nothing, so that it is the client that is
measured. In each round all ways take turns in another order; ratios are those within rounds.
"""

from __future__ import annotations

import argparse
import os
import platform
import random
import shutil
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lmcache_ext.cli.raw import Bucket, Files
from lmcache_ext.cli.rounds import MIB, buffers, finish, interval, timed
from lmcache_ext.ports import free_port
from lmcache_ext.tiers import Tier, open_tier

sys.path.insert(0, str(Path(__file__).resolve().parent))
from report import say

Ways = Mapping[str, Callable[[], float]]  # name of a way → seconds for one round of it
_EMPTY = b"<ListBucketResult><IsTruncated>false</IsTruncated><KeyCount>0</KeyCount></ListBucketResult>"


def serve(client: socket.socket, objects: dict[bytes, bytearray], spare: list[bytearray]) -> None:
    """Answer one connection's requests: PUT, GET, DELETE, and a listing that is always empty.

    `spare` has bodies to fill again: fresh memory would cost more than the transfer.
    """
    client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    rest = b""
    while True:
        while b"\r\n\r\n" not in rest:
            more = client.recv(65536)
            if not more:
                return
            rest += more
        head, _, rest = rest.partition(b"\r\n\r\n")
        verb, target, _ = head.split(b"\r\n")[0].split(b" ", 2)
        name, _, query = target.partition(b"?")
        body: bytes | bytearray = b""
        status = b"200 OK"
        if verb == b"PUT":
            sizes = [line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")]
            nbytes = int(sizes[0].partition(b":")[2])
            kept = spare.pop() if spare else objects.pop(name, bytearray())
            if len(kept) != nbytes:
                kept = bytearray(nbytes)
            kept[: len(rest)] = rest
            at, rest = len(rest), b""
            while at < nbytes:
                at += client.recv_into(memoryview(kept)[at:])
            objects[name] = kept
        elif verb == b"DELETE":
            spare.append(objects.pop(name, bytearray()))
        elif b"list-type" in query:
            body = _EMPTY
        elif name in objects:
            body = objects[name]
        else:
            status = b"404 Not Found"
        about = b'ETag: "x"\r\nLast-Modified: Thu, 26 Nov 2026 00:00:00 GMT\r\n'
        client.sendall(b"HTTP/1.1 %b\r\n%bContent-Length: %d\r\n\r\n" % (status, about, len(body)))
        if verb != b"HEAD":
            client.sendall(body)


def server(port: int) -> None:
    """Serve until killed."""
    kept: tuple[dict[bytes, bytearray], list[bytearray]] = ({}, [])
    with socket.create_server(("127.0.0.1", port)) as listener:
        while True:
            client, _ = listener.accept()
            threading.Thread(target=serve, args=(client, *kept), daemon=True).start()


def bare(endpoint: str, threads: int) -> Bucket:
    """obstore alone."""
    from obstore.store import S3Store

    config: Any = {"endpoint": endpoint, "region": "us-east-1", "virtual_hosted_style_request": False}
    config |= {"access_key_id": "k", "secret_access_key": "s", "unsigned_payload": True}
    return Bucket(S3Store("bare", config=config, client_options={"allow_http": True}), "bench", threads)


class Own:
    """A tier of ours, with one chunk of two parts for each buffer."""

    def __init__(self, tier: Tier, memory: list[memoryview]) -> None:
        self.tier = tier
        self.chunks = [[view[: view.nbytes // 2], view[view.nbytes // 2 :]] for view in memory]
        self.keys = [random.randbytes(32) for _ in memory]

    def store(self) -> float:
        """Seconds to store all under new keys."""
        self.tier.delete(self.keys)
        finish(self.tier, 1)
        self.keys = [random.randbytes(32) for _ in self.chunks]
        return timed(lambda: self._all(self.tier.submit_store))

    def load(self) -> float:
        """Seconds to load them."""
        return timed(lambda: self._all(self.tier.submit_load))

    def _all(self, submit: Callable[..., int]) -> None:
        for key, parts in zip(self.keys, self.chunks, strict=True):
            submit([key], [parts], 60.0)
        finish(self.tier, len(self.keys))


def compare(what: str, size: str, nbytes: int, rounds: int, ways: list[tuple[str, Ways]]) -> list[str]:
    """Rows of the table: each way's GB/s, and its share of the first way's within rounds."""
    rates: dict[tuple[str, str], list[float]] = {}
    for number in range(rounds + 1):
        for verb in ("store", "load"):
            for name, each in ways if number % 2 else reversed(ways):
                rate = nbytes / each[verb]() / 1e9
                if number:  # the first round warms up
                    rates.setdefault((verb, name), []).append(rate)
    rows = []
    for verb in ("store", "load"):
        first = rates[verb, ways[0][0]]
        for name, _ in ways:
            mine = rates[verb, name]
            ratio = statistics.median(a / b for a, b in zip(mine, first, strict=True))
            rows.append(f"| {what}, {verb}, {size} | {name} | {interval(mine)} | {ratio:.2f} |")
    return rows


def s3_rows(options: argparse.Namespace, size: float, memory: list[memoryview]) -> list[str]:
    """The tier beside its client."""
    port = free_port()
    process = subprocess.Popen([sys.executable, __file__, "--serve", str(port)])
    try:
        endpoint = f"http://127.0.0.1:{port}"
        while socket.socket().connect_ex(("127.0.0.1", port)):
            time.sleep(0.05)
        url = f"s3://k:s@kv/bench?endpoint={endpoint}&region=us-east-1"
        tier = open_tier(url, threads=options.threads, store_queue=4096, load_queue=4096)
        client, own = bare(endpoint, options.threads), Own(tier, memory)
        ways: list[tuple[str, Ways]] = [
            ("obstore alone", {"store": lambda: client.write(memory), "load": lambda: client.read(memory)}),
            ("s3 tier", {"store": own.store, "load": own.load}),
        ]
        rows = compare("S3", f"{size:g} MiB", len(memory) * memory[0].nbytes, options.rounds, ways)
        tier.close(10)
        return rows
    finally:
        process.kill()
        process.wait(timeout=10)


def file_rows(options: argparse.Namespace, size: float, memory: list[memoryview]) -> list[str]:
    """Raw O_DIRECT, the disk tier, and NIXL's POSIX plugin, on one disk."""
    raw = Files([options.folder / "raw"], options.threads)
    urls = {"disk tier": f"file://{options.folder}/disk", "nixl posix": f"nixl://posix{options.folder}/nixl"}
    urls["nixl posix, io_uring"] = f"nixl://posix{options.folder}/uring?backend_params=use_uring:true"
    tiers = {
        name: open_tier(url, threads=options.threads, store_queue=4096, load_queue=4096) for name, url in urls.items()
    }
    ways: list[tuple[str, Ways]] = [
        ("raw O_DIRECT", {"store": lambda: (raw.clear(), raw.write(memory))[1], "load": lambda: raw.read(memory)})
    ]
    for name, tier in tiers.items():
        own = Own(tier, memory)
        ways.append((name, {"store": own.store, "load": own.load}))
    try:
        return compare("file", f"{size:g} MiB", len(memory) * memory[0].nbytes, options.rounds, ways)
    finally:
        for tier in tiers.values():
            tier.close(10)
        shutil.rmtree(options.folder)


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path("/var/tmp/lmcache-ext-tiers-s3"), help="on the disk")
    parser.add_argument("--sizes", default="32,4", help="MiB of a chunk")
    parser.add_argument("--mib", type=int, default=512, help="MiB moved each way in a round")
    parser.add_argument("--threads", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--serve", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=None)
    options = parser.parse_args()
    if options.serve:
        server(options.serve)
    random.seed(0)
    rows = []
    for size in map(float, options.sizes.split(",")):
        memory = buffers(max(options.threads, int(options.mib / size)), int(size * MIB))
        rows += s3_rows(options, size, memory) + file_rows(options, size, memory)
    say(
        [
            f"`python benchmarks/tiers_s3.py {' '.join(sys.argv[1:])}` on {platform.machine()},",
            f"{os.cpu_count()} cores, {time.strftime('%Y-%m-%d')}; {options.threads} threads, {options.rounds} rounds, "
            "chunks of two parts.",
            "",
            "| what | way | GB/s | share of the first |",
            "|---|---|---|---|",
            *rows,
        ],
        options.out,
    )


if __name__ == "__main__":
    main()
