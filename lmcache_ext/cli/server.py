"""`lmcache-ext server`: the cache that all engines of a host share, with the flags of `lmcache server`."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from typing import Any

from lmcache_ext.errors import ConfigError

REFUSED = {
    "--l1-manager": "host memory is what there is; use --l1-size-gb",
    "--gds-l1-path": "GPU memory to files is not done by the server",
    "--l1-init-size-gb": "memory is taken as it is touched; --no-l1-use-lazy takes all of it at the start",
    "--l1-align-bytes": "parts lie on memory pages",
    "--l1-use-hugepages": "not done yet",
    "--l1-write-ttl-seconds": "a reservation ends with its writer, never by time",
    "--l1-read-ttl-seconds": "a lease ends with its reader, never by time",
    "--eviction-trigger-watermark": "eviction happens when room is needed",
    "--eviction-ratio": "eviction happens when room is needed",
    "--l2-store-policy": "chunks are written to all tiers",
    "--l2-prefetch-policy": "chunks that came from a tier stay in host memory",
    "--l2-prefetch-max-in-flight": "half of host memory is the bound",
    "--max-workers": "one thread answers; clients move their own bytes",
    "--max-gpu-workers": "the server uses no GPU",
    "--max-cpu-workers": "one thread answers; clients move their own bytes",
    "--isolated-ipc": "there is no CUDA IPC",
    "--shm-name": "the memory has no name; clients learn where it is",
    "--separate-object-groups": "hybrid models are not cached",
    "--worker-reap-timeout-seconds": "who is silent is not reaped, but who is proven dead",
    "--session-ttl-seconds": "a session ends with its client",
    "--worker-registration-grace-seconds": "a session ends with its client",
    "--enable-segmented-prefix": "not done",
    "--enable-dedup-content": "not done",
    "--enable-blend-reorder": "CacheBlend is not done",
    "--kv-event-log-size": "events come from engines",
    "--null-block-id": "the server does not know blocks",
    "--run-script-api-enabled": "no code is taken over the network",
    "--p2p-advertise-url": "peer to peer is not done",
    "--p2p-listen-url": "peer to peer is not done",
    "--p2p-lookup-timeout": "peer to peer is not done",
    "--p2p-load-timeout": "peer to peer is not done",
    "--p2p-transfer-engine": "peer to peer is not done",
    "--prometheus-port": "metrics are at /metrics of --http-port",
    "--otlp-endpoint": "there is no OpenTelemetry; scrape /metrics",
    "--enable-tracing": "there is no tracing",
    "--metrics-sample-rate": "everything is counted",
    "--disable-metrics": "counting costs nothing",
    "--trace-level": "there is no tracing",
    "--trace-output": "there is no tracing",
}
"""Flags of upstream's that are not taken, and why."""


class _Refuse(argparse.Action):
    """Ends with the reason."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: Any, values: Any, option_string: str | None = None
    ) -> None:
        parser.error(f"{option_string}: {REFUSED[self.option_strings[0]]}; leave it out")


def add_to(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the subcommand."""
    parser = commands.add_parser("server", help="the cache that all engines of a host share", description=__doc__)
    listen = parser.add_argument_group("where it listens")
    listen.add_argument("--host", default="localhost", help="for clients: loopback only (localhost)")
    listen.add_argument("--port", type=int, default=5555, help="for clients (5555)")
    listen.add_argument("--http-host", default="127.0.0.1", help="beyond loopback only with LMCACHE_SERVER_TOKEN")
    listen.add_argument("--http-port", type=int, default=8080, help="status, metrics, administration (8080)")
    memory = parser.add_argument_group("host memory (L1)")
    memory.add_argument("--l1-size-gb", type=float, required=True, metavar="GB")
    memory.add_argument("--l1-use-lazy", action=argparse.BooleanOptionalAction, default=True,
                        help="take memory as it is touched; --no-l1-use-lazy: all of it before serving")  # fmt: skip
    memory.add_argument("--eviction-policy", default="LRU", help="LRU, ARC, … (docs/policies.md); IsolatedLRU is LRU")
    memory.add_argument("--chunk-size", type=int, default=256, metavar="TOKENS", help="that engines are told (256)")
    memory.add_argument("--extent-mb", type=float, default=0.0, metavar="MB", help="what groups get at once")
    tiers = parser.add_argument_group("tiers below (L2)")
    tiers.add_argument("--l2-adapter", action="append", default=[], metavar="JSON", help="repeatable, asked in order")
    other = parser.add_argument_group("other")
    other.add_argument("--silence-seconds", type=float, default=5.0, metavar="S",
                       help="until a client that says nothing counts as silent (5)")  # fmt: skip
    other.add_argument("--instance-id", default="", help="a name, for people")
    for flag, only in (("--transport", ["zmq"]), ("--hash-algorithm", ["blake3"]), ("--engine-type", ["default"]),
                       ("--supported-transfer-mode", ["auto", "engine_driven"])):  # fmt: skip
        other.add_argument(flag, choices=only, default=only[0], help="as upstream has it")
    for flag in REFUSED:
        parser.add_argument(flag, action=_Refuse, nargs="*", help=argparse.SUPPRESS)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Serve until told to end; 2 if it can't start."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr)
    try:
        return _serve(args)
    except ConfigError as error:
        print(f"lmcache-ext server: {error}", file=sys.stderr)
        return 2
    except ImportError as error:
        print(f"lmcache-ext server: {error}; pip install 'lmcache-ext[server]'", file=sys.stderr)
        return 2


def _serve(args: argparse.Namespace) -> int:
    from lmcache_ext.server.adapters import parse
    from lmcache_ext.server.config import TOKEN, ServerConfig
    from lmcache_ext.server.main import serve

    names = ("host", "port", "http_host", "http_port", "l1_size_gb", "l1_use_lazy", "eviction_policy", "chunk_size",
             "extent_mb", "silence_seconds", "instance_id")  # fmt: skip
    adapters: Sequence[str] = args.l2_adapter
    given = {name: getattr(args, name) for name in names}
    token = os.environ.get(TOKEN, "")
    return serve(ServerConfig(**given, adapters=tuple(parse(text) for text in adapters), token=token))
