"""Keys: equal exactly when everything that gives the bytes their meaning is equal."""

from __future__ import annotations

import random
import subprocess
import sys
from dataclasses import fields, replace

import pytest

from lmcache_ext.keys import Chain, Namespace

ROOT = b"r" * 32
NAMESPACE = Namespace(
    model="m", revision="main", weights="w", dtype="bf16", kv_dtype="auto", layout="l", backend="b", page_geometry="p",
    block_size=16, chunk_size=256, parallel="tp1pp1", kv_format="1",
)  # fmt: skip


def tokens(seed: int, n: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(200_000) for _ in range(n)]


def test_growing_and_hashing_at_once_give_the_same_keys() -> None:
    t = tokens(1, 2000)
    at_once, growing = Chain(ROOT, 256), Chain(ROOT, 256)
    for end in (10, 300, 301, 256 * 3, 1999, 2000):
        growing.extend(t, end)
    assert growing.keys == at_once.extend(t, 2000)
    assert len(growing.keys) == 7


def test_a_key_stands_for_its_whole_prefix() -> None:
    t = tokens(1, 1024)
    other = [*t]
    other[3] ^= 1
    a, b = Chain(ROOT, 256).extend(t, 1024), Chain(ROOT, 256).extend(other, 1024)
    assert not set(a) & set(b)


def test_partial_chunks_have_keys_of_their_own() -> None:
    t = tokens(1, 1024)
    chain = Chain(ROOT, 256)
    partial = {chain.partial(t, end) for end in (300, 301, 511)}
    assert len(partial) == 3
    assert not partial & set(chain.extend(t, 1024))
    with pytest.raises(ValueError, match="no partial chunk"):
        chain.partial(t, 512)


@pytest.mark.parametrize(("end", "step", "ends"), [
    (300, 16, (288, 272)),
    (259, 1, (259, 258, 257)),
    (511, 64, (448, 384, 320)),
    (512, 128, (384,)),
    (257, 16, ()),
    (20, 16, (16,)),
])  # fmt: skip
def test_tails_are_the_partial_chunks_behind_the_last_full_one(end: int, step: int, ends: tuple[int, ...]) -> None:
    t = tokens(1, 1024)
    chain = Chain(ROOT, 256, lambda start, stop: f"{start},{stop}".encode())
    assert chain.tails(t, end, step) == [(stop, chain.partial(t, stop)) for stop in ends]
    assert chain.tails(t, 700, 32)[0] == (672, chain.partial(t, 672)), "not the answer to another question"


def test_a_short_first_chunk_never_equals_a_full_one_of_a_smaller_chunk_size() -> None:
    t = tokens(1, 256)
    assert Chain(ROOT, 128).extend(t, 128)[0] == Chain(ROOT, 256).partial(t, 128)  # same tokens, same root: same bytes
    assert NAMESPACE.root() != replace(NAMESPACE, chunk_size=128).root()  # which is why the root has the chunk size


def test_extra_separates() -> None:
    t = tokens(1, 512)
    with_extra = Chain(ROOT, 256, lambda start, end: b"x" if start else b"").extend(t, 512)
    without = Chain(ROOT, 256).extend(t, 512)
    assert with_extra[0] == without[0] and with_extra[1] != without[1]


@pytest.mark.parametrize("name", [f.name for f in fields(Namespace)])
def test_every_field_of_the_namespace_counts(name: str) -> None:
    value = getattr(NAMESPACE, name)
    changed = replace(NAMESPACE, **{name: value + 1 if isinstance(value, int) else value + "x"})
    assert changed.root() != NAMESPACE.root()


def test_keys_do_not_depend_on_the_process() -> None:
    script = (
        "from lmcache_ext.keys import Chain; import sys;"
        "sys.stdout.write(Chain(b'r' * 32, 256).extend(list(range(256)), 256)[0].hex())"
    )
    seen = set()
    for seed in ("0", "1", "random"):
        done = subprocess.run(
            [sys.executable, "-c", script], env={"PYTHONHASHSEED": seed, "PATH": ""}, capture_output=True, text=True,
            check=True, timeout=60,
        )  # fmt: skip
        seen.add(done.stdout)
    assert seen == {Chain(b"r" * 32, 256).extend(list(range(256)), 256)[0].hex()}


def test_a_known_answer_that_must_never_change() -> None:
    """Shared and persistent tiers depend on it: raise SCHEMA if you have to change it."""
    assert Chain(b"\0" * 32, 4).extend([1, 2, 3, 4], 4)[0].hex() == KNOWN


KNOWN = "4c2954ddb37ff7062275a79fe4f91e287eb2a53fbb15cc56312218376b2c9a20"
