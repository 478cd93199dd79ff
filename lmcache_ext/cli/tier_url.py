"""What the commands for one tier share: its URL, looked at before anything is opened."""

from __future__ import annotations

import argparse
from pathlib import Path

from lmcache_ext.tiers import Address, Medium, Tier, make
from lmcache_ext.tiers.disk import SHARDS, Disk

URL_HELP = "e.g. file:///mnt/kv/, redis://host:6379, s3://bucket/prefix?endpoint=…: docs/tiers.md has them all"


def add_url(parser: argparse.ArgumentParser) -> None:
    """The tier, and `--json`."""
    parser.add_argument("url", metavar="URL", help=URL_HELP)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of lines")


def look_at(url: str) -> Medium | Tier:
    """What `url` names; nothing is opened but a plugin that is a whole tier. Raises ConfigError."""
    address = Address(url)
    address.options({})  # they are the runner's
    return make(address)


def folders_of(made: Medium | Tier) -> tuple[Path, ...]:
    """Where a tier of files keeps them; () for others."""
    return made.folders if isinstance(made, Disk) else ()


def is_set_up(folder: Path) -> bool:
    """Whether a tier of files has been there."""
    return all((folder / shard).is_dir() for shard in (SHARDS[0], SHARDS[-1]))
