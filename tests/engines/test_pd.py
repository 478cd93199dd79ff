"""Prefill and decode apart, as LMCache's own example starts them: two `vllm serve` and the proxy, over NIXL."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from launch.demo_model import recall
from tests.engines import apart, engines, pd_kills
from tests.engines.apart import Pair
from tests.engines.pd_kills import KILLS, TOKENS, cached, questions

pytest.importorskip("nixl", reason="nixl is not installed")
pytestmark = [pytest.mark.engine, pytest.mark.timeout(1800)]

BLOCK, CHUNK = 32, 64
COMPUTED = "vllm:prompt_tokens_by_source_total", 'source="local_compute"'  # prompt tokens, says vLLM itself


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    with apart.pair(tmp_path_factory.mktemp("apart"), notify_timeout=5, read_timeout=10, answer_timeout=20) as made:
        yield made


def test_answers_are_right_and_the_decoder_computes_the_last_token_only(pair: Pair) -> None:
    asked = [query for seed in range(5) for query in questions(seed, 4)]
    computed = pair.decoder.metric(*COMPUTED)
    answers = [pair.proxy.complete(query.token_ids) for query in asked]
    texts = [answer["choices"][0]["text"] for answer in answers]
    assert recall.score(asked, [recall.encode(text) for text in texts]).exact >= 0.95
    for query, answer in zip(asked, answers, strict=True):
        assert cached(answer) == len(query.token_ids) - 1
    assert pair.decoder.metric(*COMPUTED) - computed == len(asked), "one token of each"
    assert pair.decoder.metric("lmcache:num_stored_tokens_total") == 0
    assert pair.decoder.metric("lmcache:pd_received_chunks_total") == 5 * TOKENS // CHUNK + len(asked)
    assert (
        pair.prefiller.metric("lmcache:pd_handovers_total") >= len(asked) - 1
    )  # the last is counted with its next step
    assert 'outcome="stored"} 20.0' in apart.ask(f"{pair.proxy.url}/metrics")[1]


def test_long_answers_are_those_of_one_engine(pair: Pair) -> None:
    for length in (CHUNK * 4, CHUNK * 4 + 20, BLOCK + 1, 7):
        prompt = questions(10 + length, 1)[0].token_ids[:length]
        alone = pair.prefiller.complete(prompt, 60)["choices"][0]["text"]
        assert pair.proxy.complete(prompt, 60)["choices"][0]["text"] == alone


def test_many_at_once_and_chats(pair: Pair) -> None:
    asked = questions(11, 16)
    texts: dict[int, str] = {}

    def one(i: int) -> None:
        texts[i] = pair.proxy.complete(asked[i].token_ids)["choices"][0]["text"]

    threads = [threading.Thread(target=one, args=(i,)) for i in range(len(asked))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert recall.score(asked, [recall.encode(texts[i]) for i in range(len(asked))]).exact >= 0.95
    body = {
        "model": str(engines.MODEL), "messages": [{"role": "user", "content": asked[0].message}], "max_tokens": 3,
        "temperature": 0,
    }  # fmt: skip
    status, answer = apart.ask(f"{pair.proxy.url}/v1/chat/completions", body)
    assert status == 200 and answer["choices"][0]["message"]["content"] == asked[0].expected
    assert pair.decoder.metric("lmcache:pd_open_handovers") == 0


def test_killed_with_requests_in_flight(pair: Pair) -> None:
    pd_kills.kill_and_revive(pair)


@pytest.mark.skipif(not KILLS, reason="takes half a minute; PD_KILLS=10 runs it")
def test_a_silent_prefiller(pair: Pair) -> None:
    pd_kills.silence(pair)


def test_a_dead_prefiller_costs_no_answer(pair: Pair) -> None:
    pd_kills.kill_the_prefiller_for_good(pair)
