"""Every metric that the pieces export, from their own code, and the metric names in a query."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path

from lmcache_ext.metrics import CATALOGUE
from lmcache_ext.server import figures

_SUFFIXES = {"counter": ["_total"], "gauge": [""], "histogram": ["_bucket", "_sum", "_count"]}
_EVERY_SUFFIX = ["", "_total", "_bucket", "_sum", "_count"]
# Where Dynamo puts the names of each class in its own list.
_DYNAMO = {"frontend_service": "dynamo_frontend", "router": "dynamo_component", "kvstats": "dynamo_component"}


def exported() -> set[str]:
    """Ours with the suffixes of their kinds, vLLM's and our server's from their source, Dynamo's from its list; and
    Prometheus' own."""
    names = {f"lmcache:{metric.name}{suffix}" for metric in CATALOGUE.values() for suffix in _SUFFIXES[metric.kind]}
    for name in (*_vllm(), *_dynamo(), *_server()):
        names.update(name + suffix for suffix in _EVERY_SUFFIX)
    return names | {"up", "ALERTS"}


def _vllm() -> Iterator[str]:
    spec = importlib.util.find_spec("vllm")
    assert spec is not None and spec.origin is not None
    source = Path(spec.origin).parent / "v1" / "metrics" / "loggers.py"
    yield from re.findall(r'name="(vllm:[a-z_0-9]+)"', source.read_text())


def _server() -> Iterator[str]:
    source = Path(figures.__file__).read_text()
    yield from re.findall(r'"(lmcache_(?:mp|server)_[a-z_0-9]+)"', source)
    (kinds,) = re.findall(r'for what in \(("[a-z]+", "[a-z]+")\):', source)
    yield from (f"lmcache_server_{kind}" for kind in re.findall("[a-z]+", kinds))


def _dynamo() -> Iterator[str]:
    from dynamo import prometheus_names

    for group, prefix in _DYNAMO.items():
        for key, value in vars(getattr(prometheus_names, group)).items():
            if key.isupper() and isinstance(value, str):
                yield f"{prefix}_{value}"


_WORDS = re.compile(r"[a-zA-Z_:][a-zA-Z0-9_:]*")
_KEYWORDS = {"by", "without", "on", "ignoring", "and", "or", "unless", "bool", "offset", "group_left", "group_right"}


def metrics_in(query: str) -> set[str]:
    """Names of metrics: words that are no label, no function, no keyword and no duration."""
    text = re.sub(r'"[^"]*"', "", query)
    text = re.sub(r"\{[^}]*\}|\[[^\]]*\]", "", text)
    text = re.sub(r"\b(by|without|on|ignoring|group_left|group_right)\s*\([^)]*\)", "", text)
    found = set()
    for match in _WORDS.finditer(text):
        called = text[match.end() :].lstrip().startswith("(")
        if not called and match.group() not in _KEYWORDS:
            found.add(match.group())
    return found
