"""The questions: well-formed, seeded, and scored as they say."""

import random

import pytest

from launch.demo_model import recall


def test_a_context_is_whole_lines_with_distinct_keys_and_fills_chunks() -> None:
    context = recall.make_context(random.Random(1), 519)
    assert len(context.token_ids) == len(context.text) == 512
    assert len({r.key for r in context.records}) == len(context.records) == 64
    for record in context.records:
        assert context.text[record.start :].startswith(f"{record.key} {record.value}\n")


def test_a_seed_names_one_context_and_its_queries() -> None:
    def make(seed: int) -> list[recall.Query]:
        rng = random.Random(seed)
        return recall.queries(recall.make_context(rng, 640), rng, 10)

    assert make(1) == make(1) != make(2)


def test_prompts_share_the_context_and_ask_for_values_as_far_back_as_wanted() -> None:
    rng = random.Random(2)
    context = recall.make_context(rng, 1024)
    asked = recall.queries(context, rng, 20, min_distance=800, max_distance=1000)
    assert len({q.record for q in asked}) == 20
    for query in asked:
        assert query.prompt == f"{context.text}{query.record.key} " == f"{query.message} "
        assert 800 <= query.distance <= 1000
        assert query.prompt[-query.distance :].startswith(query.expected)


def test_what_cannot_be_asked_is_refused() -> None:
    rng = random.Random(3)
    context = recall.make_context(rng, 64)
    with pytest.raises(ValueError, match=r"k=1 queries, but 0 of 8 records lie 300 to 600 tokens back"):
        recall.queries(context, rng, 1)
    with pytest.raises(ValueError, match="n_tokens=7"):
        recall.make_context(rng, 7)
    with pytest.raises(ValueError, match="printable ASCII"):
        recall.encode("a\tb")
    with pytest.raises(ValueError, match="1 answers to 2 queries"):
        recall.score(recall.queries(context, rng, 2, min_distance=0), ["abc"])


def test_score_takes_text_and_token_ids_and_ignores_what_follows() -> None:
    rng = random.Random(4)
    asked = recall.queries(recall.make_context(rng, 512), rng, 4)
    first_only = asked[2].expected[0] + "\n"
    answers = [asked[0].expected + "\nmore", recall.encode(asked[1].expected), first_only, ""]
    assert recall.score(asked, answers) == recall.Score(first=0.75, exact=0.5, count=4)
