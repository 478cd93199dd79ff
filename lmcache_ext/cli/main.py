"""`lmcache-ext`: one subcommand per module."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from lmcache_ext import __version__
from lmcache_ext.cli import bench, check, doctor, remote, report, server, top


def build_parser() -> argparse.ArgumentParser:
    """The command line: each subcommand's module adds itself."""
    parser = argparse.ArgumentParser(prog="lmcache-ext", description="Tools around the lmcache_ext KV-cache engine.")
    parser.add_argument("--version", action="version", version=f"lmcache-ext {__version__}")
    commands = parser.add_subparsers(title="commands", required=True)
    for command in (doctor, report, top, bench, check, server, remote):
        command.add_to(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand; its exit code."""
    args = build_parser().parse_args(argv)
    return int(args.run(args))


if __name__ == "__main__":
    sys.exit(main())
