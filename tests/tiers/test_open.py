"""Addresses, options, plugins: what is wrong is said at the start, with the name, the value and what would do."""

from __future__ import annotations

from pathlib import Path

import pytest

from lmcache_ext.errors import ConfigError
from lmcache_ext.tiers import Faulty, Outcome, Runner, Tier, open_tier
from lmcache_ext.tiers.disk import Disk
from lmcache_ext.tiers.example import Example
from lmcache_ext.tiers.fake import Fake
from tests.tiers.helpers import load, store


class Mine(Example):
    """A user's own, as it would be in a package of theirs."""


class NoAddress(Tier):
    """Can't be opened by URL."""


def test_a_url_opens_a_tier_that_works(tmp_path: Path) -> None:
    for url in (f"file://{tmp_path}/a", f"file://{tmp_path}/a/,{tmp_path}/b/", "example://", "fake://?latency=0.001"):
        tier = open_tier(url)
        assert store(tier, 1) is Outcome.OK and load(tier, 1) is Outcome.OK, url
        assert tier.close(5)


def test_parameters_reach_their_places(tmp_path: Path) -> None:
    url = f"fault+file://{tmp_path}/my%20cache?odirect=0&fsync=true&threads=2&capacity_gb=0.5&policy=lru&fault.seed=7"
    tier = open_tier(url, threads=8, ttl=60.0)
    assert isinstance(tier, Runner) and isinstance(tier.medium, Faulty) and isinstance(tier.medium.inner, Disk)
    assert (tier.options.threads, tier.options.ttl, tier.options.capacity) == (2, 60.0, 1 << 29)
    assert tier.medium.faults.seed == 7
    assert (tmp_path / "my cache" / "00").is_dir()
    assert tier.close(5)
    fake = open_tier("fake://?gb_per_s=2.5")
    assert isinstance(fake, Runner) and isinstance(fake.medium, Fake) and fake.medium.gb_per_s == 2.5
    assert fake.close(5)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("/var/cache", "scheme://location"),
        ("tape:///dev/st0", "known: example, fake, file, .*plugin"),
        ("file://", "absolute folders"),
        ("file://cache/here", "absolute folders"),
        ("file:///tmp/x?colour=red", "known: .*fsync.*odirect.*threads"),
        ("file:///tmp/x?odirect=maybe", "1 or 0"),
        ("example://?threads=many", "number"),
        ("example://?threads=0", "greater than 0"),
        ("example://?capacity_gb=-1", "greater than 0"),
        ("example://?capacity_gb=nan", "greater than 0"),
        ("example://?policy=BEST", "must be one of .*LRU"),
        ("example://?fault.flip=1", "not a parameter"),
        ("fake://?latency=slow", "number"),
        ("plugin://no.such.module:Thing", "can't be imported"),
        ("plugin://tests.tiers.test_open", "module.path:ClassName"),
        ("plugin://tests.tiers.test_open:Missing", "has no Missing"),
        ("plugin://tests.tiers.test_open:NoAddress", "from_address"),
        ("plugin://pathlib:Path", "Medium or a Tier"),
        ("redis://user:secret@host?x=1", "not a parameter"),
    ],
)
def test_what_is_wrong_is_refused_with_what_would_do(url: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as refused:
        open_tier(url)
    assert "secret" not in str(refused.value)


def test_a_folder_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "f").write_text("")
    with pytest.raises(ConfigError, match="can't be set up"):
        open_tier(f"file://{tmp_path}/f")


def test_a_class_of_ones_own_is_found_by_name() -> None:
    tier = open_tier("plugin://tests.tiers.test_open:Mine?threads=1")
    assert isinstance(tier, Runner) and type(tier.medium).__name__ == "Mine"
    assert store(tier, 1) is Outcome.OK and load(tier, 1) is Outcome.OK
    assert tier.close(5)
