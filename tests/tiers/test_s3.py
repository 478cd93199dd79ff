"""S3 through a real server: names, credentials, listings, and a server that dies, stops, refuses or cuts off."""

from __future__ import annotations

import logging
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from lmcache_ext.errors import ConfigError
from lmcache_ext.tiers import Options, Outcome, Runner, open_tier
from lmcache_ext.tiers.s3 import S3, _fill
from lmcache_ext.tiers.urls import Address
from tests.tiers.helpers import (
    WHOLE,
    blank,
    chunk,
    content,
    end,
    found,
    gb,
    header_of,
    key,
    load,
    over,
    store,
    until,
)
from tests.tiers.s3_server import BUCKET, PASSWORD, USER, Server, common


@pytest.fixture(autouse=True)
def without_aws(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in (
        "AWS_ACCESS_KEY_ID",
        "AWS_SECRET_ACCESS_KEY",
        "AWS_PROFILE",
        "AWS_ENDPOINT_URL",
        "AWS_ENDPOINT_URL_S3",
    ):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))


@pytest.fixture
def server(quick_path: Path) -> Iterator[Server]:
    """One that the test may harm."""
    made = Server(quick_path / "s3").start()
    yield made
    made.kill()


def url(
    server: Server, user: str = f"{USER}:{quote(PASSWORD, safe='')}@", prefix: str = "url/test", more: str = ""
) -> str:
    return f"s3://{user}{BUCKET}/{prefix}?endpoint={server.endpoint}&region=us-east-1&lookup_timeout=5{more}"


def closed(tier: object) -> None:
    assert isinstance(tier, Runner) and tier.close(10)


# -- names and settings -----------------------------------------------------------------------------------------------


def test_an_object_is_its_header_and_its_parts_under_its_name() -> None:
    server = common()
    tier = over(server.medium("a/b"))
    store(tier, 1)
    lies = server.folder / BUCKET / "a" / "b" / "v1" / "01" / key(1).hex()
    assert lies.read_bytes() == bytes(header_of(key(1), chunk(1))) + content(chunk(1))
    closed(tier)


@pytest.mark.parametrize("how", ["url", "environment", "profile"])
def test_credentials_come_from_url_environment_or_profile(
    how: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    if how == "environment":
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", USER)
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", PASSWORD)
        monkeypatch.setenv("AWS_ENDPOINT_URL", common().endpoint)
    if how == "profile":
        text = f"[default]\naws_access_key_id = no\naws_secret_access_key = no\n[mine]\naws_access_key_id = {USER}\n"
        (tmp_path / "credentials").write_text(f"{text}aws_secret_access_key = {PASSWORD}\n")
        monkeypatch.setenv("AWS_PROFILE", "mine")
    address = url(common(), prefix=how) if how == "url" else url(common(), user="", prefix=how)
    if how == "environment":
        address = address.replace(f"endpoint={common().endpoint}&", "")
    tier = open_tier(address)
    assert store(tier, 1) is Outcome.OK and load(tier, 1) is Outcome.OK
    closed(tier)


def test_secrets_are_never_said(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    tier = open_tier(url(common(), user="tester:not-the-secret@", more="&faults=1"))
    assert load(tier, 1) is Outcome.FAILED and load(tier, 1) is Outcome.OFF
    said = [record.getMessage() for record in caplog.records]
    assert any("403" in each for each in said)
    assert not [each for each in [*said, *tier.check()] if "not-the-secret" in each or "Debug" in each]
    closed(tier)


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("s3:///prefix", "must name a bucket"),
        ("s3://k:hidden@b/?endpoint=host:9000", "must be http"),
        ("s3://k:hidden@b/?timeout=0", "greater than 0"),
        ("s3://k:hidden@b/?colour=red", "known: .*endpoint.*path_style.*region"),
        ("s3://k:hidden@b/?path_style=perhaps", "1 or 0"),
    ],
)
def test_what_is_wrong_is_refused_at_the_start(address: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as refused:
        open_tier(address)
    assert "hidden" not in str(refused.value)


def test_path_style_and_sharing_follow_the_url() -> None:
    medium = S3.from_address(Address("s3://b/p?shared=1"))
    assert medium.shared and medium.bounded and not S3.from_address(Address("s3://b/p")).shared
    assert medium._config == {"virtual_hosted_style_request": True}
    assert S3.from_address(Address("s3://b?endpoint=http://h:1"))._config["virtual_hosted_style_request"] is False


# -- what is there ----------------------------------------------------------------------------------------------------


def test_a_restart_finds_what_was_there_page_by_page_oldest_first(monkeypatch: pytest.MonkeyPatch) -> None:
    server = common()
    tier = over(server.medium("again"), store_queue=100)
    result = end(tier, tier.submit_store([key(i) for i in range(25)], [chunk(i) for i in range(25)]))
    assert all(result.ok)
    closed(tier)
    time.sleep(1.1)  # times in a listing are whole seconds
    tier = over(server.medium("again"))
    store(tier, 25)
    closed(tier)
    monkeypatch.setattr("lmcache_ext.tiers.s3._PAGE", 7)
    tier = over(server.medium("again"), capacity_gb=gb(20 * WHOLE))
    there = found(tier, *range(26))
    assert sum(there) == 20 and there[25] and tier.counts().used == 20 * WHOLE
    assert {load(tier, i) for i, each in enumerate(there) if each} == {Outcome.OK}
    assert tier.check() == []
    closed(tier)


def test_objects_of_another_prefix_or_schema_are_let_alone() -> None:
    server = common()
    other, strange = over(server.medium("mine-q")), over(server.medium("mine/v1/00"))
    store(other, 1), store(strange, 2)
    tier = over(server.medium("mine"))
    for name in ("notes", "probe"):
        (server.folder / BUCKET / "mine" / "v1" / name).write_text("x")
    stub = server.folder / BUCKET / "mine" / "v1" / "03" / key(3).hex()
    stub.parent.mkdir()
    stub.write_bytes(b"too short")
    assert sorted(fault.rpartition("/")[2] for fault in tier.check()) == [
        f"{key(2).hex()} is not ours", f"{key(3).hex()} is cut off within its header", "notes is not ours",
    ]  # fmt: skip
    tier.check(fix=True)
    assert not stub.exists() and (server.folder / BUCKET / "mine" / "v1" / "notes").exists()
    assert load(other, 1) is Outcome.OK and load(strange, 2) is Outcome.OK
    for each in (other, strange, tier):
        closed(each)


def test_two_engines_share_a_bucket_without_an_index() -> None:
    server = common()
    one, two = (over(server.medium("both", shared=True)) for _ in range(2))
    store(one, 1)
    assert found(two, 1, 2) == [True, False] and load(two, 1) is Outcome.OK
    again = end(two, two.submit_store([key(1)], [chunk(1)]))
    assert (again.ok, again.nbytes) == ([True], 0), "it was sent though it is there"
    end(one, one.delete([key(1)]))
    assert load(two, 1) is Outcome.MISS
    for each in (one, two):
        closed(each)


# -- servers that fail ------------------------------------------------------------------------------------------------

SOON: dict[str, Any] = {"lookup_timeout": 5.0, "store_timeout": 1.0, "cooldown": 0.1, "cooldown_max": 0.3}
QUICK = {"timeout": 1.0, "connect_timeout": 0.3, "retries": 1}


def test_a_killed_server_is_failures_until_it_is_back(server: Server) -> None:
    tier = over(server.medium("p", **QUICK), faults=2, **SOON)
    store(tier, 1)
    server.kill()
    assert [load(tier, 1) for _ in range(3)] == [Outcome.FAILED, Outcome.FAILED, Outcome.OFF]
    assert [store(tier, i) for i in (2, 3, 4)] == [Outcome.FAILED, Outcome.FAILED, Outcome.OFF]
    server.start()
    until(lambda: load(tier, 1) is Outcome.OK)
    until(lambda: store(tier, 2) is Outcome.OK)
    until(lambda: tier.check() == [])
    closed(tier)


def test_a_server_that_is_down_at_the_start_may_come_later(server: Server) -> None:
    server.kill()
    tier = Runner(server.medium("p", **QUICK), Options(**SOON), "test")
    until(lambda: store(tier, 1) is Outcome.OFF)
    server.start()
    until(lambda: store(tier, 1) is Outcome.OK)
    assert load(tier, 1) is Outcome.OK
    closed(tier)


def test_a_server_that_stops_answering_is_late_and_gives_its_threads_back(server: Server) -> None:
    tier = over(server.medium("p", **QUICK), threads=2, faults=2, **SOON)
    store(tier, 1)
    server.signal(signal.SIGSTOP)
    began = time.monotonic()
    result = end(tier, tier.submit_load([key(1)], [blank()], timeout=0.3))
    assert result.outcomes == (Outcome.LATE,) and result.held == (0,) and time.monotonic() - began < 5
    assert end(tier, tier.submit_store([key(2)], [chunk(2)], timeout=0.3)).outcomes == (Outcome.LATE,)
    until(lambda: tier.counts().held == 0)
    assert len(tier.freed()) == 2 and time.monotonic() - began < 15
    until(lambda: Outcome.OFF in (load(tier, 1), store(tier, 3)))
    server.signal(signal.SIGCONT)
    until(lambda: load(tier, 1) is Outcome.OK)
    until(lambda: store(tier, 4) is Outcome.OK)
    closed(tier)


@pytest.mark.parametrize("wrong", ["password", "bucket"])
def test_refusals_open_the_breaker_and_end_with_their_cause(server: Server, wrong: str) -> None:
    bucket = "missing" if wrong == "bucket" else BUCKET
    medium = server.medium("p", bucket, "wrong" if wrong == "password" else PASSWORD)
    tier = Runner(medium, Options(faults=2, **SOON), "test")
    assert [load(tier, 1) for _ in range(3)] == [Outcome.FAILED, Outcome.FAILED, Outcome.OFF]
    until(lambda: store(tier, 1) is Outcome.OFF)
    if wrong == "bucket":
        (server.folder / bucket).mkdir()
        until(lambda: store(tier, 1) is Outcome.OK)
        until(lambda: load(tier, 1) is Outcome.OK)
    closed(tier)


class Cutting:
    """A proxy before a server, which ends each connection after so many bytes of answers."""

    def __init__(self, server: Server, after: int) -> None:
        self.after = after
        self._server = server
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            there = socket.create_connection(("127.0.0.1", self._server.port), timeout=5)
            threading.Thread(target=self._pass, args=(client, there, 10**9), daemon=True).start()
            threading.Thread(target=self._pass, args=(there, client, self.after), daemon=True).start()

    @staticmethod
    def _pass(source: socket.socket, target: socket.socket, left: int) -> None:
        try:
            while left and (data := source.recv(min(4096, left))):
                target.sendall(data)
                left -= len(data)
        except OSError:
            pass
        for each in (source, target):
            with each:
                each.close()

    def close(self) -> None:
        self._listener.close()


def test_a_stream_that_ends_too_soon_is_an_error_and_its_steps_may_lie_anyhow() -> None:
    parts = blank(5, 0, 3)
    _fill(parts, iter([b"ab", b"cdefgh", b"not fetched"]))
    assert content(parts) == b"abcdefgh"
    with pytest.raises(OSError, match="1 bytes too soon"):
        _fill(blank(5, 3), iter([b"abcd", b"efg"]))


def test_a_body_that_is_cut_off_is_a_failure_and_the_object_stays(server: Server) -> None:
    whole = over(server.medium("p"))
    store(whole, 1)
    proxy = Cutting(server, after=10_000)
    medium = server.medium("p", timeout=5.0, retries=1)
    medium._config["endpoint"] = f"http://127.0.0.1:{proxy.port}"
    tier = over(medium, faults=100)
    began = time.monotonic()
    assert load(tier, 1) is Outcome.FAILED and time.monotonic() - began < 15
    proxy.after = 10**9
    until(lambda: load(tier, 1) is Outcome.OK)
    assert load(whole, 1) is Outcome.OK
    proxy.close()
    closed(tier)
    closed(whole)
