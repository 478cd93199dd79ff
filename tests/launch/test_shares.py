"""Which part of the machine each engine of a script gets, and how the scripts read vLLM's flags."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.static.rules import ROOT

LIB = ROOT / "launch/lib.sh"
VENV = Path(os.environ.get("VENV") or ROOT / ".venv")


def shell(tmp_path: Path, text: str, gpus: int = 0, prefix: tuple[str, ...] = (), **env: str) -> str:
    """What a script says that sources the library, on a machine with so many GPUs."""
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\n" + "".join(f"echo GPU {i}\n" for i in range(gpus)))
    smi.chmod(0o755)
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("CUDA_", "VLLM_"))}
    script = f"set -euo pipefail; source {LIB}; {text}"
    done = subprocess.run(
        [*prefix, "bash", "-c", script],
        env={**kept, "VENV": str(VENV), "PATH": f"{tmp_path}:{os.environ['PATH']}", **env},
        capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    return done.stdout.strip()


def share(tmp_path: Path, index: int, *flags: str, device: str = "cuda", workers: int = 2, **more: object) -> str:
    words = " ".join(flags)
    text = f'device={device} WORKERS={workers}; choose_share {index} {words}; echo "${{share[*]}} ${{fit[*]}}"'
    return shell(tmp_path, text, **more)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("gpus", "visible", "flags", "shares"),
    [
        (2, "", "", ["0", "1"]),
        (4, "", "--tensor-parallel-size 2", ["0,1", "2,3"]),
        (4, "", "--tensor_parallel_size=2", ["0,1", "2,3"]),
        (8, "", "-tp 2 -pp 2", ["0,1,2,3", "4,5,6,7"]),
        (8, "2,3", "", ["2", "3"]),
        (8, "GPU-aa,GPU-bb", "", ["GPU-aa", "GPU-bb"]),
        (1, "", "", ["0 --gpu-memory-utilization 0.45"] * 2),
        (8, "5", "", ["5 --gpu-memory-utilization 0.45"] * 2),
        (1, "", "--gpu-memory-utilization 0.3", ["0", "0"]),
        (2, "", "-tp 2", ["0,1 --gpu-memory-utilization 0.45"] * 2),
    ],
)
def test_each_engine_gets_cards_of_its_own_or_a_part(tmp_path, gpus, visible, flags, shares):
    env = {"CUDA_VISIBLE_DEVICES": visible} if visible else {}
    found = [share(tmp_path, i, flags, gpus=gpus, **env) for i in range(2)]
    assert found == [f"CUDA_VISIBLE_DEVICES={each}" for each in shares]


def test_an_engine_alone_gets_all(tmp_path):
    assert share(tmp_path, 0, workers=1, gpus=4) == share(tmp_path, 0, workers=1, device="cpu") == ""


def test_cores_are_those_that_may_be_used(tmp_path):
    allowed = sorted(os.sched_getaffinity(0))
    last = str(allowed[-1])
    taskset = ("taskset", "-c", last)
    one = [share(tmp_path, i, device="cpu", prefix=taskset, OMP_NUM_THREADS="1") for i in range(2)]
    assert one == [f"VLLM_CPU_OMP_THREADS_BIND={last}"] * 2
    given = [share(tmp_path, i, device="cpu").partition("=")[2] for i in range(2)]
    assert sorted(int(core) for part in given for core in part.split(",")) == allowed or len(allowed) == 1
    lists = share(tmp_path, 0, "-tp 2", device="cpu").count("|")
    assert lists == (1 if len(allowed) >= 4 else 0), "a list for each rank, or none: ranks can't share a core"
    assert share(tmp_path, 0, device="cpu", VLLM_CPU_OMP_THREADS_BIND="7") == ""


@pytest.mark.parametrize("flag", ["--served-model-name a", "--served_model_name=a", "--served-model-name a,b"])
def test_the_served_name_is_the_first(tmp_path, flag):
    assert shell(tmp_path, f'device=cuda; choose_model --model m {flag}; echo "$SERVED_NAME"') == "a"


def test_memory_discovery_is_refused(tmp_path):
    with pytest.raises(subprocess.CalledProcessError) as error:
        shell(tmp_path, "choose_network 2", DYN_DISCOVERY_BACKEND="mem")
    assert "use file or etcd" in error.value.stderr
