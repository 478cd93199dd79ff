"""Wheel and source archive: they hold the whole product, and what they install runs without this repository."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from configparser import ConfigParser
from email.parser import Parser
from pathlib import Path

import pytest

import lmcache_ext
from lmcache_ext.ports import free_port
from tests.engines import apart, engines
from tests.engines.pd_kills import cached, questions
from tests.static.rules import ROOT

pytest.importorskip("build", reason="needs build of requirements/dev.in")
PREFIXES = {"lmcache_ext": "lmcache_ext", "backends": "dynamo_lmcache", "components": "dynamo_lmcache"}


def run(*words: str | Path, cwd: Path, **env: str) -> str:
    clean = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run(words, cwd=cwd, env=clean | env, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, f"{words}:\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
    return done.stdout


def tracked() -> list[Path]:
    """Files of the repository as a clone would have them, and those that are about to be added."""
    listed = run("git", "ls-files", "-co", "--exclude-standard", cwd=ROOT).splitlines()
    return [Path(name) for name in listed if (ROOT / name).is_symlink() or (ROOT / name).is_file()]


def product() -> dict[str, Path]:
    """What must be in the archives: the name there → the file here."""
    found = {}
    for path in tracked():
        top = path.parts[0]
        if top in PREFIXES and path.suffix in (".py", ".html"):
            found["/".join([PREFIXES[top], *path.parts[1:]])] = ROOT / path
    return found


@pytest.fixture(scope="module")
def dist(tmp_path_factory) -> Path:
    """Built from a clone's files elsewhere: the source archive first, the wheel from that archive."""
    source = tmp_path_factory.mktemp("source")
    for path in tracked():
        if path.parts[0] not in ("tests", "benchmarks"):
            (source / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / path, source / path, follow_symlinks=False)
    out = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, cwd=source)
    return out


@pytest.fixture(scope="module")
def wheel(dist: Path) -> Path:
    (found,) = dist.glob("*.whl")
    return found


def test_the_wheel_holds_the_product_byte_for_byte_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        wanted = product()
        assert names == set(wanted)
        for name, path in wanted.items():
            assert archive.read(name) == path.read_bytes(), name


def test_the_source_archive_holds_files_where_the_repository_has_links(dist):
    (found,) = dist.glob("*.tar.gz")
    with tarfile.open(found) as archive:
        inside = {member.name.partition("/")[2]: member for member in archive.getmembers()}
    assert set(product()) <= set(inside)
    assert all(inside[name].isfile() for name in product())
    assert {"pyproject.toml", "README.md", "LICENSE"} <= set(inside)


def test_metadata(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (info,) = {name.split("/")[0] for name in archive.namelist() if ".dist-info/" in name}
        metadata = Parser().parsestr(archive.read(f"{info}/METADATA").decode())
        entries = ConfigParser()
        entries.read_string(archive.read(f"{info}/entry_points.txt").decode())
        assert f"{info}/licenses/LICENSE" in archive.namelist()
        names = set(archive.namelist())
    assert metadata["Version"] == lmcache_ext.__version__
    assert metadata["License-Expression"] == "Apache-2.0"
    targets = [value for section in entries.values() for value in section.values()]
    assert "lmcache_ext.cli.main:main" in targets and len(targets) >= 4
    for target in targets:
        assert target.split(":")[0].replace(".", "/") + ".py" in names, target


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory) -> Path:
    """A fresh environment with the wheel; of this one it sees the other packages, but not the editable install."""
    folder = tmp_path_factory.mktemp("fresh") / "venv"
    run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=wheel.parent)
    executable = folder / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", executable]
    run(*pip, "install", "--no-deps", "--no-index", "--quiet", wheel, cwd=wheel.parent)
    (site,) = folder.glob("lib/python*/site-packages")
    (site / "zz_others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return executable


def test_the_command_runs(python, tmp_path):
    command = python.with_name("lmcache-ext")
    assert lmcache_ext.__version__ in run(command, "--version", cwd=tmp_path)
    listed = run(command, "--help", cwd=tmp_path)
    for name in ("doctor", "report", "top"):
        assert name in listed
        assert "usage" in run(command, name, "--help", cwd=tmp_path)


def test_every_module_is_found_in_the_wheel_and_the_light_ones_import(python, tmp_path):
    files = [name for name in product() if name.endswith(".py")]
    modules = sorted({name.removesuffix(".py").removesuffix("/__init__").replace("/", ".") for name in files})
    light = ["dynamo_lmcache.frontend.main", "dynamo_lmcache.vllm.settings", "dynamo_lmcache.vllm.flags"]
    light += ["lmcache_ext.engine", "lmcache_ext.tiers", "lmcache_ext.policies", "lmcache_ext.cli.main"]
    code = (
        "import importlib, sys, sysconfig, pathlib\n"
        "site = pathlib.Path(sysconfig.get_path('purelib'))\n"
        f"for name in {modules!r}:\n"
        "    parts = site.joinpath(*name.split('.'))\n"
        "    assert parts.with_suffix('.py').is_file() or (parts / '__init__.py').is_file(), name\n"
        f"for name in {light!r}:\n"
        "    file = importlib.import_module(name).__file__\n"
        "    assert file.startswith(str(site)), file\n"
        "assert 'vllm' not in sys.modules and 'torch' not in sys.modules\n"
    )
    run(python, "-c", code, cwd=tmp_path)


@pytest.mark.engine
@pytest.mark.timeout(400)
def test_the_wheel_serves_and_a_prompt_comes_back_from_the_cache(python, tmp_path):
    transfer = {"kv_connector": "LMCacheConnectorV1", "kv_role": "kv_both"}
    port, log = free_port(), tmp_path / "log"
    command = [python, "-P", "-m", "vllm.entrypoints.openai.api_server", "--model", engines.MODEL, *apart.FLAGS]
    command += ["--host", "127.0.0.1", "--port", port, "--no-enable-prefix-caching", "--enable-prompt-tokens-details"]
    command += ["--kv-transfer-config", json.dumps(transfer)]
    env = {k: v for k, v in os.environ.items() if not k.startswith(("LMCACHE_", "PYTHONPATH"))}
    env |= {"LMCACHE_MAX_LOCAL_CPU_SIZE": "0.1", "LMCACHE_CHUNK_SIZE": "64", "VLLM_CPU_KVCACHE_SPACE": "1"}
    with log.open("wb") as out:
        process = subprocess.Popen(list(map(str, command)), cwd=tmp_path, env=env, stdout=out, stderr=out,
                                   start_new_session=True)  # fmt: skip
    served = apart.Served("wheel", port, process, log)
    try:
        served.wait()
        query = questions(1, 1)[0]
        answers = [served.complete(query.token_ids) for _ in range(2)]
        assert [answer["choices"][0]["text"] for answer in answers] == [query.expected] * 2
        assert [cached(answer) for answer in answers] == [0, 512]
    finally:
        served.stop()
    code = "import importlib.util as util; print(util.find_spec('lmcache_ext').origin)"
    assert run(python, "-P", "-c", code, cwd=tmp_path).startswith(str(python.parents[1])), "not this repository's"


def test_what_the_wheel_leaves_out_is_documented():
    text = (ROOT / "docs" / "deploy.md").read_text().partition("## Packages")[2]
    for name in ("`launch/`", "`deploy/`", "demo model", "requirements/*.lock"):
        assert name in text
