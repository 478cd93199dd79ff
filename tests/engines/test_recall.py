"""A model whose answers depend on the far prefix tells right KV from wrong, on a real vLLM.

Contexts are shared prefixes; queries repeat a key from far back. Cold, warm, and under everything that can happen to a
request the share of right answers must stay; with flipped bytes it must fall to chance, or this test could not fail.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import pytest

from launch.demo_model import recall
from tests.engines import engines
from tests.engines.engines import BLOCK, CHUNK, ask, counter

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]

CONTEXTS, QUERIES, TOKENS = 10, 20, 512


def questions(seed: int, contexts: int = CONTEXTS) -> list[Any]:
    rng = random.Random(seed)
    asked = []
    for _ in range(contexts):
        asked += recall.queries(recall.make_context(rng, TOKENS), rng, QUERIES)
    return asked


def share(engine: Any, asked: list[Any]) -> float:
    """Share of answers that are right to the last character."""
    outputs = ask(engine, [q.token_ids for q in asked])
    return float(recall.score(asked, [list(o.outputs[0].token_ids) for o in outputs]).exact)


@pytest.fixture(scope="module")
def engine() -> Iterator[Any]:
    """Small on purpose: 2048 tokens of KV and 256 tokens a step, so that prefill is chunked and requests preempt."""
    connector = engines.transfer_config(**{"lmcache.save_decode_cache": True})
    with engines.llm(
        connector, num_gpu_blocks_override=65, max_num_batched_tokens=256, enable_prefix_caching=True, max_num_seqs=8
    ) as made:
        made.collective_rpc(engines.spy)
        yield made


def warm_up(engine: Any, asked: list[Any]) -> None:
    """Store every context, and empty vLLM's own prefix cache."""
    for query in {q.prompt[:TOKENS]: q for q in asked}.values():
        ask(engine, [query.token_ids], max_tokens=1)
    engines.forget_gpu(engine)


def test_cold_warm_and_flipped(engine: Any) -> None:
    asked = questions(1)
    assert len(asked) >= 200
    cold = share(engine, asked)  # each context once from nothing, then shared
    warm_up(engine, asked)
    hits = counter("lmcache:num_hit_tokens")
    warm = share(engine, asked)
    assert counter("lmcache:num_hit_tokens") - hits >= CONTEXTS * TOKENS
    engines.forget_gpu(engine)
    engines.flip_all()
    flipped = share(engine, asked)
    print(f"recall of {len(asked)} queries: cold {cold:.3f}, warm {warm:.3f}, flipped {flipped:.3f}")
    assert cold >= 0.95
    assert abs(cold - warm) <= 0.02
    assert flipped <= 0.1
    engines.forget_gpu(engine, reset_connector=True)


def test_bytes_come_back_page_by_page(engine: Any) -> None:
    engine.collective_rpc(engines.differing_pages)  # forget
    prompt = questions(2, 1)[0].token_ids
    ask(engine, [prompt], max_tokens=1)
    assert engine.collective_rpc(engines.differing_pages) == [{"store": (16 * 2, 0), "load": (0, 0)}]
    engines.forget_gpu(engine)
    ask(engine, [prompt], max_tokens=1)
    assert engine.collective_rpc(engines.differing_pages) == [{"store": (0, 0), "load": (16 * 2, 0)}]


def test_logprobs_are_equal_to_the_last_bit_where_the_steps_are_the_same(engine: Any) -> None:
    prompt = questions(3, 1)[0].token_ids[: CHUNK * 4 + 20]  # cold: 256 tokens, then 20; warm: 20 after a hit of 256
    cold = ask(engine, [prompt], max_tokens=8, logprobs=5)[0]
    engines.forget_gpu(engine)
    warm = ask(engine, [prompt], max_tokens=8, logprobs=5)[0]
    assert (cold.num_cached_tokens, warm.num_cached_tokens) == (0, CHUNK * 4)
    first, second = ([{t: p.logprob for t, p in step.items()} for step in o.outputs[0].logprobs] for o in (cold, warm))
    assert first == second


def test_usage_and_metrics_rise_by_exactly_the_shared_prefix(engine: Any) -> None:
    one, two = questions(4, 1)[:2]  # 512 tokens in common: eight full chunks
    ask(engine, [one.token_ids])
    engines.forget_gpu(engine)
    before = counter("lmcache:num_hit_tokens")
    assert ask(engine, [two.token_ids])[0].num_cached_tokens == TOKENS
    assert counter("lmcache:num_hit_tokens") - before == TOKENS


def test_recall_after_preemption(engine: Any) -> None:
    asked = questions(5, 4)[::10]
    expected = [list(ask(engine, [q.token_ids], max_tokens=300)[0].outputs[0].token_ids) for q in asked]
    engines.forget_gpu(engine)
    before = counter("vllm:num_preemptions")
    together = ask(engine, [q.token_ids for q in asked], max_tokens=300)
    assert counter("vllm:num_preemptions") > before, "nothing was preempted: the test shows nothing"
    assert recall.score(asked, [list(o.outputs[0].token_ids) for o in together]).exact >= 0.95
    same = sum(list(o.outputs[0].token_ids)[:3] == e[:3] for o, e in zip(together, expected, strict=True))
    assert same == len(asked)


def test_recall_after_the_abort_of_a_neighbour(engine: Any) -> None:
    from vllm import SamplingParams

    asked = questions(6, 2)
    warm_up(engine, asked)
    core = engine.llm_engine
    for i, query in enumerate(asked[:20]):
        core.add_request(
            f"victim{i}", {"prompt_token_ids": query.token_ids}, SamplingParams(max_tokens=50, ignore_eos=True)
        )
    for _ in range(3):
        core.step()
    core.abort_request([f"victim{i}" for i in range(20)])
    assert share(engine, asked) >= 0.95


def test_decode_cache_serves_the_second_turn(engine: Any) -> None:
    asked = questions(7, 1)[:4]
    for query in asked:
        answer = list(ask(engine, [query.token_ids], max_tokens=100)[0].outputs[0].token_ids)
        engines.forget_gpu(engine)
        turn = query.token_ids + answer
        follow = recall.Query(query.prompt + recall.decode(answer), query.record, 0)
        key = f"\n{follow.record.key} "
        output = ask(engine, [turn + recall.encode(key)])[0]
        assert output.num_cached_tokens >= (len(turn) - 1) // CHUNK * CHUNK > TOKENS
        assert recall.decode(list(output.outputs[0].token_ids)).startswith(query.expected)
        engines.forget_gpu(engine)


def test_two_ranks(tmp_path: Any) -> None:
    asked = questions(8, 3)
    with engines.llm(
        engines.transfer_config(), threads="0|1", tensor_parallel_size=2, enable_prefix_caching=True
    ) as made:
        cold = share(made, asked)
        warm_up(made, asked)
        hits = counter("lmcache:num_hit_tokens")
        warm = share(made, asked)
        assert counter("lmcache:num_hit_tokens") - hits >= 3 * TOKENS
        engines.forget_gpu(made)
        engines.flip_all()
        flipped = share(made, asked)
    print(f"two ranks, {len(asked)} queries: cold {cold:.3f}, warm {warm:.3f}, flipped {flipped:.3f}")
    assert cold >= 0.95 and abs(cold - warm) <= 0.02 and flipped <= 0.1


def test_block_size_is_what_the_numbers_above_assume() -> None:
    assert TOKENS % CHUNK == 0 and CHUNK % BLOCK == 0
