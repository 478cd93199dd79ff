"""Under vLLM's real Scheduler: each request is reported once, when all of its stores have ended."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from lmcache_ext.integration.vllm import impl as impl_module
from lmcache_ext.telemetry import Silent
from tests.integration.harness import Engine, Setup, prompt
from tests.integration.scenarios import copying, engine, slow


class Heard(Silent):
    def __init__(self) -> None:
        self.words: list[tuple[str, bool]] = []
        self.closed = False

    def report(self, request_id: str, stored: bool) -> None:
        self.words.append((request_id, stored))

    def close(self, seconds: float = 1.0) -> None:
        self.closed = True


@pytest.fixture
def heard(monkeypatch: pytest.MonkeyPatch) -> Iterator[Heard]:
    heard = Heard()
    monkeypatch.setattr(impl_module, "open_telemetry", lambda *_: heard)
    yield heard


def test_stored_is_said_once_all_ranks_are_done(heard: Heard) -> None:
    e = engine(Setup(ranks=2, caching=False), slow(0.05, "store"))
    p = prompt(1, 300)
    request_id = e.add(p)
    e.run(request_id)
    assert heard.words == [] and e.total("num_stored_tokens") < 288  # the last stores are still under way
    e.drain()
    assert heard.words == [("r1", True)] and e.total("num_stored_tokens") == 288
    e.ask(p)  # everything is there already
    e.ask([1, 2, 3])  # less than a block: there is nothing to store
    assert heard.words[1:] == [("r2", True), ("r3", True)]
    e.close()
    e.scheduler.connector.shutdown()
    assert heard.closed


def test_failed_is_said_of_what_is_not_stored(heard: Heard) -> None:
    def broken(*_: object) -> None:
        raise OSError("injected")

    e = engine(Setup(caching=False), broken)
    e.ask(prompt(1, 300))
    assert heard.words == [("r1", False)]
    e.close()
    e = engine(Setup(caching=False))
    e.abort(e.add(prompt(2, 300)))
    running = e.add(prompt(3, 300), max_tokens=5)
    e.step()
    e.abort(running)
    e.drain()
    e.ask(prompt(4, 300), kv_transfer_params={"lmcache.skip_save": True})
    assert heard.words[1:] == [("r1", False), ("r2", False), ("r3", False)]
    e.close()


def test_a_store_that_hangs_has_failed(heard: Heard) -> None:
    with copying(slow(2.0, "store")):
        e = Engine(Setup(caching=False, extra={"lmcache.store_timeout_secs": 0.2}))
        e.run(e.add(prompt(1, 300)))
        e.drain()
    assert heard.words == [("r1", False)]
