"""Flags: upstream's command lines work as they are, and what can't work is refused with a reason."""

from __future__ import annotations

import pytest

from dynamo_lmcache.proxy.args import Backend, BadFlag, parse_args
from dynamo_lmcache.proxy.main import main


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CLIENT_BOUND", "CLIENT_BOUND_KEY", "OPENAI_API_KEY"):
        monkeypatch.delenv(name, raising=False)


def urls(backends: tuple[Backend, ...]) -> list[str]:
    return [backend.url.removeprefix("http://") for backend in backends]


def test_upstreams_telemetry_command():
    line = "--host 127.0.0.1 --port 8000 --prefiller-host 127.0.0.1 --prefiller-port 8100 --decoder-host 127.0.0.1"
    config = parse_args(f"{line} --decoder-port 8200 --telemetry-port 5768".split())
    assert (config.mode, config.notify_host, config.notify_port) == ("telemetry", "127.0.0.1", 5768)
    assert urls(config.prefillers) == ["127.0.0.1:8100"] and urls(config.decoders) == ["127.0.0.1:8200"]


def test_upstreams_nixl_command_with_several_engines():
    line = "--host localhost --port 9100 --prefiller-host localhost --prefiller-port 7100 --num-prefillers 2"
    line += " --decoder-host localhost --decoder-port 7200 --decoder-init-port 7300 --decoder-alloc-port 7400"
    config = parse_args(f"{line} --proxy-host localhost --proxy-port 7500 --num-decoders 2".split())
    assert (config.mode, config.notify_host, config.notify_port) == ("nixl", "localhost", 7500)
    assert urls(config.prefillers) == ["localhost:7100", "localhost:7101"]
    assert config.decoders == (
        Backend("localhost", 7200, (7300,), (7400,)),
        Backend("localhost", 7201, (7301,), (7401,)),
    )


def test_defaults_are_upstreams_on_loopback():
    config = parse_args([])
    assert (config.host, config.port, config.notify_host, config.notify_port) == ("127.0.0.1", 8000, "127.0.0.1", 5768)
    assert urls(config.prefillers) == ["127.0.0.1:8100"] and urls(config.decoders) == ["127.0.0.1:8200"]
    config = parse_args(["--mode", "nixl"])
    assert (config.notify_host, config.notify_port) == ("127.0.0.1", 8500)
    assert config.decoders == (Backend("127.0.0.1", 8200, (8300,), (8400,)),)
    assert config.limits.max_body == 64 << 20


@pytest.mark.parametrize(
    ("hosts", "ports", "expected"),
    [
        ("a,b", "1", ["a:1", "b:1"]),
        ("a", "1,2", ["a:1", "a:2"]),
        ("a, b", "1,2", ["a:1", "b:2"]),
        ("::1", "1", ["[::1]:1"]),
    ],
)
def test_hosts_and_ports_pair_up(hosts, ports, expected):
    assert urls(parse_args(["--decoder-host", hosts, "--decoder-port", ports]).decoders) == expected


def test_ranks_ports_of_decoders():
    ranks = ["--decoder-init-port", "1,2;3,4", "--decoder-alloc-port", "5,6;7,8"]
    two = parse_args(["--decoder-port", "7200,7201", *ranks])
    assert [(d.init_ports, d.alloc_ports) for d in two.decoders] == [((1, 2), (5, 6)), ((3, 4), (7, 8))]
    hosts = parse_args(["--decoder-host", "a,b", "--decoder-init-port", "1,2", "--decoder-alloc-port", "5,6"])
    assert [(d.init_ports, d.alloc_ports) for d in hosts.decoders] == [((1, 2), (5, 6))] * 2


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("--telemetry-port 1 --proxy-port 2", "--proxy-port"),
        ("--mode nixl --telemetry-port 1", "--telemetry-port"),
        ("--mode telemetry --decoder-init-port 1", "--decoder-init-port"),
        ("--decoder-host a,b --decoder-port 1,2,3", "2 hosts"),
        ("--decoder-host a,a", "twice"),
        ("--prefiller-port 65535 --num-prefillers 2", "65536"),
        ("--prefiller-port 1,2 --num-prefillers 3", "--num-prefillers"),
        ("--decoder-port 1,2 --decoder-init-port 7 --decoder-alloc-port 8", "semicolon"),
        ("--num-decoders 2 --decoder-init-port 7,8 --decoder-alloc-port 9,10", "semicolon"),
        ("--decoder-init-port 7,8 --decoder-alloc-port 9", "one each a rank"),
        ("--decoder-init-port 7;8 --decoder-alloc-port 9", "2 lists for 1 decoders"),
        ("--decoder-init-port 7 --decoder-alloc-port 7", "two ranks"),
        ("--port 0", "65535"),
        ("--port x", "--port"),
        ("--decoder-host a,,b", "commas"),
        ("--max-requests 0", "1 or more"),
        ("--notify-timeout inf", "finite"),
        ("--notify-timeout 0", "above 0"),
        ("--read-timeout nan", "above 0"),
        ("--prefiller 1", "--prefiller"),
    ],
)
def test_what_can_not_work_is_refused(line, says, capsys):
    with pytest.raises(BadFlag, match=says):
        parse_args(line.split())
    assert main(line.split()) == 2
    assert says in capsys.readouterr().err


def test_upstreams_environment(monkeypatch):
    monkeypatch.setenv("CLIENT_BOUND", "true")
    monkeypatch.setenv("OPENAI_API_KEY", " key ")
    assert parse_args([]).session_header == "session-id" and parse_args([]).api_key == "key"
    monkeypatch.setenv("CLIENT_BOUND_KEY", "user")
    assert parse_args([]).session_header == "user"
    assert parse_args(["--session-header", "x"]).session_header == "x"


def test_help_names_every_flag(capsys):
    with pytest.raises(SystemExit):
        parse_args(["--help"])
    assert "--telemetry-port" in capsys.readouterr().out
