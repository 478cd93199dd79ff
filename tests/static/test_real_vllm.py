"""`import vllm` gives the real vllm from every folder of the repository, although three folders here have that name.

Python puts the current folder on sys.path. There, a folder `vllm` without `__init__.py` is only a possible part of a
namespace package, and the real package further down the path wins; with `__init__.py` it would be taken.
`lmcache_ext/integration/vllm` must have one, because vLLM loads the connector by that name: imported under the other's
name, it hands over.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.static.rules import ROOT

# Imported by vLLM, Dynamo or us, some of them only when a feature is used.
OTHERS = {"vllm", "dynamo", "nixl", "torch", "transformers", "triton", "lmcache", "redis", "zmq", "nats", "aetcd"}


def folders() -> list[Path]:
    skip = {"__pycache__", "build", "dist", "node_modules"}
    found = [ROOT]
    for base, names, _ in os.walk(ROOT):
        names[:] = [n for n in names if n not in skip and not n.startswith(".") and not n.endswith(".egg-info")]
        names[:] = [n for n in names if not (Path(base) / n / "pyvenv.cfg").exists()]
        found += [Path(base) / name for name in names]
    return found


def python(code: str, cwd: Path) -> str:
    env = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONSAFEPATH")}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, env=env, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, f"in {cwd}:\n{done.stderr[-2000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def imported_names(tmp_path_factory) -> set[str]:
    """Top-level names that `import vllm` brings in, learnt in an empty folder."""
    code = "import json, sys, vllm; print(json.dumps([vllm.__file__, sorted({m.split('.')[0] for m in sys.modules})]))"
    file, names = json.loads(python(code, tmp_path_factory.mktemp("empty")).splitlines()[-1])
    assert "site-packages" in file
    return set(names) | OTHERS


@pytest.mark.parametrize("folder", folders(), ids=lambda folder: str(folder.relative_to(ROOT)))
def test_no_folder_shadows_what_vllm_imports(folder, imported_names):
    ours = {path.stem for path in folder.glob("*.py")} | {path.parent.name for path in folder.glob("*/__init__.py")}
    shadowed = (ours & imported_names) - {"lmcache_ext", "__init__", "__main__"}
    if folder == ROOT / "lmcache_ext" / "integration":
        shadowed.remove("vllm")  # hands over: see below
    assert not shadowed, (
        f"with {folder.relative_to(ROOT)} as current folder, `import {sorted(shadowed)[0]}` would be ours: "
        "rename the module, or leave __init__.py out of the folder"
    )


@pytest.mark.parametrize("folder", ["backends", "dynamo_lmcache", "lmcache_ext/integration"])
def test_the_real_vllm_is_imported(folder):
    assert "site-packages" in python("import vllm; print(vllm.__file__)", ROOT / folder).splitlines()[-1]


def test_the_editable_install_adds_one_folder_and_not_backends():
    code = "import json, sys; print(json.dumps(sys.path[1:]))"
    added = [Path(entry) for entry in json.loads(python(code, Path("/"))) if Path(entry).is_relative_to(ROOT)]
    outside = [path for path in added if not path.is_relative_to(Path(sys.prefix))]
    assert outside == [ROOT]
