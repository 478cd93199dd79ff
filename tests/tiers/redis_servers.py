"""Debian's redis-server in its own process, on a free loopback port or a Unix socket, in a folder of its own."""

from __future__ import annotations

import atexit
import datetime
import functools
import ipaddress
import itertools
import shutil
import signal
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from redis import Redis as Client
from redis.backoff import NoBackoff
from redis.exceptions import RedisError
from redis.retry import Retry

from lmcache_ext.ports import free_port
from lmcache_ext.tiers.redis_link import Site
from lmcache_ext.tiers.redis_tier import Redis
from tests.processes import freeze
from tests.tiers.helpers import until

_numbers = itertools.count()


class Server:
    """One process; `settings` are those of redis.conf. With a `config` instead, a sentinel."""

    def __init__(self, folder: Path, port: int = 0, config: Path | None = None, **settings: object) -> None:
        program = shutil.which("redis-server")
        if program is None:
            pytest.skip("needs redis-server: apt-get install redis-server")
        self.folder = folder
        self.port = port or free_port()
        self.settings = settings
        self.config = config
        folder.mkdir(parents=True, exist_ok=True)
        self._client = self._connect()
        self.start(program)

    def start(self, program: str = "redis-server") -> None:
        """Again, if it was ended, with the same port and settings."""
        chosen = {"port": self.port, "bind": "127.0.0.1", "save": "", "dir": self.folder, **self.settings}
        words = [
            word for name, value in chosen.items() for word in (f"--{name.replace('_', '-')}", *str(value).split())
        ]
        words.insert(words.index("--save") + 1, "")
        words = [str(self.config), "--sentinel"] if self.config else words
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen([program, *words], stdout=log, stderr=log)
        try:
            until(self.answers)
        except BaseException:
            self.stop()
            raise

    def answers(self) -> bool:
        assert self.process.poll() is None, (self.folder / "log").read_text()[-2000:]
        try:
            return bool(self.client().ping())
        except RedisError:
            return False

    def client(self) -> Any:
        """Of the library as it comes."""
        return self._client

    def _connect(self) -> Any:
        settings, secret = self.settings, str(self.settings.get("requirepass", "")) or None
        retry = Retry(NoBackoff(), 0)
        if "unixsocket" in settings:
            return Client(unix_socket_path=str(settings["unixsocket"]), password=secret, retry=retry)
        ssl: dict[str, Any] = {}
        if "tls_port" in settings:
            names = {"ssl_certfile": "tls_cert_file", "ssl_keyfile": "tls_key_file", "ssl_ca_certs": "tls_ca_cert_file"}
            ssl = {"ssl": True, **{ours: str(settings[theirs]) for ours, theirs in names.items()}}
        port = int(str(settings.get("tls_port", self.port)))
        return Client("127.0.0.1", port, password=secret, retry=retry, socket_timeout=5, **ssl)

    @property
    def host(self) -> str:
        return f"127.0.0.1:{self.settings.get('tls_port', self.port)}"

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGKILL)
        self.process.wait(timeout=10)
        self._client.close()

    def pause(self) -> None:
        freeze(self.process.pid)

    def go_on(self) -> None:
        self.process.send_signal(signal.SIGCONT)


@functools.cache
def _shared() -> Server:
    folder = Path(tempfile.mkdtemp())
    server = Server(folder, enable_debug_command="local")
    atexit.register(lambda: (server.stop(), shutil.rmtree(folder, ignore_errors=True)))
    return server


def clean_redis() -> Redis:
    """A medium over the one server that tests share, without objects."""
    server = _shared()
    server.client().flushall()
    return Redis(Site("server", (("127.0.0.1", server.port),)), prefix=f"t{next(_numbers)}")


def cluster_of(folder: Path, count: int, **settings: object) -> list[Server]:
    """Nodes that know each other and share the slots."""
    buses = [free_port() for _ in range(count)]
    chosen = {"cluster_enabled": "yes", "cluster_node_timeout": 2000, "cluster_require_full_coverage": "no", **settings}
    nodes = [Server(folder / str(i), cluster_port=buses[i], **chosen) for i in range(count)]
    bounds = [16384 * i // count for i in range(count + 1)]
    for i, node in enumerate(nodes):
        node.client().execute_command("CLUSTER", "ADDSLOTSRANGE", bounds[i], bounds[i + 1] - 1)
        if i:
            nodes[0].client().execute_command("CLUSTER", "MEET", "127.0.0.1", node.port, buses[i])
    for node in nodes:
        until(lambda node=node: _knows(node, count), 15)
    return nodes


def _knows(node: Server, count: int) -> bool:
    info = node.client().execute_command("CLUSTER", "INFO")
    said = info if isinstance(info, dict) else dict(line.split(":") for line in info.decode().split())
    return said["cluster_state"] == "ok" and int(said["cluster_known_nodes"]) == count


def certificates(folder: Path) -> dict[str, Path]:
    """A key and a certificate for 127.0.0.1 that is its own authority, by the names of redis' settings."""
    secret = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "127.0.0.1")])
    now = datetime.datetime.now(datetime.timezone.utc)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(secret.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(secret, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    plain = serialization.NoEncryption()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "cert.pem").write_bytes(made.public_bytes(pem))
    (folder / "key.pem").write_bytes(secret.private_bytes(pem, serialization.PrivateFormat.PKCS8, plain))
    return {
        "tls_cert_file": folder / "cert.pem",
        "tls_key_file": folder / "key.pem",
        "tls_ca_cert_file": folder / "cert.pem",
    }
