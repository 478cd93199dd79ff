"""Rules and dashboard: promtool takes them, every name is exported, and a real Prometheus answers every query."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import subprocess
import sys
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import ModuleType

import pytest
import yaml
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest

from lmcache_ext.ports import free_port
from tests.cli.worker import Worker, served
from tests.deploy.names import exported, metrics_in
from tests.server.helpers import Server, attached, keys, look, spec, store
from tests.static.rules import ROOT

RULES = ROOT / "deploy" / "prometheus" / "rules.yaml"
DASHBOARD = ROOT / "deploy" / "grafana" / "dashboard.json"
needs_prometheus = pytest.mark.skipif(
    not (shutil.which("promtool") and shutil.which("prometheus")), reason="needs Debian's prometheus"
)
# Labels as Dynamo's system port adds them to vLLM's own.
LABELS = {"model_name": "demo", "engine": "0", "dynamo_namespace": "dynamo", "dynamo_component": "backend"}


def rules() -> list[dict]:
    return [rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]]


def queries() -> dict[str, str]:
    """`panel / legend` → PromQL."""
    panels = json.loads(DASHBOARD.read_text())["panels"]
    return {
        f"{panel['title']} / {target['legendFormat']}": target["expr"]
        for panel in panels
        for target in panel.get("targets", ())
    }


def promtool(*words: str) -> str:
    done = subprocess.run(["promtool", *words], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@needs_prometheus
def test_promtool_takes_the_rules_and_each_alert_fires_when_it_should():
    promtool("check", "rules", str(RULES))
    promtool("test", "rules", "tests/deploy/rules_test.yaml")


def test_every_alert_is_under_test_and_says_what_to_do():
    proven = (ROOT / "tests/deploy/rules_test.yaml").read_text()
    alerts = [rule for rule in rules() if "alert" in rule]
    assert len(alerts) >= 19
    for rule in alerts:
        assert rule["alert"] in proven
        assert rule["annotations"]["action"] and rule["labels"]["severity"] in ("info", "warning", "critical")


def test_every_metric_in_a_rule_or_on_the_dashboard_is_exported():
    known = exported()
    for query in (*(rule["expr"] for rule in rules()), *queries().values()):
        names = metrics_in(query)
        assert names, query
        assert names <= known, f"{names - known} in {query}"


def test_a_name_that_nobody_exports_is_noticed():
    assert metrics_in('sum by (le) (rate(lmcache:x_total{a="b"}[5m])) / on (c) up') == {"lmcache:x_total", "up"}
    assert "lmcache:x_total" not in exported() and "lmcache:num_hit_tokens" not in exported()  # without _total


def test_the_settings_and_commands_that_alerts_name_exist():
    from lmcache_ext.cli.main import build_parser
    from lmcache_ext.config import EngineConfig

    text = RULES.read_text()
    for word in {word.strip("`.,;:\"'") for word in text.split()}:
        if word.startswith("LMCACHE_"):
            assert word.removeprefix("LMCACHE_").lower() in EngineConfig.model_fields, word
    commands = re.findall(r"`lmcache-ext ([^`]+)`", text)
    assert {"report", "check URL", "describe kvcache"} <= set(commands)
    for command in set(commands) - {"server"}:  # which wants to be told how much memory
        build_parser().parse_args(command.replace("URL", "file:///tmp/x/").split())


def script(name: str) -> ModuleType:
    """Of the dashboard's folder."""
    spec = importlib.util.spec_from_file_location(name, DASHBOARD.with_name(f"{name}.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


def test_the_dashboard_is_what_its_script_writes():
    assert DASHBOARD.read_text() == script("dashboard").text(), "run: python deploy/grafana/dashboard.py"


def test_panels_do_not_overlap_and_have_numbers_of_their_own():
    panels = json.loads(DASHBOARD.read_text())["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    cells = [
        (x, y)
        for panel in panels
        for place in [panel["gridPos"]]
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    ]
    assert len(set(cells)) == len(cells)


class Frontend:
    """What Dynamo's frontend serves, as far as the dashboard reads it."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        labels = {"model": "demo"}
        ttft = Histogram("dynamo_frontend_time_to_first_token_seconds", "x", list(labels), registry=self.registry)
        done = Counter("dynamo_frontend_requests", "x", ["model", "status"], registry=self.registry)
        reused = Counter("dynamo_component_router_kv_worker_reused_tokens", "x", registry=self.registry)
        self._ttft, self._done, self._reused = ttft.labels(**labels), done.labels("demo", "success"), reused

    def text(self) -> bytes:
        self._ttft.observe(0.2)
        self._done.inc()
        self._reused.inc(50)
        return generate_latest(self.registry)


class Busy(Worker):
    """Moves between any two scrapes."""

    def text(self) -> bytes:
        self.request()
        self.request(gpu=100, host=700, seconds=0.1)
        self.pool(40, 100)
        for name in ("local_cpu_evict_keys_count", "num_skipped_store_tokens", "num_faults", "num_failed_tokens"):
            self.recorder.count(name)
        self.recorder.count("put_failed_count")
        for name in ("num_slow_tier_tokens", "num_held_buffers"):
            self.recorder.count(name)
        for tier in ("disk", "gds", "remote"):
            self.tier(tier, tokens=100, nbytes=1 << 20)
        self.vllm(num_requests_running=3, num_requests_waiting=1, kv_cache_usage_perc=0.5, num_preemptions=1)
        return super().text()


@contextmanager
def shared_server(folder: Path) -> Iterator[str]:
    """Our server with a tier and a busy client; its URL."""
    adapter = json.dumps({"type": "fs", "base_path": str(folder / "kv"), "max_capacity_gb": 1})
    ended = threading.Event()
    with Server(folder, "--l2-adapter", adapter) as server:
        client = attached(server, spec())

        def work() -> None:
            while not ended.wait(0.05):
                chain = keys(4)
                with suppress(AssertionError):  # a machine that stands still for long enough ends a session
                    store(client, spec(), chain)
                    look(client, spec(), chain)
                client.forget("r")

        thread = threading.Thread(target=work)
        thread.start()
        try:
            yield server.url
        finally:
            ended.set()
            thread.join(20)
            client.close()


@needs_prometheus
def test_a_real_prometheus_has_data_for_every_query(tmp_path):
    with ExitStack() as stack:
        urls = stack.enter_context(served(Busy(LABELS), Frontend()))
        urls.append(stack.enter_context(shared_server(tmp_path)))
        port = stack.enter_context(prometheus(tmp_path, dict(zip(("worker", "frontend", "server"), urls, strict=True))))
        asked = {title: resolve(query) for title, query in queries().items()}
        asked |= {rule["record"]: rule["record"] for rule in rules() if "record" in rule}
        expected = {
            "Hit rate by tier / GPU prefix cache": 0.05,
            "Pool occupancy / {{instance}}": 0.4,
            "Chunks found / of those looked up": 1.0,
        }
        assert set(expected) | {"instance:lmcache_tier_hit:ratio_rate5m"} <= set(asked)
        deadline = time.monotonic() + 60
        wrong = dict(asked)  # each is asked until it has an answer once: a scrape may be late
        while wrong:
            assert time.monotonic() < deadline, f"no data, or others than expected, for {list(wrong)}"
            for title, query in list(wrong.items()):
                values = answer(port, query)
                if values and (title not in expected or values == [pytest.approx(expected[title], rel=0.01)]):
                    del wrong[title]
            time.sleep(0.3)
        require_drawn(port, tmp_path / "dashboard.svg")
        assert len(asked) > 75


def require_drawn(port: int, picture: Path) -> None:
    """All panels, each with its lines."""
    pytest.importorskip("matplotlib", reason="needs matplotlib of requirements/dev.in")
    command = [sys.executable, DASHBOARD.with_name("picture.py"), f"http://127.0.0.1:{port}", "--minutes", "0.2"]
    # In a process of its own: its first time takes seconds, which whoever is scraped here does not have.
    subprocess.run([*command, "--interval", "4s", "--out", picture], timeout=120, check=True)
    drawn = picture.read_text()
    for panel in json.loads(DASHBOARD.read_text())["panels"]:
        for target in panel.get("targets", ()):
            assert panel["title"] in drawn
            assert "{{" in target["legendFormat"] or target["legendFormat"] in drawn


def resolve(query: str) -> str:
    return str(script("dashboard").resolve(query, "4s"))


def answer(port: int, query: str) -> list[float]:
    """The values that Prometheus has now, less NaN."""
    url = f"http://127.0.0.1:{port}/api/v1/query?" + urllib.parse.urlencode({"query": query})
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(url, timeout=10) as got:
        result = json.load(got)["data"]["result"]
    values = [float(entry["value"][1]) for entry in result]
    return [value for value in values if value == value]


def ready(port: int) -> bool:
    """Whether it answers queries yet."""
    try:
        return bool(answer(port, "vector(1)"))
    except OSError:
        return False


@contextmanager
def prometheus(folder: Path, targets: dict[str, str]) -> Iterator[int]:
    """A Prometheus on a free port, which this yields, that scrapes `targets` twice a second."""
    port = free_port()
    jobs = [
        {"job_name": f"lmcache-{job}", "static_configs": [{"targets": [url.split("/")[2]]}]}
        for job, url in targets.items()
    ]
    timing = {"scrape_interval": "500ms", "scrape_timeout": "500ms", "evaluation_interval": "500ms"}
    config = folder / "prometheus.yaml"
    config.write_text(yaml.safe_dump({"global": timing, "rule_files": [str(RULES)], "scrape_configs": jobs}))
    command = ["prometheus", f"--config.file={config}", f"--storage.tsdb.path={folder / 'data'}"]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen([*command, f"--web.listen-address=127.0.0.1:{port}"], stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + 20
        while not ready(port):
            assert process.poll() is None and time.monotonic() < deadline, (folder / "log").read_text()
            time.sleep(0.1)
        yield port
    finally:
        process.terminate()
        process.wait(20)
