"""The chain of tiers under vLLM's real Scheduler. The harness checks every page before it is read, so what a tier
brings is proved by each of these."""

from __future__ import annotations

import random
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest import mock

from lmcache_ext.integration.vllm import fetching
from lmcache_ext.integration.vllm import impl as impl_module
from tests.integration.harness import Engine, Setup, prompt
from tests.integration.runner import scenarios_of
from tests.integration.scenarios import Router, engine

# The harness computes faster than any disk reads.
DISK = {"lmcache.max_local_disk_size": 1.0, "lmcache.lookup_timeout_ms": 5000, "lmcache.skip_slow_tiers": False}


def folder() -> str:
    return tempfile.mkdtemp(prefix="tier-")


def on_disk(where: str | None = None, url: str = "file://{}/", **more: Any) -> Setup:
    """vLLM's own cache is off: what is found is ours."""
    extra = {"lmcache.local_disk": url.format(where or folder()), **DISK, **more.pop("extra", {})}
    return Setup(**{"caching": False, "extra": extra, **more})


def forget_memory(e: Engine) -> None:
    """L1 is emptied; tiers keep what they have."""
    e.drain()
    e.side.directory.clear()


def arrived(e: Engine) -> None:
    """What nobody waits for any more has come, too."""
    deadline = time.monotonic() + 10
    while any(level.fetching for level in e.side.lower.levels):
        assert time.monotonic() < deadline
        e.step()


def scenario_a_prefix_comes_back_from_disk() -> None:
    e = engine(on_disk())
    p = prompt(1, 300)
    cold, _ = e.ask(p)
    assert e.total("disk_stored_bytes") > 0 and e.total("disk_objects") == 5
    forget_memory(e)
    assert e.ask(p) == (cold, 288)
    assert e.total("disk_hit_tokens") == 288
    assert e.ask(p) == (cold, 288)  # from memory, where it is now
    assert e.total("disk_hit_tokens") == 288
    e.close()


def scenario_who_is_alone_waits_for_a_quick_answer_within_the_step() -> None:
    """And has to ask again where others compute, or where answers may not take any time."""
    p, q = prompt(1, 300), prompt(2, 300)
    for seconds, neighbour, deferred in ((5.0, False, False), (0.0, False, True), (5.0, True, True)):
        e = engine(on_disk())
        cold, _ = e.ask(p)
        forget_memory(e)
        answers: list[Any] = []

        def match(request: Any, local: int, original: Any = e.side.match, seen: list[Any] = answers) -> Any:
            seen.append(original(request, local))
            return seen[-1]

        running = e.add(q, 30) if neighbour else ""
        e.step()
        with mock.patch.object(fetching, "_ALONE_SECONDS", seconds), mock.patch.object(e.side, "match", match):
            request = e.add(p)
            e.run(request)
        assert (None, False) in answers if deferred else answers == [(288, False)]
        assert (e.outputs[request], e.cached[request]) == (cold, 288)
        e.run(*filter(None, [running]))
        e.close()


def scenario_a_restarted_engine_finds_what_the_last_one_stored() -> None:
    where, p = folder(), prompt(1, 300)
    e = engine(on_disk(where))
    cold, _ = e.ask(p)
    e.close()
    e.scheduler.connector.shutdown()
    e = engine(on_disk(where))
    deadline = time.monotonic() + 10
    while not e.side.lower.levels[0].tier.scanned:  # look-ups are answered at once then
        assert time.monotonic() < deadline
    assert e.ask(p) == (cold, 288)  # its very first request
    assert e.total("disk_hit_tokens") == 288
    e.close()


def scenario_a_longer_prompt_finds_its_head_in_memory_and_its_tail_on_disk() -> None:
    e = engine(on_disk())
    p = prompt(1, 500)
    cold, _ = e.ask(p)
    forget_memory(e)
    e.ask(p[:130])  # two chunks come back from disk, and its tail is new
    assert e.ask(p) == (cold, 480)
    e.close()


def scenario_damaged_objects_are_computed() -> None:
    for damage in (
        lambda data: data[:4200] + bytes([data[4200] ^ 1]) + data[4201:],
        lambda data: data[:-100],
        lambda data: b"\0" * len(data),
    ):
        where = folder()
        e = engine(on_disk(where))
        p = prompt(1, 300)
        cold, _ = e.ask(p)
        forget_memory(e)
        files = sorted(path for path in Path(where).rglob("*") if path.is_file() and path.stat().st_size > 4096)
        assert len(files) == 5
        for path in files:
            path.write_bytes(damage(path.read_bytes()))
        assert e.ask(p) == (cold, 0)
        assert e.total("disk_failed_jobs") > 0 and e.total("disk_hit_tokens") == 0
        e.close()


def scenario_swapped_objects_are_computed() -> None:
    where = folder()
    e = engine(on_disk(where))
    p = prompt(1, 300)
    cold, _ = e.ask(p)
    forget_memory(e)
    files = [path for path in Path(where).rglob("*") if path.is_file() and path.stat().st_size > 4096]
    contents = [path.read_bytes() for path in files]
    for path, data in zip(files, contents[1:] + contents[:1], strict=True):
        path.write_bytes(data)
    assert e.ask(p)[0] == cold
    e.close()


def scenario_other_salts_and_shapes_do_not_meet_on_one_disk() -> None:
    where, p = folder(), prompt(1, 300)
    e = engine(on_disk(where))
    cold, _ = e.ask(p)
    forget_memory(e)
    assert e.ask(p, cache_salt="other")[1] == 0
    e.close()
    for setup in (on_disk(where, ranks=2), on_disk(where, chunk=128)):
        e = engine(setup)
        assert e.ask(p) == (cold, 0)
        e.close()


def scenario_ranks_find_their_own_parts_on_disk() -> None:
    e = engine(on_disk(ranks=2))
    p = prompt(1, 300)
    cold, _ = e.ask(p)
    forget_memory(e)
    assert e.ask(p) == (cold, 288)
    e.close()


def scenario_memory_only_stages_where_local_cpu_is_off() -> None:
    e = engine(on_disk(extra={"lmcache.local_cpu": False}))
    p = prompt(1, 300)
    cold, _ = e.ask(p)
    e.drain()
    assert e.total("local_cpu_hot_cache_count") == 0
    assert e.ask(p) == (cold, 288)
    assert e.total("disk_hit_tokens") == 288
    e.close()


def scenario_chunks_go_to_tiers_once_they_were_used() -> None:
    e = engine(on_disk(extra={"lmcache.min_uses_before_write_back": 1}))
    p = prompt(1, 300)
    cold, _ = e.ask(p)
    assert e.total("disk_stored_bytes") == 0
    assert e.ask(p) == (cold, 288)
    e.drain()
    assert e.total("disk_objects") == 5
    e.close()


def scenario_locations_choose_tiers() -> None:
    where, p = folder(), prompt(1, 300)
    e = engine(on_disk(where, extra={"lmcache.store_location": "RemoteBackend", "lmcache.remote_url": "example://"}))
    cold, _ = e.ask(p)
    assert (e.total("disk_stored_bytes"), e.total("remote_objects")) == (0, 5)
    forget_memory(e)
    assert e.ask(p) == (cold, 288)
    assert e.total("remote_hit_tokens") == 288
    e.close()
    e = engine(on_disk(where, extra={"lmcache.retrieve_locations": "LocalCPUBackend"}))
    e.ask(p)
    forget_memory(e)
    assert e.ask(p) == (cold, 0)
    e.close()


def scenario_a_tier_that_hangs_costs_its_deadline_and_no_more() -> None:
    url = "fault+file://{}/?fault.hang=1&load_timeout=0.3&store_timeout=0.3"
    e = engine(on_disk(url=url, slots=16, extra={"lmcache.lookup_timeout_ms": 200}))
    p = prompt(1, 300)
    began = time.monotonic()
    cold, _ = e.ask(p)
    assert e.ask(p) == (cold, 288)  # memory serves
    assert time.monotonic() - began < 5
    e.side.lower = e.side._fetcher = None  # its buffers never come back: what `close` proves does not hold for them
    e.drain()


def scenario_a_spoilt_tier_is_never_wrong() -> None:
    url = "fault+file://{}/?fault.seed=3&fault.error=0.2&fault.short=0.2&fault.flip=0.2&faults=1000000"
    e = engine(on_disk(url=url, slots=24))
    rng = random.Random(1)
    prompts = [prompt(seed, rng.randint(40, 400)) for seed in range(6)]
    answers: dict[int, Any] = {}
    for _ in range(40):
        i = rng.randrange(len(prompts))
        answer, _ = e.ask(prompts[i])
        assert answers.setdefault(i, answer) == answer
        if rng.random() < 0.4:
            forget_memory(e)
    assert e.total("disk_hit_tokens") > 0 and e.total("disk_failed_jobs") > 0
    e.close()


def scenario_aborts_while_a_tier_brings_leave_nothing() -> None:
    e = engine(on_disk(url="fault+file://{}/?fault.delay=1&fault.delay_s=0.02"))
    p = prompt(1, 300)
    cold, _ = e.ask(p)
    forget_memory(e)
    for steps in range(12):
        request_id = e.add(p)
        for _ in range(steps):
            e.step()
        e.abort(request_id)
        forget_memory(e)
    assert e.ask(p)[0] == cold
    arrived(e)
    e.close()


def scenario_what_a_tier_brings_does_not_push_out_what_it_follows() -> None:
    p = prompt(1, 12 * 64 + 1)
    for slots, others in ((12, 3), (13, 9)):  # memory keeps the beginning of it, or a third
        e = engine(on_disk(slots=slots, blocks=128, extra={"lmcache.lookup_timeout_ms": 5000}))
        cold, _ = e.ask(p)
        e.ask(p)  # from memory: its end now leaves first
        e.ask(prompt(2, others * 64 + 1))
        assert e.ask(p) == (cold, 768)
        e.close()


def scenario_many_requests_share_what_a_tier_brings() -> None:
    e = engine(on_disk(url="fault+file://{}/?fault.delay=1&fault.delay_s=0.01", blocks=128))
    p = prompt(1, 300)
    cold, _ = e.ask(p)
    forget_memory(e)
    before = e.total("disk_loaded_bytes")
    ids = [e.add(p) for _ in range(4)]
    e.run(*ids)
    assert all(e.outputs[request_id] == cold and e.cached[request_id] == 288 for request_id in ids)
    assert e.total("disk_loaded_bytes") - before == e.total("disk_stored_bytes")  # once
    e.close()


def scenario_a_small_memory_over_a_disk_serves_what_fits() -> None:
    e = engine(on_disk(slots=6))
    prompts = [prompt(seed, 300) for seed in range(4)]
    cold = [e.ask(p)[0] for p in prompts]
    for _ in range(3):
        for p, answer in zip(prompts, cold, strict=True):
            warm, cached = e.ask(p)
            assert warm == answer and cached >= 64
    e.close()


def scenario_a_tier_slower_than_computing_is_left_alone() -> None:
    url = "fault+file://{}/?fault.delay=1&fault.delay_s=1"
    e = engine(on_disk(url=url, extra={"lmcache.skip_slow_tiers": True, "lmcache.lookup_timeout_ms": 50}))
    p = prompt(1, 600)
    cold, _ = e.ask(p)
    e.side._pace.rate = 1e6  # tokens/s: 600 of them take less than a millisecond
    forget_memory(e)
    began = time.monotonic()
    assert e.ask(p)[0] == cold
    assert time.monotonic() - began < 0.9  # it waited for no longer than computing takes
    arrived(e)  # what came too late says how slow it is
    e.side._pace.rate = 1e6
    forget_memory(e)
    assert e.ask(p) == (cold, 0)
    assert e.total("num_slow_tier_tokens") > 0
    e.close()


def scenario_a_reset_is_not_undone_by_tiers() -> None:
    e = engine(on_disk())
    p = prompt(1, 300)
    cold, _ = e.ask(p)
    e.drain()
    assert e.side.reset()
    assert e.ask(p) == (cold, 0)
    e.close()


def scenario_a_reset_leads_where_no_other_engines_reset_leads() -> None:
    with tempfile.TemporaryDirectory() as folder:
        p, answers = prompt(1, 300), set()
        for _ in range(2):  # one after the other; the first's KV is of other weights, for all that the second knows
            e = engine(on_disk(folder))
            assert e.side.reset()
            cold, cached = e.ask(p)
            e.drain()
            arrived(e)
            answers.add((tuple(cold), cached))
            e.close()
        assert {cached for _, cached in answers} == {0} and len(answers) == 1


def scenario_events_of_what_a_tier_brought() -> None:
    e = engine(on_disk(events=True))
    seen = Router(e)
    p = prompt(1, 300)
    e.ask(p)
    forget_memory(e)
    e.ask(p)
    assert seen.blocks == seen.resident() and len(seen.blocks) == 9
    e.close()


def on_shelf(e: Engine) -> tuple[int, int]:
    """(chunks on disk that routers were told of, chunks on disk)."""
    return len(e.side.lower.chunks()), e.total("disk_objects")


def scenario_a_router_knows_what_is_on_disk() -> None:
    where, p = folder(), prompt(1, 300)
    e = engine(on_disk(where, caching=True, events=True))
    seen = Router(e)
    e.ask(p)
    assert len(seen.disk) == 9 and on_shelf(e) == (5, 5)
    forget_memory(e)
    e.step()
    assert len(seen.disk) == 9 and not seen.blocks
    seen.disk.clear()
    e.forget_gpu()  # vLLM says that all is gone, and we that the disk has it
    e.step()
    assert len(seen.disk) == 9
    files = [path for path in Path(where).rglob("*") if path.is_file() and path.stat().st_size > 4096]
    for path in files:
        path.write_bytes(b"x" * path.stat().st_size)
    with mock.patch.object(e.side.lower, "offer"):  # else what is computed is written once more
        e.ask(p)
        e.step()
    assert not seen.disk and on_shelf(e) == (0, 0)
    e.close()


def scenario_a_router_learns_what_was_on_disk_before_a_restart_once_it_is_used() -> None:
    where, p = folder(), prompt(1, 300)
    e = engine(on_disk(where))
    e.ask(p)
    e.close()
    e.scheduler.connector.shutdown()
    e = engine(on_disk(where, events=True))
    seen = Router(e)
    e.step()
    assert not seen.disk
    assert e.ask(p)[1] == 288
    assert len(seen.disk) == 9 and on_shelf(e) == (5, 5)
    e.close()


def scenario_a_router_forgets_what_left_the_disk() -> None:
    for seed in range(3):
        small = {"lmcache.max_local_disk_size": 12 * 8192 / 2**30}
        e = engine(on_disk(events=True, slots=8, extra=small))
        seen = Router(e)
        rng = random.Random(seed)
        for _ in range(12):
            e.ask(prompt(rng.randrange(6), 300))
        e.step()
        told, there = on_shelf(e)
        assert told == there > 0 and 0 < len(seen.disk) <= 2 * there
        tier = e.side.lower.levels[0].tier
        assert all(tier.holds(key) for key in e.side.lower.levels[0].shelf._told)
        e.close()


def scenario_routers_are_not_told_of_what_all_engines_share() -> None:
    e = engine(Setup(caching=False, events=True, extra={"lmcache.remote_url": f"fs://{folder()}/"}))
    seen = Router(e)
    e.ask(prompt(1, 300))
    assert e.total("remote_stored_bytes") > 0 and seen.blocks and not seen.disk
    e.close()


def scenario_chunks_are_encrypted_on_their_way() -> None:
    secret = Path(folder()) / "secret"
    secret.write_text(bytes(range(32)).hex())
    secret.chmod(0o600)
    where = folder()
    extra = {
        "lmcache.remote_url": f"fs://{where}/", "lmcache.remote_serde": "aesgcm",
        "lmcache.remote_serde_key_file": str(secret), "lmcache.skip_slow_tiers": False,
        "lmcache.lookup_timeout_ms": 5000,
    }  # fmt: skip
    e = engine(Setup(caching=False, extra=extra))
    p = prompt(1, 300)
    cold, _ = e.ask(p)
    forget_memory(e)
    assert e.ask(p) == (cold, 288)
    assert e.total("remote_hit_tokens") == 288
    e.close()
    secret.write_text(bytes(32).hex())
    e = engine(Setup(caching=False, extra=extra))
    assert e.ask(p) == (cold, 0)
    e.close()


def scenario_bad_settings_name_themselves() -> None:
    from lmcache_ext.errors import ConfigError

    for extra, words in (
        ({"lmcache.local_disk": "file:///tmp/x/", "lmcache.max_local_disk_size": 0}, "max_local_disk_size"),
        ({"lmcache.remote_url": "nothing://here"}, "nothing"),
        ({"lmcache.store_location": "Elsewhere"}, "LocalDiskBackend"),
        ({"lmcache.lookup_timeout_ms": 0}, "lookup_timeout_ms"),
    ):
        try:
            engine(Setup(extra=extra))
        except ConfigError as refused:
            assert words in str(refused), refused
        else:
            raise AssertionError(f"{extra} was taken")


def scenario_an_engine_whose_pool_is_lost_opens_no_tier() -> None:
    with mock.patch.object(impl_module.rendezvous, "find", lambda *_: None):
        e = engine(on_disk())
    assert e.side.lower is None
    assert e.ask(prompt(1, 100))[1] == 0


ALL = scenarios_of(globals())
