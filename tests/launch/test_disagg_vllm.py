"""launch/disagg_vllm.sh: what it refuses, and what it would start, on an interpreter that only takes notes; and two
prefillers, two decoders and the proxy for real."""

from __future__ import annotations

import json
import os
import socket
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from launch.demo_model import recall
from lmcache_ext.ports import free_port
from tests.engines.apart import ask
from tests.engines.pd_kills import cached, questions
from tests.launch.processes import running_with
from tests.launch.script import serving

SCRIPT = Path(__file__).resolve().parents[2] / "launch" / "disagg_vllm.sh"
PORTS = ("HTTP_PORT", "PREFILL_PORT", "DECODE_PORT", "INIT_PORT", "ALLOC_PORT", "PROXY_PORT")

# Notes its arguments and settings, and lives on; nothing is ever listed.
_NOTER = """#!/bin/sh
[ "$1" != -I ] || exit 1
{ echo "$@"; echo "CORES=$VLLM_CPU_OMP_THREADS_BIND"; cat "$LMCACHE_CONFIG_FILE"; } >"$NOTES/$$"
exec sleep 60
"""


def run(folder: Path, *arguments: str, **env: str) -> tuple[int, str]:
    """(exit status, what it printed)"""
    ports = {name: str(free_port()) for name in PORTS}
    keep = {name: value for name, value in os.environ.items() if not name.startswith(("LMCACHE_", "VLLM_", "HF_"))}
    done = subprocess.run(
        [SCRIPT, *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=60, check=False,
        env={
            **keep, "VENV": str(folder / "venv"), "SKIP_SETUP": "1", "DEVICE": "cpu", "TMPDIR": str(folder), **ports,
            "START_TIMEOUT_S": "2", "NOTES": str(folder / "notes"), "TEST_MARKER": str(folder), **env,
        },
    )  # fmt: skip
    assert not running_with(f"TEST_MARKER={folder}"), "it leaves something behind"
    return done.returncode, done.stdout


def noter(folder: Path) -> None:
    """An environment whose Python takes notes."""
    (folder / "venv" / "bin").mkdir(parents=True)
    (folder / "notes").mkdir()
    python = folder / "venv" / "bin" / "python"
    python.write_text(_NOTER)
    python.chmod(0o755)


def notes(folder: Path) -> dict[str, tuple[str, str, dict[str, object]]]:
    """lmcache_rpc_port → (arguments, cores, settings) of each engine that was started."""
    found = {}
    for path in (folder / "notes").iterdir():
        arguments, cores, settings = path.read_text().split("\n", 2)
        start = arguments.index('{"kv_connector"')
        transfer, _ = json.JSONDecoder().raw_decode(arguments[start:])
        name = transfer["kv_connector_extra_config"]["lmcache_rpc_port"]
        found[name] = (arguments, cores, yaml.safe_load(settings))
    return found


def test_it_tells_how_it_is_used(tmp_path: Path) -> None:
    noter(tmp_path)
    for arguments, status in (((), 2), (("both",), 2), (("--help",), 0)):
        code, output = run(tmp_path, *arguments)
        assert code == status and "launch/disagg_vllm.sh all" in output and "BUFFER_GB" in output


def test_a_taken_port_starts_nothing(tmp_path: Path) -> None:
    noter(tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        code, output = run(tmp_path, "all", INIT_PORT=str(port))
    assert code == 1 and f"something listens at port {port} already" in output
    assert not notes(tmp_path)


def test_two_of_each_with_two_ranks_get_ports_of_their_own(tmp_path: Path) -> None:
    noter(tmp_path)
    env = {"PREFILLERS": "2", "DECODERS": "2", "INIT_PORT": "21300", "ALLOC_PORT": "21400", "PROXY_PORT": "21500"}
    code, output = run(tmp_path, "all", "--tensor-parallel-size", "2", **env)
    assert code == 1 and "is not ready after 2 s" in output
    started = notes(tmp_path)
    assert set(started) == {"producer0", "producer1", "consumer0", "consumer1"}
    ports = [(started[f"consumer{i}"][2]["pd_peer_init_port"], started[f"consumer{i}"][2]["pd_peer_alloc_port"])
             for i in range(2)]  # fmt: skip
    assert ports == [([21300, 21301], [21400, 21401]), ([21302, 21303], [21402, 21403])]
    for i in range(2):
        arguments, _, settings = started[f"producer{i}"]
        assert settings["pd_proxy_port"] == 21500 and settings["pd_role"] == "sender"
        assert '"kv_role": "kv_producer"' in arguments and "--tensor-parallel-size 2" in arguments
        assert '"skip_last_n_tokens": 1' in started[f"consumer{i}"][0]


def test_files_of_ones_own_and_a_share_of_the_machine(tmp_path: Path) -> None:
    noter(tmp_path)
    mine = tmp_path / "mine.yaml"
    mine.write_text("pd_role: sender\nchunk_size: 64\n")
    run(tmp_path, "all", str(tmp_path / "model"), PREFILL_CONFIG_FILE=str(mine), BUFFER_GB="3")
    started = notes(tmp_path)
    assert started["producer0"][2] == {"pd_role": "sender", "chunk_size": 64}
    assert started["consumer0"][2]["pd_buffer_size"] == 3 << 30
    assert f"--model {tmp_path / 'model'}" in started["producer0"][0]
    if (os.cpu_count() or 1) > 1:
        assert started["producer0"][1] != started["consumer0"][1], "each has cores of its own"


@pytest.mark.engine
@pytest.mark.timeout(900)
def test_two_of_each_for_real(tmp_path: Path) -> None:
    pytest.importorskip("nixl", reason="nixl is not installed")
    env = {"PREFILLERS": "2", "DECODERS": "2", **{name: str(free_port()) for name in PORTS[1:]}}
    with serving(tmp_path, "disagg_vllm.sh", "all", BUFFER_GB="1", LMCACHE_CHUNK_SIZE="64", **env) as script:
        url = f"http://127.0.0.1:{script.http_port}"
        model = ask(f"{url}/v1/models")[1]["data"][0]["id"]
        asked = [query for seed in range(4) for query in questions(400 + seed, 4)]

        def one(query: recall.Query) -> dict[str, Any]:
            body = {"model": model, "prompt": query.token_ids, "max_tokens": 3, "temperature": 0}
            status, answer = ask(f"{url}/v1/completions", body, 120)
            assert status == 200, answer
            return dict(answer)

        with ThreadPoolExecutor(4) as clients:
            answers = list(clients.map(one, asked))
        texts = [answer["choices"][0]["text"] for answer in answers]
        assert recall.score(asked, texts).exact == 1
        for query, answer in zip(asked, answers, strict=True):
            assert cached(answer) == len(query.token_ids) - 1
        for name in ("PREFILL_PORT", "DECODE_PORT"):
            engines = replace(script, system_port=int(env[name]))
            served = [engines.metric(i, "vllm:request_success_total") for i in range(2)]
            assert sum(served) == len(asked) and min(served) >= 2, f"{name}: {served}"
        script.interrupt()


def test_one_part_alone(tmp_path: Path) -> None:
    noter(tmp_path)
    run(tmp_path, "prefiller")
    assert set(notes(tmp_path)) == {"producer0"}
