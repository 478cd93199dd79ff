"""Time to first token with prefill and decode apart on plain `vllm serve`: our hand-over and vLLM's NixlConnector.

    python benchmarks/pd_engines.py [--device cpu|cuda] [--buffer cpu|cuda] [--rounds 9] [--eager]
        [--out benchmarks/results/pd_engines_cpu.md]

Four engines live at once, a prefiller and a decoder of each system, prefillers on the first core or GPU and decoders on
the second, vLLM's own prefix cache off, on a model with random weights (on GPUs: of Llama-3.1-8B's shape). The two take
turns with prompts of 3000 (on GPUs 16000) tokens that are new. The client does what a proxy does, for both: it asks
the prefiller, waits for word that the KV can be had, and asks the decoder, whose first token ends the time.

ours: the prefiller writes chunks of 256 tokens while it computes the next; the decoder has them in host memory or, with
`--buffer cuda`, in memory of its GPU, and loads. NixlConnector: the decoder reads everything when the prefill is over.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec
import zmq

from lmcache_ext.pd.wire import ProxyNotif
from lmcache_ext.ports import free_port

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parent / "gpu"))
from deployments import LONG, SHAPE, model, text
from report import say
from systems import LLAMA_8B

START_S = 600
WAIT_MS = 30_000
_opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def post(port: int, body: dict[str, Any]) -> Any:
    """A completion's answer, open."""
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    return _opener.open(request, timeout=120)


@dataclass(frozen=True)
class Machine:
    """How the engines are started."""

    length: int  # tokens of a prompt
    buffer: int  # bytes that a side of ours gets for hand-overs
    flags: tuple[str, ...]
    share: Callable[[int], dict[str, str]]  # 0 or 1 → the environment that keeps an engine to its half
    shape: dict[str, Any]  # of the model, beside the demo model's
    device: str = "cpu"  # whose memory the buffer is

    def at(self, half: int) -> dict[str, str]:
        """The whole environment of an engine."""
        common = {"HF_HUB_OFFLINE": "1", "UCX_NET_DEVICES": "lo", "VLLM_LOGGING_LEVEL": "WARNING"}
        return {**os.environ, **common, **self.share(half)}


CPU = Machine(
    LONG, 1 << 30, ("--max-model-len", "4096", "--block-size", "32", "--enforce-eager", "--dtype", "float32"),
    lambda half: {"VLLM_CPU_OMP_THREADS_BIND": str(half), "VLLM_CPU_KVCACHE_SPACE": "1"}, SHAPE,
)  # fmt: skip
CUDA = Machine(
    16000, 4 << 30,
    ("--max-model-len", "20000", "--dtype", "bfloat16", "--gpu-memory-utilization", "0.4",
     "--kv-cache-memory-bytes", str(6 << 30)),
    lambda half: {"CUDA_VISIBLE_DEVICES": str(half)},
    {name: LLAMA_8B[name] for name in LLAMA_8B if name not in ("vocab_size", "bos_token_id", "eos_token_id")},
)  # fmt: skip


@dataclass(frozen=True)
class Engine:
    """One that was started."""

    port: int
    process: subprocess.Popen[bytes]
    log: Path


@contextmanager
def engine(
    machine: Machine, folder: Path, logs: Path, role: str, half: int, connector: dict[str, Any], env: dict[str, str]
) -> Iterator[Engine]:
    """`vllm serve` on one half of the machine, until the with block ends. Yields at once, long before it serves."""
    port = free_port()
    command = [
        sys.executable, "-P", "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder),
        "--served-model-name", "bench", "--load-format", "dummy", *machine.flags, "--no-enable-prefix-caching",
        "--enable-prompt-tokens-details", "--host", "127.0.0.1", "--port", str(port),
        "--kv-transfer-config", json.dumps({**connector, "kv_role": role}),
    ]  # fmt: skip
    variables = {**machine.at(half), **env}
    log = logs / f"{connector['kv_connector']}-{role}.log"
    with log.open("wb") as out:
        process = subprocess.Popen(command, env=variables, stdout=out, stderr=out, start_new_session=True)
    try:
        yield Engine(port, process, log)
    except BaseException:
        sys.stderr.write(f"{role}:\n{log.read_text(errors='replace')[-3000:]}\n")
        raise
    finally:
        process.terminate()
        process.wait(60)


def await_all(engines: list[Engine]) -> None:
    """Until each of them is healthy. Raises RuntimeError: one has ended."""
    began = time.monotonic()
    for each in engines:
        while True:
            try:
                _opener.open(f"http://127.0.0.1:{each.port}/health", timeout=5).close()
                break
            except OSError:
                if time.monotonic() > began + START_S:
                    raise
                for one in engines:
                    if one.process.poll() is not None:
                        raise RuntimeError(f"an engine has ended with status {one.process.returncode}") from None
                time.sleep(0.5)
        print(f"{each.log.stem} serves after {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)


def body(prompt: str, transfer: dict[str, Any] | None, **more: Any) -> dict[str, Any]:
    """Of a completion."""
    return {
        "model": "bench",
        "prompt": prompt,
        "temperature": 0,
        "ignore_eos": True,
        "kv_transfer_params": transfer,
        **more,
    }


@dataclass(frozen=True)
class Taken:
    """When a request began, was prefilled, and had its first token."""

    began: float
    prefilled: float
    first: float


Ask = Callable[[str], Taken]


def first_token(port: int, prompt: str, transfer: dict[str, Any] | None) -> float:
    """Ask a decoder. Returns when its first token came."""
    with post(port, body(prompt, transfer, max_tokens=2, stream=True)) as lines:
        times = [time.perf_counter() for line in lines if line.startswith(b"data: {")]
    return times[0]


def loaded(port: int) -> float:
    """Tokens that an engine's connector has brought so far."""
    with _opener.open(f"http://127.0.0.1:{port}/metrics", timeout=30) as answer:
        lines = answer.read().decode().splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith("vllm:external_prefix_cache_hits_total{"))


def ours(ports: tuple[int, int], listen: tuple[int, int], told: zmq.Socket[bytes]) -> Ask:
    """A request through our hand-over."""

    def ask(prompt: str) -> Taken:
        req_id = uuid.uuid4().hex
        spec = {"req_id": req_id, "receiver_host": "127.0.0.1", "receiver_init_port": [listen[0]],
                "receiver_alloc_port": [listen[1]]}  # fmt: skip
        began = time.perf_counter()
        post(ports[0], body(prompt, {"ret_first_tok": True, "disagg_spec": spec}, max_tokens=1)).read()
        prefilled = time.perf_counter()
        if not told.poll(WAIT_MS):
            raise RuntimeError("the prefiller said nothing")
        notif = msgspec.msgpack.decode(told.recv(), type=ProxyNotif)
        if (notif.req_id, notif.status) != (req_id, "stored"):
            raise RuntimeError(f"{notif} of {req_id}")
        return Taken(began, prefilled, first_token(ports[1], prompt, None))

    return ask


def nixl(ports: tuple[int, int]) -> Ask:
    """A request through vLLM's own connector."""

    def ask(prompt: str) -> Taken:
        remote = dict.fromkeys(("remote_engine_id", "remote_block_ids", "remote_host", "remote_port"))
        began = time.perf_counter()
        transfer = {"do_remote_decode": True, "do_remote_prefill": False, **remote}
        answer = json.load(post(ports[0], body(prompt, transfer, max_tokens=1)))
        prefilled = time.perf_counter()
        return Taken(began, prefilled, first_token(ports[1], prompt, answer["kv_transfer_params"]))

    return ask


def settings(folder: Path, name: str, **values: Any) -> dict[str, str]:
    """A file of ours, and the variable that names it."""
    path = folder / f"{name}.json"
    common = {"local_cpu": False, "enable_pd": True, "transfer_channel": "nixl"}
    path.write_text(json.dumps({**common, **values}))  # JSON is YAML
    return {"LMCACHE_CONFIG_FILE": str(path)}


def started(stack: ExitStack, machine: Machine, folder: Path, logs: Path) -> dict[str, tuple[Ask, int]]:
    """Both systems, serving: how to ask, and the decoder's port."""
    told = stack.enter_context(zmq.Context()).socket(zmq.PULL)
    notify = told.bind_to_random_port("tcp://127.0.0.1", free_port(), 32768)
    listen = free_port(), free_port()
    connector = {"kv_connector": "LMCacheConnectorV1", "kv_connector_module_path": "lmcache_ext.integration.vllm",
                 "kv_connector_extra_config": {"skip_last_n_tokens": 1}}  # fmt: skip
    buffer = {"pd_buffer_size": machine.buffer, "pd_buffer_device": machine.device}
    send = settings(folder, "send", pd_role="sender", pd_proxy_host="127.0.0.1", pd_proxy_port=notify,
                    **buffer)  # fmt: skip
    take = settings(folder, "take", pd_role="receiver", pd_peer_host="127.0.0.1", pd_peer_init_port=[listen[0]],
                    pd_peer_alloc_port=[listen[1]], **buffer)  # fmt: skip
    theirs: dict[str, Any] = {"kv_connector": "NixlConnector", "kv_buffer_device": "cpu" if machine is CPU else "cuda"}

    def quiet() -> dict[str, str]:
        return {"LMCACHE_NIXL_SLEEP_US": "1000", "VLLM_NIXL_SIDE_CHANNEL_PORT": str(free_port())}

    engines = [
        stack.enter_context(engine(machine, folder, logs, "kv_producer", 0, connector, send)),
        stack.enter_context(engine(machine, folder, logs, "kv_consumer", 1, connector, take)),
        stack.enter_context(engine(machine, folder, logs, "kv_producer", 0, theirs, quiet())),
        stack.enter_context(engine(machine, folder, logs, "kv_consumer", 1, theirs, quiet())),
    ]
    await_all(engines)
    ports = [each.port for each in engines]
    return {
        "ours": (ours((ports[0], ports[1]), listen, told), ports[1]),
        "NixlConnector": (nixl((ports[2], ports[3])), ports[3]),
    }


def span(values: list[float]) -> str:
    """Median and ends, in ms."""
    low, middle, high = (f"{1000 * value:.0f}" for value in (min(values), statistics.median(values), max(values)))
    return f"{middle} ({low} to {high})"


def main() -> None:
    """See above."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--buffer", choices=("cpu", "cuda"), default="cpu", help="where our hand-over's memory is")
    parser.add_argument("--eager", action="store_true", help="no CUDA graphs: the engines start sooner")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--logs", type=Path, help="a folder that keeps the engines' logs")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if options.device == "cpu" and (options.buffer == "cuda" or options.eager):
        parser.error("--buffer cuda and --eager are for --device cuda")
    machine = CPU if options.device == "cpu" else replace(CUDA, device=options.buffer)
    if options.eager and machine is not CPU:
        machine = replace(machine, flags=(*machine.flags, "--enforce-eager"))
    times: dict[str, list[Taken]] = {}
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        logs = options.logs or folder
        logs.mkdir(parents=True, exist_ok=True)
        systems = started(stack, machine, model(folder, machine.shape), logs)
        for i in range(options.rounds + 1):
            for name in list(systems) if i % 2 else list(systems)[::-1]:
                ask, decoder = systems[name]
                before = loaded(decoder)
                taken = ask(text(1000 * len(name) + i, machine.length))
                if loaded(decoder) - before < machine.length * 0.9:
                    raise RuntimeError(f"{name}: the decoder computed the prompt")
                print(f"{i} {name}: {taken.first - taken.began:.3f} s", file=sys.stderr, flush=True)
                if i:  # what the first request alone does is not measured
                    times.setdefault(name, []).append(taken)
    whole = {name: [each.first - each.began for each in taken] for name, taken in times.items()}
    after = {name: [each.first - each.prefilled for each in taken] for name, taken in times.items()}
    ratios = sorted(a / b for a, b in zip(whole["ours"], whole["NixlConnector"], strict=True))
    steps = sorted(a / b for a, b in zip(after["ours"], after["NixlConnector"], strict=True))
    say(
        [
            f"# Prefill and decode apart on plain `vllm serve`: {options.device}",
            "",
            f"`python benchmarks/pd_engines.py --device {options.device} --buffer {options.buffer} --rounds "
            f"{options.rounds}{' --eager' * options.eager}` on {where()}, "
            f"{time.strftime('%Y-%m-%d')}. Medians (least to most), in ms; prompts of {machine.length} tokens.",
            "",
            "| | ours | NixlConnector | ratio, pair by pair |",
            "|---|---|---|---|",
            f"| time to first token | {span(whole['ours'])} | {span(whole['NixlConnector'])} | {ratio(ratios)} |",
            f"| of which after the prefill | {span(after['ours'])} | {span(after['NixlConnector'])} | {ratio(steps)} |",
        ],
        options.out,
    )


def where() -> str:
    """The machine, in words."""
    import torch

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return f"{os.cpu_count()} cores" + (f", {len(gpus)} x {gpus[0]}" if gpus else "")


def ratio(values: list[float]) -> str:
    """Median and the middle half."""
    quarter = len(values) // 4
    return f"{statistics.median(values):.3f} [{values[quarter]:.3f}, {values[-1 - quarter]:.3f}]"


if __name__ == "__main__":
    main()
