"""vLLM's processes may use AMX where the CPU has it, and nothing is asked for elsewhere."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest
from vllm.platforms import current_platform

from dynamo_lmcache.vllm import cpu_amx

# Which parts of the CPU's state Linux lets this process use, as a mask (ARCH_GET_XCOMP_PERM).
ALLOWED = """
import ctypes
mask = ctypes.c_ulong()
assert ctypes.CDLL(None).syscall(158, 0x1022, ctypes.byref(mask)) == 0
print(mask.value >> 18 & 1)
"""


@pytest.mark.skipif(not cpu_amx.has_amx(), reason="this CPU has no AMX")
def test_a_process_may_use_tiles_once_it_has_asked() -> None:
    ask = "from dynamo_lmcache.vllm import cpu_amx\ncpu_amx.register()\ncpu_amx.register()"
    code = f"{ALLOWED}\n{ask}\n{ALLOWED}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert [line for line in done.stdout.split() if line in "01"] == ["0", "1"]


@pytest.mark.parametrize("why", ["another platform", "another machine", "no AMX"])
def test_nothing_is_asked_for_elsewhere(monkeypatch: pytest.MonkeyPatch, why: str) -> None:
    asked: list[int] = []
    monkeypatch.setattr(cpu_amx, "request", lambda: asked.append(1))
    monkeypatch.setattr(current_platform, "is_cpu", lambda: why != "another platform")
    monkeypatch.setattr(platform, "machine", lambda: "aarch64" if why == "another machine" else "x86_64")
    monkeypatch.setattr(cpu_amx, "has_amx", lambda: why != "no AMX")
    cpu_amx.register()
    assert asked == []


def test_it_is_asked_for_where_there_is_amx(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(cpu_amx, "request", lambda: asked.append(1))
    monkeypatch.setattr(current_platform, "is_cpu", lambda: True)
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(cpu_amx, "has_amx", lambda: True)
    cpu_amx.register()
    assert asked == [1]


def test_a_refusal_is_told(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(cpu_amx, "_REQUEST_PERMISSION", 0)
    cpu_amx.request()
    assert "no AMX for this process" in caplog.text
