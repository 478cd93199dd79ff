"""What is coded on its way: nothing readable, nothing that can be moved or changed, and what fp8 loses."""

from __future__ import annotations

import logging
import struct
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from lmcache_ext.errors import ConfigError
from lmcache_ext.tiers import Options, Outcome, Runner, open_tier
from lmcache_ext.tiers.example import Example
from lmcache_ext.tiers.header import BLOCK, decode
from lmcache_ext.tiers.serde import STAGES, Serde
from tests.tiers.helpers import (
    as_stored,
    blank,
    chunk,
    content,
    end,
    found,
    header_of,
    key,
    load,
    memory,
    over,
    store,
)

SECRET = bytes(range(32))
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@pytest.fixture
def secret(tmp_path: Path) -> str:
    file = tmp_path / "secret"
    file.write_text(SECRET.hex() + "\n")
    return str(file)


@pytest.fixture
def sealed(secret: str) -> Iterator[Runner]:
    tier = over(Example(), serde="aesgcm", serde_key_file=secret)
    yield tier
    assert tier.close(5)


def stored(tier: Runner, i: int) -> list[memoryview]:
    """Header and parts as they lie on the medium."""
    assert isinstance(tier.medium, Example)
    data = tier.medium._objects[key(i)][0]
    header = decode(data)
    views, at = [memoryview(bytearray(data[:BLOCK]))], BLOCK
    for length in header.lengths:
        (view,) = memory(length)
        view[:] = data[at : at + length]
        views.append(view)
        at += length
    return views


def put(tier: Runner, i: int, parts: list[memoryview]) -> None:
    """As somebody would who can write to the medium, and makes a header that fits."""
    tier.medium.write(key(i), header_of(key(i), parts), parts)


def test_what_lies_there_is_aes_gcm_bound_to_key_stages_and_lengths(sealed: Runner) -> None:
    store(sealed, 1)
    _, *coded, stamp = stored(sealed, 1)
    about, nonce, tag = bytes(stamp[:64]), bytes(stamp[64:76]), bytes(stamp[76:92])
    assert about.startswith(b"LMCXCODEaesgcm:") and not any(stamp[92:])
    bound = key(1) + about + struct.pack("<2Q", 8192, 8192)
    assert AESGCM(SECRET).decrypt(nonce, content(coded) + tag, bound) == content(chunk(1))


def test_equal_chunks_look_different_and_nothing_of_them_shows(sealed: Runner) -> None:
    parts = memory(8192)
    store(sealed, 1, parts), store(sealed, 2, parts)
    one, two = (content(stored(sealed, i)[1:]) for i in (1, 2))
    assert bytes(64) not in one[:8192] and one[:8192] != two[:8192]
    assert decode(stored(sealed, 1)[0]).digest != decode(stored(sealed, 2)[0]).digest


def test_a_chunk_under_another_key_is_damaged(sealed: Runner) -> None:
    store(sealed, 1)
    put(sealed, 2, stored(sealed, 1)[1:])
    assert found(sealed, 1, 2)[0] and sealed.check(fix=True)
    assert load(sealed, 2) is Outcome.CORRUPT and load(sealed, 1) is Outcome.OK
    assert found(sealed, 1, 2) == [True, False]


@pytest.mark.parametrize(
    ("part", "at", "outcome"),
    [
        (0, 0, Outcome.CORRUPT),
        (1, 8191, Outcome.CORRUPT),
        (2, 0, Outcome.FOREIGN),  # the stages' names
        (2, 64, Outcome.CORRUPT),  # the nonce
        (2, 91, Outcome.CORRUPT),  # the tag
    ],
)
def test_a_change_is_found_though_header_and_sum_fit(sealed: Runner, part: int, at: int, outcome: Outcome) -> None:
    store(sealed, 1)
    parts = stored(sealed, 1)[1:]
    parts[part][at] ^= 1
    put(sealed, 1, parts)
    assert load(sealed, 1) is outcome and load(sealed, 1) is Outcome.MISS


def test_another_secret_makes_objects_foreign_and_trips_nothing(sealed: Runner, tmp_path: Path) -> None:
    (tmp_path / "other").write_text("00" * 32)
    other = over(Example(), serde="aesgcm", serde_key_file=str(tmp_path / "other"), faults=1)
    plain = over(Example(), faults=1)
    for i in range(3):
        store(sealed, i)
        for tier in (other, plain):
            put(tier, i, stored(sealed, i)[1:])
            tier.check(fix=True)
            assert load(tier, i) is Outcome.FOREIGN and load(tier, i) is Outcome.MISS
    assert other.counts().trips == plain.counts().trips == 0
    put(sealed, 9, as_stored(plain, 9))
    sealed.check(fix=True)
    assert load(sealed, 9) is Outcome.FOREIGN
    assert other.close(5) and plain.close(5)


def test_nothing_says_the_secret(secret: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    tier = open_tier(f"file://{tmp_path}/kv?serde=aesgcm&serde_key_file={secret}")
    assert isinstance(tier, Runner)
    store(tier, 1)
    said = " ".join([caplog.text, repr(tier.options), *tier.check(), *map(repr, tier.serde._stages)])
    assert tier.close(5)
    (tmp_path / "odd").write_text(SECRET.hex() + "zz")
    with pytest.raises(ConfigError, match="64 hexadecimal digits") as refused:
        open_tier(f"example://?serde=aesgcm&serde_key_file={tmp_path}/odd")
    for text in (said, str(refused.value), repr(refused.value.__context__)):
        assert SECRET.hex()[:8] not in text and repr(SECRET)[2:20] not in text


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ("serde=cachegen", "must be naive, or some of fp8,aesgcm"),
        ("serde=aesgcm,fp8&serde_dtype=bf16", "in this order"),
        ("serde=fp8,fp8&serde_dtype=bf16", "in this order"),
        ("serde=fp8", "serde_dtype=''.*to be told which"),
        ("serde=fp8&serde_dtype=fp8_e4m3", "serde_dtype='fp8_e4m3'"),
        ("serde=fp8&serde_dtype=torch.float32", "bf16 or fp16"),
        ("serde=aesgcm", "needs a file"),
        ("serde=aesgcm&serde_key_file=/no/such", "No such file"),
    ],
)
def test_what_can_not_work_is_refused_at_the_start(asked: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        open_tier(f"example://?{asked}")


def numbers(kind: torch.dtype, count: int = 40_000) -> torch.Tensor:
    """Of all sizes, with what is odd among them."""
    made = torch.randn(count, generator=torch.Generator().manual_seed(0)) * torch.logspace(-6, 4, count)
    made[:7] = torch.tensor([0.0, -0.0, float("nan"), float("inf"), -float("inf"), 65504.0, 1e-7])
    made[256:384] = 0
    return made.to(kind)


def part_of(values: torch.Tensor) -> memoryview:
    (part,) = memory(2 * values.numel())
    part[:] = values.view(torch.uint8).numpy().tobytes()
    return part


@pytest.mark.parametrize("dtype", DTYPES)
def test_fp8_is_e4m3_with_a_scale_for_128_numbers(dtype: str) -> None:
    given = numbers(DTYPES[dtype])
    serde = Serde.of(Options(serde="fp8", serde_dtype=dtype))
    coded, _ = serde.encode(key(1), [part_of(given)])
    groups = -(-given.numel() // 128)
    assert coded.nbytes == -(-(given.numel() + 4 * groups) // 4096) * 4096
    codes = torch.frombuffer(coded[: given.numel()], dtype=torch.float8_e4m3fn).float()
    scales = torch.frombuffer(coded[given.numel() :][: 4 * groups], dtype=torch.float32)
    spread = scales.repeat_interleave(128)[: given.numel()]
    exact = given.float()
    peak = torch.where(exact.isfinite(), exact.abs(), 0).split(128)
    assert torch.equal(scales, torch.stack([group.max() for group in peak]) / 448)
    want = torch.where(spread > 0, exact / spread, 0).nan_to_num(float("nan")).clamp(-448, 448).to(torch.float8_e4m3fn)
    regular = exact.isfinite()
    off = (codes - want.float()).abs()[regular] > codes.abs()[regular] / 8 + 2**-9
    assert not off.any() and (codes == want.float())[regular].float().mean() > 0.999
    assert codes[2].isnan() and codes[3:5].tolist() == [448, -448]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("stages", ["fp8", "fp8,aesgcm"])
def test_fp8_comes_back_within_its_error_and_always_alike(dtype: str, stages: str, secret: str) -> None:
    given = numbers(DTYPES[dtype])
    tier = over(Example(), serde=stages, serde_dtype=dtype, serde_key_file=secret)
    parts = [part_of(given), part_of(given[:9])]
    result = end(tier, tier.submit_store([key(1)], [parts]))
    assert result.ok == [True] and result.nbytes == 2 * given.numel() + 18
    assert 0.5 < tier.counts().used / (2 * given.numel()) < 0.75
    into = [memory(*(part.nbytes for part in parts)) for _ in range(2)]
    for each in into:
        assert end(tier, tier.submit_load([key(1)], [each])).ok == [True]
    assert content(into[0]) == content(into[1])
    back = torch.frombuffer(into[0][0], dtype=DTYPES[dtype]).float()
    exact = given.float()
    regular = exact.isfinite()
    peak = torch.where(regular, exact.abs(), 0)
    peak = torch.cat([group.max().expand(len(group)) for group in peak.split(128)])
    allowed = exact.abs() / 16 + peak * 2**-10 / 448 + exact.abs() / 128 + 2**-24
    assert ((back - exact).abs() <= allowed)[regular].all()
    assert back[2].isnan() and back.isfinite().sum() == given.numel() - 1
    assert torch.equal(torch.frombuffer(into[0][1], dtype=DTYPES[dtype]).float()[:2], torch.zeros(2))
    assert tier.close(5)


def test_fp8_of_another_kind_is_foreign_and_odd_bytes_fail() -> None:
    medium = Example()
    one, two = (over(medium, serde="fp8", serde_dtype=dtype) for dtype in DTYPES)
    store(one, 1)
    two.check(fix=True)
    assert load(two, 1, blank()) is Outcome.FOREIGN
    assert store(one, 2, memory(5)) is Outcome.FAILED and found(one, 2) == [False]
    assert one.close(5) and two.close(5)


def test_threads_do_not_meet_in_their_memory(secret: str) -> None:
    serde = Serde.of(Options(serde="aesgcm", serde_key_file=secret))
    wrong: list[Any] = []

    def work(seed: int) -> None:
        for i in range(30):
            parts, into = chunk(f"{seed} {i}", 50_000), memory(50_000)
            room = serde.room(into)
            for view, given in zip(room, serde.encode(key(i), parts), strict=True):
                view[:] = given
            if serde.decode(key(i), room, into) is not Outcome.OK or content(into) != content(parts):
                wrong.append((seed, i))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert not wrong


def test_naive_costs_nothing() -> None:
    serde, parts = Serde.of(Options(serde="naive")), chunk(1)
    assert serde.encode(key(1), parts) is parts and serde.room(parts) is parts
    assert list(STAGES) == ["fp8", "aesgcm"]
