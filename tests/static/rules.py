"""The rules of docs and style that a machine can check, as functions from one parsed file to complaints."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PRODUCT = ("lmcache_ext", "backends", "components")

LEAVES = {"keys", "config", "events", "metrics", "errors", "registry", "native", "processes", "sleepy"}
LEAVES |= {"telemetry", "tracing"}
CORE = {"engine", "transfer", "tiers", "policies"}
PROCESSES = {"pd", "server", "cli"}
# Who may import whom inside lmcache_ext: a part sees its own row and the rows below.
BELOW = {
    **dict.fromkeys(LEAVES, LEAVES),
    **dict.fromkeys(CORE, CORE | LEAVES),
    **dict.fromkeys(PROCESSES, PROCESSES | CORE | LEAVES),
    "integration": {"integration"} | PROCESSES | CORE | LEAVES,
}
# Outside packages, and the parts of lmcache_ext that may import them.
HEAVY = {"vllm": {"integration"}, "dynamo": set(), "torch": {"transfer", "integration", "pd"}}
# config refuses unknown policies by name, and policies is a registry without imports from the core.
ALLOWED = {("lmcache_ext.config.settings", "lmcache_ext.policies")}
NEVER = {"tests", "launch", "benchmarks", "deploy", "backends", "components"}

UNSAFE_MODULES = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "shelve", "marshal"}
UNSAFE_CALLS = {"eval", "exec"}
WAITS = {"join", "wait", "get", "result", "acquire", "communicate"}
DEADLINES = {"timeout", "blocking", "block"}
NO_DEADLINE = "# no deadline:"  # with a reason, on the line of the call

MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 50
LONG = "# long:"  # with a reason, on the line of the def


@dataclass(frozen=True)
class Source:
    """One product file."""

    path: str  # relative to the repository, with /
    text: str

    @property
    def tree(self) -> ast.Module:
        return ast.parse(self.text, self.path)

    @property
    def module(self) -> str:
        """Its import name: backends/vllm/args.py is dynamo_lmcache.vllm.args."""
        parts = list(Path(self.path).with_suffix("").parts)
        if parts[0] in ("backends", "components"):
            parts[0] = "dynamo_lmcache"
        return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)

    def says(self, node: ast.AST, comment: str) -> bool:
        """Whether a line of `node`'s first expression holds `comment` and a reason."""
        lines = self.text.splitlines()[node.lineno - 1 : getattr(node, "end_lineno", node.lineno)]
        return any(comment in line and line.split(comment, 1)[1].strip() for line in lines)

    def at(self, node: ast.AST, complaint: str) -> str:
        return f"{self.path}:{node.lineno}: {complaint}"


def product() -> list[Source]:
    """All Python files of the product."""
    files = sorted(file for folder in PRODUCT for file in (ROOT / folder).rglob("*.py"))
    return [Source(file.relative_to(ROOT).as_posix(), file.read_text()) for file in files]


def imports(source: Source) -> Iterator[tuple[ast.stmt, str]]:
    """Every import statement with each full name it may bind, relative ones resolved."""
    package = source.module.split(".")
    if not source.path.endswith("__init__.py"):
        package = package[:-1]
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Import):
            yield from ((node, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            yield from ((node, f"{base}.{alias.name}") for alias in node.names)


def wrong_arrows(source: Source) -> Iterator[str]:
    """Imports against the one direction of docs' drawing."""
    for node, name in imports(source):
        top, _, rest = name.partition(".")
        if top in NEVER:
            yield source.at(node, f"imports {name}: nothing imports {top}/")
        elif source.module.startswith("lmcache_ext.") and not _may(source.module, top, rest.split(".")[0]):
            yield source.at(node, f"{source.module} may not import {name}")


def _may(module: str, top: str, part: str) -> bool:
    mine = module.split(".")[1]
    if top == "dynamo_lmcache":
        return False
    if top == "lmcache_ext":
        everyone = part.startswith("__") or part == ""
        return everyone or part in BELOW[mine] or (module, f"{top}.{part}") in ALLOWED
    return mine in HEAVY.get(top, {mine})


def unsafe(source: Source) -> Iterator[str]:
    """pickle and its kin, eval and exec, bare except, print outside the CLI."""
    for node, name in imports(source):
        if name.split(".")[0] in UNSAFE_MODULES:
            yield source.at(node, f"imports {name}")
    for node in ast.walk(source.tree):
        if isinstance(node, ast.ExceptHandler) and node.type is None:
            yield source.at(node, "bare except")
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            if node.func.id in UNSAFE_CALLS:
                yield source.at(node, f"{node.func.id}()")
            elif node.func.id == "print" and not source.module.startswith("lmcache_ext.cli."):
                yield source.at(node, "print() outside the CLI")


def endless_waits(source: Source) -> Iterator[str]:
    """Calls that may block for ever."""
    tree = source.tree
    bounded = {
        id(argument)
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and _called(node) == "wait_for"
        for argument in node.args
    }
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call) or id(node) in bounded or not _endless(node):
            continue
        if not source.says(node, NO_DEADLINE):
            yield source.at(node, f"{ast.unparse(node.func)}() without a deadline (or '{NO_DEADLINE} why')")


def _called(node: ast.Call) -> str:
    return node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")


def _endless(node: ast.Call) -> bool:
    if not isinstance(node.func, ast.Attribute):
        return False
    given = {keyword.arg: keyword.value for keyword in node.keywords}
    none = [value for name, value in given.items() if name == "timeout"]
    if any(isinstance(value, ast.Constant) and value.value is None for value in none):
        return True
    if ast.unparse(node.func) in ("subprocess.run", "subprocess.check_output", "subprocess.check_call"):
        return "timeout" not in given
    if node.func.attr not in WAITS or DEADLINES & given.keys():
        return False
    return not node.args or (isinstance(node.args[0], ast.Constant) and node.args[0].value is None)


def too_long(source: Source) -> Iterator[str]:
    """Files and functions that want splitting."""
    lines = source.text.count("\n")
    if lines > MAX_FILE_LINES:
        yield f"{source.path}: {lines} lines, more than {MAX_FILE_LINES}"
    for node in ast.walk(source.tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            if length > MAX_FUNCTION_LINES and LONG not in source.text.splitlines()[node.lineno - 1]:
                yield source.at(node, f"{node.name} has {length} lines, more than {MAX_FUNCTION_LINES}")
