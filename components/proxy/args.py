"""The command line: the flags of both of upstream's proxies under their names and defaults, and ours."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NoReturn

Mode = Literal["telemetry", "nixl"]

_NIXL_FLAGS = ("decoder_init_port", "decoder_alloc_port", "proxy_host", "proxy_port")
_TELEMETRY_FLAGS = ("telemetry_host", "telemetry_port")


class BadFlag(ValueError):
    """A flag, or two together, that can't be used; the message says what would do."""


@dataclass(frozen=True)
class Backend:
    """Where one ``vllm serve`` listens; the ports are those of a decoder's ranks (NIXL mode)."""

    host: str
    port: int
    init_ports: tuple[int, ...] = ()
    alloc_ports: tuple[int, ...] = ()

    @property
    def url(self) -> str:
        """Its root, without a slash at the end."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{host}:{self.port}"


@dataclass(frozen=True)
class Limits:
    """Times in seconds, sizes in bytes."""

    notify_timeout: float
    connect_timeout: float
    answer_timeout: float
    read_timeout: float
    client_timeout: float
    drain_timeout: float
    probe_interval: float
    max_body: int
    max_requests: int


@dataclass(frozen=True)
class Config:
    """Everything the proxy was told, validated."""

    mode: Mode
    host: str
    port: int
    notify_host: str
    notify_port: int
    prefillers: tuple[Backend, ...]
    decoders: tuple[Backend, ...]
    prefill_fallback: bool
    session_header: str | None
    api_key: str | None
    log_level: str
    limits: Limits


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise BadFlag(message)


def build_parser() -> argparse.ArgumentParser:
    """The parser; defaults that tell the modes apart are None until `parse_args`."""
    parser = _Parser(prog="python -m dynamo_lmcache.proxy", description=__doc__, allow_abbrev=False)
    _add_shared(parser)
    telemetry = parser.add_argument_group("telemetry mode: a shared cache server, told by HTTP")
    telemetry.add_argument("--telemetry-host", metavar="HOST", help="where reports are taken (--host)")
    telemetry.add_argument("--telemetry-port", type=_port, metavar="PORT", help="where reports are taken (5768)")
    nixl = parser.add_argument_group("NIXL mode: the prefiller pushes, told by ZMQ")
    nixl.add_argument("--decoder-init-port", type=_groups, metavar="PORTS", help="a decoder's, one a rank (8300)")
    nixl.add_argument("--decoder-alloc-port", type=_groups, metavar="PORTS", help="a decoder's, one a rank (8400)")
    nixl.add_argument("--proxy-host", metavar="HOST", help="where notifications are taken (127.0.0.1)")
    nixl.add_argument("--proxy-port", type=_port, metavar="PORT", help="where notifications are taken (8500)")
    _add_limits(parser)
    return parser


def _add_shared(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--mode", choices=("telemetry", "nixl"), help="which one; follows from the flags of only one of them")
    add("--host", default="127.0.0.1", help="where clients are served (%(default)s)")
    add("--port", type=_port, default=8000, help="where clients are served (%(default)s)")
    for role, port in (("prefiller", 8100), ("decoder", 8200)):
        add(f"--{role}-host", type=_names, default=["127.0.0.1"], metavar="HOSTS", help="one or several, a comma apart")
        add(f"--{role}-port", type=_ports, default=[port], metavar="PORTS", help=f"one or several ({port})")
        add(
            f"--num-{role}s", type=_count, default=1, metavar="N", help="with one host and port: N, each a port further"
        )
    add(
        "--prefill-fallback",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="without a prefiller the decoder computes the prompt (on); off: such requests get 503",
    )
    add("--session-header", metavar="NAME", help="requests that agree in this header go to the same engines")
    add("--log-level", choices=("debug", "info", "warning", "error"), default="info")


def _add_limits(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("limits; times in seconds")

    def add(flag: str, default: float, text: str) -> None:
        kind = _count if isinstance(default, int) else _seconds
        group.add_argument(flag, type=kind, default=default, metavar="N", help=f"{text} (%(default)s)")

    add("--notify-timeout", 10.0, "for the word that the prompt's KV is stored; then the decoder starts anyway")
    add("--connect-timeout", 5.0, "for a connection to an engine")
    add("--answer-timeout", 600.0, "for an engine's first byte, or for all of an answer that is not streamed")
    add("--read-timeout", 120.0, "between two bytes of an engine's stream")
    add("--client-timeout", 120.0, "for a client that does not send its body, or does not read")
    add("--drain-timeout", 30.0, "for requests under way when the proxy is told to stop")
    add("--probe-interval", 2.0, "between two looks at an engine")
    add("--max-body-mib", 64, "size of a request; larger ones get 413")
    add("--max-requests", 1024, "requests under way; more get 429")


def parse_args(argv: Sequence[str] | None = None) -> Config:
    """Parse and check a command line, ``sys.argv[1:]`` when None.

    Raises:
        BadFlag: with the flag, its value and what would do.
        SystemExit: for ``--help``.
    """
    known = build_parser().parse_args(argv)
    mode = _mode(known)
    if mode == "nixl":
        notify_host, notify_port = known.proxy_host or "127.0.0.1", known.proxy_port or 8500
    else:
        notify_host, notify_port = known.telemetry_host or known.host, known.telemetry_port or 5768
    bound = os.environ.get("CLIENT_BOUND", "").lower() == "true"
    return Config(
        mode=mode,
        host=known.host,
        port=known.port,
        notify_host=notify_host,
        notify_port=notify_port,
        prefillers=tuple(Backend(*pair) for pair in pairs("prefiller", known)),
        decoders=_decoders(known, mode),
        prefill_fallback=known.prefill_fallback,
        session_header=known.session_header or (os.environ.get("CLIENT_BOUND_KEY", "session-id") if bound else None),
        api_key=os.environ.get("OPENAI_API_KEY", "").strip() or None,
        log_level=known.log_level,
        limits=Limits(
            *(known.notify_timeout, known.connect_timeout, known.answer_timeout, known.read_timeout),
            *(known.client_timeout, known.drain_timeout, known.probe_interval),
            *(known.max_body_mib << 20, known.max_requests),
        ),
    )


def _mode(known: argparse.Namespace) -> Mode:
    given: dict[Mode, list[str]] = {
        "nixl": [_flag(name) for name in _NIXL_FLAGS if getattr(known, name) is not None],
        "telemetry": [_flag(name) for name in _TELEMETRY_FLAGS if getattr(known, name) is not None],
    }
    chosen: Mode = known.mode or ("nixl" if given["nixl"] and not given["telemetry"] else "telemetry")
    other = given["telemetry" if chosen == "nixl" else "nixl"]
    if other:
        raise BadFlag(
            f"{other[0]} is not of {chosen} mode: leave it out, or give --mode and the flags of one mode only"
        )
    return chosen


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def pairs(role: str, known: argparse.Namespace) -> list[tuple[str, int]]:
    """Hosts and ports of all engines of a role, by upstream's rules.

    One host and one port: ``--num-…s`` engines on successive ports. One of the two: it goes with each of the others.
    Otherwise one to one.
    """
    hosts, ports = getattr(known, f"{role}_host"), getattr(known, f"{role}_port")
    count = getattr(known, f"num_{role}s")
    if len(hosts) == len(ports) == 1:
        ports = [ports[0] + i for i in range(count)]
        if ports[-1] > 65535:
            raise BadFlag(f"--num-{role}s={count}: the last port would be {ports[-1]}")
    elif count not in (1, max(len(hosts), len(ports))):
        raise BadFlag(f"--num-{role}s={count}: hosts and ports name {max(len(hosts), len(ports))}; leave it out")
    if len(hosts) == 1:
        hosts = hosts * len(ports)
    elif len(ports) == 1:
        ports = ports * len(hosts)
    if len(hosts) != len(ports):
        raise BadFlag(f"--{role}-host has {len(hosts)} hosts, --{role}-port {len(ports)} ports: give as many, or one")
    found = list(zip(hosts, ports, strict=True))
    if len(set(found)) != len(found):
        raise BadFlag(f"--{role}-host and --{role}-port name an engine twice: {found}")
    return found


def _decoders(known: argparse.Namespace, mode: Mode) -> tuple[Backend, ...]:
    found = pairs("decoder", known)
    if mode == "telemetry":
        return tuple(Backend(*pair) for pair in found)
    inits = _of_each("init", known.decoder_init_port or [[8300]], known, len(found))
    allocs = _of_each("alloc", known.decoder_alloc_port or [[8400]], known, len(found))
    taken: set[tuple[str, int]] = set()
    for (host, _), init, alloc in zip(found, inits, allocs, strict=True):
        if len(init) != len(alloc):
            raise BadFlag(
                f"{len(init)} ports in --decoder-init-port, {len(alloc)} in --decoder-alloc-port: one each a rank"
            )
        for port in (*init, *alloc):
            if (host, port) in taken:
                raise BadFlag(
                    f"--decoder-init-port, --decoder-alloc-port: {host}:{port} would be two ranks' port; "
                    "give each decoder its own, a semicolon between decoders: 8300,8301;8310,8311"
                )
            taken.add((host, port))
    ranks = zip(found, inits, allocs, strict=True)
    return tuple(Backend(*pair, tuple(init), tuple(alloc)) for pair, init, alloc in ranks)


def _of_each(kind: str, groups: list[list[int]], known: argparse.Namespace, count: int) -> list[list[int]]:
    """The ports of each decoder's ranks.

    As upstream: one list is every decoder's, and where --num-decoders counts the ports up, it does so with these.
    """
    if len(groups) == count:
        return groups
    if len(groups) > 1:
        raise BadFlag(f"--decoder-{kind}-port has {len(groups)} lists for {count} decoders: give as many, or one")
    step = int(len(known.decoder_host) == len(known.decoder_port) == 1)
    return [[port + i * step for port in groups[0]] for i in range(count)]


def _port(text: str) -> int:
    number = int(text)
    if not 1 <= number <= 65535:
        raise argparse.ArgumentTypeError(f"{text}: a port is 1 to 65535")
    return number


def _ports(text: str) -> list[int]:
    return [_port(part) for part in text.split(",")]


def _groups(text: str) -> list[list[int]]:
    return [_ports(part) for part in text.split(";")]


def _names(text: str) -> list[str]:
    names = [part.strip() for part in text.split(",")]
    if not all(names):
        raise argparse.ArgumentTypeError(f"{text!r}: a host between each two commas")
    return names


def _count(text: str) -> int:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text}: 1 or more")
    return number


def _seconds(text: str) -> float:
    if not 0 < (number := float(text)) < float("inf"):
        raise argparse.ArgumentTypeError(f"{text}: a finite time above 0 s")
    return number
