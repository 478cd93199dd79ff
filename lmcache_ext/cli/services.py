"""Doctor's look at the discovery services: are they there, and are they what they should be?"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import replace
from urllib.parse import urlsplit

from lmcache_ext.cli.finding import Finding, Level, fail, ok, warn
from lmcache_ext.cli.network import LOOPBACK

TIMEOUT_S = 3.0

Probe = Callable[[str, str, int], Awaitable[str]]  # address, host, port → the server's version


def check_discovery(env: Mapping[str, str]) -> Iterator[Finding]:
    """Whether etcd and NATS answer, where they are asked for."""
    backend = env.get("DYN_DISCOVERY_BACKEND") or "file"
    if backend == "file":
        yield ok("discovery", "file: one machine, nothing to start")
    elif backend == "mem":
        yield warn("discovery", "mem: known within one process only", "use file, or etcd")
    elif backend == "etcd":
        addresses = (env.get("ETCD_ENDPOINTS") or "http://localhost:2379").split(",")
        found = [_service("etcd", "ETCD_ENDPOINTS", address.strip(), 2379, _etcd) for address in addresses]
        if any(each.level is Level.OK for each in found):  # one member of a cluster is enough
            found = [replace(each, level=Level.WARN) if each.level is Level.FAIL else each for each in found]
        yield from found
    else:
        yield warn("discovery", f"DYN_DISCOVERY_BACKEND={backend}: not tried with our workers", "use file or etcd")
    planes = {env.get("DYN_REQUEST_PLANE"), env.get("DYN_EVENT_PLANE")}
    if "nats" in planes or (backend == "etcd" and None in planes):
        yield _service("nats", "NATS_SERVER", env.get("NATS_SERVER") or "nats://localhost:4222", 4222, _nats)


def _service(name: str, variable: str, address: str, default_port: int, probe: Probe) -> Finding:
    advice = f"start it, or correct {variable}"
    try:
        parts = urlsplit(address if "//" in address else f"//{address}")
        host, port = parts.hostname or LOOPBACK, parts.port or default_port
        with socket.create_connection((host, port), TIMEOUT_S):
            pass
        version = asyncio.run(asyncio.wait_for(probe(address, host, port), TIMEOUT_S))
        return ok("discovery", f"{name} {version} at {address}")
    except ImportError as error:
        return warn("discovery", f"{name} at {address} was not asked: {error}", f"pip install {error.name}")
    except TimeoutError:
        return fail("discovery", f"{name} at {address}: no answer within {TIMEOUT_S:g} s", advice)
    except (OSError, ValueError) as error:
        return fail("discovery", f"{name} at {address} can't be reached: {error}", advice)
    except Exception as error:
        if "authorization" in str(error).lower():  # Dynamo logs in with NATS_AUTH_*, which is not tried here
            return warn("discovery", f"{name} at {address} wants a login, which was not tried", "see NATS_AUTH_*")
        return fail("discovery", f"what is at {address} is no {name}: {error}", advice)


async def _etcd(address: str, host: str, port: int) -> str:
    import aetcd

    if address.startswith("https:"):  # Dynamo has its certificates from ETCD_AUTH_*; that it listens must do here
        return "with TLS"
    direct = {"grpc.enable_http_proxy": 0}
    client = aetcd.Client(host, port, timeout=int(TIMEOUT_S), options=direct, connect_wait_timeout=int(TIMEOUT_S))
    try:
        status = await client.status()
        return str(status.version)
    finally:
        await client.close()


async def _nats(address: str, host: str, port: int) -> str:
    import nats

    async def quiet(_: Exception) -> None:
        """The exception that `connect` raises says it all."""

    client = nats.NATS()
    try:
        await client.connect(
            address if "//" in address else f"nats://{address}",
            allow_reconnect=False,
            connect_timeout=int(TIMEOUT_S),
            error_cb=quiet,
        )
        return str(client.connected_server_version).strip("<>").removeprefix("nats server ")
    finally:
        with contextlib.suppress(Exception):
            await client.close()
