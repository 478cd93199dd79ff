"""The HTTP API of a real server: paths, shapes, refusals, metrics, quotas."""

from __future__ import annotations

import base64
import os
import re
import shutil
import subprocess
import urllib.request

import pytest
import xxhash
from prometheus_client.parser import text_string_to_metric_families

from lmcache_ext.cli.main import main
from lmcache_ext.keys import Chain
from lmcache_ext.server import protocol as p
from tests.server.helpers import Server, attached, keys, look, spec, store, until


@pytest.fixture
def server(tiered):
    return tiered


@pytest.fixture
def client(server):
    one = attached(server, spec())
    yield one
    one.close()


def text(server: Server, path: str) -> str:
    with urllib.request.urlopen(server.url + path, timeout=5) as answer:
        return answer.read().decode()


def test_health_status_config_version(server, client):
    assert server.ask("GET", "/healthcheck") == (200, {"status": "healthy"})
    status = server.status()
    assert status["is_healthy"]
    assert status["instance_id"] == "one"
    assert status["l1"]["size"] == 64 << 20
    assert [(each["name"], each["silent"], each["holds"]) for each in status["clients"]] == [("test", False, 0)]
    assert (status["groups"][0]["model"], status["groups"][0]["ranks"]) == ("m", 2)
    assert status["l2"][0]["name"] == "fs"
    config = server.ask("GET", "/config")[1]
    assert (config["l1_size_gb"], config["chunk_size"], config["l2_adapters"]) == (0.0625, 256, ["fs"])
    assert server.ask("GET", "/version")[1]["version"]


def test_objects_are_listed_and_deleted(server, client):
    server.ask("POST", "/cache/clear", {"tier": "l1", "force": True})
    chain = keys(5)
    store(client, spec(), chain)
    status, body = server.ask("GET", "/cache/objects?limit=2&offset=1")
    assert (status, body["total"]) == (200, 5)
    assert [each["key"] for each in body["objects"]] == [key.hex() for key in chain[1:3]]
    assert body["objects"][0]["bytes"] == 12288
    named = [key.hex() for key in chain[3:]]
    assert server.ask("DELETE", "/cache/objects", {"keys": named, "tier": "all"})[1]["deleted_l1"] == 2
    assert look(client, spec(), chain).ready == 3
    client.forget("r")


def test_checksums_are_those_of_the_bytes(server, client):
    chain = keys(2)
    store(client, spec(), chain)
    names = [key.hex() for key in [*chain, *keys(1)]]
    body = server.ask("POST", "/cache/checksums", {"keys": names})[1]
    expected = [xxhash.xxh3_128_hexdigest(key[-8:] * (12288 // 8)) for key in chain]
    assert (body["status"], body["chunk_checksums"]) == ("success", [*expected, None])
    assert until(lambda: server.status()["l1"]["leases"] == 0)


def test_clear_spares_what_is_held(server, client):
    chain = keys(3)
    store(client, spec(), chain)
    held = look(client, spec(), chain).lease
    assert server.ask("POST", "/cache/clear")[1]["cleared"] >= 3
    assert bytes(held.parts(2)[0][:8]) == chain[2][-8:]
    assert until(lambda: server.status()["l1"]["leases"] == 3), "once the tier has them, too"
    client.forget("r")
    assert until(lambda: server.status()["l1"]["used"] == 0)


@pytest.mark.parametrize("by", ["keys", "tokens"])
def test_prefetch_brings_chunks_from_the_tier(server, client, by):
    tokens = [ord(c) for c in by * 16][:64]
    chain = Chain(spec().root, 16).extend(tokens, 64)
    store(client, spec(), chain)
    assert until(lambda: server.status()["l2"][0]["objects"] >= 4 and not server.status()["l1"]["leases"])
    server.ask("POST", "/cache/clear")
    body = {"root": spec().root.hex(), "keys": [key.hex() for key in chain]}
    if by == "tokens":
        body = {"model_name": "m", "world_size": 2, "token_ids": tokens}
    status, started = server.ask("POST", "/cache/prefetches", body)
    assert (status, started["status"]) == (202, "pending")
    path = f"/cache/prefetches/{started['id']}"
    assert until(lambda: server.ask("GET", path)[1]["status"] == "completed")
    assert server.ask("GET", path)[1]["ready"] == 4
    assert look(client, spec(), chain, by).ready == 4
    client.forget(by)
    assert until(lambda: server.status()["l1"]["leases"] == 0)


def test_quotas_bound_a_salt(server, client):
    limit = 3 * 12288
    assert server.ask("PUT", "/quota/tenant", {"limit_gb": limit / 2**30})[1]["status"] == "ok"
    salt, chain = p.salt_digest("tenant"), keys(6)
    for key in chain:
        store(client, spec(), [key], salt=salt)
        assert until(lambda: server.status()["l1"]["leases"] == 0), "what is being written to the tier is held"
    share = server.ask("GET", "/quota/tenant")[1]
    assert share == {
        "cache_salt": "tenant", "limit_gb": limit / 2**30, "current_usage_gb": limit / 2**30, "exists": True,
    }  # fmt: skip
    assert server.ask("GET", "/quota")[1]["users"]["tenant"]["current_usage_gb"] == limit / 2**30
    assert look(client, spec(), chain[3:]).ready == 3
    client.forget("r")
    assert server.ask("PUT", "/quota/_default", {"limit_gb": 1})[1]["cache_salt"] == "_default"
    assert server.ask("DELETE", "/quota/_default")[1]["status"] == "removed"
    assert server.ask("DELETE", "/quota/tenant")[1]["status"] == "removed"
    assert server.ask("DELETE", "/quota/tenant")[1]["status"] == "not_found"
    assert not server.ask("GET", "/quota/tenant")[1]["exists"]


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("GET", "/nothing", None, 404),
        ("PUT", "/status", {}, 405),
        ("GET", "/cache/prefetches/none", None, 404),
        ("GET", "/cache/objects?limit=x", None, 400),
        ("DELETE", "/cache/objects", {"keys": []}, 400),
        ("DELETE", "/cache/objects", {"keys": ["zz"]}, 400),
        ("DELETE", "/cache/objects", {"keys": ["00" * 32], "tier": "l9"}, 400),
        ("POST", "/cache/clear", {"tier": "l2"}, 400),
        ("POST", "/cache/clear", {"root": "00" * 32}, 404),
        ("POST", "/cache/checksums", [1], 400),
        ("POST", "/cache/prefetches", {"model_name": "unknown", "token_ids": [1]}, 404),
        ("POST", "/cache/prefetches", {"model_name": "m", "token_ids": [-1]}, 400),
        ("POST", "/cache/prefetches", {"model_name": "m", "token_ids": [1], "cache_salt": "s"}, 400),
        ("PUT", "/quota/x", {"limit_gb": -1}, 400),
        ("PUT", "/quota/x", {"limit_gb": True}, 400),
        ("PUT", "/quota/x", {}, 400),
    ],
)
def test_mistakes_are_named(server, client, method, path, body, status):
    found, answer = server.ask(method, path, body)
    assert found == status, answer
    assert answer["error"]


def test_other_sites_are_refused(server):
    assert server.ask("GET", "/status", Host="evil.example")[0] == 403
    assert server.ask("POST", "/cache/clear", {}, Origin="http://evil.example")[0] == 403
    assert server.ask("POST", "/cache/clear", {}, Origin=server.url)[0] == 200


def test_metrics_have_upstreams_names(server, client):
    families = {family.name: family for family in text_string_to_metric_families(text(server, "/metrics"))}
    for name in ("lmcache_mp_lookups", "lmcache_mp_lookup_hit", "lmcache_mp_l1_memory_usage_bytes",
                 "lmcache_mp_l1_usage_ratio", "lmcache_mp_l2_usage_bytes", "lmcache_server_requests"):  # fmt: skip
        assert name in families, name
    assert families["lmcache_server_clients"].samples[0].value >= 1


def test_openapi_names_every_path(server):
    described = server.ask("GET", "/openapi.json")[1]
    assert described["openapi"].startswith("3.")
    paths = {(method, path) for path, methods in described["paths"].items() for method in methods}
    assert ("delete", "/quota/{cache_salt}") in paths
    assert len(paths) == 17
    assert all(each["summary"] for methods in described["paths"].values() for each in methods.values())
    assert described["paths"]["/quota/{cache_salt}"]["get"]["parameters"][0]["name"] == "cache_salt"


def test_the_page_needs_nothing_from_anybody(server):
    page = text(server, "/")
    assert not re.search(r"""(src|href)\s*=|url\(|@import|https?://""", page)


@pytest.mark.skipif(not shutil.which("chromium"), reason="needs Debian's chromium")
def test_the_page_shows_what_the_server_says(server, client, tmp_path):
    chain = keys(4)
    store(client, spec(), chain)
    flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-dev-shm-usage",
             f"--user-data-dir={tmp_path}", "--virtual-time-budget=4000", "--dump-dom"]  # fmt: skip
    command = ["chromium", *flags, server.url + "/"]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=60).stdout
    shown = re.sub(r"<script.*</script>", "", dom, flags=re.DOTALL)
    assert re.search(r'id="state"[^>]*>healthy<', shown)
    assert f"<td>{os.getpid()}</td>" in shown
    assert "16 tokens, 12.0 KiB" in shown
    assert re.search(r"<td>fs</td>", shown)
    assert re.search(r'id="memory">[0-9.]+ %', shown)


def test_a_secret_is_asked_for(tmp_path, monkeypatch):
    with Server(tmp_path, "--http-host", "0.0.0.0", env={"LMCACHE_SERVER_TOKEN": "s3cret"}) as server:
        basic = base64.b64encode(b"me:s3cret").decode()
        assert server.ask("GET", "/status")[0] == 401
        assert server.ask("GET", "/status", Authorization="Bearer wrong")[0] == 401
        assert server.ask("GET", "/status", Authorization="Basic ????")[0] == 401
        assert server.ask("GET", "/status", Authorization="Bearer s3cret", Host="node7")[0] == 200
        assert server.ask("GET", "/status", Authorization=f"Basic {basic}")[0] == 200
        refused = {"Authorization": f"Basic {basic}", "Origin": "http://evil.example"}
        assert server.ask("POST", "/cache/clear", {}, **refused)[0] == 403
        assert main(["ping", "kvcache", "--url", server.url]) == 1
        monkeypatch.setenv("LMCACHE_SERVER_TOKEN", "s3cret")
        assert main(["ping", "kvcache", "--url", server.url]) == 0
