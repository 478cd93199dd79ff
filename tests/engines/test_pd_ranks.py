"""A prefiller with two ranks and a decoder with one: KV heads change their rank on the way."""

from __future__ import annotations

import pytest

from launch.demo_model import recall
from tests.engines import apart
from tests.engines.pd_kills import TOKENS, cached, questions
from tests.engines.test_pd import BLOCK, CHUNK

pytest.importorskip("nixl", reason="nixl is not installed")
pytestmark = [pytest.mark.engine, pytest.mark.timeout(500)]


def test_two_ranks_prefill_for_one(tmp_path_factory: pytest.TempPathFactory) -> None:
    asked = [query for seed in range(4) for query in questions(300 + seed, 5)]
    with apart.pair(tmp_path_factory.mktemp("ranks"), prefill_ranks=2) as pair:
        answers = [pair.proxy.complete(query.token_ids) for query in asked]
        received = pair.decoder.metric("lmcache:pd_received_chunks_total")
        tail = pair.proxy.complete(asked[0].token_ids[: CHUNK * 3 + BLOCK + 7], 40)
        alone = pair.prefiller.complete(asked[0].token_ids[: CHUNK * 3 + BLOCK + 7], 40)
        outcomes = apart.ask(f"{pair.proxy.url}/metrics")[1]
    texts = [answer["choices"][0]["text"] for answer in answers]
    assert recall.score(asked, [recall.encode(text) for text in texts]).exact >= 0.95
    for query, answer in zip(asked, answers, strict=True):
        assert cached(answer) == len(query.token_ids) - 1
    assert received == 2 * (4 * TOKENS // CHUNK + len(asked)), "each chunk comes from two"
    assert tail["choices"][0]["text"] == alone["choices"][0]["text"]
    assert f'outcome="stored"}} {len(asked) + 1}.0' in outcomes
