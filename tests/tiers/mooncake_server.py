"""A real Mooncake master, peers with memory for its pool, and media that share one client."""

from __future__ import annotations

import atexit
import ctypes
import functools
import importlib.util
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from lmcache_ext.errors import ConfigError
from lmcache_ext.ports import free_port
from lmcache_ext.tiers.mooncake import Mooncake
from lmcache_ext.tiers.mooncake_client import connect, library, require_answer
from tests.processes import freeze
from tests.tiers.helpers import until

MIB = 1 << 20


def missing() -> str:
    """Why there can be no Mooncake here; "" if there can."""
    try:
        library()
    except ConfigError as error:
        return str(error)
    return ""


def alive(port: int) -> bool:
    try:
        require_answer("127.0.0.1", port, 0.2)
    except OSError:
        return False
    return True


class Process:
    """A child that a test stops, continues and kills."""

    def __init__(self, command: Sequence[str]) -> None:
        self.command = command
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def stop(self) -> None:
        freeze(self.process.pid)

    def go_on(self) -> None:
        self.process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(10)


class Master(Process):
    """`mooncake_master` on loopback. Gives peers up that are silent for two seconds; with `http` it starts slowly."""

    def __init__(self, lease_ms: int = 10_000, http: bool = False) -> None:
        self.port, self.metadata_port = free_port(), free_port() if http else 0
        spec = importlib.util.find_spec("mooncake")
        assert spec is not None and spec.origin is not None
        flags = {
            "rpc_address": "127.0.0.1",
            "rpc_port": self.port,
            "metrics_host": "127.0.0.1",
            "metrics_port": free_port(),
            "client_ttl": 2,
            "default_kv_lease_ttl": lease_ms,
        }
        if http:
            flags |= {"enable_http_metadata_server": "true", "http_metadata_server_host": "127.0.0.1"}
            flags |= {"http_metadata_server_port": self.metadata_port}
        binary = Path(spec.origin).with_name("mooncake_master")
        self._start([str(binary), *(f"--{name}={value}" for name, value in flags.items())])

    def _start(self, command: Sequence[str]) -> None:
        super().__init__(command)
        until(lambda: alive(self.port) and (not self.metadata_port or alive(self.metadata_port)))

    def restart(self) -> None:
        """A new one at the same address, which knows nothing."""
        self.kill()
        self._start(self.command)

    def settings(self, mib: int, metadata: str = "P2PHANDSHAKE") -> dict[str, str]:
        """For a client that gives `mib` MiB to the pool."""
        return {
            "local_hostname": "127.0.0.1",
            "metadata_server": metadata,
            "protocol": "tcp",
            "rdma_devices": "",
            "global_segment_size": str(mib * MIB),
            "local_buffer_size": str(4 * MIB),
            "master_server_addr": f"127.0.0.1:{self.port}",
        }

    @property
    def http(self) -> str:
        return f"http://127.0.0.1:{self.metadata_port}/metadata"


class Peer(Process):
    """Another process whose memory belongs to the pool."""

    def __init__(self, settings: dict[str, str]) -> None:
        library()
        maps = Path("/proc/self/maps").read_text().splitlines()
        runtimes = {line.split()[-1] for line in maps if "libcudart" in line}  # as library() had to find it
        program = (
            "import ctypes, signal\n"
            f"for path in {runtimes or ()!r}: ctypes.CDLL(path, ctypes.RTLD_GLOBAL)\n"
            "from mooncake.store import MooncakeDistributedStore\n"
            "client = MooncakeDistributedStore()\n"
            f"assert client.setup({settings!r}) == 0\n"
            "print('ready', flush=True)\n"
            "signal.pause()"
        )
        self.command = [sys.executable, "-c", program]
        self.process = subprocess.Popen(self.command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        assert self.process.stdout is not None
        with self.process.stdout as said:
            assert said.readline() == b"ready\n"


class LeftOpen:
    """A client that outlives the medium that uses it, and the tests: to close one takes two seconds, or ten."""

    def __init__(self, settings: dict[str, str], timeout: float) -> None:
        self._client = connect(settings, timeout)
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(self._client))  # not even at the end of the interpreter
        self._registered: set[int] = set()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._client, name)

    def register_buffer(self, start: int, nbytes: int) -> int:
        self._registered.add(start)
        return int(self._client.register_buffer(start, nbytes))

    def close(self) -> None:
        """All that is left to do: media whose I/O hung at their end were never closed."""
        for start in self._registered:
            self._client.unregister_buffer(start)
        self._registered.clear()


@functools.cache
def mortal(http: bool = False) -> Master:
    """One to stop, kill and start again, until the end of the tests: clients of one that is gone end slowly."""
    master = Master(lease_ms=300, http=http)
    atexit.register(master.kill)
    return master


@functools.cache
def kept() -> tuple[Master, LeftOpen]:
    """One master with a peer, until the end of the tests, and a client."""
    master = Master()
    atexit.register(master.kill)
    peer = Peer(master.settings(256))
    atexit.register(peer.kill)
    return master, LeftOpen(master.settings(0), 1.0)


def medium_with_kept_client(**options: Any) -> Mooncake:
    """An empty store. Skips the test if there is no Mooncake."""
    if why := missing():
        pytest.skip(why)
    master, client = kept()
    client.close()
    client.remove_all(True)
    return Mooncake(master.settings(0), connect=lambda *_: client, **options)
