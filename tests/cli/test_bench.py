"""`lmcache-ext bench tier`: figures for every kind of tier, beside its limit, and nothing left behind."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from lmcache_ext.cli import bench, raw
from lmcache_ext.cli.main import main
from lmcache_ext.tiers import Outcome, open_tier
from lmcache_ext.tiers.disk import Disk
from tests.tiers import mooncake_server, s3_server
from tests.tiers.helpers import load, store, until
from tests.tiers.redis_servers import Server

QUICK = ["--chunk-mb", "0.25,1", "--chunks", "5", "--threads", "3", "--rounds", "2"]


def told(capsys: pytest.CaptureFixture[str], url: str, *more: str) -> dict[str, Any]:
    capsys.readouterr()
    assert main(["bench", "tier", url, *QUICK, "--json", *more]) == 0, capsys.readouterr().err
    return json.loads(capsys.readouterr().out)


def require_figures(report: dict[str, Any], limit: str | None) -> None:
    assert (report["compared_with"], report["threads"], report["rounds"]) == (limit, 3, 2)
    assert [size["chunk_mb"] for size in report["sizes"]] == [0.25, 1]
    for size in report["sizes"]:
        for way in ("store", "load"):
            one = size[way]
            assert one["mb_per_s"] > 0 and 0 < one["p50_ms"] <= one["p99_ms"] and one["samples"] == 10
            assert (one["raw_mb_per_s"] is None) == (limit is None) == (one["ratio"] is None)
            assert limit is None or (one["raw_mb_per_s"] > 0 and one["ratio"] > 0)
        assert 0 < size["look_up"]["p50_ms"] <= size["look_up"]["p99_ms"]


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[Server]:
    server = Server(tmp_path / "redis")
    yield server
    server.stop()


@pytest.mark.parametrize("start", ["file://", "fs://", "nixl://posix"])
def test_files_beside_o_direct_in_the_same_folder(
    start: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = set()
    real = raw.Files.store

    def watched(self: raw.Files, i: int, view: memoryview) -> None:
        seen.update(folder.parent for folder in self._folders)
        real(self, i, view)

    monkeypatch.setattr(raw.Files, "store", watched)
    granted = Disk([tmp_path])._grants_direct
    (tmp_path / "00").mkdir()
    limit = "O_DIRECT" if granted(tmp_path) else "files, page cache"
    (tmp_path / "00").rmdir()
    require_figures(told(capsys, f"{start}{tmp_path}/a/b"), limit)
    assert seen == {tmp_path / "a" / "b"}
    assert list(tmp_path.iterdir()) == [], "folders are left"


def test_what_was_in_the_tier_stays(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tier = open_tier(f"file://{tmp_path}/", lookup_timeout=5.0)
    store(tier, 1)
    assert tier.close(5)
    before = sorted(tmp_path.rglob("*"))
    told(capsys, f"file://{tmp_path}/")
    assert sorted(tmp_path.rglob("*")) == before
    assert main(["bench", "tier", f"file://{tmp_path}/?capacity_gb=0.001"]) == 2
    assert "leave it out" in capsys.readouterr().err
    tier = open_tier(f"file://{tmp_path}/")
    assert load(tier, 1) is Outcome.OK and tier.close(5)


def test_redis_beside_its_client(redis: Server, capsys: pytest.CaptureFixture[str]) -> None:
    redis.client().set("other", b"1")
    require_figures(told(capsys, f"redis://127.0.0.1:{redis.port}"), "redis-py")
    until(lambda: redis.client().keys() == [b"other"])  # the probe's key expires after a second


def test_a_bucket_beside_its_client(capsys: pytest.CaptureFixture[str]) -> None:
    server = s3_server.common()
    bucket = server.folder / s3_server.BUCKET

    def objects() -> list[Path]:
        return sorted(path for path in bucket.rglob("*") if path.is_file())

    before = objects()
    who = f"{s3_server.USER}:{quote(s3_server.PASSWORD, safe='')}"
    url = f"s3://{who}@{s3_server.BUCKET}/bench?endpoint={server.endpoint}&region=us-east-1"
    report = told(capsys, url)
    require_figures(report, "obstore")
    assert objects() == before
    assert s3_server.USER not in json.dumps(report)


@pytest.mark.skipif(bool(mooncake_server.missing()), reason="needs Mooncake's client")
def test_a_pool_beside_its_client(capfd: pytest.CaptureFixture[str]) -> None:
    master = mooncake_server.Master(lease_ms=100)
    peer = mooncake_server.Peer(master.settings(256))
    try:
        more = "local_hostname=127.0.0.1&global_segment_size=0&local_buffer_size=0"
        assert main(["bench", "tier", f"mooncakestore://127.0.0.1:{master.port}?{more}", *QUICK, "--json"]) == 0
        out = capfd.readouterr().out
        require_figures(json.loads(out[out.index("{\n") :]), "Mooncake's client")
    finally:
        peer.kill()
        master.kill()


def test_lines_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "tier", "fake://?latency=0.002&fault.x", *QUICK]) == 2
    assert main(["bench", "tier", "fake://?latency=0.002", *QUICK]) == 0
    head, columns, store_line, load_line, look_up, *_ = capsys.readouterr().out.splitlines()
    assert head == "fake://  3 threads, 2 rounds of 5 chunks"
    assert columns.split() == ["MB/s", "raw", "MB/s", "ratio", "p50", "ms", "p99", "ms"]
    assert store_line.startswith("store, 0.25 MiB ") and load_line.startswith("load, 0.25 MiB ")
    assert 2 <= float(load_line.split()[-2]) < 20 and look_up.startswith("look-up of 128 keys ")


def test_coding_is_measured_with_the_tier(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "secret").write_text("77" * 32)
    require_figures(told(capsys, f"example://?serde=aesgcm&serde_key_file={tmp_path}/secret"), None)


@pytest.mark.parametrize(
    ("url", "code", "why"),
    [
        ("/mnt/kv", 2, "must be scheme://location"),
        ("tape:///x", 2, "known: example"),
        ("file://here", 2, "absolute folders"),
        ("redis://user:hidden@127.0.0.1:1", 1, "redis://127.0.0.1:1: can't be written: .*refused"),
        ("fault+example://?fault.error=1", 1, "can't be written: .*made up"),
        ("fault+example://?fault.short=1", 1, "a load ended with 'corrupt'"),
    ],
)
def test_what_does_not_work_is_said(url: str, code: int, why: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "tier", url, *QUICK]) == code
    said = capsys.readouterr()
    assert not said.out and "hidden" not in said.err
    assert re.search(why, said.err)


def test_a_tier_that_breaks_in_the_middle_leaves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: raw.Files, i: int, view: memoryview) -> None:
        raise OSError("the disk is gone")

    monkeypatch.setattr(raw.Files, "load", broken)
    assert main(["bench", "tier", f"file://{tmp_path}/a", *QUICK]) == 1
    assert "the disk is gone" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("wrong", [["--chunk-mb", "0"], ["--chunk-mb", "4,x"], ["--chunks", "0"], ["--threads", "-1"]])
def test_odd_numbers_are_refused(wrong: list[str]) -> None:
    with pytest.raises(SystemExit) as refused:
        main(["bench", "tier", "example://", *wrong])
    assert refused.value.code == 2


def test_every_size_is_whole_in_two_blocks() -> None:
    assert bench._sizes("0.0078125,32") == [0.0078125, 32.0] and os.O_DIRECT
