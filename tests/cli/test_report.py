"""`lmcache-ext report`: figures from a worker's /metrics, and each advice with its reason."""

from __future__ import annotations

import json
import socket
import threading

import pytest

from lmcache_ext.cli import figures as module
from lmcache_ext.cli.advice import RULES, advise
from lmcache_ext.cli.figures import figures
from lmcache_ext.cli.main import main
from lmcache_ext.cli.scrape import ScrapeError, Window, address, default_worker, fetch, parse
from tests.cli.worker import Worker, served
from tests.server.helpers import Server, attached, keys, look, spec, store

GIB = 1 << 30


def busy(requests: int = 20) -> Worker:
    """Half of the requests cold, half warm; a cold one takes 0.5 s for 1,000 tokens."""
    worker = Worker()
    for _ in range(requests // 2):
        worker.request()
        worker.request(gpu=100, host=800, seconds=0.06)
    worker.pool(chunks=30, capacity=100)
    return worker


def now(worker: Worker):
    return figures(Window(None, parse(worker.text().decode())))


def told(worker: Worker) -> str:
    return "\n".join(f"{entry.do} because {entry.why}" for entry in advise(now(worker)))


@pytest.mark.parametrize(
    ("given", "url"),
    [
        ("8081", "http://127.0.0.1:8081/metrics"),
        ("host:8081", "http://host:8081/metrics"),
        ("http://host:8081", "http://host:8081/metrics"),
        ("https://host/x/metrics", "https://host/x/metrics"),
    ],
)
def test_a_worker_is_named_by_port_host_or_url(given, url):
    assert address(given) == url


@pytest.mark.parametrize(("variable", "port"), [("9099", 9099), ("", 8081), (None, 8081)])
def test_without_a_name_it_is_the_one_of_the_launch_scripts(monkeypatch, variable, port):
    monkeypatch.delenv("DYN_SYSTEM_PORT", raising=False)
    if variable is not None:
        monkeypatch.setenv("DYN_SYSTEM_PORT", variable)
    assert default_worker() == f"http://127.0.0.1:{port}/metrics"


def test_tokens_by_where_they_came_from():
    found = now(busy())
    assert (found.requests, found.prompt, found.gpu, found.host, found.computed) == (20, 20_000, 1_000, 8_000, 11_000)
    assert found.share(found.host) == pytest.approx(0.4)
    assert found.occupancy == 0.3 and found.capacity_bytes == 100 << 20


def test_failed_loads_are_computed_not_saved():
    worker = busy()
    worker.recorder.count("num_failed_tokens", 500)
    found = now(worker)
    assert (found.host, found.failed, found.computed) == (7_500, 500, 11_500)


def test_time_saved_is_that_of_the_tokens_less_the_loads():
    found = now(busy())
    prefill, step, loads = 10 * 0.5 + 10 * 0.06, 20 * 0.01, 10 * 0.01
    token = (prefill - step - loads) / 11_000
    assert found.token_s == pytest.approx(token)
    assert found.saved_s == pytest.approx(8_000 * token - loads)


def test_time_saved_is_not_told_where_hardly_anything_was_computed(capsys):
    worker = Worker()
    for _ in range(30):
        worker.request(gpu=0, host=990, seconds=0.03)
    assert module._LEAST_COMPUTED > 10
    assert now(worker).saved_s is None
    with served(worker) as urls:
        assert main(["report", *urls]) == 0
    assert "can't be told" in capsys.readouterr().out


def test_the_engines_of_one_worker_are_added_up_and_a_sick_one_is_noticed():
    text = busy().text().decode()
    ours = [line for line in text.splitlines() if line.startswith("lmcache:")]
    second = "\n".join(line.replace('engine="0"', 'engine="1"') for line in ours) + "\n"
    assert parse(text + second).total("lmcache:num_hit_tokens_total") == 16_000
    assert figures(Window(None, parse(text + second))).healthy is True
    zero = second.replace('lmcache_is_healthy{engine="1",model_name="demo"} 1.0', 'lmcache_is_healthy{engine="1"} 0.0')
    assert figures(Window(None, parse(text + zero))).healthy is False
    idle = "".join(f"{line}\n" for line in zero.splitlines() if "num_lookup_requests" not in line)
    assert figures(Window(None, parse(text + idle))).healthy is True  # it made no step yet


def test_a_window_has_only_what_happened_in_it_also_after_a_restart():
    worker = busy()
    first = parse(worker.text().decode(), at=10)
    worker.request(prompt=300)
    second = parse(worker.text().decode(), at=12)
    found = figures(Window(first, second))
    assert (found.requests, found.prompt, found.seconds) == (1, 300, 2)
    fresh = Worker()
    fresh.request(prompt=70)
    assert figures(Window(second, parse(fresh.text().decode(), at=14))).prompt == 70


def test_the_report_in_lines(capsys):
    with served(busy()) as urls:
        assert main(["report", *urls]) == 0
    out = capsys.readouterr().out
    for words in (
        "20 requests",
        "host memory         40.0%  8,000 tokens",
        "computed            55.0%",
        "8.00 GB/s",
        "30% of 100",
    ):
        assert words in out
    assert "demo" in out and "time saved, estimated: 3.8 s" in out


def test_tiers_have_a_line_each_if_they_are_used(capsys):
    worker = busy()
    worker.tier("disk", tokens=3000, nbytes=5 << 20, chunks=7)
    worker.recorder.count("num_slow_tier_tokens", 12)
    worker.recorder.count("remote_stored_bytes", 1 << 20)
    with served(worker) as urls:
        assert main(["report", *urls]) == 0
        out = capsys.readouterr().out
        assert main(["report", "--json", *urls]) == 0
    line = "disk: 3,000 tokens came from it; 5.0 MB read, 5.0 MB written, 7 not written, 7 failed; 7 chunks, 5.0 MB"
    assert line in out and "gds" not in out
    assert "remote: 0 tokens came from it; 0 bytes read, 1.0 MB written\n" in out
    assert "12 tokens were computed instead" in out
    told = json.loads(capsys.readouterr().out)[urls[0]]["figures"]["tiers"]
    assert list(told) == ["disk", "remote"] and told["disk"]["loaded_bytes"] == 5 << 20


def test_a_shared_server_has_figures_of_its_own(tmp_path, capsys):
    with Server(tmp_path, "--l2-adapter", json.dumps({"type": "mock", "max_size_gb": 1})) as server:
        client = attached(server, spec())
        chain = keys(4)
        assert store(client, spec(), chain) == 4
        look(client, spec(), [*chain, *keys(4)])
        assert main(["report", server.url, "--json"]) == 0
        told = json.loads(capsys.readouterr().out)[f"{server.url}/metrics"]["figures"]
        assert main(["report", str(server.http)]) == 0
        assert main(["top", "--every", "0.1", "--frames", "1", server.url]) == 0
        client.close()
    assert (told["stored"], told["found"], told["looked_up"], told["clients"]) == (4, 4, 8, 1)
    out = capsys.readouterr().out
    assert "shared server" in out and "look-ups of 8 chunks, 50.0% found" in out and "tier mock" in out
    assert "1 clients, 0 silent" in out


def test_the_report_as_json_and_over_a_time(capsys):
    with served(busy(), busy()) as urls:
        assert main(["report", "--json", "--over", "0.1", *urls]) == 0
    said = json.loads(capsys.readouterr().out)
    assert list(said) == urls
    assert said[urls[0]]["figures"]["requests"] == 0
    assert said[urls[0]]["figures"]["seconds"] >= 0.1


def test_no_request_yet_is_said(capsys):
    with served(Worker()) as urls:
        assert main(["report", *urls]) == 0
    assert "no request was looked up yet" in capsys.readouterr().out


def test_a_worker_that_has_made_no_step_is_not_sick():
    assert now(Worker()).healthy is True


def test_nobody_there_or_no_cache_is_an_error_that_says_what_to_do(capsys):
    with served(Worker(cache=False), busy()) as urls:
        assert main(["report", urls[0], urls[1], "1"]) == 1
    said = capsys.readouterr()
    assert "ENABLE_LMCACHE=1" in said.err and "DYN_SYSTEM_PORT" in said.err
    assert "20 requests" in said.out  # the one that is well


def test_what_is_not_prometheus_text_is_refused():
    with socket.create_server(("127.0.0.1", 0)) as server:  # which speaks no HTTP

        def greet() -> None:
            with server.accept()[0] as client:
                client.sendall(b"SSH-2.0\r\n")

        threading.Thread(target=greet, daemon=True).start()
        with pytest.raises(ScrapeError, match="can't be read"):
            fetch(f"http://127.0.0.1:{server.getsockname()[1]}/metrics")
    with pytest.raises(ScrapeError, match="text format"):
        parse("<html>\n")


@pytest.mark.parametrize("over", ["-1", "x", "4000"])
def test_a_strange_time_is_refused(over):
    with pytest.raises(SystemExit):
        main(["report", "--over", over])


def test_a_healthy_half_full_cache_gets_no_advice():
    assert told(busy(40)) == ""
    assert told(count(tiered(), num_slow_tier_tokens=100, remote_skipped_chunks=40)) == ""


def test_health_probes_are_no_traffic_that_shares_nothing():
    worker = busy()
    for _ in range(1000):
        worker.request(prompt=1, seconds=0.01)
    assert told(worker) == ""


def full(worker: Worker) -> Worker:
    worker.pool(chunks=100, capacity=100, chunk_bytes=40 << 20)
    worker.recorder.count("local_cpu_evict_keys_count", 250)
    return worker


def cold(requests: int) -> Worker:
    worker = Worker()
    for _ in range(requests):
        worker.request()
    return worker


def count(worker: Worker, **counters: int) -> Worker:
    for name, by in counters.items():
        worker.recorder.count(name, by)
    return worker


def sick() -> Worker:
    worker = busy()
    worker.recorder.gauge("lmcache_is_healthy", 0)
    return worker


def slow_loads() -> Worker:
    worker = busy()
    for _ in range(100):
        worker.recorder.sample("time_to_retrieve", 0.04)
        worker.vllm(request_prefill_time_seconds=0.1)
        worker.vllm(request_prefill_kv_computed_tokens=1000)
    return worker


def spacious() -> Worker:
    worker = busy(600)
    worker.pool(chunks=10, capacity=100, chunk_bytes=100 << 20)
    return worker


def tiered(**more: int) -> Worker:
    worker = busy()
    worker.tier("remote", tokens=100, nbytes=10 << 20, chunks=10, **more)
    return worker


CASES = [
    (lambda: tiered(damaged=3), ["lmcache-ext check", "LMCACHE_REMOTE_URL", "3 damaged"]),
    (lambda: tiered(trips=2), ["LMCACHE_REMOTE_URL", "2 times"]),
    (lambda: count(tiered(), num_slow_tier_tokens=101), ["lmcache-ext bench tier", "101 tokens", "100 came"]),
    (
        lambda: count(tiered(), remote_skipped_chunks=41),
        ["LMCACHE_MIN_USES_BEFORE_WRITE_BACK", "51 chunks, and took 10"],
    ),
    (sick, ["restart", "switched off"]),
    (lambda: count(busy(), num_faults=3), ["log", "3 faults"]),
    (lambda: count(busy(), num_failed_tokens=800), ["LMCACHE_LOAD_TIMEOUT_SECS", "800 of 8,000"]),
    (lambda: count(busy(), put_failed_count=4), ["LMCACHE_STORE_TIMEOUT_SECS", "4 of 20"]),
    (lambda: full(busy()), ["LMCACHE_MAX_LOCAL_CPU_SIZE=7.8", "2.5 times over"]),
    (lambda: full(cold(30)), ["LMCACHE_CACHE_POLICY=LFU", "100%"]),
    (lambda: count(busy(), num_skipped_store_tokens=9_000), ["LMCACHE_MAX_PINNED_FRACTION", "9,000 of 20,000"]),
    (slow_loads, ["LMCACHE_MIN_RETRIEVE_TOKENS=1600", "longer than"]),
    (lambda: cold(30), ["LMCACHE_CHUNK_SIZE", "30 of 30"]),
    (spacious, ["LMCACHE_MAX_LOCAL_CPU_SIZE=2.0", "10% of 9.8 GB"]),
]


@pytest.mark.parametrize(("worker", "words"), CASES, ids=lambda value: value[0] if isinstance(value, list) else "")
def test_advice_names_the_setting_and_the_figures(worker, words):
    said = told(worker())
    for word in words:
        assert word in said


def test_every_setting_in_an_advice_exists():
    import inspect
    import re

    from lmcache_ext.config import EngineConfig

    text = "".join(inspect.getsource(rule) for rule in RULES)
    names = {name.lower() for name in re.findall(r"LMCACHE_([A-Z_]+)", text)} - {"ext"}
    assert names - {"enable"} <= set(EngineConfig.model_fields) and len(names) >= 7
