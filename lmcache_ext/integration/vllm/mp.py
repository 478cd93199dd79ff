"""Joining a cache server: the keys `lmcache.mp.*`, the client, and a server that is started where none answers."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from lmcache_ext.errors import ConfigError
from lmcache_ext.integration.vllm.log import get_logger
from lmcache_ext.processes import started
from lmcache_ext.server.client import Client
from lmcache_ext.server.owners import this_process
from lmcache_ext.server.protocol import Process
from lmcache_ext.transfer.rendezvous import Berth

logger = get_logger("mp")

PREFIX = "lmcache.mp."
_HERE_SECONDS = 2.0  # an engine that starts waits so long for its server; afterwards it joins whenever there is one
_PATIENCE = 1.0  # seconds that one answer may take, on a machine with better things to do
_PLAIN = {  # what else upstream has: values that change nothing, or mean what is done here anyway
    "mp_transfer_mode": ("auto", "engine_driven"),
    "hash_algorithm": ("blake3",),
    "nonblocking_lookup_status": (True,),
    "isolated_ipc": (False,),
    "use_vmm_api": (False,),
    "eager_prefetch": (False,),
    "lazy_offload": (False,),
    "transfer_intermediate_tensors": (False,),
}
_IGNORED = ("mq_timeout", "heartbeat_interval")  # deadlines are the server's and the client's own
_KNOWN = {"host", "port", "server_urls", "autostart", "save_decode_cache", *_PLAIN, *_IGNORED}
_AUTOSTART = {"server_args", "wait_timeout"}


@dataclass(frozen=True)
class Joining:
    """Which server to join.

    Args:
        autostart: start one where none answers.
        server_args: its further flags.
        wait_timeout: seconds that it may take to answer.
    """

    host: str
    port: int
    autostart: bool = False
    server_args: tuple[str, ...] = ()
    wait_timeout: float = 90.0
    save_decode_cache: bool | None = None

    @property
    def address(self) -> str:
        """For ZMQ."""
        return f"tcp://{self.host}:{self.port}"

    @classmethod
    def of(cls, extra: Mapping[str, Any]) -> Joining | None:
        """As `kv_connector_extra_config` says; None if it names no server.

        Raises:
            ConfigError: a key or its value is not one that we can follow.
        """
        given = {key.removeprefix(PREFIX): value for key, value in extra.items() if key.startswith(PREFIX)}
        start = {key.removeprefix("autostart."): given.pop(key) for key in list(given) if key.startswith("autostart.")}
        for key in given.keys() - _KNOWN:
            raise ConfigError(PREFIX + key, given[key], "is no key that we know")
        for key in start.keys() - _AUTOSTART:
            raise ConfigError(f"{PREFIX}autostart.{key}", start[key], "is no key that we know")
        for key, allowed in _PLAIN.items():
            if key in given and given[key] not in allowed:
                raise ConfigError(PREFIX + key, given[key], f"can be {' or '.join(map(repr, allowed))} only")
        if not given.keys() & {"host", "port", "server_urls", "autostart"}:
            return None
        host, port = _address(given)
        decode = given.get("save_decode_cache")
        if decode is not None and not isinstance(decode, bool):
            raise ConfigError(PREFIX + "save_decode_cache", decode, "must be true or false")
        return cls(
            host, port, _flag(given.get("autostart", False)), _words(start.get("server_args", ())),
            _seconds(start.get("wait_timeout", 90.0)), decode,
        )  # fmt: skip


def _address(given: Mapping[str, Any]) -> tuple[str, int]:
    urls = given.get("server_urls")
    if urls is not None:
        each = urls.split(",") if isinstance(urls, str) else list(urls)
        if len(each) != 1:
            raise ConfigError(PREFIX + "server_urls", urls, "must name one server: an engine joins the one of its host")
        parts = urlsplit(each[0] if "//" in each[0] else f"tcp://{each[0]}")
        host, port = parts.hostname or "", parts.port or 5555
    else:
        host = str(given.get("host", "localhost")).removeprefix("tcp://")
        port = given.get("port", 5555)
    try:
        number = int(port)
    except (TypeError, ValueError):
        number = 0
    if not 0 < number < 1 << 16:
        raise ConfigError(PREFIX + "port", port, "must be a port, 1 to 65535")
    if host not in ("localhost", "127.0.0.1", "::1", "[::1]"):
        raise ConfigError(PREFIX + "host", host, "must be this host's loopback: workers map the server's memory")
    return "127.0.0.1" if host == "localhost" else host, number


def _flag(value: object) -> bool:
    if not isinstance(value, bool):
        raise ConfigError(PREFIX + "autostart", value, "must be true or false")
    return value


def _words(value: object) -> tuple[str, ...]:
    if isinstance(value, str):
        return tuple(shlex.split(value))
    if isinstance(value, list | tuple) and all(isinstance(word, str) for word in value):
        return tuple(value)
    raise ConfigError(PREFIX + "autostart.server_args", value, "must be flags, as text or as a list")


def _seconds(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 3600:
        raise ConfigError(PREFIX + "autostart.wait_timeout", value, "must be seconds, more than 0, at most 3600")
    return float(value)


def open_client(joining: Joining, name: str, workers: Sequence[Berth], memory_gb: float | None) -> Client:
    """A client, attached if the server answers in time.

    Args:
        workers: all ranks, whose processes copy to and from the server's memory.
        memory_gb: `--l1-size-gb` of a server that is started here.

    Raises:
        ConfigError: a server is to be started, and it is not said how large, or it ended at once.
    """
    me = this_process()
    others = {berth.pid: started(berth.pid) for berth in workers if berth.pid != me.pid}
    processes = [me, *(Process(pid, start) for pid, start in others.items() if start is not None)]
    client = Client(joining.address, name, processes, _PATIENCE)
    if client.wait_up(0.5 if joining.autostart else _HERE_SECONDS):
        return client
    if joining.autostart:
        _start(joining, memory_gb)
        if client.wait_up(joining.wait_timeout):
            return client
    logger.warning("no cache server answers at %s; serving without a cache until one does", joining.address)
    return client


def _start(joining: Joining, memory_gb: float | None) -> None:
    """A server that outlives us. Where another engine was faster, ours ends because the port is taken."""
    flags = list(joining.server_args)
    if "--l1-size-gb" not in flags:
        if memory_gb is None:
            raise ConfigError(
                "LMCACHE_MAX_LOCAL_CPU_SIZE", None,
                f"must say how large the server is that {PREFIX}autostart starts, or --l1-size-gb in its server_args",
            )  # fmt: skip
        flags += ["--l1-size-gb", str(memory_gb)]
    command = [sys.executable, "-m", "lmcache_ext.cli.main", "server", "--host", joining.host]
    command += ["--port", str(joining.port), *flags]
    logger.info("starting a cache server: %s", shlex.join(command))
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True, env=dict(os.environ))
    time.sleep(0.2)
    if process.poll() is not None:
        logger.error("the cache server ended at once with exit code %d", process.returncode)
