"""`lmcache-ext ping`, `describe`, `kvcache clear` and `quota`: a running server, or engine, over HTTP."""

from __future__ import annotations

import argparse
import http.client
import json
import os
import sys
import urllib.error
import urllib.request
from collections.abc import Callable
from typing import Any
from urllib.parse import quote

TIMEOUT_S = 5.0
DEFAULTS = {"kvcache": "http://127.0.0.1:8080", "engine": "http://127.0.0.1:8000"}
_PING = {"kvcache": "/healthcheck", "engine": "/health"}
_DESCRIBE = {"kvcache": "/status", "engine": "/v1/models"}


def add_to(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the subcommands."""
    for name, text, run in (("ping", "is it there?", ping), ("describe", "what it says of itself", describe)):
        parser = commands.add_parser(name, help=f"a server or an engine: {text}", description=__doc__)
        parser.add_argument("target", choices=sorted(DEFAULTS))
        parser.add_argument("--url", help="default: kvcache http://127.0.0.1:8080, engine http://127.0.0.1:8000")
        parser.set_defaults(run=run)
    kvcache = commands.add_parser("kvcache", help="clear a server's memory", description=__doc__)
    _action(kvcache.add_subparsers(required=True), "clear", "forget all chunks in host memory", clear)
    quota = commands.add_parser("quota", help="bound what a salt may take of a server's memory", description=__doc__)
    actions = quota.add_subparsers(required=True)
    for name, text in (("set", "bound a salt"), ("get", "show one"), ("delete", "bound it no more")):
        parser = _action(actions, name, text, share)
        parser.add_argument("salt", help="_default: requests without a salt")
        if name == "set":
            parser.add_argument("--limit-gb", type=float, required=True)
        parser.set_defaults(action=name)
    _action(actions, "list", "show all", share).set_defaults(action="list", salt="")


def _action(
    actions: argparse._SubParsersAction[argparse.ArgumentParser], name: str, text: str,
    run: Callable[[argparse.Namespace], int],
) -> argparse.ArgumentParser:  # fmt: skip
    parser = actions.add_parser(name, help=text)
    parser.add_argument("--url", help=f"default: {DEFAULTS['kvcache']}")
    parser.set_defaults(run=run, target="kvcache")
    return parser


def ping(args: argparse.Namespace) -> int:
    """0 if it is there."""
    return _ask(args, "GET", _PING[args.target], lambda answer: "ok")


def describe(args: argparse.Namespace) -> int:
    """Print what it says."""
    return _ask(args, "GET", _DESCRIBE[args.target], lambda answer: json.dumps(answer, indent=2))


def clear(args: argparse.Namespace) -> int:
    """Forget all chunks."""
    return _ask(args, "POST", "/cache/clear", lambda answer: f"{answer['cleared']} chunks forgotten", {"tier": "l1"})


def share(args: argparse.Namespace) -> int:
    """One of `quota`'s actions."""
    path = f"/quota/{quote(args.salt, safe='')}" if args.salt else "/quota"
    method = {"set": "PUT", "delete": "DELETE"}.get(args.action, "GET")
    body = {"limit_gb": args.limit_gb} if args.action == "set" else None
    return _ask(args, method, path, lambda answer: json.dumps(answer, indent=2), body)


def _ask(
    args: argparse.Namespace, method: str, path: str, show: Callable[[Any], str], body: dict[str, Any] | None = None
) -> int:
    url = (args.url or DEFAULTS[args.target]).rstrip("/") + path
    headers = {"Content-Type": "application/json"}
    if token := os.environ.get("LMCACHE_SERVER_TOKEN"):
        headers["Authorization"] = f"Bearer {token}"
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, headers, method=method)
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=TIMEOUT_S) as answer:
            text = answer.read().decode()
        print(show(json.loads(text) if text.strip() else {}))
    except urllib.error.HTTPError as error:
        print(f"{url}: {error.code} {error.read().decode(errors='replace')[:500]}", file=sys.stderr)
        return 1
    except (OSError, ValueError, http.client.HTTPException) as error:
        print(f"{url}: {getattr(error, 'reason', error)}; name the server with --url", file=sys.stderr)
        return 1
    return 0
