"""Prefiller, decoder, cache server and proxy on plain `vllm serve`: what the decoder gets comes from the server."""

from __future__ import annotations

import dataclasses
import json
import socket
import subprocess
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from lmcache_ext.ports import free_port
from tests.launch.script import START_S, STOP_S, Script, serving
from tests.launch.test_refusals import refused
from tests.tiers.mooncake_server import missing

NAME = "disagg_mp_mooncake.sh"
PORTS = ("PREFILL_PORT", "DECODE_PORT", "TELEMETRY_PORT", "SERVER_PORT", "SERVER_HTTP_PORT", "MASTER_PORT",
         "MASTER_METRICS_PORT")  # fmt: skip


def ports() -> dict[str, str]:
    found: set[int] = set()
    while len(found) < len(PORTS):
        found.add(free_port())
    return dict(zip(PORTS, map(str, found), strict=True))


def get(port: str, path: str) -> str:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(f"http://127.0.0.1:{port}{path}", timeout=30) as answer:
        return str(answer.read().decode())


def status_where(port: str, what: Any) -> dict[str, Any]:
    """The server's status once `what` of it holds."""
    deadline = time.monotonic() + 20
    while not what(status := json.loads(get(port, "/status?check=1"))):
        assert time.monotonic() < deadline, status
        time.sleep(0.2)
    return dict(status)


@pytest.mark.engine
@pytest.mark.timeout(START_S + STOP_S + 120)
def test_the_decoder_loads_what_the_prefiller_computed(tmp_path: Path) -> None:
    port = ports()
    l2 = "none" if missing() else "mooncake"
    flags = ["--enforce-eager", "--max-model-len", "2048"]
    with serving(tmp_path, NAME, *flags, L2=l2, L1_SIZE_GB="0.25", **port) as script:
        prefiller, decoder = (
            dataclasses.replace(script, system_port=int(port[name])) for name in ("PREFILL_PORT", "DECODE_PORT")
        )
        command, promised, text = script.promise()
        for number in (1, 2):
            answer = script.curl(command)
            assert answer["choices"][0]["text"] == text
            assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == promised
            assert decoder.metric(0, "lmcache:num_hit_tokens_total") == number * promised
            assert prefiller.metric(0, "lmcache:num_hit_tokens_total") == (number - 1) * promised
        assert told(script) == {"stored": 2}
        status = status_where(port["SERVER_HTTP_PORT"], lambda status: status["leased"]["chunks"] >= 6)
        assert status["stored"]["chunks"] >= 2 and status["faults"] == []
        assert len(status["clients"]) == 2
        if l2 == "mooncake":
            stored = "lmcache:remote_stored_bytes_total"
            server = dataclasses.replace(script, system_port=int(port["SERVER_HTTP_PORT"]))
            status_where(port["SERVER_HTTP_PORT"], lambda status: server.metric(0, stored) > 0)
        assert b"[DONE]" in chat(script)
        hang_up(script, decoder)
        # Mooncake's client: on all interfaces, whatever it is told.
        assert {each.split()[0] for each in script.listeners()} <= ({"lmcache-ext"} if l2 == "mooncake" else set())
        script.interrupt()


def told(script: Script) -> dict[str, int]:
    """How hand-overs ended, as the proxy counts them."""
    ends = ("stored", "failed", "timeout", "broken", "no_prefiller")
    proxy = dataclasses.replace(script, system_port=script.http_port)
    name = "lmcache_proxy_handovers_total"
    assert proxy.metric(0, name) == 2
    lines = get(str(script.http_port), "/metrics").splitlines()
    found = {end: [line for line in lines if line.startswith(f'{name}{{outcome="{end}"}}')] for end in ends}
    return {end: int(float(lines[0].split()[-1])) for end, lines in found.items() if lines}


def chat(script: Script) -> bytes:
    """What the printed chat request gets, streamed."""
    command = script.output[script.output.index("curl -N") :].split("\n\n")[0]
    command = command.replace('"max_tokens": 128', '"max_tokens": 8, "stream": true')
    done = subprocess.run(["bash", "-c", command], capture_output=True, timeout=120, check=True)
    return done.stdout


def hang_up(script: Script, decoder: Script) -> None:
    """A client that leaves within a stream: the decoder stops."""
    body = json.dumps({"model": "demo", "prompt": "x", "max_tokens": 2000, "ignore_eos": True, "stream": True})
    command = ["curl", "-sN", f"http://127.0.0.1:{script.http_port}/v1/completions", "-d", body]
    made = "vllm:generation_tokens_total"
    before = decoder.metric(0, made)
    with subprocess.Popen(command, stdout=subprocess.PIPE) as client:
        assert client.stdout is not None and client.stdout.readline().startswith(b"data: ")
        client.kill()
    deadline = time.monotonic() + 30
    while decoder.metric(0, "vllm:num_requests_running"):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert decoder.metric(0, made) - before < 1900


def test_a_port_that_is_taken_or_given_twice(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as server:
        taken = str(server.getsockname()[1])
        output = refused(tmp_path, script=NAME, **{**ports(), "L2": "none", "SERVER_PORT": taken})
    assert f"SERVER_PORT={taken}: something listens there already; set SERVER_PORT to another port" in output
    port = ports()
    output = refused(tmp_path, script=NAME, **{**port, "L2": "none", "DECODE_PORT": port["PREFILL_PORT"]})
    assert f"DECODE_PORT={port['PREFILL_PORT']}: PREFILL_PORT has that port" in output


def test_a_tier_that_there_is_not(tmp_path):
    assert "L2=redis is not one of mooncake, none" in refused(tmp_path, script=NAME, **ports(), L2="redis")
