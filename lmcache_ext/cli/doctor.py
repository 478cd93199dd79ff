"""`lmcache-ext doctor`: can this machine serve with the cache on? Reads the variables that the launch scripts read."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Iterable, Mapping

from lmcache_ext.cli import machine, model, network, packages, services, settings
from lmcache_ext.cli.finding import Finding, Level

Env = Mapping[str, str]

CHECKS: tuple[Callable[[Env], Iterable[Finding]], ...] = (
    settings.check_switch,
    settings.check_settings,
    machine.check_gpu,
    packages.check_packages,
    model.check_model,
    machine.check_memory,
    machine.check_shm,
    machine.check_memlock,
    machine.check_compiler,
    network.check_ports,
    services.check_discovery,
)


def examine(env: Env) -> list[Finding]:
    """Run all checks under the environment `env`. Imports neither torch nor vLLM: takes well under a second."""
    return [finding for check in CHECKS for finding in check(env)]


def add_to(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the subcommand."""
    parser = commands.add_parser("doctor", help="check GPU, memory, ports, versions and settings", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of lines")
    parser.add_argument("--quiet", action="store_true", help="leave out what is ok")
    parser.add_argument("--port", type=int, action="append", default=[], help="also look at this system port")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the findings; 1 if any of them is a `fail`."""
    findings = [*examine(os.environ), *network.check_more_ports(os.environ, args.port)]
    failed = any(finding.level is Level.FAIL for finding in findings)
    if args.json:
        print(json.dumps({"ok": not failed, "findings": [finding.as_dict() for finding in findings]}, indent=2))
    else:
        print_lines(finding for finding in findings if not (args.quiet and finding.level is Level.OK))
    return 1 if failed else 0


def print_lines(findings: Iterable[Finding]) -> None:
    """One line a finding, what to do about it indented below."""
    for finding in findings:
        print(f"{finding.level.value:<4}  {finding.check:<17} {finding.text}")
        if finding.advice:
            print(f"{'':<23} -> {finding.advice}")
