"""`lmcache-ext top`: rates between two readings, one column a worker, and workers that come and go."""

from __future__ import annotations

import contextlib
import os
import pty
import re
import select
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager

from lmcache_ext.cli.main import main
from lmcache_ext.cli.scrape import parse
from lmcache_ext.cli.top import column, frame
from tests.cli.worker import Worker, served
from tests.launch.processes import heed_sigint


def reading(worker: Worker, at: float):
    return parse(worker.text().decode(), at)


def row(lines: list[str], label: str) -> str:
    return next(line for line in lines if line.strip().startswith(label))


def test_a_frame_tells_the_rates_of_the_interval_by_worker():
    one, two = Worker(), Worker()
    for worker in (one, two):
        worker.request()
        worker.pool(chunks=50, capacity=100)
    before = [reading(worker, 10.0) for worker in (one, two)]
    for _ in range(4):
        one.request(gpu=250, host=500, seconds=0.2)
    one.recorder.count("local_cpu_evict_keys_count", 6)
    one.vllm(num_requests_running=7)
    after = [reading(worker, 12.0) for worker in (one, two)]
    urls = ["http://a:8081/metrics", "http://b:8082/metrics"]
    lines = frame({url: column(*pair) for url, pair in zip(urls, zip(before, after, strict=True), strict=True)})
    assert lines[0].split()[1:] == ["a:8081", "b:8082"]
    assert row(lines, "requests/s").split() == ["requests/s", "2.0", "0.0"]
    assert row(lines, "prompt tokens/s").split()[-2:] == ["2,000.0", "0.0"]
    assert row(lines, "GPU prefix cache").split()[-3:] == ["##........", "25.0%", "-"]
    assert row(lines, "host memory").split()[-3:] == ["#####.....", "50.0%", "-"]
    assert row(lines, "time to first token").split()[-3:] == ["200.0", "ms", "-"]
    assert row(lines, "loads GB/s").split()[-2:] == ["8.00", "-"]
    assert row(lines, "evicted chunks/s").split()[-2:] == ["3.0", "0.0"]
    assert row(lines, "pool").split() == ["pool", "#####.....", "50.0%", "#####.....", "50.0%"]
    assert row(lines, "requests running").split()[-2:] == ["7", "0"]
    assert row(lines, "pinned GPU blocks").split()[-2:] == ["3", "3"]


def test_a_tier_has_rows_if_a_worker_uses_it():
    one, two = Worker(), Worker()
    one.tier("disk", nbytes=1 << 20)
    before = [reading(worker, 10.0) for worker in (one, two)]
    one.tier("disk", tokens=600, nbytes=4 << 20, chunks=6)
    after = [reading(worker, 12.0) for worker in (one, two)]
    urls = ["http://a:8081/metrics", "http://b:8082/metrics"]
    lines = frame({url: column(*pair) for url, pair in zip(urls, zip(before, after, strict=True), strict=True)})
    assert row(lines, "disk tokens/s").split()[-2:] == ["300.0", "-"]
    assert row(lines, "disk in, out a s").split()[-5:] == ["2.0", "MB,", "2.0", "MB", "-"]
    assert row(lines, "disk holds").split()[-4:] == ["6,", "4.0", "MB", "-"]
    assert row(lines, "disk failed/s").split()[-2:] == ["3.0", "-"]
    assert not [line for line in lines if line.startswith(("gds", "remote"))]


def test_a_worker_that_is_away_has_a_line_and_comes_back():
    worker = Worker()
    assert column("gone", reading(worker, 1.0)) == "it has just come back: figures follow"
    lines = frame({"http://a/metrics": column(reading(worker, 1.0), "no answer"), "http://b/metrics": "none"})
    assert lines == ["http://a/metrics: no answer", "http://b/metrics: none"]


def test_frames_without_a_terminal_have_no_control_codes(capsys):
    with served(Worker()) as urls:
        assert main(["top", "--every", "0.1", "--frames", "2", *urls]) == 0
    out = capsys.readouterr().out
    assert out.count("requests/s") == 2 and "\x1b" not in out


def test_nobody_there_ends_with_1(capsys):
    assert main(["top", "--every", "0.1", "--frames", "1", "1"]) == 1
    assert "DYN_SYSTEM_PORT" in capsys.readouterr().out


@contextmanager
def traffic(worker: Worker):
    """A request every 20 ms."""
    ended = threading.Event()

    def run() -> None:
        while not ended.wait(0.02):
            worker.request(host=500)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join(10)


def test_on_a_terminal_it_redraws_until_ctrl_c():
    worker = Worker()
    with served(worker) as urls, traffic(worker):
        master, slave = pty.openpty()
        command = [sys.executable, "-m", "lmcache_ext.cli.main", "top", "--every", "0.2", *urls]
        process = subprocess.Popen(command, stdout=slave, stderr=slave, stdin=slave, preexec_fn=heed_sigint)
        os.close(slave)
        try:
            text = _until(master, lambda seen: seen.count("\x1b[H") >= 3)
            assert float(re.search(r"requests/s +([\d.]+)", text).group(1)) > 0
            assert "50.0%" in text
            process.send_signal(signal.SIGINT)
            deadline = time.monotonic() + 10
            with contextlib.suppress(OSError):  # how a terminal's end looks; unread, it would hold up whoever writes
                while select.select([master], [], [], max(0.0, deadline - time.monotonic()))[0]:
                    os.read(master, 65536)
            assert process.wait(10) == 0
        finally:
            process.kill()
            process.wait(10)
            os.close(master)


def _until(descriptor: int, enough) -> str:
    seen, deadline = "", time.monotonic() + 20
    while not enough(seen):
        ready, _, _ = select.select([descriptor], [], [], max(0.0, deadline - time.monotonic()))
        assert ready, f"only this came: {seen!r}"
        seen += os.read(descriptor, 65536).decode()
    return seen
