"""launch/agg_lmcache.sh says what is wrong and starts nothing; and it stops what it started. No engine runs here."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from lmcache_ext.ports import free_port
from tests.launch.processes import heed_sigint, running_with

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "launch" / "agg_lmcache.sh"


def environment(tmp_path: Path, **env: str) -> dict[str, str]:
    ours = ("LMCACHE_", "DYN_", "VLLM_", "HF_")
    mine = {key: value for key, value in os.environ.items() if not key.startswith(ours)}
    mine |= {"VENV": sys.prefix, "SKIP_SETUP": "1", "DEVICE": "cpu", "MODEL": str(tmp_path), "TMPDIR": str(tmp_path)}
    return {**mine, "HTTP_PORT": str(free_port()), "DYN_SYSTEM_PORT": str(free_port()), **env}


def refused(tmp_path: Path, *flags: str, script: str = SCRIPT.name, **env: str) -> str:
    (tmp_path / "config.json").write_text("{}")
    done = subprocess.run(
        [SCRIPT.parent / script, *flags],
        env=environment(tmp_path, **env),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 1, done.stdout
    assert "starting" not in done.stdout
    return done.stdout


def test_a_strange_enable_lmcache(tmp_path):
    output = refused(tmp_path, ENABLE_LMCACHE="maybe")
    assert re.search(r"fail +ENABLE_LMCACHE +'maybe' is neither on nor off", output)
    assert "1/true/yes/on" in output


def test_a_taken_port(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        output = refused(tmp_path, HTTP_PORT=str(port))
    assert f"port {port} on 127.0.0.1 can't be used" in output and f"process {os.getpid()}" in output


def test_a_model_that_is_not_there(tmp_path):
    assert "/no/such/model: there is no such folder" in refused(tmp_path, MODEL="/no/such/model")


def test_a_model_flag_counts_as_model(tmp_path):
    assert "/no/such/model: there is no such folder" in refused(tmp_path, "--model=/no/such/model")
    assert "/no/such/model: there is no such folder" in refused(tmp_path, "--model", "/no/such/model")


def test_too_little_memory(tmp_path):
    output = refused(tmp_path, LMCACHE_MAX_LOCAL_CPU_SIZE="100000")
    assert re.search(r"fail +memory .*pool \(LMCACHE_MAX_LOCAL_CPU_SIZE\) 100000.0", output)


@pytest.mark.skipif(os.geteuid() != 0, reason="a small /dev/shm of its own needs root")
def test_a_small_dev_shm(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    unshare = ["unshare", "--mount", "bash", "-c"]
    if subprocess.run([*unshare, "mount -t tmpfs -o size=64m none /dev/shm"], timeout=20, check=False).returncode:
        pytest.skip("mounting is not allowed here")
    done = subprocess.run(
        [*unshare, f"mount -t tmpfs -o size=64m none /dev/shm && exec {SCRIPT}"],
        env=environment(tmp_path),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 1
    assert "64 MiB free in /dev/shm" in done.stdout and "--shm-size" in done.stdout


def test_etcd_that_does_not_answer(tmp_path):
    elsewhere = {"ETCD_ENDPOINTS": f"http://127.0.0.1:{free_port()}", "NATS_SERVER": f"nats://127.0.0.1:{free_port()}"}
    output = refused(tmp_path, DYN_DISCOVERY_BACKEND="etcd", **elsewhere)
    assert "etcd at http://127.0.0.1:" in output
    assert "nats at" in output  # etcd brings NATS, unless told otherwise


SCRIPTS = sorted(path.name for path in SCRIPT.parent.glob("*_*.sh"))
OF_DYNAMO = [name for name in SCRIPTS if "start_frontend" in (SCRIPT.parent / name).read_text()]


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_shows_the_variables(name):
    done = subprocess.run([SCRIPT.parent / name, "--help"], capture_output=True, text=True, timeout=20, check=False)
    assert done.returncode == 0
    assert "HTTP_PORT" in done.stdout and "set -e" not in done.stdout


@pytest.mark.parametrize("name", [name for name in OF_DYNAMO if name != SCRIPT.name])
def test_a_taken_port_of_a_second_worker(tmp_path, name):
    port = free_port()
    with socket.create_server(("127.0.0.1", port)):
        output = refused(tmp_path, script=name, DYN_SYSTEM_PORT=str(port - 1))
    assert f"port {port} on 127.0.0.1 can't be used" in output


@pytest.mark.parametrize(
    ("name", "variable"),
    [("agg_router.sh", "WORKERS"), ("disagg_router.sh", "PREFILL_WORKERS"), ("disagg_router.sh", "DECODE_WORKERS")],
)
def test_a_strange_number_of_workers(tmp_path, name, variable):
    assert "must be 1 or more" in refused(tmp_path, script=name, **{variable: "none"})


STUBS = """
source {lib}
device=cpu MODEL=x SERVED_NAME=x
choose_network 1
open_run
start first {python} -c "import time; time.sleep(600)"
start second bash -c "{second}"
echo started
supervise
"""


def run_stubs(tmp_path: Path, second: str) -> subprocess.Popen[str]:
    script = tmp_path / "stubs.sh"
    script.write_text(
        "set -euo pipefail" + STUBS.format(lib=ROOT / "launch/lib.sh", python=sys.executable, second=second)
    )
    return subprocess.Popen(
        ["bash", script],
        env=environment(tmp_path, STOP_TIMEOUT_S="1", TEST_MARKER=str(tmp_path)),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=heed_sigint,
    )


def wait_for_line(process: subprocess.Popen[str], line: str) -> None:
    assert process.stdout is not None
    for text in process.stdout:
        if line in text:
            return
    pytest.fail(f"never said {line!r}")


def wait_until(happened: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_stops_all_even_the_deaf(tmp_path, number, code):
    process = run_stubs(tmp_path, "trap '' TERM; sleep 600 & wait")
    wait_for_line(process, "started")
    process.send_signal(number)
    output, _ = process.communicate(timeout=30)
    assert process.returncode == code, output
    assert not running_with(f"TEST_MARKER={tmp_path}")
    assert not list(tmp_path.glob("lmcache-ext.*"))


def test_a_process_that_ends_is_named_with_its_last_words(tmp_path):
    process = run_stubs(tmp_path, "trap '' TERM; sleep 600 & echo my last words; exit 7")
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 1
    assert "my last words" in output and "second ended by itself, with exit status 7" in output
    assert not running_with(f"TEST_MARKER={tmp_path}")


def sleepers(marker: str) -> int:
    """How many of the two got past setpriv, setsid and bash."""

    past = re.compile(r"\d+ (\S*python\S* -c import time|sleep 601)")
    return sum(past.match(each) is not None for each in running_with(marker))


def test_killing_the_script_ends_its_processes(tmp_path):
    marker = f"TEST_MARKER={tmp_path}"
    process = run_stubs(tmp_path, "exec sleep 601")
    wait_for_line(process, "started")
    wait_until(lambda: sleepers(marker) == 2)
    process.kill()
    process.communicate(timeout=30)
    wait_until(lambda: not running_with(marker))
