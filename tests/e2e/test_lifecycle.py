"""How a worker ends: SIGTERM drains, a dead engine is an error. Without the cache, so that this is covered, too."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import openai
import pytest

from tests.e2e.serving import MODEL_NAME, Server, serving, until

pytestmark = pytest.mark.engine

WITHOUT_CACHE = {"ENABLE_LMCACHE": "0"}


@pytest.fixture(scope="module")
def servers(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, Server, Server]]:
    """(one that waits for requests when it ends, one that does not, one to lose its engine), started at once."""
    patient = {**WITHOUT_CACHE, "DYN_VLLM_DRAIN_TIMEOUT_S": "100"}
    hasty = {**WITHOUT_CACHE, "DYN_VLLM_DRAIN_TIMEOUT_S": "0", "DYN_GRACEFUL_SHUTDOWN_GRACE_PERIOD_SECS": "0"}
    kinds = ((patient, []), (hasty, ["--no-warmup"]), (WITHOUT_CACHE, ["--no-warmup"]))
    contexts = [serving(tmp_path_factory.mktemp("server"), model, flags=flags, env=env) for env, flags in kinds]
    with ExitStack() as stack, ThreadPoolExecutor(len(contexts)) as pool:
        first, second, third = pool.map(stack.enter_context, contexts)
        yield first, second, third


def engine_process(server: Server) -> int:
    """The process of vLLM's engine core, a child of the worker."""
    listing = subprocess.run(
        ["ps", "-o", "pid=,args=", "--ppid", str(server.processes["worker"].pid)],
        capture_output=True,
        text=True,
        check=True,
        timeout=10,
    ).stdout
    (line,) = [line for line in listing.splitlines() if "EngineCore" in line]
    return int(line.split()[0])


def test_sigterm_lets_a_request_finish(servers: tuple[Server, Server, Server]) -> None:
    server, _, _ = servers
    with server.client() as client:
        log = server.log("worker")
        assert "kv_connector='NixlConnector'" in log and "LMCacheConnectorV1" not in log
        stream = client.completions.create(
            model=MODEL_NAME, prompt="abc", max_tokens=40, stream=True, extra_body={"ignore_eos": True}
        )
        with stream:
            chunks = iter(stream)
            next(chunks)
            server.signal("worker")
            reasons = [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices]
        assert reasons[-1] == "length"
        assert server.processes["worker"].wait(timeout=60) == 0


def test_an_answer_that_a_shutdown_cuts_is_no_complete_answer(servers: tuple[Server, Server, Server]) -> None:
    _, server, _ = servers
    with server.client() as client:
        stream = client.completions.create(
            model=MODEL_NAME, prompt="abc", max_tokens=1900, stream=True, extra_body={"ignore_eos": True}
        )
        reasons: list[str | None] = []
        with stream, pytest.raises(openai.APIError):
            next(iter(stream))
            server.signal("worker")
            reasons.extend(chunk.choices[0].finish_reason for chunk in stream if chunk.choices)
            pytest.fail(f"{len(reasons)} more chunks, then {reasons[-1:]}:\n{server.log('worker')[-3000:]}")
        assert not any(reasons)
        assert server.processes["worker"].wait(timeout=60) == 0


def test_a_dead_engine_ends_the_worker(servers: tuple[Server, Server, Server]) -> None:
    _, _, server = servers
    os.kill(engine_process(server), signal.SIGKILL)
    worker = server.processes["worker"]
    until(lambda: worker.poll() is not None, 30, "the worker has ended")
    assert worker.returncode == 1
    assert "engine is dead" in server.log("worker")
    del server.processes["worker"]
    until(lambda: not server.listed(), 30, "the model is gone")
