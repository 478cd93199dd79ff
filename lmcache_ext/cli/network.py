"""Doctor's look at ports."""

from __future__ import annotations

import socket
from collections.abc import Iterable, Iterator, Mapping

import psutil

from lmcache_ext.cli.finding import Finding, fail, ok

# The same defaults as launch/lib.sh.
PORTS = {"HTTP_PORT": "8000", "DYN_SYSTEM_PORT": "8081"}
# Dynamo reads the system port as a signed 16-bit number.
HIGHEST = {"HTTP_PORT": 65535, "DYN_SYSTEM_PORT": 32767}
LOOPBACK = "127.0.0.1"


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
