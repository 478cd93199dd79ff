"""`lmcache-ext check URL [--fix]`: what is wrong in a tier? Looks at names and sizes, not at bytes: loads prove those.

May run while engines use the tier. Without --fix nothing is changed, and each line says what --fix would do.
"""

from __future__ import annotations

import argparse
import json
import sys

from lmcache_ext.cli.tier_url import add_url, folders_of, is_set_up, look_at
from lmcache_ext.errors import ConfigError
from lmcache_ext.tiers import Address, Medium, Tier
from lmcache_ext.tiers.disk import Disk
from lmcache_ext.tiers.nixl_storage import NixlStorage

_STAYS = {"is not ours": "stays, for it may be somebody's", "can't be read": "nothing can be done about it from here"}


def add_to(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the subcommand."""
    parser = commands.add_parser("check", help="find faults in a tier, and mend them", description=__doc__)
    add_url(parser)
    parser.add_argument("--fix", action="store_true", help="remove what dead writers left, and what can't be objects")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the faults; 1 if there are any that were not mended, 2 if the URL is wrong."""
    try:
        faults, left, objects = examine(args.url, args.fix)
    except ConfigError as error:
        print(f"lmcache-ext check: {error}", file=sys.stderr)
        return 2
    if args.json:
        print(json.dumps({"ok": not left, "objects": objects, "faults": faults, "left": left}, indent=2))
        return 1 if left else 0
    for fault in faults:
        print(f"{fault}: {_fate(fault, args.fix, fault in left)}")
    after = f", {len(left)} left" if args.fix else ""
    print(f"{Address(args.url).shown}: {objects:,} objects, {len(faults)} faults{after}")
    return 1 if left else 0


def examine(url: str, fix: bool) -> tuple[list[str], list[str], int]:
    """(faults, those that are still there, objects). Raises ConfigError.

    Without a tier around the medium: a new one would mend things by itself when it starts, and find differences
    between its index and what engines do meanwhile, which are no faults.
    """
    made = look_at(url)
    for folder in folders_of(made):
        if not is_set_up(folder):
            raise ConfigError("url", Address(url).shown, f"{folder} lacks the subfolders 00 to ff of a tier's folder")
    if isinstance(made, NixlStorage):
        made = Disk(made.folders)  # the same files, and names are all that is wanted
    if isinstance(made, Tier):
        faults = made.check(fix)
        left = made.check() if fix and faults else faults
        objects = made.counts().objects
        made.close(10)
        return faults, left, objects
    made.open()
    try:
        name = Address(url).shown
        faults, objects = _scan(made, fix, name)
        left = _scan(made, False, name)[0] if fix and faults else faults
        return faults, left, objects
    finally:
        made.close()


def _scan(medium: Medium, sweep: bool, name: str) -> tuple[list[str], int]:
    """Faults and the number of objects."""
    faults: list[str] = []
    objects = 0
    try:
        medium.probe(write=False)  # a medium that can't list finds nothing, also where it is gone
        for _ in medium.scan(sweep, faults):
            objects += 1
    except Exception as error:  # each medium raises its own
        faults.append(f"{name} can't be read: {error}")
    return faults, objects


def _fate(fault: str, fix: bool, left: bool) -> str:
    stays = next((why for what, why in _STAYS.items() if what in fault), None)
    if stays:
        return stays
    if not fix:
        return "--fix removes it"
    return "could not be mended" if left else "mended"
