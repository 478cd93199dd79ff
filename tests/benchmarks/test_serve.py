"""`benchmarks/serve.py`: its command line, what it reads of a client's result, its table and its chart."""

from __future__ import annotations

import importlib.util
import json
import sys
import xml.etree.ElementTree as ET
from types import ModuleType

import pytest

from tests.static.rules import ROOT


@pytest.fixture(scope="module")
def serve() -> ModuleType:
    spec = importlib.util.spec_from_file_location("benchmarks_serve", ROOT / "benchmarks" / "serve.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["benchmarks_serve"] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


def results(serve: ModuleType) -> list[object]:
    return [
        serve.Result("agg_lmcache.sh", cache, 60, 0, ttft, 2 * ttft, 30, gpu=0.25, host=host)
        for cache, ttft, host in (("0", 2000, 0.0), ("1", 500, 0.5))
    ]


def test_what_follows_two_dashes_are_the_workers_flags(serve):
    options = serve.parsed(["--prefixes", "4", "--", "--dtype", "bfloat16"])
    assert options.flags == ["--dtype", "bfloat16"] and options.prefixes == 4
    assert options.scripts == ["agg_lmcache.sh"]


def test_a_script_that_is_not_there_is_refused(serve, capsys):
    with pytest.raises(SystemExit):
        serve.parsed(["--scripts", "agg_lmcache.sh,nonsense.sh"])
    assert "nonsense.sh" in capsys.readouterr().err
    assert all((ROOT / "launch" / name).exists() for name in serve.SCRIPTS)


def test_the_engine_has_room_for_the_requests_under_way_and_for_a_quarter_of_the_prefixes(serve):
    few = serve.parsed(["--prefixes", "1", "--prefix", "512", "--suffix", "0", "--output", "0", "--concurrency", "1"])
    assert serve.longest(few) == 512 + 64 and serve.gpu_blocks(few) == 2 * (512 + 64) // 32
    many = serve.parsed(["--prefixes", "100", "--prefix", "1024"])
    assert serve.gpu_blocks(many) == 25 * 1024 // 32


def test_results_of_both_clients_are_read(serve, tmp_path):
    options = serve.parsed([])
    same = {"seconds": 9.0, "failed": 1, "ttft": 100.0, "ttft_p95": 200.0, "itl": 30.0}
    names = ("duration", "failed", "median_ttft_ms", "p95_ttft_ms", "mean_itl_ms")
    (tmp_path / "r.json").write_text(json.dumps(dict(zip(names, same.values(), strict=True))))
    assert serve.vllm_client(options, tmp_path, tmp_path)[1]() == same
    told = {
        "benchmark_duration": {"avg": 9.0}, "error_request_count": {"avg": 1.0},
        "time_to_first_token": {"p50": 100.0, "p95": 200.0}, "inter_token_latency": {"avg": 30.0},
    }  # fmt: skip
    (tmp_path / "profile_export_aiperf.json").write_text(json.dumps(told))
    assert serve.aiperf_client(options, tmp_path, tmp_path)[1]() == same


def test_the_table_says_how_it_came_about(serve):
    options = serve.parsed(["--concurrency", "3"])
    text = "\n".join(serve.report(results(serve), options, ["--concurrency", "3"]))
    assert "`python benchmarks/serve.py --concurrency 3`" in text and "3 at a time" in text
    assert "| agg_lmcache.sh | with the cache | 60 | 500 | 1000 | 30 | 25% | 50% | 0 |" in text
    head, line, *rows = [row for row in text.splitlines() if row.startswith("|")]
    assert {row.count("|") for row in (head, line, *rows)} == {10}


def test_the_chart_is_a_picture_with_a_bar_for_each_result(serve):
    tree = ET.fromstring(serve.chart(results(serve)))
    bars = [bar for bar in tree.iter("{http://www.w3.org/2000/svg}rect") if bar.get("x")]
    assert [float(bar.get("width")) for bar in bars] == [210.0, 52.5]
