"""launch/setup.sh on a small copy of the repository, with packages made here: real venvs, real pip, no network."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import signal
import subprocess
import time
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.launch.processes import heed_sigint

ROOT = Path(__file__).resolve().parents[2]
PROJECT = '[project]\nname = "lmcache-ext"\nversion = "0.1.0"\n[tool.setuptools]\npackages = ["lmcache_ext"]\n'


def make_wheel(folder: Path, name: str, version: str) -> None:
    """A wheel with one module."""
    folder.mkdir(exist_ok=True)
    info = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{name}.py", f"VERSION = {version!r}\n")
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")


@pytest.fixture(scope="session")
def setuptools_wheel(tmp_path_factory) -> Path:
    """The installed setuptools as a wheel again: the editable install needs a newer one than a new venv brings."""
    installed = importlib.metadata.distribution("setuptools")
    path = tmp_path_factory.mktemp("wheels") / f"setuptools-{installed.version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        for file in installed.files or []:
            if file.suffix != ".pyc" and ".." not in file.parts and Path(file.locate()).is_file():
                wheel.write(file.locate(), str(file))
    return path


@dataclass
class Copy:
    """A repository with the set-up script, an empty package and locks of our own."""

    root: Path
    wheels: Path
    env: dict[str, str]

    @property
    def venv(self) -> Path:
        return self.root / ".venv"

    def lock(self, *pins: str) -> None:
        (self.root / "requirements" / "cpu.lock").write_text("\n".join(pins) + "\n")

    def need_editable_install(self, wheel: Path) -> None:
        shutil.copy(wheel, self.wheels)
        name, version, *_ = wheel.name.split("-")
        (self.root / "requirements" / "dev.lock").write_text(f"tool==2.0\n{name}=={version}\n")

    def start(self, **env: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [self.root / "launch" / "setup.sh"],
            env={**self.env, **env},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            preexec_fn=heed_sigint,
        )

    def run(self, **env: str) -> tuple[int, str]:
        process = self.start(**env)
        output, _ = process.communicate(timeout=120)
        return process.returncode, output

    def version_of(self, module: str) -> str:
        code = f"import {module}; print({module}.VERSION)"
        done = subprocess.run(
            [self.venv / "bin" / "python", "-c", code],
            cwd="/",
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )
        return done.stdout.strip()


@pytest.fixture
def copy(tmp_path, setuptools_wheel) -> Copy:
    root, wheels = tmp_path / "repo", tmp_path / "wheels"
    for name in ("launch/setup.sh", "launch/lib.sh"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, root / name)
    (root / "pyproject.toml").write_text(PROJECT)
    (root / "requirements").mkdir()
    (root / "lmcache_ext").mkdir()
    (root / "lmcache_ext" / "__init__.py").write_text("VERSION = 'ours'\n")
    for name, version in [("thing", "1.0"), ("thing", "1.1"), ("tool", "2.0"), ("extra", "3.0")]:
        make_wheel(wheels, name, version)
    keep = {key: value for key, value in os.environ.items() if not key.startswith("PIP_")}
    keep = {k: v for k, v in keep.items() if k not in ("VENV", "DEVICE", "SKIP_SETUP", "MAKEFLAGS", "MFLAGS")}
    pip = {"PIP_CONFIG_FILE": os.devnull, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(wheels), "PIP_NO_CACHE_DIR": "1"}
    copy = Copy(root, wheels, {**keep, **pip, "DEVICE": "cpu"})
    copy.lock("thing==1.0")
    copy.need_editable_install(setuptools_wheel)
    return copy


def test_from_nothing_then_nothing_to_do(copy):
    code, output = copy.run()
    assert code == 0, output
    assert "python -m venv" in output and "pip install" in output  # shows what it does
    assert [copy.version_of(name) for name in ("thing", "tool", "lmcache_ext")] == ["1.0", "2.0", "ours"]
    begin = time.monotonic()
    assert copy.run() == (0, "")
    assert time.monotonic() - begin < 10


def test_a_new_lock_is_installed_and_what_it_no_longer_names_goes(copy):
    copy.lock("thing==1.0", "extra==3.0")
    assert copy.run()[0] == 0
    copy.lock("thing==1.1")
    code, output = copy.run()
    assert code == 0, output
    assert copy.version_of("thing") == "1.1"
    assert copy.version_of("extra") == ""
    assert copy.version_of("tool") == "2.0"


def test_a_missing_package_is_named_and_nothing_is_left(copy):
    copy.lock("thing==1.0", "absent==7.0")
    code, output = copy.run()
    assert code == 1
    assert "could not get absent==7.0" in output
    assert not copy.venv.exists()


def test_a_missing_package_leaves_the_old_installation_usable(copy):
    assert copy.run()[0] == 0
    copy.lock("thing==1.1", "absent==7.0")
    code, output = copy.run()
    assert code == 1 and "absent==7.0" in output
    assert copy.version_of("thing") == "1.0"
    copy.lock("thing==1.0")
    assert copy.run() == (0, "")


def test_killed_half_way_it_starts_over(copy):
    process = copy.start()
    deadline = time.monotonic() + 60
    while not (copy.venv / "bin" / "python").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate(timeout=30)
    code, output = copy.run()
    assert code == 0, output
    assert "cut short" in output
    assert copy.version_of("thing") == "1.0"


def test_interrupted_it_leaves_nothing(copy):
    process = copy.start()
    deadline = time.monotonic() + 60
    while not (copy.venv / "bin" / "python").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode != 0
    assert not copy.venv.exists()


def test_a_foreign_folder_is_not_touched(copy):
    copy.venv.mkdir()
    (copy.venv / "precious").touch()
    code, output = copy.run()
    assert code == 1
    assert "was not made by this script" in output and "SKIP_SETUP=1" in output
    assert (copy.venv / "precious").exists()


def test_skip_setup_takes_what_is_there(copy):
    assert copy.run(SKIP_SETUP="1") == (0, "")
    assert not copy.venv.exists()


def test_torch_comes_from_pytorchs_index_only_where_pip_does_not_offer_it(copy):
    index = copy.root.parent / "index"
    index.mkdir()
    make_wheel(index / "torch", "torch", "2.13.0+cpu")
    name = "torch-2.13.0+cpu-py3-none-any.whl"
    (index / "torch" / "index.html").write_text(f'<a href="{name.replace("+", "%2B")}">{name}</a>')
    copy.lock("torch==2.13.0+cpu")
    code, output = copy.run(TORCH_CPU_INDEX=index.as_uri(), PIP_NO_INDEX="0", PIP_INDEX_URL="file:///nowhere")
    assert code == 0, output
    assert f"taking it from PyTorch's CPU wheel index, {index.as_uri()}" in output
    assert copy.version_of("torch") == "2.13.0+cpu"


def test_torch_from_pips_own_configuration_needs_no_other_index(copy):
    make_wheel(copy.wheels, "torch", "2.13.0+cpu")
    copy.lock("torch==2.13.0+cpu")
    code, output = copy.run(TORCH_CPU_INDEX="file:///nowhere")
    assert code == 0, output
    assert "PyTorch's" not in output


def test_torch_that_nobody_has_is_named(copy):
    copy.lock("torch==2.13.0+cpu")
    code, output = copy.run(TORCH_CPU_INDEX="file:///nowhere")
    assert code == 1
    assert "could not get torch==2.13.0+cpu" in output
    assert not copy.venv.exists()


def test_a_strange_device_is_refused(copy):
    code, output = copy.run(DEVICE="tpu")
    assert code == 1
    assert "DEVICE=tpu is not one of auto, cpu, cuda" in output


def test_without_python_311_the_debian_package_is_named(copy, tmp_path):
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("bash", "env", "dirname", "sha256sum", "cut", "cat", "id"):
        (tools / name).symlink_to(shutil.which(name))
    code, output = copy.run(PATH=str(tools))
    assert code == 1
    assert "sudo apt-get install --no-install-recommends python3.11" in output


def test_a_full_disk_is_said_before_anything_is_downloaded(copy, tmp_path):
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "df").write_text("#!/bin/sh\necho head\necho disk 1 1 1048576 1 /\n")
    (tools / "df").chmod(0o755)
    code, output = copy.run(PATH=f"{tools}:{os.environ['PATH']}")
    assert code == 1
    assert "1 GiB free" in output and "need 6 GiB" in output
    assert not copy.venv.exists()


def test_two_at_once_install_once(copy):
    first, second = copy.start(), copy.start()
    outputs = [first.communicate(timeout=120)[0], second.communicate(timeout=120)[0]]
    assert (first.returncode, second.returncode) == (0, 0), outputs
    assert sum("python -m venv" in output for output in outputs) == 1
