"""What each policy does in traces that were worked out by hand.

A trace is a word; its letters are requests for one chunk each. A request for a chunk that is missing stores it, which
evicts when the pool is full, and touches it once as it ends. One that finds its chunk touches it twice.
"""

from __future__ import annotations

import pytest

from lmcache_ext.policies import POLICIES, EvictionPolicy
from lmcache_ext.policies.arc import ARC
from lmcache_ext.policies.lfu import LFU
from lmcache_ext.policies.mru import MRU
from lmcache_ext.policies.s3fifo import S3FIFO


def run(policy: EvictionPolicy, trace: str, size: int = 3) -> str:
    """Play `trace` in an empty pool of `size`. Returns who left, in order."""
    known: set[str] = set()
    left = ""
    for name in trace:
        if name in known:
            policy.touch(name.encode())
        else:
            if len(known) == size:
                victim = next(iter(policy.victims()))
                policy.remove(victim)
                left += victim.decode()
                known.remove(victim.decode())
            policy.insert(name.encode())
            known.add(name)
        policy.touch(name.encode())
    return left


def order(policy: EvictionPolicy) -> str:
    return b"".join(policy.victims()).decode()


@pytest.mark.parametrize(
    ("name", "trace", "left", "kept"),
    [
        # A second use of a saves it: b, then c are unused for longest. FIFO does not care.
        ("LRU", "abcade", "bc", "ade"),
        ("FIFO", "abcade", "ab", "cde"),
        ("LFU", "abcade", "bc", "ade"),
        ("ARC", "abcade", "bc", "dea"),
        ("S3-FIFO", "abcade", "bc", "dea"),
        # The one used last leaves: a when d comes, d when e comes.
        ("MRU", "abcade", "ad", "ecb"),
        # A loop of four in a pool of three: LRU finds nothing, MRU everything but c (missing in the second lap).
        ("LRU", "abcdabcd", "abcda", "bcd"),
        ("FIFO", "abcdabcd", "abcda", "bcd"),
        ("MRU", "abcdabcd", "cb", "dca"),
        # One chunk used twice, then a scan: LRU loses it, who tells one use from two keeps it.
        ("LRU", "aabcdefg", "abcd", "efg"),
        ("ARC", "aabcdefg", "bcde", "fga"),
        ("S3-FIFO", "aabcdefg", "bcde", "fga"),
    ],
)
def test_who_leaves_from_a_pool_of_three(name: str, trace: str, left: str, kept: str) -> None:
    policy = POLICIES.get(name)()
    assert (run(policy, trace), order(policy)) == (left, kept)


def test_mru_takes_the_chain_used_last_from_its_tail() -> None:
    mru = MRU()
    for key in (b"a", b"b", b"c", b"x"):  # the chain abc, and another
        mru.insert(key)
    for key in (b"c", b"b", b"a"):  # used again, as the directory says it
        mru.touch(key)
    assert order(mru) == "cbax"


def test_lfu_equals_leave_in_the_order_of_their_last_use() -> None:
    lfu = LFU()
    for key in (b"a", b"b", b"c"):
        lfu.insert(key)
    for key in (b"c", b"a", b"b"):
        lfu.touch(key)
    assert order(lfu) == "cab"


def test_lfu_forgets_what_was_popular_once() -> None:
    # a has 8 uses, rank 8. b and c: 2 uses, rank 2. When b leaves the age is 2, so d and e have rank 2 + 2, f and g 6,
    # h and i 8, like a, which was used earlier.
    lfu = LFU()
    assert run(lfu, "aaaabcdefghi") == "bcdefg"
    assert order(lfu) == "ahi"
    lfu = LFU()
    assert run(lfu, "aaaabcdefghij") == "bcdefga"


def test_arc_makes_room_for_the_list_whose_ghost_is_asked_for() -> None:
    # d evicts b, the first of T1 = b c. b evicts c, and is a ghost of T1: the target rises to 1, T2 = a b, T1 = d.
    arc = ARC()
    assert run(arc, "aabcdb") == "bc"
    assert (arc._target, order(arc)) == (1, "abd")
    # T1 is not longer than its target, so e evicts a of T2. T1 = d e is, so a evicts d. a is a ghost of T2, and there
    # are two of T1 (c, d): the target falls by 2 / 1, but not below 0.
    arc = ARC()
    assert run(arc, "aabcdbea") == "bcad"
    assert (arc._target, order(arc)) == (0, "eba")


def test_arc_forgets_ghosts_beyond_the_pool() -> None:
    # T1 is full of chunks used once, which leaves no room for ghosts of it: a is new when it comes back.
    arc = ARC()
    run(arc, "abcda")
    assert (order(arc), arc._target, len(arc._once_ghosts)) == ("cda", 0, 0)


def test_s3fifo_admits_a_ghost_to_the_main_queue() -> None:
    # d evicts a, a ghost from now on; a evicts b and goes to the main queue, where a scan does not reach it.
    policy = S3FIFO()
    assert run(policy, "abcdaefg") == "abcde"
    assert order(policy) == "fga"


def test_s3fifo_gives_the_head_of_the_main_queue_a_round_for_each_use() -> None:
    policy = S3FIFO()
    run(policy, "abcabc")
    assert order(policy) == "abc"  # all were used again, and are in the main queue now, with no use counted there
    policy.touch(b"a"), policy.touch(b"a")
    assert order(policy) == "bca"  # a has one round left
    policy.remove(b"b"), policy.touch(b"c")
    assert order(policy) == "ca"  # c went to the end for its use, a for its second one


def test_s3fifo_evicts_from_main_while_small_is_below_a_tenth() -> None:
    policy = S3FIFO()
    run(policy, "abcdefghijklmnopqrst" * 2, size=20)  # twenty chunks, all used again
    assert run_on(policy, "u") == "a"  # they moved to the main queue; u is alone in the small one, below 2 of 20
    assert run_on(policy, "v") == "b"
    assert run_on(policy, "w") == "u"  # u v fill it


def run_on(policy: EvictionPolicy, name: str) -> str:
    """Evict one, store `name`."""
    victim = next(iter(policy.victims()))
    policy.remove(victim)
    policy.insert(name.encode())
    policy.touch(name.encode())
    return victim.decode()
