"""Upstream's `--l2-adapter` JSON, as URLs of our tiers (docs/tiers.md)."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote, urlencode

from lmcache_ext.engine import Level
from lmcache_ext.errors import ConfigError
from lmcache_ext.tiers import open_tier

logger = logging.getLogger("lmcache_ext.server")

FLAG = "--l2-adapter"


class _Keys:
    """One adapter's JSON object. Whoever reads a key takes it; `finish` refuses what nobody took."""

    def __init__(self, values: dict[str, Any], where: str = "") -> None:
        self._values, self._where = dict(values), where

    def take(self, name: str, default: Any = None) -> Any:
        """The value, or `default`."""
        return self._values.pop(name, default)

    def need(self, name: str) -> Any:
        """The value. Raises ConfigError if there is none."""
        if name not in self._values:
            raise ConfigError(FLAG, self._where, f"needs {name!r}")
        return self._values.pop(name)

    def rest(self) -> dict[str, Any]:
        """All that nobody took."""
        values, self._values = self._values, {}
        return values

    def ignore(self, *names: str) -> None:
        """Keys that make no difference here."""
        for name in names:
            if self._values.pop(name, None) is not None:
                logger.warning("%s %s: %r makes no difference here", FLAG, self._where, name)

    def finish(self) -> None:
        """Raises ConfigError that names a key that nobody took."""
        for name, value in self._values.items():
            raise ConfigError(FLAG, f"{self._where} {name}", f"{value!r}: there is no such key here")


@dataclass(frozen=True)
class Adapter:
    """One tier to open: `kind` is what its metrics are called, `disk` or `remote`."""

    type: str
    kind: str
    url: str

    def open(self) -> Level:
        """Raises ConfigError if it can't be set up."""
        return Level(self.kind, open_tier(self.url))


def parse(text: str) -> Adapter:
    """The adapter that a JSON object describes. Raises ConfigError that names what is wrong."""
    try:
        values = json.loads(text)
    except ValueError as error:
        raise ConfigError(FLAG, text, f"is no JSON: {error}") from None
    if not isinstance(values, dict) or not isinstance(values.get("type"), str):
        raise ConfigError(FLAG, text, 'must be a JSON object with a "type"')
    return _parse(values)


def _parse(values: dict[str, Any]) -> Adapter:
    name = values["type"]
    if name not in _KINDS:
        raise ConfigError(FLAG, name, f"is not a type that there is here; known: {', '.join(sorted(_KINDS))}")
    keys = _Keys({key: value for key, value in values.items() if key != "type"}, name)
    kind, make = _KINDS[name]
    if name == "fault_inject":
        return _faulty(keys)
    common = _common(keys)
    base, query = make(keys)
    keys.finish()
    query = {**common, **{key: value for key, value in query.items() if value is not None}}
    return Adapter(name, kind, base + ("?" + urlencode(query) if query else ""))


def _common(keys: _Keys) -> dict[str, Any]:
    """What all adapters share, as parameters of a tier."""
    found: dict[str, Any] = {}
    if serde := keys.take("serde"):
        raise ConfigError(FLAG, f"serde {serde!r}", "chunks are stored as they are; leave it out")
    if not keys.take("persist_enabled", True):
        raise ConfigError(FLAG, "persist_enabled false", "a tier that is not written to is no tier; leave it out")
    eviction = keys.take("eviction") or {}
    if policy := eviction.pop("eviction_policy", None):
        found["policy"] = policy
    if eviction:
        logger.warning("%s: capacity is a bound at every moment; %s make no difference", FLAG, ", ".join(eviction))
    if (threads := keys.take("num_workers")) is not None:
        found["threads"] = threads
    if (capacity := keys.take("max_capacity_gb")) is not None:
        found["capacity_gb"] = capacity
    keys.ignore("affinity_tag")
    return found


Made = tuple[str, dict[str, Any]]


def _fs(keys: _Keys) -> Made:
    keys.ignore("relative_tmp_dir", "read_ahead_size")
    shared = keys.take("shared")
    return f"fs://{_folder(keys.need('base_path'))}", {
        "odirect": _flag(keys.take("use_odirect")), "shared": _flag(shared),
    }  # fmt: skip


def _resp(keys: _Keys) -> Made:
    keys.ignore("shared")
    host, port = keys.take("host", "localhost"), keys.take("port", 6379)
    return f"redis://{_login(keys)}{host}:{port}", {}


def _valkey(keys: _Keys) -> Made:
    keys.ignore("shared")
    nodes = keys.need("startup_nodes")
    listed = nodes.split(",") if isinstance(nodes, str) else [_node(node) for node in nodes]
    cluster = keys.take("cluster_mode", len(listed) > 1)
    scheme = "redis-cluster" if cluster else "valkey"
    base = f"{scheme}://{_login(keys)}{','.join(listed) if cluster else listed[0]}"
    database = keys.take("database_id", 0)
    return base + (f"/{database}" if database and not cluster else ""), {
        "prefix": keys.take("key_prefix"), "tls": _flag(keys.take("tls_enable")), "ttl": keys.take("ttl_seconds"),
        "timeout": keys.take("request_timeout"), "connect_timeout": keys.take("connection_timeout"),
    }  # fmt: skip


def _mooncake(keys: _Keys) -> Made:
    master = keys.need("master_server_addr")
    keys.ignore("shared", "per_op_workers")
    values = {name: _text(value) for name, value in keys.rest().items()}
    return f"mooncakestore://{master}", values


def _nixl(keys: _Keys) -> Made:
    keys.ignore("shared", "pool_size")
    backend, given = str(keys.need("backend")), dict(keys.take("backend_params") or {})
    folder = given.pop("file_path", None)
    if folder is None:
        raise ConfigError(FLAG, f"nixl_store {backend}", "needs backend_params.file_path; for buckets use type s3")
    given.pop("file_size", None)
    found = {"odirect": _flag(given.pop("use_direct_io", None)), "capacity_gb": given.pop("max_capacity_gb", None)}
    if given:
        found["backend_params"] = ",".join(f"{name}:{_text(value)}" for name, value in given.items())
    return f"nixl://{backend.lower()}{_folder(folder)}", found


def _s3(keys: _Keys) -> Made:
    bucket, prefix = keys.need("s3_bucket"), keys.take("s3_prefix", "")
    user, secret = keys.take("aws_access_key_id"), keys.take("aws_secret_access_key")
    login = f"{quote(user, safe='')}:{quote(secret or '', safe='')}@" if user else ""
    return f"s3://{login}{bucket}/{prefix}", {
        "endpoint": keys.take("s3_endpoint"), "region": keys.take("s3_region"), "shared": _flag(keys.take("shared")),
    }  # fmt: skip


def _mock(keys: _Keys) -> Made:
    keys.ignore("shared")
    return "fake://", {"capacity_gb": keys.need("max_size_gb"), "gb_per_s": keys.take("mock_bandwidth_gb")}


def _faulty(keys: _Keys) -> Adapter:
    inner = keys.need("inner")
    if not isinstance(inner, dict) or not isinstance(inner.get("type"), str) or inner["type"] == "fault_inject":
        raise ConfigError(FLAG, "fault_inject inner", 'must be another adapter: {"type": …}')
    adapter = _parse(inner)
    names = ("seed", "error", "short", "flip", "delay", "delay_s", "hang")
    faults = {f"fault.{name}": value for name in names if (value := keys.take(name)) is not None}
    keys.finish()
    return Adapter(
        "fault_inject", adapter.kind, f"fault+{adapter.url}{'&' if '?' in adapter.url else '?'}{urlencode(faults)}"
    )


def _folder(path: object) -> str:
    return quote("/" + str(path).strip("/") + "/")


def _login(keys: _Keys) -> str:
    user, password = keys.take("username") or "", keys.take("password") or ""
    return f"{quote(user, safe='')}:{quote(password, safe='')}@" if user or password else ""


def _node(node: object) -> str:
    return f"{node['host']}:{node['port']}" if isinstance(node, dict) else str(node)


def _flag(value: object) -> int | None:
    return None if value is None else int(bool(value))


def _text(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


_KINDS: dict[str, tuple[str, Callable[[_Keys], Made]]] = {
    "fs": ("disk", _fs),
    "fs_native": ("disk", _fs),
    "nixl_store": ("disk", _nixl),
    "nixl_store_dynamic": ("disk", _nixl),
    "resp": ("remote", _resp),
    "valkey": ("remote", _valkey),
    "mooncake_store": ("remote", _mooncake),
    "s3": ("remote", _s3),
    "mock": ("remote", _mock),
    "fault_inject": ("remote", _fs),
}
