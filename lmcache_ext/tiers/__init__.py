"""Tiers below host memory. `base.py` is the contract, `medium.py` what one writes to add a tier, `example.py` how."""

from __future__ import annotations

import importlib
from typing import Any

from lmcache_ext.errors import ConfigError
from lmcache_ext.tiers import disk, example, fake, fs, infinistore, mooncake, nixl_storage, redis_tier, s3
from lmcache_ext.tiers.base import Counts, JobResult, Kind, Outcome, Parts, Tier, view_at
from lmcache_ext.tiers.fault import Faults, Faulty
from lmcache_ext.tiers.medium import MEDIA, Found, Medium
from lmcache_ext.tiers.options import Options
from lmcache_ext.tiers.runner import Runner
from lmcache_ext.tiers.urls import Address

__all__ = [
    "MEDIA",
    "Address",
    "Counts",
    "Faults",
    "Faulty",
    "Found",
    "JobResult",
    "Kind",
    "Medium",
    "Options",
    "Outcome",
    "Parts",
    "Runner",
    "Tier",
    "disk",
    "example",
    "fake",
    "fs",
    "infinistore",
    "load_class",
    "make",
    "mooncake",
    "nixl_storage",
    "open_tier",
    "redis_tier",
    "s3",
    "view_at",
]


def open_tier(url: str, **options: Any) -> Tier:
    """The tier at `url`, at work.

    Args:
        url: `scheme://location?name=value&…`. Schemes are those of `MEDIA`; `plugin://module.path:ClassName` takes a
            class of yours, a `Medium` or a `Tier`; `fault+` before a medium's scheme makes it faulty.
        options: fields of `Options`; parameters in the URL go before them.

    Raises:
        ConfigError: the scheme or a parameter is not known, a value does not fit, or the tier can't be set up.
    """
    address = Address(url)
    chosen = address.options(options)
    made = make(address)
    return made if isinstance(made, Tier) else Runner(made, chosen, address.shown)


def make(address: Address) -> Medium | Tier:
    """What `address` names, its options taken from it already. A medium is not opened. Raises ConfigError."""
    made: Medium | Tier = _class_of(address).from_address(address)
    faults = Faults.from_address(address) if address.scheme.startswith("fault+") else None
    address.finish()
    return Faulty(made, faults) if faults and isinstance(made, Medium) else made


def _class_of(address: Address) -> Any:
    scheme = address.scheme.removeprefix("fault+")
    if scheme == "plugin":
        return load_class(address.location)
    if scheme not in MEDIA:
        known = ", ".join(sorted([*(name.lower() for name in MEDIA), "plugin"]))
        raise ConfigError("url", address.shown, f"has no scheme that we know; known: {known}")
    return MEDIA.get(scheme)


def load_class(name: str) -> Any:
    """The `Medium` or `Tier` called `module.path:ClassName`. Raises ConfigError that says what is wrong with it."""
    module, _, attribute = name.partition(":")
    if not module or not attribute:
        raise ConfigError("plugin", name, "must be module.path:ClassName")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except ImportError as error:
        raise ConfigError("plugin", name, f"can't be imported: {error}") from error
    except AttributeError:
        raise ConfigError("plugin", name, f"{module} has no {attribute}") from None
    if not (isinstance(found, type) and issubclass(found, (Medium, Tier)) and hasattr(found, "from_address")):
        raise ConfigError("plugin", name, "must be a Medium or a Tier with a class method from_address(address)")
    return found
