"""Prefill and decode apart, under vLLM's real Scheduler: bytes are checked before every forward at both sides.

`python -m tests.integration.pd_scenarios` runs them all on whatever vLLM comes first on PYTHONPATH, a line each. They
need a process of their own, which ends without libc's destructors: docs/pd.md says why.
"""

from __future__ import annotations

import contextlib
import os
import random
import socket
import sys
import tempfile
import time
from unittest import mock

from lmcache_ext.errors import ConfigError
from lmcache_ext.integration.vllm import impl as impl_module
from lmcache_ext.ports import free_port
from tests.integration.apart import Apart, apart, until
from tests.integration.harness import BLOCK, Engine, Setup, prompt
from tests.integration.runner import run, scenarios_of

CHUNK = 64


def same_answer(made: Apart, tokens: list[int], cached: int, max_tokens: int = 5) -> None:
    """The decoder had so many tokens of the prompt, and says what one engine alone would."""
    alone, _ = made.prefill.ask(tokens, max_tokens)
    output, hit = made.decode.ask(tokens, max_tokens)
    assert output == alone
    assert hit == cached


def scenario_the_decoder_computes_the_last_token_only() -> None:
    last_token_only(ranks=1)


def scenario_the_decoder_computes_the_last_token_only_on_two_ranks() -> None:
    last_token_only(ranks=2)


def last_token_only(ranks: int) -> None:
    received = 0
    with apart(Setup(ranks=ranks), Setup(ranks=ranks)) as made:
        for i, length in enumerate((2 * CHUNK, 5 * CHUNK + BLOCK + 7, BLOCK + 1)):
            tokens = prompt(i, length)
            assert made.hand_over(tokens) == "stored"
            assert made.told[f"p{i}"] == {(rank, "stored") for rank in range(ranks)}
            assert made.decode.side.directory.leases > 0, "what was handed over must be kept for its decode request"
            same_answer(made, tokens, length - 1)
            received += ranks * -(-length // CHUNK)
            assert made.decode.total("pd_received_chunks") == received
            assert made.prefill.total("pd_handovers") == i + 1
            assert made.decode.side.directory.leases == 0, "the decode request has claimed it"


def scenario_fewer_ranks_decode_than_prefill() -> None:
    other_ranks(Setup(ranks=2, heads=2), Setup(ranks=1, heads=4))


def scenario_more_ranks_decode_than_prefill() -> None:
    other_ranks(Setup(ranks=1, heads=4), Setup(ranks=2, heads=2))


def other_ranks(prefill: Setup, decode: Setup) -> None:
    """Heads change their rank on the way; what one engine has already is not sent to it again."""
    with apart(prefill, decode) as made:
        head = prompt(50, 3 * CHUNK)
        for i, length in enumerate((CHUNK, 2 * CHUNK + BLOCK + 7, BLOCK + 1)):
            tokens = head + prompt(51 + i, length)
            assert made.hand_over(tokens) == "stored"
            assert made.told[f"p{i}"] == {(rank, "stored") for rank in range(decode.ranks)}
            same_answer(made, tokens, len(tokens) - 1)
        assert made.decode.total("pd_received_chunks") == 2 * (4 + 3 + 1)
        assert made.prefill.total("pd_handovers") == 3


def scenario_fewer_ranks_of_a_model_whose_ranks_hold_the_same() -> None:
    tokens = prompt(55, 3 * CHUNK)
    for prefill, decode in ((2, 1), (1, 2)):
        with apart(Setup(ranks=prefill, mla=True), Setup(ranks=decode, mla=True)) as made:
            assert made.hand_over(tokens) == "stored"
            same_answer(made, tokens, 3 * CHUNK - 1)


def scenario_files_of_another_tp_size_are_not_read() -> None:
    """Keys do not name the TP size here, so that hand-overs fit; those on disk do."""
    tokens, hits = prompt(57, 3 * CHUNK), []
    with tempfile.TemporaryDirectory() as folder:
        extra = {"lmcache.local_disk": f"file://{folder}", "lmcache.max_local_disk_size": 0.1}
        for ranks, heads in ((2, 2), (1, 4), (2, 2)):
            with apart(Setup(ranks=ranks, heads=heads, extra=extra), Setup(ranks=1, heads=4)) as made:
                hits.append(made.prefill.ask(tokens)[1])
                assert made.hand_over(tokens) == "stored"
                same_answer(made, tokens, 3 * CHUNK - 1)
                assert made.prefill.total("disk_corrupt_objects") == made.prefill.total("num_faults") == 0
    assert hits == [0, 0, 3 * CHUNK - 1]


def scenario_ports_in_the_wrong_order_are_refused() -> None:
    tokens = prompt(56, 3 * CHUNK)
    with apart(Setup(ranks=2), Setup(ranks=2)) as made:
        ports = {"receiver_init_port": made.init[::-1], "receiver_alloc_port": made.alloc[::-1]}
        assert made.hand_over(tokens, **ports) == "failed"
        same_answer(made, tokens, 0)


def scenario_one_writer_speaks_for_ranks_with_the_same_bytes() -> None:
    tokens = prompt(2, 3 * CHUNK)
    with apart(Setup(ranks=2, mla=True), Setup(ranks=2, mla=True)) as made:
        assert made.hand_over(tokens) == "stored"
        assert made.told["p0"] == {(0, "stored"), (1, "stored")}
        same_answer(made, tokens, 3 * CHUNK - 1)


def scenario_the_first_token_is_told_as_upstream_does() -> None:
    with apart() as made:
        _, request = made.begin(prompt(3, 100))
        made.prefill.run(request)
        made.prefill.drain()
        assert made.prefill.told[request] == {"first_tok": made.prefill.outputs[request][0]}
        made.outcome("p0")
        made.decode.ask(prompt(3, 100))


def scenario_what_either_side_has_already_is_not_sent() -> None:
    head = prompt(4, 4 * CHUNK)
    with apart() as made:
        made.prefill.ask(head)
        assert made.hand_over(head + prompt(5, CHUNK)) == "stored"
        same_answer(made, head + prompt(5, CHUNK), 5 * CHUNK - 1)
        received = made.decode.total("pd_received_chunks")
        assert made.hand_over(head + prompt(6, CHUNK)) == "stored"
        same_answer(made, head + prompt(6, CHUNK), 5 * CHUNK - 1)
        assert made.decode.total("pd_received_chunks") == received + 1 == 6


def scenario_chunks_arrive_while_later_ones_are_computed() -> None:
    tokens = prompt(7, 15 * CHUNK)
    with apart(Setup(budget=CHUNK), Setup(budget=1024)) as made:
        req_id, request = made.begin(tokens)
        for _ in range(14):
            made.prefill.step()
            time.sleep(0.1)  # a step of a real engine takes as long
        assert 3 <= len(made.decode.side.directory) < 15
        made.listen()
        assert req_id not in made.told
        made.prefill.run(request)
        made.prefill.drain()
        assert made.outcome(req_id) == "stored"
        same_answer(made, tokens, 15 * CHUNK - 1)


def scenario_prompts_shorter_than_a_block() -> None:
    with apart() as made:
        for length in (BLOCK - 1, 2, 1):
            assert made.hand_over(prompt(8, length)) == "stored"
            same_answer(made, prompt(8, length), length - 1)
        assert made.decode.total("pd_received_chunks") == 2, "of one token nothing can be had"


def scenario_a_chat_goes_on_where_its_last_prompt_ended() -> None:
    """That was in the middle of a block: the next turn begins there at either side."""
    turns, answer = [prompt(60, CHUNK + 41), prompt(61, 9), prompt(62, 10)], 3
    with apart(Setup(caching=False), Setup(caching=False)) as made:
        tokens: list[int] = []
        for turn in turns:
            known, tokens = len(tokens), tokens + turn
            _, request = made.begin(tokens)
            made.prefill.run(request)
            made.prefill.drain()
            assert made.outcome(f"p{turns.index(turn)}") == "stored"
            assert made.prefill.cached[request] == max(0, known - answer)
            output, hit = made.decode.ask(tokens, answer)
            assert hit == len(tokens) - 1
            tokens += output


def scenario_a_tail_is_found_on_disk() -> None:
    tokens = prompt(63, 2 * CHUNK + 17)
    with tempfile.TemporaryDirectory() as folder:
        extra = {"lmcache.local_disk": f"file://{folder}", "lmcache.max_local_disk_size": 0.1}
        for cached in (0, len(tokens) - 1):
            with apart(Setup(extra=extra)) as made:
                _, request = made.begin(tokens)
                made.prefill.run(request)
                made.prefill.drain()
                assert made.prefill.cached[request] == cached
                assert made.outcome("p0") == "stored"
                same_answer(made, tokens, len(tokens) - 1)


def scenario_an_abort_gives_every_reservation_back() -> None:
    for steps in (1, 3):
        with apart(Setup(budget=CHUNK)) as made:
            req_id, request = made.begin(prompt(9, 8 * CHUNK))
            for _ in range(steps):
                made.prefill.step()
            until(lambda made=made: made.decode.side.directory.used == 8)
            made.prefill.abort(request)
            made.prefill.drain()
            until(made.settled)
            made.listen()
            assert req_id not in made.told, "whoever aborts does not wait"


def scenario_a_receiver_without_room_is_a_miss() -> None:
    tokens = prompt(10, 6 * CHUNK)
    with apart(decode=Setup(slots=8)) as made:
        made.decode.ask(prompt(30, 4 * CHUNK))  # a consumer stores nothing
        assert made.hand_over(prompt(31, 4 * CHUNK)) == "stored"  # and takes half, unclaimed
        assert made.hand_over(tokens) == "failed"
        made.decode.ask(prompt(31, 4 * CHUNK))
        until(made.settled)
        assert made.prefill.total("pd_failed_handovers") == 1
        same_answer(made, tokens, 0)
        assert made.hand_over(tokens[: 3 * CHUNK]) == "stored", "smaller ones pass"
        same_answer(made, tokens[: 3 * CHUNK], 3 * CHUNK - 1)


def scenario_what_cannot_be_stored_here_leaves_a_prefix_there() -> None:
    tokens = prompt(11, 6 * CHUNK)
    with apart(Setup(slots=2, budget=1024)) as made:
        assert made.hand_over(tokens) == "failed"
        until(lambda: len(made.decode.side.directory) == 2)
        same_answer(made, tokens, 2 * CHUNK)


def scenario_a_port_that_is_taken_ends_the_start() -> None:
    init, alloc = free_port(), free_port()
    extra = {
        "lmcache.enable_pd": True, "lmcache.pd_role": "receiver", "lmcache.pd_peer_host": "127.0.0.1",
        "lmcache.pd_peer_init_port": init, "lmcache.pd_peer_alloc_port": alloc,
    }  # fmt: skip
    with socket.create_server(("127.0.0.1", alloc)):
        try:
            Engine(Setup(role="kv_consumer", extra=extra))
        except ConfigError as refused:
            assert f"127.0.0.1:{init} and {alloc}" in str(refused)
        else:
            raise AssertionError("it started")


def scenario_nobody_listens_at_the_receivers_ports() -> None:
    with apart() as made:
        begun = time.monotonic()
        free = [made.init[0] + 1], [made.alloc[0] + 1]
        assert made.hand_over(prompt(12, 128), receiver_init_port=free[0], receiver_alloc_port=free[1]) == "failed"
        assert time.monotonic() - begun < 5
        same_answer(made, prompt(12, 128), 0)


def scenario_a_decoder_of_another_model_refuses() -> None:
    with apart(decode=Setup(extra={"lmcache.chunk_size": 32})) as made:
        assert made.hand_over(prompt(13, 128)) == "failed"


def scenario_a_spec_that_makes_no_sense_is_refused_at_once() -> None:
    wrong: list[dict[str, object]] = [
        {"receiver_host": ""},
        {"receiver_init_port": []},
        {"receiver_init_port": [1, 2, 3], "receiver_alloc_port": [4, 5]},
        {"receiver_alloc_port": ["x"]},
        {"receiver_init_port": [70000]},
        {"receiver_init_port": [5000] * 5000, "receiver_alloc_port": [5001] * 5000},
    ]
    with apart() as made:
        for other in wrong:
            assert made.hand_over(prompt(14, 100), **other) == "failed"


def scenario_a_spec_that_is_none_at_all_harms_nobody() -> None:
    with apart() as made:
        for spec in (5, None, {}, {"req_id": 7}, []):
            request = made.prefill.add(prompt(15, 100), kv_transfer_params={"disagg_spec": spec})
            made.prefill.run(request)
        assert made.prefill.total("num_faults") == 0


def scenario_a_request_under_way_twice() -> None:
    with apart() as made:
        _, one = made.begin(prompt(16, 4 * CHUNK), "same")
        _, two = made.begin(prompt(17, 4 * CHUNK), "same")
        made.prefill.run(one, two)
        made.prefill.drain()
        assert made.outcome("same") == "stored"
        made.decode.ask(prompt(16, 4 * CHUNK))


def scenario_the_decode_request_never_comes() -> None:
    with apart(ttl_s=0.5) as made:
        assert made.hand_over(prompt(18, 4 * CHUNK)) == "stored"
        assert made.decode.side.directory.leases == 4
        until(lambda: made.decode.side.directory.leases == 0, 3)
        assert made.decode.total("pd_unclaimed_handovers") == 1


def scenario_a_reset_at_the_prefiller_ends_what_is_under_way() -> None:
    with apart(Setup(budget=CHUNK)) as made:
        req_id, request = made.begin(prompt(19, 8 * CHUNK))
        for _ in range(3):
            made.prefill.step()
        made.prefill.side.reset()
        made.prefill.run(request)
        made.prefill.drain()
        assert made.outcome(req_id) == "failed"
        made.decode.ask(prompt(19, 8 * CHUNK))
        made.store.claim(req_id)


def scenario_a_reset_at_the_decoder_forgets_what_arrives() -> None:
    tokens = prompt(20, 8 * CHUNK)
    with apart(Setup(budget=CHUNK)) as made:
        req_id, request = made.begin(tokens)
        for _ in range(3):
            made.prefill.step()
        until(lambda: made.decode.side.directory.used == 8)
        made.decode.side.reset()
        made.prefill.run(request)
        made.prefill.drain()
        made.outcome(req_id)
        same_answer(made, tokens, 0)
        made.store.claim(req_id)


def scenario_a_reset_on_both_sides_leaves_them_together() -> None:
    for divided in (True, False):  # without, as with pipeline parallelism
        with contextlib.ExitStack() as stack:
            if not divided:
                stack.enter_context(mock.patch.object(impl_module, "division", lambda *_: None))
            made = stack.enter_context(apart())
            tokens = prompt(21, 4 * CHUNK)
            for side in (made.prefill.side, made.decode.side):
                side.reset()
            assert made.hand_over(tokens) == "stored"
            same_answer(made, tokens, 4 * CHUNK - 1)


def scenario_random_traffic_through_small_pools() -> None:
    random_traffic(ranks=1, heads=1, decode_heads=1)


def scenario_random_traffic_from_two_ranks_to_one() -> None:
    random_traffic(ranks=2, heads=2, decode_heads=4)


def random_traffic(ranks: int, heads: int, decode_heads: int) -> None:
    """Requests that share prefixes, some aborted, some decoded before they have arrived; both engines busy at once, and
    more passes through the decoder's pool than it holds."""
    rng = random.Random(21)
    shared = [prompt(100 + i, 6 * CHUNK) for i in range(3)]
    prefill = Setup(budget=128, slots=24, ranks=ranks, heads=heads)
    with apart(prefill, Setup(budget=128, slots=24, heads=decode_heads), ttl_s=2.0) as made:
        waiting: list[tuple[str, str, list[int]]] = []
        decoding: dict[str, list[int]] = {}
        for i in range(40):
            head = rng.choice(shared)[: rng.randrange(7) * CHUNK]
            tokens = head + prompt(200 + i, rng.randrange(1, 4 * CHUNK))
            waiting.append((*made.begin(tokens), tokens))
            for _ in range(rng.randrange(4)):
                made.prefill.step()
                made.decode.step()
            made.listen()
            for entry in list(waiting):
                req_id, request, prompt_ids = entry
                if rng.random() < 0.05:
                    made.prefill.abort(request)
                    waiting.remove(entry)
                elif req_id in made.told or rng.random() < 0.05:
                    decoding[made.decode.add(prompt_ids, 4)] = prompt_ids
                    waiting.remove(entry)
        made.prefill.run()
        made.prefill.drain()
        for req_id, _, prompt_ids in waiting:  # by now some have found no room: nobody came for the others
            made.outcome(req_id, seconds=20)
            decoding[made.decode.add(prompt_ids, 4)] = prompt_ids
        made.decode.run()
        for request, prompt_ids in decoding.items():
            assert made.decode.outputs[request] == made.prefill.ask(prompt_ids, 4)[0]
        assert made.decode.total("num_hit_tokens") > 10 * CHUNK
        assert made.decode.total("pd_received_chunks") >= 24


ALL = scenarios_of(globals())


if __name__ == "__main__":
    failed = run(ALL, sys.argv[1:])
    sys.stderr.flush()
    os._exit(min(failed, 1))
