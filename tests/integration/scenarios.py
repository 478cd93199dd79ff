"""What can happen to a request, as scenarios over the harness. Each one ends in `Engine.close`: every invariant holds.

`python -m tests.integration` runs them on whatever vLLM comes first on PYTHONPATH, a line each.
"""

from __future__ import annotations

import itertools
import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import numpy as np

from lmcache_ext.integration.vllm import impl as impl_module
from lmcache_ext.integration.vllm import worker as worker_module
from lmcache_ext.integration.vllm.requests import MAX_STORE_FAILURES
from lmcache_ext.transfer import cpu
from tests.integration.harness import BLOCK, Engine, Setup, prompt
from tests.integration.runner import scenarios_of

_COPY = cpu.compile_copy()


@contextmanager
def copying(copy: Callable[..., None] = _COPY, load_timeout: float = 5.0) -> Iterator[None]:
    """Engines made inside copy with `copy`."""

    def opened(pages: Any, pool: Any, timeout: float) -> cpu.CpuTransfer:
        return cpu.CpuTransfer(pages, pool, load_timeout, copy)

    with mock.patch.object(worker_module, "open_transfer", opened):
        yield


def engine(setup: Setup | None = None, copy: Callable[..., None] = _COPY) -> Engine:
    with copying(copy):
        return Engine(setup or Setup())


def slow(seconds: float, only: str = "") -> Callable[..., None]:
    """A copy that takes its time; `only`: "store" or "load", by the name of the thread that runs it."""

    def copy(target: Any, source: Any, size: Any) -> None:
        if only in threading.current_thread().name:
            time.sleep(seconds)
        _COPY(target, source, size)

    return copy


class Failing:
    """A copy whose loads fail while `on`; the bytes at their targets are then anything."""

    def __init__(self) -> None:
        self.on = True

    def __call__(self, target: Any, source: Any, size: Any) -> None:
        if self.on and "load" in threading.current_thread().name:
            raise OSError("injected")
        _COPY(target, source, size)


# -- hits -----------------------------------------------------------------------------------------------


ASK_HITS = {"lmcache.report_hits": True}


def hits(gpu: int, host: int) -> dict[str, Any]:
    """What an answer says of its hits."""
    return {"lmcache.report_hits": {"gpu_cache": gpu, "host_memory": host}}


class Router:
    """What a router believes to be in host memory and on disk: it does not count, so the last word on a block holds."""

    def __init__(self, e: Engine) -> None:
        self.blocks: set[Any] = set()
        self.disk: set[Any] = set()
        self._engine, self._take = e, e.side.events
        e.connector._impl.take_events = self._hear  # type: ignore[method-assign]

    def _hear(self) -> list[Any]:
        from vllm.distributed.kv_events import BlockStored

        events = self._take()
        for event in events:
            blocks = {"CPU": self.blocks, "DISK": self.disk}[event.medium]
            change = blocks.update if isinstance(event, BlockStored) else blocks.difference_update
            change(event.block_hashes)
        return list(events)

    def resident(self) -> set[Any]:
        """The truth."""
        from vllm.v1.core.kv_cache_utils import maybe_convert_block_hash

        chunks = self._engine.side.directory.chunks()
        return {maybe_convert_block_hash(block) for chunk in chunks for block in chunk.note.block_hashes}


def scenario_second_request_hits_exactly_its_prefix() -> None:
    for caching in (True, False):
        e = engine(Setup(caching=caching))
        p = prompt(1, 300)
        cold, cached = e.ask(p)
        assert cached == 0
        assert e.total("num_stored_tokens") == 288  # 4 chunks of 64 and a tail of one block
        if caching:
            e.forget_gpu()
        warm, cached = e.ask(p)
        assert (warm, cached, e.total("num_hit_tokens")) == (cold, 288, 288)
        e.close()


def scenario_full_chunks_alone_without_partial_ones() -> None:
    e = engine(Setup(caching=False, extra={"lmcache.save_unfull_chunk": False}))
    p = prompt(1, 300)
    e.ask(p)
    assert e.ask(p)[1] == 256 == e.total("num_hit_tokens")
    e.close()


def scenario_discard_partial_chunks() -> None:
    e = engine(Setup(caching=False, extra={"discard_partial_chunks": True, "lmcache_rpc_port": "producer1"}))
    p = prompt(1, 300)
    e.ask(p)
    assert e.ask(p)[1] == 256
    e.close()


def scenario_shared_prefix_hits_its_full_chunks() -> None:
    e = engine(Setup(caching=False))
    p = prompt(1, 210)
    e.ask(p + prompt(2, 90))
    assert e.ask(p + prompt(3, 90))[1] == 192 == e.total("num_hit_tokens")
    e.close()


def scenario_prompt_of_whole_chunks_keeps_a_token_to_compute() -> None:
    e = engine(Setup(caching=False))
    p = prompt(1, 256)
    e.ask(p)
    assert e.ask(p)[1] == 256 - BLOCK
    e.close()


def scenario_local_hits_of_any_alignment() -> None:
    e = engine(Setup(chunk=128, blocks=40))
    p = prompt(1, 500)
    e.ask(p)
    for keep in range(16):
        e.forget_gpu()
        e.ask(p[: keep * BLOCK + 5])  # vLLM now holds `keep` blocks of it
        _, cached = e.ask(p)
        assert cached == 480, (keep, cached)
    e.close()


def scenario_hits_are_told_by_tier_if_asked() -> None:
    for multi in (False, True):
        e = engine(Setup(multi=multi))

        def told(tokens: list[int], params: dict[str, Any] | None = ASK_HITS, e: Engine = e) -> Any:
            request_id = e.add(tokens, max_tokens=3, kv_transfer_params=params)
            e.run(request_id)
            e.drain()
            return e.told[request_id]

        p = prompt(1, 300)
        assert told(p) == hits(0, 0)
        e.forget_gpu()
        assert told(p[:97]) == hits(0, 64)
        assert told(p) == hits(96, 192)
        assert told(p) == hits(288, 0)
        assert told(p, None) is None
        e.close()


def scenario_chunked_prefill_stores_once_each() -> None:
    e = engine(Setup(budget=64, caching=False))
    p = prompt(1, 500)
    cold, _ = e.ask(p)
    assert e.total("num_stored_tokens") == 480
    assert e.ask(p) == (cold, 480)
    assert e.total("num_stored_tokens") == 480
    e.close()


def scenario_fuller_chunk_replaces_the_partial_one() -> None:
    e = engine(Setup(caching=False, chunk=128))
    p = prompt(1, 160)
    e.ask(p)
    e.ask(p)
    assert e.total("local_cpu_hot_cache_count") == 2  # 128 + a tail of 32
    e.ask(p + prompt(2, 100))
    assert e.total("local_cpu_hot_cache_count") == 2  # 256 in full: the tail is gone
    assert e.ask(p + prompt(2, 100))[1] == 256
    e.close()


# -- decode ---------------------------------------------------------------------------------------------


def scenario_decode_cache_serves_the_second_turn() -> None:
    e = engine(Setup(caching=False, extra={"lmcache.save_decode_cache": True}))
    p = prompt(1, 100)
    answer, _ = e.ask(p, max_tokens=100)
    turn = p + answer + prompt(2, 20)
    assert e.ask(turn)[1] == 192  # 199 tokens have KV: 3 chunks of 64
    e.close()
    e = engine(Setup(caching=False))
    answer, _ = e.ask(p, max_tokens=100)
    assert e.ask(p + answer + prompt(2, 20))[1] == 96  # the prompt alone
    e.close()


def scenario_many_at_once() -> None:
    e = engine(Setup(blocks=120, budget=512))
    prompts = [prompt(i, 150 + 37 * i) for i in range(8)]
    cold = [e.add(p, max_tokens=20) for p in prompts]
    e.run()
    e.forget_gpu()
    warm = [e.add(p, max_tokens=20) for p in prompts]
    e.run()
    for p, a, b in zip(prompts, cold, warm, strict=True):
        assert e.outputs[a] == e.outputs[b]
        assert e.cached[b] == (len(p) - 1) // BLOCK * BLOCK
    e.close()


def scenario_requests_for_one_prefix_share_its_load() -> None:
    e = engine(Setup(blocks=100), slow(0.02, "load"))
    p = prompt(1, 300)
    expected = [e.ask(p + prompt(i, 9), max_tokens=5)[0] for i in (2, 3, 4)]
    e.forget_gpu()
    e.add(prompt(5, 40), max_tokens=400)  # the engine is busy: loads do not hold up a step
    e.step()
    loads, tokens = e.total("num_retrieve_requests"), e.total("num_requested_tokens")
    together = [e.add(p + prompt(i, 9), max_tokens=5) for i in (2, 3, 4)]
    e.run(*together)
    assert [e.outputs[r] for r in together] == expected
    assert [e.cached[r] for r in together] == [288] * 3
    assert (e.total("num_retrieve_requests") - loads, e.total("num_requested_tokens") - tokens) == (1, 288)
    e.abort("r4")
    e.close()


def scenario_a_shared_load_that_fails_or_is_aborted_leaves_nobody_waiting() -> None:
    for fails in (True, False):
        failing = Failing()
        failing.on = False
        e = engine(Setup(blocks=100), failing)
        p = prompt(1, 300)
        expected, _ = e.ask(p, max_tokens=5)
        e.forget_gpu()
        other = e.add(prompt(5, 40), max_tokens=400)
        e.step()
        failing.on = fails
        first, second = e.add(p, max_tokens=5), e.add(p, max_tokens=5)
        e.step()
        if not fails:
            e.abort(first)
        e.run(second, seconds=10)
        assert e.outputs[second] == expected
        failing.on = False
        e.abort(other)
        e.close()


def scenario_without_prefix_caching_each_loads_for_itself() -> None:
    e = engine(Setup(blocks=100, caching=False), slow(0.01, "load"))
    p = prompt(1, 300)
    expected, _ = e.ask(p)
    e.add(prompt(5, 40), max_tokens=100)
    e.step()
    loads = e.total("num_retrieve_requests")
    both = [e.add(p), e.add(p)]
    e.run()
    assert [e.outputs[r] for r in both] == [expected] * 2
    assert e.total("num_retrieve_requests") - loads == 2
    e.close()


def scenario_only_a_short_load_on_an_idle_engine_is_part_of_its_step() -> None:
    for most, status in ((288, "RUNNING"), (287, "WAITING_FOR_REMOTE_KVS")):
        e = engine(Setup(caching=False))
        p = prompt(1, 300)
        expected, _ = e.ask(p, max_tokens=3)
        e.side._most_at_once = most
        request_id = e.add(p, max_tokens=3)
        e.step()
        assert e.scheduler.requests[request_id].status.name == status
        e.run(request_id)
        assert (e.outputs[request_id], e.cached[request_id]) == (expected, 288)
        e.close()


def scenario_stores_as_far_as_the_pool_has_grown() -> None:
    e = engine(Setup(ranks=2, caching=False))
    pools = [rank.connector._impl._worker._pool for rank in e.ranks]
    pools[0].grown, pools[1].grown = 64, 2  # chunks; the least counts
    p = prompt(1, 300)
    cold, _ = e.ask(p)
    assert (e.total("num_stored_tokens"), e.total("local_cpu_capacity_count")) == (128, 2)
    assert e.ask(p) == (cold, 128)
    pools[1].grown = 64
    e.ask(p)
    assert e.total("local_cpu_capacity_count") == 64
    assert e.ask(p) == (cold, 288)
    e.close()


def scenario_a_pool_that_cannot_be_opened_is_no_cache() -> None:
    with mock.patch.object(impl_module, "Growth", side_effect=OSError("gone")):
        e = engine(Setup(caching=False))
    p = prompt(1, 300)
    assert e.ask(p)[1] == e.ask(p)[1] == 0
    assert e.total("num_stored_tokens") == 0
    e.close()


# -- who may share --------------------------------------------------------------------------------------


def scenario_salts_share_nothing() -> None:
    e = engine(Setup(caching=False))
    p = prompt(1, 300)
    e.ask(p, cache_salt="a")
    assert e.ask(p, cache_salt="b")[1] == 0
    assert e.ask(p)[1] == 0
    assert e.ask(p, cache_salt="a")[1] == 288
    e.close()


def scenario_lora_adapters_share_nothing() -> None:
    from vllm.lora.request import LoRARequest

    def lora(name: str, number: int) -> LoRARequest:
        return LoRARequest(lora_name=name, lora_int_id=number, lora_path=f"/nowhere/{name}")

    e = engine(Setup(caching=False))
    p = prompt(1, 300)
    e.ask(p, lora_request=lora("x", 1))
    assert e.ask(p, lora_request=lora("y", 2))[1] == 0
    assert e.ask(p)[1] == 0
    assert e.ask(p, lora_request=lora("x", 1))[1] == 288
    e.close()


def scenario_images_are_part_of_the_key() -> None:
    from vllm.multimodal.inputs import MultiModalFeatureSpec, PlaceholderRange

    def image(name: str) -> list[Any]:
        where = PlaceholderRange(offset=70, length=40)
        return [MultiModalFeatureSpec(data=None, modality="image", identifier=name, mm_position=where)]

    e = engine(Setup(caching=False))
    chain = e.side._tracker
    p = prompt(1, 300)
    from tests.integration.harness import Request, SamplingParams, _accepted

    def keys(features: list[Any]) -> list[bytes]:
        request = Request(
            **_accepted(
                Request, request_id=str(random.random()), prompt_token_ids=p, sampling_params=SamplingParams(),
                pooling_params=None, eos_token_id=2, mm_features=features,
            )
        )  # fmt: skip
        return list(chain(request).chain.extend(p, 300))

    plain, cat, dog = keys([]), keys(image("cat")), keys(image("dog"))
    assert plain[0] == cat[0] == dog[0]  # tokens 0 to 63 lie before the image
    assert len({plain[1], cat[1], dog[1]}) == len({plain[3], cat[3], dog[3]}) == 3
    assert keys(image("cat")) == cat
    e.side._trackers.clear()
    e.close()


def scenario_tags_and_skip_save() -> None:
    e = engine(Setup(caching=False))
    p = prompt(1, 300)
    e.ask(p, kv_transfer_params={"lmcache.skip_save": True})
    assert e.ask(p, kv_transfer_params={"lmcache.tag.user": "u"})[1] == 0
    assert e.ask(p)[1] == 0
    assert e.ask(p, kv_transfer_params={"lmcache.tag.user": "u"})[1] == 288
    e.close()


# -- limits ---------------------------------------------------------------------------------------------


def scenario_short_hits_are_not_loaded() -> None:
    e = engine(Setup(caching=False, extra={"lmcache.min_retrieve_tokens": 200}))
    p = prompt(1, 300)
    e.ask(p[:150])
    assert e.ask(p)[1] == 0
    assert e.ask(p)[1] == 288
    e.close()


def scenario_load_limit_and_skipped_last_tokens() -> None:
    e = engine(Setup(caching=False, extra={"lmcache.max_tokens_per_load": 100}))
    p = prompt(1, 300)
    e.ask(p)
    assert e.ask(p)[1] == 96
    e.close()
    e = engine(Setup(caching=False, extra={"skip_last_n_tokens": 100}))
    e.ask(p)
    assert e.ask(p)[1] == 192
    e.close()


def scenario_local_cpu_off_finds_nothing() -> None:
    e = engine(Setup(caching=False, extra={"lmcache.local_cpu": False}))
    p = prompt(1, 300)
    e.ask(p)
    assert e.ask(p)[1] == 0 == e.total("num_stored_tokens")
    e.close()


def scenario_consumer_does_not_store() -> None:
    e = engine(Setup(caching=False, role="kv_consumer"))
    e.ask(prompt(1, 300))
    assert e.total("num_store_requests") == 0
    e.close()


def scenario_remote_prefill_is_left_to_the_sibling() -> None:
    e = engine(Setup(caching=False))
    p = prompt(1, 300)
    e.ask(p)
    request_id = e.add(p, kv_transfer_params={"do_remote_prefill": True})
    e.run(request_id)
    assert e.cached[request_id] == 0
    e.close()


def scenario_small_pool_evicts_and_stays_right() -> None:
    e = engine(Setup(caching=False, slots=6))
    rng = random.Random(3)
    for _ in range(60):
        e.ask(prompt(rng.randrange(6), rng.choice((100, 200, 300))))
    assert e.total("local_cpu_evict_keys_count") > 20
    assert e.total("num_hit_tokens") > 0
    e.close()


def scenario_one_request_larger_than_the_pool() -> None:
    e = engine(Setup(caching=False, slots=3, blocks=80))
    p = prompt(1, 900)
    for _ in range(3):
        e.ask(p, max_tokens=3)
    e.close()


# -- what goes wrong ------------------------------------------------------------------------------------


def scenario_preemption() -> None:
    for caching in (True, False):
        for copy in (_COPY, slow(0.02)):
            e = engine(Setup(blocks=24, caching=caching, extra={"lmcache.save_decode_cache": True}), copy)
            prompts = [prompt(i, 150) for i in range(4)]
            ids = [e.add(p, max_tokens=120) for p in prompts]
            e.run()
            e.drain()
            assert e.preemptions, "nothing was preempted: the scenario shows nothing"
            alone = engine(Setup(blocks=64))
            for p, request_id in zip(prompts, ids, strict=True):
                assert alone.ask(p, max_tokens=120)[0] == e.outputs[request_id]
            alone.close()
            e.close()


def scenario_abort_at_every_step() -> None:
    for at in range(10):
        e = engine(Setup(caching=False, budget=64), slow(0.003))
        p = prompt(1, 300)
        if at % 2:
            e.ask(p)
        neighbour = e.add(prompt(2, 200), max_tokens=5)
        victim = e.add(p, max_tokens=5)
        for _ in range(at):
            e.step()
        e.abort(victim)
        e.run(neighbour)
        e.drain()
        out = e.outputs[neighbour]
        assert e.ask(prompt(2, 200), max_tokens=5)[0] == out
        e.ask(p)
        e.close()


def scenario_failed_loads_are_computed() -> None:
    for caching in (True, False):
        for busy in (False, True):
            failing = Failing()
            e = engine(Setup(caching=caching, blocks=100), failing)
            p = prompt(1, 300)
            cold, _ = e.ask(p, max_tokens=5)
            if caching:
                e.forget_gpu()
            if busy:
                e.add(prompt(2, 40), max_tokens=30)
                e.step()
            began = e.steps
            request_id = e.add(p, max_tokens=5, kv_transfer_params=ASK_HITS)
            e.run(request_id)
            assert e.outputs[request_id] == cold
            assert e.steps - began < 60, "asked for ever"
            assert e.told[request_id] == hits(0, 0)
            assert e.total("num_failed_tokens") == 288
            failing.on = False
            e.drain()
            if caching:
                e.forget_gpu()
            assert e.ask(p, max_tokens=5) == (cold, 288)  # stored again
            e.close()


def scenario_a_failed_load_of_a_request_that_goes_is_found_by_nobody() -> None:
    for shared in (False, True):
        failing = Failing()
        failing.on = False
        e = engine(Setup(blocks=100, budget=700), failing)
        p = prompt(1, 300)
        cold, _ = e.ask(p, max_tokens=5)
        e.forget_gpu()
        failing.on = True
        first = e.add(p, max_tokens=5)
        others = [e.add([*p, 5, 6], max_tokens=5)] if shared else []  # in the same step, on the same blocks
        began = e.steps
        while not e.total("num_failed_tokens"):
            assert e.steps - began < 200, "no load was part of a step"
            e.step()
        failing.on = False
        e.abort(first)  # before it has computed them again
        others.append(e.add(p, max_tokens=5))
        e.run()
        assert e.outputs[others[-1]] == cold
        e.close()


def scenario_failed_load_in_the_middle() -> None:
    failing = Failing()
    e = engine(Setup(caching=False), failing)
    p = prompt(1, 300)
    cold, _ = e.ask(p)
    worker = e.ranks[0].connector._impl._worker

    taken = worker._take

    def take(result: Any) -> None:
        targets = worker._blocks.get(result.id)
        taken(result)
        if targets and not result.ok:
            worker._invalid -= set(targets[:4])  # the first two chunks did arrive

    def copy_some(target: Any, source: Any, size: Any) -> None:
        _COPY(target, source, size)
        if failing.on and len(size) == 18:
            raise OSError("injected after the copy")

    worker._transfer._copy = copy_some
    with mock.patch.object(worker, "_take", take):
        request_id = e.add(p, kv_transfer_params=ASK_HITS)
        e.run(request_id)
    assert e.outputs[request_id] == cold
    assert e.told[request_id] == hits(0, 128)
    failing.on = False
    e.drain()
    assert e.ask(p) == (cold, 288)
    e.close()


def scenario_vanished_promise_is_computed() -> None:
    e = engine(Setup(caching=False))
    p = prompt(1, 300)
    cold, _ = e.ask(p)
    with mock.patch.object(e.side.directory, "lease", lambda keys: None):
        request_id = e.add(p, kv_transfer_params=ASK_HITS)
        e.run(request_id)
    assert e.outputs[request_id] == cold
    assert e.told[request_id] == hits(0, 0)
    e.drain()
    assert e.ask(p)[0] == cold
    e.close()


def scenario_faults_in_hooks_become_misses() -> None:
    def fault(*args: Any) -> Any:
        raise RuntimeError("injected")

    for where in ("match", "allocated", "update", "finished", "events", "busy"):
        e = engine(Setup(caching=False))
        p = prompt(1, 300)
        cold, _ = e.ask(p)

        with mock.patch.object(e.side, where, fault):
            request_id = e.add(p)
            e.run(request_id)
            e.connector.has_pending_push_work()
        assert e.outputs[request_id] == cold, where
        assert e.total("num_faults") > 0, where
        assert not e.wrong, (where, e.wrong)
    for where in ("plan_step", "_reserve"):
        e = engine(Setup(caching=False))
        with mock.patch.object(e.side._storer, where, fault):
            e.ask(prompt(1, 300))
        assert e.ask(prompt(1, 300))[1] == 0
        assert e.ask(prompt(1, 300))[1] == 288
        e.close()


def scenario_a_fault_within_a_store_of_several_chunks() -> None:
    e = engine(Setup(blocks=24, caching=False))
    storer, p = e.side._storer, prompt(1, 257)
    note, calls = storer._note, itertools.count()

    def faulty(*of: Any) -> Any:
        if next(calls) == 2:
            raise MemoryError("the third chunk")
        return note(*of)

    with mock.patch.object(storer, "plan_step"), mock.patch.object(storer, "_note", faulty):
        request_id = e.add(p)
        e.run(request_id)
    e.drain()
    assert e.total("num_faults") == 1 and e.side.directory.leases == 0
    for i in range(2, 5):  # others use its blocks
        e.ask(prompt(i, 257))
    assert e.ask(p) == (e.outputs[request_id], 0)
    e.close()


def scenario_slow_stores_do_not_starve_the_engine() -> None:
    e = engine(Setup(blocks=24, caching=False), slow(0.3, "store"))
    began = time.monotonic()
    ids = [e.add(prompt(i, 300), max_tokens=30) for i in range(4)]
    e.run(*ids)
    assert time.monotonic() - began < 60
    assert e.total("num_skipped_store_tokens") > 0 or e.total("num_stored_tokens") > 0
    e.close()


def scenario_short_requests_are_stored_whole_while_blocks_are_free() -> None:
    e = engine(Setup(blocks=400), slow(0.05, "store"))
    for i in range(12):  # 9 blocks each, gone long before their store is: 5 % of all blocks are 20
        e.run(e.add(prompt(i, 300)))
    assert e.total("pinned_gpu_blocks") > 20
    e.drain()
    assert (e.total("num_skipped_store_tokens"), e.total("num_stored_tokens")) == (0, 12 * 288)
    e.close()


def scenario_hung_store_gives_its_blocks_back() -> None:
    e = engine(Setup(caching=False, budget=512, extra={"lmcache.store_timeout_secs": 0.2}), slow(3.0, "store"))
    p = prompt(1, 300)
    request_id = e.add(p)
    e.run(request_id)
    began = time.monotonic()
    e.drain()
    assert time.monotonic() - began < 2.5
    assert e.side.pins.count == 0
    assert e.total("put_failed_count") == 1
    assert e.side.directory.leases > 0  # the copy may still write: its slots are nobody's
    time.sleep(3.0)
    e.ask(prompt(3, 10))  # a step, so that the report arrives
    assert e.total("local_cpu_hot_cache_count") == 0  # it came too late to be believed
    e.close()


def scenario_cancelled_load_deadline() -> None:
    with copying(slow(0.05), load_timeout=0.0):
        e = Engine(Setup(caching=False))
    p = prompt(1, 300)
    cold, _ = e.ask(p)
    time.sleep(0.01)
    assert e.ask(p)[0] == cold
    e.close()


def scenario_reset_forgets_everything() -> None:
    e = engine(Setup(caching=False), slow(0.05, "store"))
    p = prompt(1, 300)
    request_id = e.add(p, max_tokens=40)
    for _ in range(3):
        e.step()
    assert e.connector.reset_cache() is True  # its store is under way, and more would follow
    e.run(request_id)
    e.drain()
    assert e.total("local_cpu_hot_cache_count") == 0
    assert e.ask(p)[1] == 0
    assert e.ask(p)[1] == 288
    e.close()


def scenario_reset_through_the_scheduler() -> None:
    e = engine()
    p = prompt(1, 300)
    e.ask(p)
    assert e.scheduler.reset_prefix_cache(reset_connector=True)
    assert e.ask(p)[1] == 0
    e.close()


def scenario_a_reset_does_not_wait_for_stores() -> None:
    for running in (False, True):
        e = engine(Setup(blocks=64), slow(0.3, "store"))
        p = prompt(1, 300)
        request_id = e.add(p, max_tokens=60 if running else 1)
        for _ in range(2000):
            if e.side.pins.count and (not running or len(e.outputs[request_id]) >= 3):
                break
            e.step()
        if not running:
            e.run(request_id)
        assert e.side.pins.count
        assert e.scheduler.reset_prefix_cache(reset_running_requests=running, reset_connector=True)
        assert e.side.pins.count == 0 and e.scheduler.has_requests()  # the copy still reads: not idle
        e.drain()
        assert len(e.outputs[request_id]) == (60 if running else 1)
        assert e.ask(p)[1] == (288 if running else 0)  # what ran has been computed anew
        assert e.ask(p)[1] == 288
        e.close()


def scenario_a_reset_that_fails_switches_the_cache_off() -> None:
    e = engine(Setup(caching=False))
    p = prompt(1, 300)
    cold, _ = e.ask(p)
    with mock.patch.object(e.side.directory, "clear", side_effect=MemoryError):
        assert e.connector.reset_cache()
    assert e.ask(p) == (cold, 0) and e.ask(p) == (cold, 0)
    e.close()


def storing() -> tuple[Engine, str, list[tuple[str, bool]]]:
    """An engine, a request of it that goes on while its store is under way, and what will be told of its stores."""
    e = engine(Setup(blocks=64), slow(0.3, "store"))
    told: list[tuple[str, bool]] = []
    e.side._told._report = lambda request_id, ok: told.append((request_id, ok))
    request_id = e.add(prompt(1, 300), max_tokens=30)
    for _ in range(2000):
        if e.side.pins.count:
            break
        e.step()
    return e, request_id, told


def scenario_a_reset_that_is_refused_costs_no_store() -> None:
    e, request_id, told = storing()
    assert not e.scheduler.reset_prefix_cache()  # a request runs
    e.run(request_id)
    e.drain()
    assert told == [(request_id, True)] and e.total("num_stored_tokens") == 288
    e.close()


def scenario_what_gave_way_is_stored_again_or_said_to_have_failed() -> None:
    e, request_id, told = storing()
    with mock.patch.object(e.side.pins, "alone", return_value=True):
        e.side._give_way()
    e.run(request_id)
    e.drain()
    stored = e.total("num_stored_tokens") == 288
    assert told == [(request_id, stored)]
    e.close()


def scenario_blocks_that_the_next_step_computed_from_a_failed_load_are_spoilt_too() -> None:
    for goes_early in (False, True):
        failing = Failing()
        failing.on = False
        e = engine(Setup(blocks=128, budget=128), failing)
        p = prompt(1, 600)
        e.ask(p[:129])
        e.forget_gpu()
        failing.on = True
        first = e.add(p)
        steps = [e.scheduler.schedule(), e.scheduler.schedule()]  # two under way
        assert [output.num_scheduled_tokens[first] for output in steps] == [128, 128]
        if goes_early:
            e.abort(first)
        for output in steps:
            e.carry_out(output)
        e.wrong.clear()  # what vLLM computes on bytes that did not come is computed again
        if not goes_early:
            e.abort(first)
        failing.on = False
        e.drain()
        e.ask(p[:257])  # which has its beginning cached again
        e.ask(p)
        e.close()


def scenario_stores_that_preemption_cancels_are_no_failures() -> None:
    gate = threading.Event()

    def copy(target: Any, source: Any, size: Any) -> None:
        if "store" in threading.current_thread().name:
            gate.wait(timeout=30)
        _COPY(target, source, size)

    e = engine(Setup(blocks=90, max_len=2048, slots=64, caching=False, budget=128), copy)
    first, second = e.add(prompt(1, 1200), max_tokens=700), e.add(prompt(2, 1200), max_tokens=700)
    for _ in range(2000):
        if e.preemptions:
            break
        e.step()
    tracker = e.side._trackers[second]
    assert len([f for f in e.side.flights._open.values() if f.cancelled]) > MAX_STORE_FAILURES
    gate.set()
    e.abort(first)
    e.run(second, seconds=60)
    e.drain()
    assert tracker.may_store and e.ask(prompt(2, 1200))[1] == 1184
    e.close()


def scenario_a_step_without_tokens_says_nothing_of_how_fast_the_engine_computes() -> None:
    for ranks in (1, 2):
        e = engine(Setup(ranks=ranks, budget=512))
        pace = e.side._pace
        steps = [e.scheduler.schedule()]
        e.add(prompt(1, 400))
        deadline = time.monotonic() + 30
        while not steps[-1].total_num_scheduled_tokens:  # until the look-up is answered
            assert time.monotonic() < deadline
            time.sleep(0.001)
            steps.append(e.scheduler.schedule())  # vLLM schedules a step while the one before is under way
        assert len(steps) > 1 and steps[-1].total_num_scheduled_tokens == 400
        for step in steps:
            e.carry_out(step)
            assert bool(pace.rate) == (step is steps[-1])
        e.run()
        e.close()


# -- more than one --------------------------------------------------------------------------------------


def scenario_two_ranks_store_and_load_their_own_parts() -> None:
    e = engine(Setup(ranks=2, caching=False))
    p = prompt(1, 300)
    cold, _ = e.ask(p, max_tokens=5)
    assert e.ask(p, max_tokens=5) == (cold, 288)
    e.close()


def scenario_mla_is_stored_once_and_read_by_all() -> None:
    e = engine(Setup(ranks=2, mla=True, caching=False))
    p = prompt(1, 300)
    cold, _ = e.ask(p, max_tokens=5)
    first, second = (rank.connector._impl._worker for rank in e.ranks)
    assert first.writes and not second.writes
    assert np.array_equal(first._pool.bytes, second._pool.bytes) and first._pool.bytes.any()  # one segment, two maps
    assert e.ask(p, max_tokens=5) == (cold, 288)
    e.close()


def scenario_one_rank_fails_for_all() -> None:
    e = engine(Setup(ranks=2, caching=False))
    p = prompt(1, 300)

    def broken(target: Any, source: Any, size: Any) -> None:
        raise OSError("injected")

    second = e.ranks[1].connector._impl._worker._transfer
    with mock.patch.object(second, "_copy", broken):
        cold, _ = e.ask(p)
        assert e.total("num_stored_tokens") == 0
    assert e.ask(p) == (cold, 0)
    with mock.patch.object(second, "_copy", broken):
        request_id = e.add(p)
        e.run(request_id)
        assert e.outputs[request_id] == cold
    e.drain()
    e.ask(p)
    assert e.ask(p) == (cold, 288)
    e.close()


def scenario_beside_a_sibling_in_multi_connector() -> None:
    e = engine(Setup(multi=True, caching=False))
    p = prompt(1, 300)
    cold, _ = e.ask(p, max_tokens=5)
    assert e.ask(p, max_tokens=5) == (cold, 288)
    assert e.scheduler.recompute_kv_load_failures
    e.close()
    failing = Failing()
    e = engine(Setup(multi=True), failing)
    cold, _ = e.ask(p, max_tokens=5)
    e.forget_gpu()
    request_id = e.add(p, max_tokens=5)
    e.run(request_id)
    assert e.outputs[request_id] == cold
    e.close()


def scenario_events_follow_the_chunks() -> None:
    from vllm.distributed.kv_events import BlockRemoved, BlockStored

    e = engine(Setup(events=True, slots=5))
    said: list[Any] = []
    take = e.side.events
    e.connector._impl.take_events = lambda: said.extend(new := take()) or new  # type: ignore[method-assign]
    p = prompt(1, 300)
    e.ask(p)
    stored = [x for x in said if isinstance(x, BlockStored)]
    assert [len(x.block_hashes) for x in stored] == [2, 2, 2, 2, 1]
    assert {x.medium for x in stored} == {"CPU"} and {x.block_size for x in stored} == {BLOCK}
    assert [t for x in stored for t in x.token_ids] == p[:288]
    assert stored[0].parent_block_hash is None
    assert stored[1].parent_block_hash == stored[0].block_hashes[-1]
    e.ask(prompt(2, 200))
    removed = [x for x in said if isinstance(x, BlockRemoved)]
    assert removed and all(x.medium == "CPU" for x in removed)
    gone = {h for x in removed for h in x.block_hashes}
    assert gone <= {h for x in stored for h in x.block_hashes}
    said.clear()
    e.forget_gpu()  # vLLM says that all is cleared; what we hold is said again
    e.ask(prompt(3, 20))
    assert len([x for x in said if isinstance(x, BlockStored)]) == e.total("local_cpu_hot_cache_count")
    e.close()


def scenario_a_router_never_forgets_what_is_there() -> None:
    e = engine(Setup(events=True, chunk=128, caching=False))
    seen = Router(e)
    p, tagged = prompt(1, 160), {"lmcache.tag.user": "u"}
    e.ask(p)
    assert seen.blocks == seen.resident() and len(seen.blocks) == 5
    e.ask(p + prompt(2, 100))  # the tail gives way to a fuller chunk, which begins with the same block
    assert seen.blocks == seen.resident() and len(seen.blocks) == 8
    e.ask(p, kv_transfer_params=tagged)
    keys = [chunk.key for chunk in e.side.directory.chunks()]
    e.side.directory.drop(keys[0])  # its tokens are there under another key, too
    e.ask(prompt(3, 20))
    assert seen.blocks == seen.resident() and len(seen.blocks) == 8
    e.close()


def scenario_a_router_sees_evictions() -> None:
    e = engine(Setup(events=True, slots=5, caching=False))
    seen = Router(e)
    for seed in range(1, 8):
        e.ask(prompt(seed, 100 + 40 * seed))
        assert seen.blocks == seen.resident() and seen.blocks
    e.close()


def scenario_random_traffic() -> None:
    for seed in range(20):
        rng = random.Random(seed)
        setup = Setup(
            blocks=rng.choice((28, 60)), chunk=rng.choice((32, 64, 128)), slots=rng.choice((5, 20, 60)),
            caching=rng.random() < 0.5, budget=rng.choice((64, 200)), ranks=rng.choice((1, 2)),
            extra={"lmcache.save_decode_cache": rng.random() < 0.5},
        )  # fmt: skip
        failing = Failing()
        failing.on = False
        e = engine(setup, failing)
        live: list[str] = []
        for _ in range(250):
            roll = rng.random()
            if roll < 0.25 and len(live) < 12:
                p = prompt(rng.randrange(5), 400)[: rng.randrange(1, 400)]
                salt = rng.choice((None, "s"))
                live.append(e.add(p, max_tokens=rng.randrange(1, 40), cache_salt=salt))
            elif roll < 0.29 and live:
                e.abort(live.pop(rng.randrange(len(live))))
            elif roll < 0.31:
                failing.on = not failing.on
            elif roll < 0.315:
                e.connector.reset_cache()
            e.step()
            assert not e.wrong, e.wrong
            assert e.side.directory.check() == []
        failing.on = False
        e.run()
        e.close()


ALL = scenarios_of(globals())
