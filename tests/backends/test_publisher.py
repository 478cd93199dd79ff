"""KV events: the socket, refusals, and the endpoints of data-parallel ranks."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.config.kv_events import KVEventsConfig

from dynamo_lmcache.vllm.publisher import configure_events, rank_endpoint
from dynamo_lmcache.vllm.registration import dp_ranks
from dynamo_lmcache.vllm.settings import SettingError


def config(events: KVEventsConfig | None = None, *, publish: bool = True) -> Any:
    return SimpleNamespace(engine_args=SimpleNamespace(kv_events_config=events), publish_kv_events=publish)


def test_events_go_through_a_socket_file() -> None:
    worker = config()
    socket = configure_events(worker)
    assert socket is not None
    events = worker.engine_args.kv_events_config
    assert events.enable_kv_cache_events and events.publisher == "zmq"
    assert events.endpoint == socket.endpoint and events.endpoint.startswith("ipc:///")
    folder = Path(socket.endpoint.removeprefix("ipc://")).parent
    assert folder.is_dir()
    socket.close()
    assert not folder.exists()


def test_every_rank_has_a_socket_of_its_own() -> None:
    socket = configure_events(config())
    assert socket is not None
    assert len({rank_endpoint(socket.endpoint, rank) for rank in range(3)}) == 3
    socket.close()


def test_events_can_be_turned_off() -> None:
    worker = config(publish=False)
    assert configure_events(worker) is None and worker.engine_args.kv_events_config is None


@pytest.mark.parametrize("endpoint", ["tcp://127.0.0.1:5557", "tcp://localhost:5557"])
def test_an_endpoint_that_loses_every_event_is_refused(endpoint: str) -> None:
    with pytest.raises(SettingError, match="loses every event"):
        configure_events(config(KVEventsConfig(enable_kv_cache_events=True, publisher="zmq", endpoint=endpoint)))


@pytest.mark.parametrize("endpoint", ["tcp://*:5557", "ipc:///tmp/x"])
def test_the_users_events_are_left_alone(endpoint: str) -> None:
    events = KVEventsConfig(enable_kv_cache_events=True, publisher="zmq", endpoint=endpoint)
    worker = config(events)
    assert configure_events(worker) is None and worker.engine_args.kv_events_config is events


@pytest.mark.parametrize(
    ("external", "hybrid", "expected"),
    [(False, False, range(1, 5)), (True, False, range(1, 2)), (False, True, range(1, 3))],
)
def test_ranks(external: bool, hybrid: bool, expected: range) -> None:
    parallel = SimpleNamespace(
        data_parallel_rank=1,
        data_parallel_size=4,
        data_parallel_size_local=2,
        data_parallel_external_lb=external,
        data_parallel_hybrid_lb=hybrid,
    )
    worker: Any = SimpleNamespace(parallel_config=parallel)
    assert dp_ranks(worker) == expected
