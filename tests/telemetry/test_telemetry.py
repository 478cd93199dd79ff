"""Reports of requests whose stores are done: to whom, when, and that who makes them never waits."""

from __future__ import annotations

import asyncio
import json
import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from lmcache_ext.errors import ConfigError
from lmcache_ext.metrics import Recorder
from lmcache_ext.telemetry import DEFAULT_ENDPOINT, ENDPOINT, TYPE, Silent, Stores, endpoint, open_telemetry
from lmcache_ext.telemetry.sender import Limits, Sender
from tests.proxy.deployments import telemetry as proxy_in_telemetry_mode

PATH = "/api/v1/telemetry"
QUICK = Limits(post=0.3, pause=0.01, cooldown=0.2, longest=0.4)


class Endpoint:
    """A real HTTP server; knobs are plain fields."""

    def __init__(self) -> None:
        self.got: list[dict[str, Any]] = []
        self.posts = 0
        self.connections = 0
        self.answers: list[int] = []  # of the next POSTs; then 200
        self.status = 200
        self.delay_s = 0.0
        self.drips = False
        self.go_on = threading.Event()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def setup(self) -> None:
                outer.connections += 1
                super().setup()

            def do_POST(self) -> None:
                text = self.rfile.read(int(self.headers["Content-Length"]))
                outer.posts += 1
                outer.go_on.wait(outer.delay_s)
                status = outer.answers.pop(0) if outer.answers else outer.status
                if status == 200 and self.path == PATH:
                    outer.got.append(json.loads(text))
                if outer.drips:
                    self.close_connection = True
                    while not outer.go_on.wait(0.05):
                        self.wfile.write(b"H")
                    return
                self.send_response(status)
                self.send_header("Content-Length", "2")
                self.end_headers()
                self.wfile.write(b"{}")

            def log_message(self, *args: Any) -> None:
                pass

        class Server(ThreadingHTTPServer):
            def handle_error(self, request: Any, client_address: Any) -> None:
                pass  # clients that hang up

        self.server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}{PATH}"

    @property
    def ids(self) -> list[str]:
        return [one for report in self.got for one in report["request_ids_set"]]


@contextmanager
def listening() -> Iterator[Endpoint]:
    made = Endpoint()
    thread = threading.Thread(target=made.server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield made
    finally:
        made.go_on.set()
        made.server.shutdown()
        made.server.server_close()
        thread.join(10)


@contextmanager
def sending(url: str, limits: Limits = QUICK, ranks: int = 1) -> Iterator[Sender]:
    made = Sender(url, "my/model", ranks, limits)
    try:
        yield made
    finally:
        made.close(0.1)
        assert not made._thread.is_alive()


def until(condition: Callable[[], object], within_s: float = 10.0) -> None:
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline, "did not come about"
        time.sleep(0.005)


def dead() -> str:
    """Where nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}{PATH}"


# -- settings ----------------------------------------------------------------------------------------------------------


def test_nothing_is_said_unless_asked_for(caplog):
    for environ in ({}, {TYPE: ""}, {TYPE: "noop"}, {TYPE: " NoOp "}):
        assert endpoint(environ) is None
        assert isinstance(open_telemetry("m", 1, environ), Silent)
    assert not caplog.records
    assert endpoint({ENDPOINT: "http://somewhere/"}) is None
    assert f"has no effect without {TYPE}=fastapi" in caplog.text


def test_upstreams_variables_and_its_default_endpoint():
    assert endpoint({TYPE: "fastapi"}) == DEFAULT_ENDPOINT == "http://localhost:5768/api/v1/telemetry"
    assert endpoint({TYPE: "fastapi", ENDPOINT: "https://p:1/x"}) == "https://p:1/x"


@pytest.mark.parametrize(
    ("environ", "named"),
    [
        ({TYPE: "kafka"}, f"{TYPE}='kafka': must be fastapi, or noop"),
        ({TYPE: "fastapi", ENDPOINT: "127.0.0.1:5768"}, f"{ENDPOINT}='127.0.0.1:5768': must be a URL like"),
        ({TYPE: "fastapi", ENDPOINT: "ftp://a/b"}, "must be a URL like http://localhost:5768/api/v1/telemetry"),
        ({TYPE: "fastapi", ENDPOINT: "http:///x"}, "must be a URL like"),
        ({TYPE: "fastapi", ENDPOINT: "http://a:70000/"}, "0-65535"),
        ({TYPE: "fastapi", ENDPOINT: "http://[::1/"}, ENDPOINT),
    ],
)
def test_a_wrong_value_is_refused_with_its_name(environ, named):
    with pytest.raises(ConfigError) as caught:
        endpoint(environ)
    assert named in str(caught.value)


# -- when a request's stores are done ----------------------------------------------------------------------------------


class Told(list[tuple[str, bool]]):
    def __call__(self, request_id: str, stored: bool) -> None:
        self.append((request_id, stored))


def test_a_request_without_stores_is_told_when_it_is_over():
    stores = Stores(told := Told())
    stores.finished("none")
    stores.finished("refused", ok=False)
    assert told == [("none", True), ("refused", False)]


def test_a_request_is_told_once_after_its_last_store():
    stores = Stores(told := Told())
    stores.began("r", 1)
    stores.began("r", 2)
    stores.ended(1, ok=True)
    stores.finished("r")
    assert told == []
    stores.began("other", 3)
    stores.ended(2, ok=True)
    stores.ended(2, ok=False)  # late, and told before
    stores.ended(99, ok=False)
    assert told == [("r", True)]
    stores.ended(3, ok=True)
    assert told == [("r", True)] and not len(stores)
    stores.finished("other")
    assert told == [("r", True), ("other", True)] and not len(stores)


def test_stores_that_fail_after_the_end_are_failures_and_earlier_ones_are_tried_again():
    stores = Stores(told := Told())
    for number, request_id in enumerate(("early", "late", "late", "given up")):
        stores.began(request_id, number)
    stores.ended(0, ok=False)
    stores.finished("early")
    stores.finished("late")
    stores.ended(1, ok=False)
    stores.ended(2, ok=True)
    stores.finished("given up", ok=False)
    stores.ended(3, ok=True)
    assert told == [("early", True), ("late", False), ("given up", False)]


# -- posts -------------------------------------------------------------------------------------------------------------


def test_a_report_is_upstreams_with_a_status():
    with listening() as there, sending(there.url, ranks=8) as sender:
        sender.report("cmpl-1-0-abc", stored=True)
        until(lambda: there.got)
        sender.report("cmpl-2-0-abc", stored=False)
        until(lambda: len(there.got) == 2)
        common = {
            "event": "request_store_finished",
            "model_name": "my/model",
            "world_size": 1,
            "kv_rank": 0,
            "ranks": 8,
        }
        assert there.got == [
            {**common, "request_ids_set": ["cmpl-1-0-abc"], "status": "stored"},
            {**common, "request_ids_set": ["cmpl-2-0-abc"], "status": "failed"},
        ]
        until(lambda: sender.sent == 2)
        assert sender.lost == 0
        assert there.connections == 1, "connections are kept"


def test_what_waits_goes_together_by_status():
    with listening() as there, sending(there.url, Limits(together=8)) as sender:
        there.delay_s = 0.2
        sender.report("first", True)
        until(lambda: there.posts)
        for number in range(12):
            sender.report(f"r{number}", stored=number % 4 != 3)
        until(lambda: sender.sent == 13)
        assert sorted(there.ids) == sorted(["first", *(f"r{number}" for number in range(12))])
        assert [(len(report["request_ids_set"]), report["status"]) for report in there.got] == [
            (1, "stored"), (6, "stored"), (2, "failed"), (3, "stored"), (1, "failed"),
        ]  # fmt: skip


def test_a_fault_that_passes_is_tried_again():
    with listening() as there, sending(there.url) as sender:
        there.answers = [500, 503]
        sender.report("r", True)
        until(lambda: sender.sent == 1)
        assert there.ids == ["r"] and there.posts == 3


def test_an_endpoint_that_refuses_is_not_asked_again_for_the_same():
    with listening() as there, sending(there.url) as sender:
        there.status = 404
        sender.report("r", True)
        until(lambda: sender.failed == 1)
        assert there.posts == 1


@pytest.mark.parametrize("kind", ["dead", "500", "slow", "dripping"])
def test_a_bad_endpoint_costs_the_caller_nothing_and_the_log_one_line(kind, caplog):
    caplog.set_level(logging.WARNING, logger="lmcache_ext.telemetry")
    with listening() as there, sending(dead() if kind == "dead" else there.url) as sender:
        there.status = 500 if kind == "500" else 200
        there.delay_s = 60.0 if kind == "slow" else 0.0
        there.drips = kind == "dripping"
        took = []
        for number in range(50):
            start = time.monotonic()
            sender.report(f"r{number}", True)
            took.append(time.monotonic() - start)
            time.sleep(0.01)
        until(lambda: sender.failed + sender.stale >= 50, 20)
        assert sorted(took)[25] < 0.005
        sender.report("again", True)
        until(lambda: sender.lost == 51, 10)
        assert len(caplog.records) == 1, caplog.text
        assert "requests go on" in caplog.text and sender._url in caplog.text


def test_an_endpoint_that_comes_back_is_used_again(caplog):
    with listening() as there, sending(there.url) as sender:
        there.status = 500
        for number in range(2):
            sender.report(f"lost{number}", True)
            until(lambda n=number: sender.failed == n + 1)
        posts = there.posts
        there.status = 200
        sender.report("found", True)
        until(lambda: sender.sent == 1)
        assert there.ids == ["found"] and there.posts == posts + 1
        assert "arrive again; 2 were lost" in caplog.text


def test_the_queue_is_bounded_and_what_it_does_not_take_is_counted():
    with listening() as there, sending(there.url, Limits(waiting=10, post=30)) as sender:
        there.delay_s = 60
        sender.report("first", True)
        until(lambda: there.posts)
        for number in range(25):
            sender.report(f"r{number}", True)
        assert sender.dropped == 15
        there.go_on.set()
        until(lambda: sender.sent == 11)
        recorder = Recorder()
        for _ in range(2):
            sender.measure(recorder)
        totals = {"num_telemetry_reports": 11, "num_lost_telemetry_reports": 15}
        assert recorder.totals == totals


def test_reports_that_nobody_waits_for_any_more_are_not_sent():
    with listening() as there, sending(there.url, Limits(age=0.2, post=30)) as sender:
        there.delay_s = 0.5
        sender.report("first", True)
        until(lambda: there.posts)
        sender.report("old", True)
        until(lambda: sender.stale == 1)
        sender.report("new", True)
        until(lambda: sender.sent == 2)
        assert there.ids == ["first", "new"]


def test_the_end_sends_what_waits_and_ends_in_time():
    with listening() as there:
        sender = Sender(there.url, "m", 1)
        sender.report("last", True)
        sender.close(5)
        assert there.ids == ["last"] and not sender._thread.is_alive()
        sender.report("too late", True)
        assert sender.dropped == 1
    with listening() as there:
        there.delay_s = 60
        sender = Sender(there.url, "m", 1)
        for number in range(1000):
            sender.report(f"r{number}", True)
        until(lambda: there.posts)
        start = time.monotonic()
        sender.close(0.3)  # what is being posted has its 2 s, in a thread that ends with the process
        assert time.monotonic() - start < 10
        until(lambda: not sender._thread.is_alive())
        assert there.posts == 1 and sender.lost == 1000


async def test_our_proxy_takes_it_for_all_ranks_at_once():
    async with proxy_in_telemetry_mode(ranks=4) as d:
        (prefiller,) = d.prefillers
        url = f"http://127.0.0.1:{d.config.notify_port}{PATH}"
        with sending(url, ranks=4) as sender:
            for stored, outcome in ((True, "stored"), (False, "failed")):

                async def report(own: str, engine_id: str, stored: bool = stored) -> None:
                    sender.report(engine_id, stored)

                prefiller.report = report
                start = time.monotonic()
                status, _ = await d.post(model="fake", prompt="hello", max_tokens=2)
                assert status == 200 and time.monotonic() - start < 10, "the proxy waited for more"
                assert await d.counted("handovers_total", outcome=outcome) == 1
            for _ in range(200):
                if sender.sent == 2:
                    break
                await asyncio.sleep(0.01)
            assert (sender.sent, sender.lost) == (2, 0)
