"""Promises that are made while a tier still brings the last chunks, under vLLM's real Scheduler. The harness checks
every page before it is read."""

from __future__ import annotations

import dataclasses
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

from lmcache_ext.integration.vllm import fetching
from lmcache_ext.integration.vllm.fetching import Fetcher
from lmcache_ext.keys import Chain
from tests.integration.harness import Engine, prompt
from tests.integration.runner import scenarios_of
from tests.integration.scenarios import Failing, engine, slow
from tests.integration.tier_scenarios import arrived, forget_memory, on_disk

ONE_BY_ONE = "fault+file://{}/?fault.delay=1&fault.delay_s=0.02&threads=1"


@contextmanager
def slow_copies() -> Iterator[None]:
    """Copies into the engine's blocks count as slow, so a promise is made as soon as one chunk is there."""

    def worth(self: Fetcher, request_id: str, match: Any) -> Any:
        return self._below.soon(request_id)[0] if match.ready > match.local else ()

    with mock.patch.object(Fetcher, "_worth", worth):
        yield


def stored(copy: Any = None, **setup: Any) -> tuple[Engine, list[int], list[int]]:
    """An engine, a prompt that only its disk has, and the answer to it."""
    e = engine(on_disk(**{"url": ONE_BY_ONE, **setup}), **({"copy": copy} if copy else {}))
    p = prompt(1, 300)
    cold, _ = e.ask(p)
    forget_memory(e)
    return e, p, cold


def ahead_of(e: Engine) -> Any:
    """The only promise that is not kept yet; None: there is none."""
    assert len(e.side._fetcher._open) <= 1
    return next(iter(e.side._fetcher._open.values()), None)


def begin(e: Engine, p: list[int], **options: Any) -> str:
    """Ask for `p`, and step until it was promised ahead."""
    request_id = e.add(p, **options)
    deadline = time.monotonic() + 10
    while ahead_of(e) is None:
        assert time.monotonic() < deadline and not e.outputs[request_id], "nothing was promised ahead"
        e.step()
    return request_id


def scenario_blocks_are_filled_while_a_tier_still_brings() -> None:
    for setup in ({}, {"ranks": 2}, {"multi": True}, {"mla": True, "ranks": 2}):
        e, p, cold = stored(**setup)
        with slow_copies():
            request_id = begin(e, p, kv_transfer_params={"lmcache.report_hits": True})
            each = ahead_of(e)
            assert each.start < each.end == 288 and e.side.flights.loading
            e.run(request_id)
        assert (e.outputs[request_id], e.cached[request_id], e.total("num_hit_tokens")) == (cold, 288, 288)
        assert e.told[request_id] == {"lmcache.report_hits": {"gpu_cache": 0, "host_memory": 288}}
        assert e.total("num_retrieve_requests") == 1 and not e.total("num_failed_tokens")
        e.close()


def scenario_a_promise_is_made_once_the_rest_takes_no_longer_than_two_copies() -> None:
    e = engine(on_disk(url=ONE_BY_ONE))
    p = prompt(1, 300)
    cold, _ = e.ask(p)
    for seconds, least, early in ((1.0, 1.0, True), (1e-9, 0.0, False), (1.0, 1e9, False), (0.0, 0.0, False)):
        forget_memory(e)
        e.side._loader.token_seconds = seconds
        with mock.patch.object(fetching, "_LEAST_SECONDS", least):
            request_id, seen = e.add(p), False
            while not e.outputs[request_id]:
                e.step()
                seen |= ahead_of(e) is not None
        assert (seen, e.outputs[request_id]) == (early, cold)
        e.drain()
    e.close()


def scenario_a_chunk_that_leaves_memory_meanwhile_is_not_jumped_over() -> None:
    e, p, cold = stored(blocks=128)
    assert e.ask(p) == (cold, 288)
    keys = Chain(e.side._root, 64).extend(p, 288)
    tail = [chunk.key for chunk in e.side.directory.chunks() if chunk.tokens == 32]
    assert len(keys) == 4 and len(tail) == 1
    for key in (*keys[2:], *tail):
        e.side.directory.drop(key)
    with slow_copies():
        request_id = e.add(p)
        while not e.side.lower.knows(request_id):
            e.step()
        e.side.directory.drop(keys[1])  # what the tier brings follows this one
        e.run(request_id)
    assert e.outputs[request_id] == cold
    e.close()


def scenario_what_a_tier_does_not_bring_after_all_is_computed() -> None:
    for wrong in ("error", "flip", "short"):
        e, p, cold = stored(url=ONE_BY_ONE + "&faults=1000", blocks=128)
        with slow_copies():
            request_id = begin(e, p, kv_transfer_params={"lmcache.report_hits": True})
            had = ahead_of(e).start
            faulty = e.side.lower.levels[0].tier.medium
            faulty.faults = dataclasses.replace(faulty.faults, **{wrong: 1.0})
            e.run(request_id)
            hits = e.told[request_id]["lmcache.report_hits"]["host_memory"]
            assert e.outputs[request_id] == cold and had <= hits < 288 and e.total("num_failed_tokens") > 0
        faulty.heal()
        e.drain()
        again, cached = e.ask(p)  # a chunk that was still coming when it was computed may have been lost
        assert again == cold and cached >= had and e.ask(p) == (cold, 288)
        e.close()


def scenario_a_tier_that_stalls_behind_a_promise_costs_its_deadline() -> None:
    e, p, cold = stored(url=ONE_BY_ONE + "&load_timeout=0.3")
    with slow_copies():
        request_id = begin(e, p)
        faulty = e.side.lower.levels[0].tier.medium
        faulty.faults = dataclasses.replace(faulty.faults, hang=1.0)
        began = time.monotonic()
        e.run(request_id)
        assert e.outputs[request_id] == cold and time.monotonic() - began < 3
    faulty.heal()
    e.drain()
    e.close()


def scenario_an_abort_at_any_step_of_a_promise_leaves_nothing() -> None:
    for ranks in (1, 2):
        e = engine(on_disk(url=ONE_BY_ONE, ranks=ranks), copy=slow(0.01, only="load"))
        p = prompt(1, 300)
        cold, _ = e.ask(p)
        with slow_copies():
            for steps in (0, 1, 2, 3, 5, 8, 13, 21, 34, 55):
                forget_memory(e)
                request_id = begin(e, p)
                for _ in range(steps):
                    e.step()
                e.abort(request_id)
                e.drain()
                assert ahead_of(e) is None
            forget_memory(e)
            assert e.ask(p) == (cold, 288)
        assert not e.total("num_failed_tokens")  # nobody needed them
        e.close()


def scenario_a_copy_that_fails_within_a_promise_is_computed() -> None:
    copy = Failing()
    for late in (False, True):
        copy.on = False
        e, p, cold = stored(copy)
        loads = mock.patch.object(e.side._loader, "plan", wraps=e.side._loader.plan)
        with slow_copies(), loads as plan:
            copy.on = not late
            request_id = begin(e, p, kv_transfer_params={"lmcache.report_hits": True})
            brought = ahead_of(e).start if late else 0
            while late and e.side.flights.loads():
                e.step()
            copy.on = True
            e.run(request_id)
            copy.on = False
        assert e.outputs[request_id] == cold and e.total("num_failed_tokens") > 0
        assert plan.call_count == 1 + late  # nothing is loaded behind what failed
        assert e.told[request_id]["lmcache.report_hits"]["host_memory"] == brought
        e.drain()
        assert e.ask(p)[0] == cold
        e.close()


def scenario_a_reset_within_a_promise() -> None:
    e, p, cold = stored()
    with slow_copies():
        request_id = begin(e, p)
        assert e.side.reset()
        e.run(request_id)
    assert e.outputs[request_id] == cold
    assert e.ask(p) == (cold, 0)
    e.close()


def scenario_others_wait_for_a_promise_under_way() -> None:
    e, p, cold = stored(caching=True, blocks=128)
    e.forget_gpu()
    with slow_copies():
        first = begin(e, p)
        others = [e.add(p) for _ in range(3)]
        e.run(first, *others)
    assert all(e.outputs[request_id] == cold for request_id in (first, *others))
    assert e.total("num_retrieve_requests") == 1
    e.close()


def scenario_a_fault_while_the_rest_is_planned_is_computed() -> None:
    e, p, cold = stored()
    with slow_copies():
        request_id = begin(e, p)
        with mock.patch.object(e.side.lower, "fetch", side_effect=RuntimeError("injected")):
            e.run(request_id)
    assert e.outputs[request_id] == cold
    arrived(e)
    e.close()


def scenario_random_traffic_with_promises_ahead_is_never_wrong() -> None:
    url = "fault+file://{}/?fault.seed=5&fault.delay=0.5&fault.delay_s=0.004&fault.error=0.05&fault.flip=0.05"
    e = engine(on_disk(url=url + "&threads=2&faults=1000000", slots=24, blocks=96), copy=slow(0.001, only="load"))
    rng = random.Random(2)
    prompts = [prompt(seed, rng.randint(100, 500)) for seed in range(6)]
    answers: dict[int, Any] = {}
    with slow_copies():
        for _ in range(60):
            chosen = [rng.randrange(len(prompts)) for _ in range(rng.randint(1, 3))]
            ids = [e.add(prompts[i]) for i in chosen]
            for request_id in ids:
                for _ in range(rng.randint(0, 12)):
                    e.step()
                if rng.random() < 0.2:
                    e.abort(request_id)
            e.drain()
            for i, request_id in zip(chosen, ids, strict=True):
                if answer := e.outputs[request_id]:
                    assert answers.setdefault(i, answer) == answer
            if rng.random() < 0.5:
                forget_memory(e)
    assert e.total("disk_hit_tokens") > 0 and e.total("num_failed_tokens") > 0
    e.close()


ALL = scenarios_of(globals())
