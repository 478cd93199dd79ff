"""Doctor's look at ports and at the discovery services."""

from __future__ import annotations

import socket
from collections.abc import Iterable, Iterator, Mapping
from urllib.parse import urlsplit

import psutil

from lmcache_ext.cli.finding import Finding, fail, ok, warn

# The same defaults as launch/lib.sh.
PORTS = {"HTTP_PORT": "8000", "DYN_SYSTEM_PORT": "8081"}
# Dynamo reads the system port as a signed 16-bit number.
HIGHEST = {"HTTP_PORT": 65535, "DYN_SYSTEM_PORT": 32767}
LOOPBACK = "127.0.0.1"
CONNECT_TIMEOUT_S = 2.0


def check_ports(env: Mapping[str, str]) -> Iterator[Finding]:
    """Whether the HTTP port and the worker's system port are free."""
    hosts = {"HTTP_PORT": env.get("HTTP_HOST") or LOOPBACK, "DYN_SYSTEM_PORT": env.get("DYN_SYSTEM_HOST") or LOOPBACK}
    taken: dict[str, str] = {}
    for variable, default in PORTS.items():
        value = env.get(variable) or default
        if value in taken:
            yield fail("port", f"{variable}={value}: {taken[value]} has that port", f"set {variable} to another one")
            continue
        taken[value] = variable
        yield _port(variable, value, hosts[variable])


def check_more_ports(env: Mapping[str, str], ports: Iterable[int]) -> Iterator[Finding]:
    """Whether the system ports of further workers are free."""
    host = env.get("DYN_SYSTEM_HOST") or LOOPBACK
    for port in ports:
        if str(port) == (env.get("HTTP_PORT") or PORTS["HTTP_PORT"]):
            yield fail("port", f"system port {port}: HTTP_PORT has that port", "set HTTP_PORT to another one")
        else:
            yield _port("DYN_SYSTEM_PORT", str(port), host)


def _port(variable: str, value: str, host: str) -> Finding:
    highest = HIGHEST[variable]
    if not (value.isdecimal() and 0 < int(value) <= highest):
        return fail("port", f"{variable}={value} can't be used", f"set {variable} to a number from 1 to {highest}")
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a connection in TIME_WAIT is no obstacle
        try:
            probe.bind((host, int(value)))
        except OSError as error:
            text = f"{variable}: port {value} on {host} can't be used: {error.strerror or error}{_holder(int(value))}"
            return fail("port", text, f"stop that, or set {variable} to another port")
    return ok("port", f"{variable}: {value} on {host} is free")


def _holder(port: int) -> str:
    try:
        sockets = psutil.net_connections("tcp")
    except (psutil.Error, OSError):
        return ""
    for each in sockets:
        if each.status == psutil.CONN_LISTEN and each.laddr[1:] == (port,) and each.pid:
            try:
                return f" (process {each.pid}, {psutil.Process(each.pid).name()})"
            except psutil.Error:
                return f" (process {each.pid})"
    return ""


def check_discovery(env: Mapping[str, str]) -> Iterator[Finding]:
    """Whether etcd and NATS answer, where they are asked for."""
    backend = env.get("DYN_DISCOVERY_BACKEND") or "file"
    if backend in ("file", "mem"):
        yield ok("discovery", f"{backend}: one machine, nothing to start")
    elif backend == "etcd":
        for address in (env.get("ETCD_ENDPOINTS") or "http://localhost:2379").split(","):
            yield _service("etcd", "ETCD_ENDPOINTS", address.strip(), 2379)
    else:
        yield warn("discovery", f"DYN_DISCOVERY_BACKEND={backend}: not tried with our workers", "use file or etcd")
    planes = {env.get("DYN_REQUEST_PLANE"), env.get("DYN_EVENT_PLANE")}
    if "nats" in planes or (backend == "etcd" and None in planes):
        yield _service("nats", "NATS_SERVER", env.get("NATS_SERVER") or "nats://localhost:4222", 4222)


def _service(name: str, variable: str, address: str, default_port: int) -> Finding:
    parts = urlsplit(address if "//" in address else f"//{address}")
    try:
        host, port = parts.hostname or LOOPBACK, parts.port or default_port
        with socket.create_connection((host, port), timeout=CONNECT_TIMEOUT_S):
            return ok("discovery", f"{name} at {address} accepts connections")
    except (OSError, ValueError) as error:
        return fail("discovery", f"{name} at {address} does not answer: {error}", f"start it, or correct {variable}")
