"""Ports for those who have not been given one."""

from __future__ import annotations

import socket
from pathlib import Path

from lmcache_ext.ports import free_port


def test_ports_are_free_all_different_and_not_the_kernels_own() -> None:
    first = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    ports = [free_port() for _ in range(50)]
    assert len(set(ports)) == 50 and max(ports) < max(first, 21000) and max(ports) < 2**15
    for port in ports:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", port))
