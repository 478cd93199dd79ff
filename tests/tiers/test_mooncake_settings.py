"""What Mooncake's set-up gets, and which memory it is told of. Needs no Mooncake."""

from __future__ import annotations

import ctypes
import json
import mmap
import socket
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

from lmcache_ext.errors import ConfigError
from lmcache_ext.tiers import mooncake_client, open_tier, view_at
from lmcache_ext.tiers.header import BLOCK
from lmcache_ext.tiers.mooncake import Mooncake
from lmcache_ext.tiers.urls import Address

# -- settings -------------------------------------------------------------------------------------------------------


def settings_of(url: str) -> dict[str, str]:
    address = Address(url)
    medium = Mooncake.from_address(address)
    address.finish()
    return medium.settings


def test_settings_have_upstreams_defaults() -> None:
    assert settings_of("mooncakestore://127.0.0.1:50051") == {
        "local_hostname": "127.0.0.1",
        "metadata_server": "P2PHANDSHAKE",
        "protocol": "tcp",
        "rdma_devices": "",
        "global_segment_size": "3355443200",
        "local_buffer_size": "1073741824",
        "master_server_addr": "127.0.0.1:50051",
    }


@pytest.mark.parametrize("prefix", ["", "mooncake_"])
def test_settings_are_named_as_upstream_names_them(prefix: str) -> None:
    given = {
        "local_hostname": "10.0.0.7",
        "metadata_server": "http://10.0.0.1:8080/metadata",
        "protocol": "rdma",
        "device_name": "mlx5_0,mlx5_1",
        "global_segment_size": "32212254720",
        "local_buffer_size": "0",
    }
    query = "&".join(f"{prefix}{name}={value}" for name, value in given.items())
    expected = {**given, "rdma_devices": given["device_name"], "master_server_addr": "10.0.0.1:50051"}
    expected.pop("device_name")
    assert settings_of(f"mooncakestore://10.0.0.1:50051?{query}") == expected


def test_what_only_mooncake_knows_goes_to_its_setup() -> None:
    settings = settings_of("mooncakestore://127.0.0.1:1?mooncake_tenant_id=a&mooncake_transfer_timeout=3")
    assert settings["tenant_id"] == "a" and "transfer_timeout" not in settings


def test_a_file_lies_below_the_parameters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "mooncake.json"
    monkeypatch.setenv("MOONCAKE_CONFIG_PATH", str(path))
    path.write_text(json.dumps({"master_server_address": "x:1", "device_name": "mlx5_0", "global_segment_size": 5}))
    settings = settings_of("mooncakestore://127.0.0.1:2?global_segment_size=6")
    assert (settings["rdma_devices"], settings["global_segment_size"]) == ("mlx5_0", "6")
    assert settings["master_server_addr"] == "127.0.0.1:2"
    path.write_text("[")
    with pytest.raises(ConfigError, match=r"MOONCAKE_CONFIG_PATH=.*can't be read"):
        settings_of("mooncakestore://127.0.0.1:2")


@pytest.mark.parametrize(
    "url",
    [
        "mooncakestore://127.0.0.1",
        "mooncakestore://127.0.0.1:port",
        "mooncakestore://127.0.0.1:1?global_segment_size=16MB",
        "mooncakestore://127.0.0.1:1?transfer_timeout=0",
        "mooncakestore://127.0.0.1:1?transfers=none",
        "mooncakestore://127.0.0.1:1?protcol=rdma",
    ],
)
def test_what_does_not_fit_is_refused(url: str) -> None:
    with pytest.raises(ConfigError):
        settings_of(url)


class Answering:
    """A server that hangs up on everybody, as a master does on nonsense."""

    def __init__(self) -> None:
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        self.thread = threading.Thread(target=self._serve)
        self.thread.start()

    def _serve(self) -> None:
        while True:
            link, _ = self.listener.accept()
            with link:
                if link.recv(100) == b"end":
                    return

    def close(self) -> None:
        with socket.create_connection(("127.0.0.1", self.port), timeout=5) as link:
            link.sendall(b"end")
        self.thread.join(5)
        self.listener.close()


def test_rdma_settings_reach_mooncake_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[dict[str, str]] = []
    client = SimpleNamespace(setup=lambda settings: given.append(settings) or 0, close=lambda: 0)
    module = SimpleNamespace(MooncakeDistributedStore=lambda: client, ReplicateConfig=SimpleNamespace)
    monkeypatch.setitem(sys.modules, "mooncake.store", module)
    server = Answering()
    try:
        where = f"127.0.0.1:{server.port}"
        query = f"protocol=rdma&device_name=mlx5_0&local_hostname=node7&metadata_server=http://{where}/metadata"
        tier = open_tier(f"mooncakestore://{where}?{query}&global_segment_size=30000000000", threads=1)
        assert tier.close(5)
    finally:
        server.close()
    assert given == [
        {
            "local_hostname": "node7",
            "metadata_server": f"http://{where}/metadata",
            "protocol": "rdma",
            "rdma_devices": "mlx5_0",
            "global_segment_size": "30000000000",
            "local_buffer_size": "1073741824",
            "master_server_addr": where,
        }
    ]


@pytest.mark.parametrize(
    ("error", "why"),
    [
        ("No module named 'mooncake'", "needs a package mooncake-transfer-engine"),
        ("libcudart.so.99: cannot open shared object file", "pip install nvidia-cuda-runtime-cu99"),
    ],
)
def test_without_mooncake_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch, error: str, why: str) -> None:
    def fail(name: str) -> None:
        raise ImportError(error)

    monkeypatch.setattr(mooncake_client.importlib, "import_module", fail)
    with pytest.raises(ConfigError, match=why):
        open_tier("mooncakestore://127.0.0.1:1")


# -- memory ---------------------------------------------------------------------------------------------------------


class Registered:
    """What a client is told of. Refuses ranges that meet, as Mooncake does."""

    def __init__(self) -> None:
        self.ranges: dict[int, int] = {}
        self.calls = 0

    def register_buffer(self, start: int, nbytes: int) -> int:
        self.calls += 1
        if any(start < other + size and other < start + nbytes for other, size in self.ranges.items()):
            return -600
        self.ranges[start] = nbytes
        return 0

    def unregister_buffer(self, start: int) -> int:
        return 0 if self.ranges.pop(start, None) else -600


@pytest.fixture
def client() -> Registered:
    return Registered()


@pytest.fixture
def ranges(client: Registered) -> mooncake_client.Ranges:
    made = mooncake_client.Ranges()
    made.open(client)
    return made


def pool(nbytes: int) -> memoryview:
    return memoryview(mmap.mmap(-1, nbytes))


def test_a_pool_is_registered_once_whatever_its_parts(ranges: mooncake_client.Ranges, client: Registered) -> None:
    whole = pool(16 * BLOCK)
    for at in range(15):
        with ranges.using([whole[at * BLOCK : (at + 1) * BLOCK], whole[-BLOCK:]]):
            assert list(client.ranges.values()) == [16 * BLOCK]
    assert client.calls == 1


def test_memory_that_is_registered_stays_mapped(ranges: mooncake_client.Ranges, client: Registered) -> None:
    owner = mmap.mmap(-1, BLOCK)
    with ranges.using([memoryview(owner)]):
        pass
    with pytest.raises(BufferError):
        owner.close()
    ranges.close()
    owner.close()
    assert client.ranges == {}


def test_as_many_ranges_are_remembered_as_may_be(ranges: mooncake_client.Ranges, client: Registered) -> None:
    first = pool(BLOCK)
    for _ in range(mooncake_client._REMEMBERED + 50):
        with ranges.using([first, pool(BLOCK)]):
            pass
    assert len(client.ranges) == mooncake_client._REMEMBERED
    with ranges.using([first]):
        assert client.calls == mooncake_client._REMEMBERED + 51, "what is used again and again was forgotten"


def test_memory_that_nobody_owns_is_forgotten_at_once(ranges: mooncake_client.Ranges, client: Registered) -> None:
    owner = ctypes.create_string_buffer(4 * BLOCK)
    part = view_at(ctypes.addressof(owner), BLOCK)
    with ranges.using([part]), ranges.using([part]):
        assert list(client.ranges.values()) == [BLOCK] and client.calls == 1
    assert client.ranges == {}
    ranges.keep(view_at(ctypes.addressof(owner), 4 * BLOCK))
    with ranges.using([part, view_at(ctypes.addressof(owner) + BLOCK, BLOCK)]):
        pass
    assert list(client.ranges.values()) == [4 * BLOCK] and client.calls == 2


def test_a_pool_takes_the_place_of_its_parts(client: Registered) -> None:
    ranges = mooncake_client.Ranges()
    whole = pool(4 * BLOCK)
    ranges.keep(whole)
    ranges.open(client)
    assert list(client.ranges.values()) == [4 * BLOCK]
    other = mooncake_client.Ranges()
    other.open(client)
    with pytest.raises(OSError, match="could not register"), other.using([pool(BLOCK), whole[:BLOCK]]):
        pass
    client.ranges.pop(next(iter(client.ranges)))
    with other.using([whole[:BLOCK]]):
        pass
    other.keep(whole)
    assert 4 * BLOCK in client.ranges.values()
