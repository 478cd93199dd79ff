"""What the HTTP paths take and answer, as OpenAPI says it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from lmcache_ext import __version__

MOST_KEYS = 4096
MOST_GB = 1e9
Schema = dict[str, Any]

_STRING: Schema = {"type": "string"}
_KEY: Schema = {"type": "string", "pattern": "^[0-9a-f]{64}$"}
_KEYS: Schema = {"type": "array", "items": _KEY, "minItems": 1, "maxItems": MOST_KEYS}
_TOKENS: Schema = {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": (1 << 32) - 1}}
_COUNT: Schema = {"type": "integer", "minimum": 0, "maximum": 999_999_999_999}


def _object(required: Iterable[str] = (), **fields: Schema) -> Schema:
    return {"type": "object", "properties": fields, "required": list(required)}


# (method, path) → (what the body must be, whether there must be one)
_BODIES: dict[tuple[str, str], tuple[Schema, bool]] = {
    ("DELETE", "/cache/objects"): (_object(["keys"], keys=_KEYS, tier={"enum": ["l1", "l2", "all"]}), True),
    ("POST", "/cache/clear"): (_object(tier={"enum": ["l1"]}, root=_KEY), False),
    ("POST", "/cache/checksums"): (_object(["keys"], keys=_KEYS), True),
    ("POST", "/cache/prefetches"): (
        {
            "anyOf": [
                _object(["root", "keys"], root=_KEY, keys=_KEYS),
                _object(
                    ["model_name", "token_ids"], model_name=_STRING, token_ids=_TOKENS,
                    world_size={"type": "integer"},
                ),
            ]
        },
        True,
    ),
    ("PUT", "/quota/{cache_salt}"): (
        _object(["limit_gb"], limit_gb={"type": "number", "minimum": 0, "maximum": MOST_GB}),
        True,
    ),
}  # fmt: skip
_QUERIES: dict[tuple[str, str], dict[str, Schema]] = {
    ("GET", "/status"): {"check": {"enum": ["0", "1"]}},
    ("GET", "/cache/objects"): {"offset": _COUNT, "limit": _COUNT},
}
_NO_JSON = {"/": "text/html", "/metrics": "text/plain"}
_FOUND = {("POST", "/cache/clear"), ("POST", "/cache/prefetches"), ("GET", "/cache/prefetches/{id}")}


def describe(routes: Iterable[tuple[str, str, str]]) -> Schema:
    """The whole document.

    Args:
        routes: (method, path, what it does) of all.
    """
    paths: dict[str, Schema] = {}
    for method, path, summary in routes:
        about: Schema = {
            "summary": summary, "operationId": f"{method.lower()}{path.replace('/', '_')}",
            "responses": _responses(method, path),
        }  # fmt: skip
        if parameters := _parameters(method, path):
            about["parameters"] = parameters
        if (method, path) in _BODIES:
            schema, required = _BODIES[method, path]
            about["requestBody"] = {"content": {"application/json": {"schema": schema}}, "required": required}
        paths.setdefault(path, {})[method.lower()] = about
    return {"openapi": "3.1.0", "info": {"title": "lmcache-ext server", "version": __version__}, "paths": paths}


def _parameters(method: str, path: str) -> list[Schema]:
    names = [part[1:-1] for part in path.split("/") if part.startswith("{")]
    found: list[Schema] = [{"name": name, "in": "path", "required": True, "schema": _STRING} for name in names]
    queries = _QUERIES.get((method, path), {})
    return found + [{"name": name, "in": "query", "schema": schema} for name, schema in queries.items()]


def _responses(method: str, path: str) -> Schema:
    kind = _NO_JSON.get(path, "application/json")
    content = {kind: {"schema": {"type": "object"} if kind == "application/json" else _STRING}}
    error = {"application/json": {"schema": _object(["error"], error=_STRING)}}
    done = "202" if path == "/cache/prefetches" else "200"
    found: Schema = {done: {"description": "done", "content": content}}
    if (method, path) in _BODIES or (method, path) in _QUERIES:
        found["400"] = {"description": "that makes no sense; `error` says why", "content": error}
    if (method, path) in _FOUND:
        found["404"] = {"description": "there is no such thing", "content": error}
    if path == "/cache/prefetches":
        found["409"] = {"description": "there is no tier below host memory", "content": error}
    for status, why in (("401", "the secret is missing"), ("403", "not from there"), ("503", "busy")):
        found[status] = {"description": why, "content": error if status != "503" else {}}
    return found
