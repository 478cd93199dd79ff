"""Which tiers settings open, in which order, and what is refused by whose name."""

from __future__ import annotations

from pathlib import Path

import pytest

from lmcache_ext.config import EngineConfig
from lmcache_ext.config.settings import LOCATIONS, STAGES
from lmcache_ext.engine import levels
from lmcache_ext.engine.levels import open_levels
from lmcache_ext.errors import ConfigError
from lmcache_ext.tiers import Runner, serde


@pytest.fixture
def secret(tmp_path: Path) -> str:
    (tmp_path / "secret").write_text("11" * 32)
    return str(tmp_path / "secret")


def opened(**settings: object) -> list[levels.Level]:
    return open_levels(EngineConfig(**settings), "torch.bfloat16")


def test_disk_then_gds_then_remote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """cuFile does not start without a GPU, so the URL's plugin is another."""
    real, urls = levels.open_tier, []

    def instead(url: str, **options: object) -> object:
        urls.append((url, options.get("capacity_gb")))
        return real(url.replace("nixl://gds_mt", "nixl://posix"), **options)

    monkeypatch.setattr(levels, "open_tier", instead)
    folders = f"{tmp_path}/g/,{tmp_path}/h/"
    found = opened(
        local_disk=f"{tmp_path}/d/", max_local_disk_size=1, gds_path=folders, max_gds_size=2, remote_url="example://",
        retrieve_locations="GdsBackend", store_location="RemoteBackend",
    )  # fmt: skip
    assert [(level.kind, level.reads, level.writes) for level in found] == [
        ("disk", False, False), ("gds", True, False), ("remote", False, True)
    ]  # fmt: skip
    assert urls == [(f"file://{tmp_path}/d/", 1.0), (f"nixl://gds_mt{folders}", 2.0), ("example://", None)]
    assert (tmp_path / "g" / "00").is_dir() and (tmp_path / "h" / "00").is_dir()
    assert all(level.tier.close(5) for level in found)


@pytest.mark.parametrize("asked", ["naive", "fp8", "aesgcm", "fp8,aesgcm", " fp8 , aesgcm"])
def test_only_the_remote_tier_is_coded(asked: str, secret: str, tmp_path: Path) -> None:
    settings = {"remote_serde": asked, "remote_serde_key_file": secret, "remote_url": "example://"}
    disk, remote = opened(local_disk=str(tmp_path), max_local_disk_size=1, **settings)
    assert isinstance(remote.tier, Runner) and isinstance(disk.tier, Runner)
    names = [stage.name.partition(":")[0] for stage in remote.tier.serde._stages]
    assert names == [name.strip() for name in asked.split(",") if name != "naive"]
    assert disk.tier.options.serde == "naive"
    assert disk.tier.close(5) and remote.tier.close(5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"local_disk": "/a/"}, "max_local_disk_size=0.0: must be the GB for local_disk"),
        ({"gds_path": "/a/"}, "max_gds_size=0.0: must be the GB for gds_path"),
        ({"remote_url": "example://", "remote_serde": "aesgcm"}, "remote_serde_key_file=''"),
        ({"remote_url": "example://", "remote_serde": "aesgcm", "remote_serde_key_file": "/no"}, "remote_serde_key_fi"),
    ],
)
def test_what_is_missing_is_refused_by_the_settings_name(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        opened(**settings)


def test_fp8_is_refused_for_kv_of_another_or_an_unknown_kind() -> None:
    config = EngineConfig(remote_url="example://", remote_serde="fp8")
    for dtype in ("", "torch.float32", "fp8_e4m3"):
        with pytest.raises(ConfigError, match="bf16 or fp16"):
            open_levels(config, dtype)


def test_settings_and_tiers_know_the_same_names() -> None:
    assert tuple(serde.STAGES) == STAGES
    assert {levels.DISK, levels.GDS, levels.REMOTE} == set(LOCATIONS[1:])
    with pytest.raises(ValueError, match="some of fp8,aesgcm"):
        EngineConfig(remote_serde="cachegen")
