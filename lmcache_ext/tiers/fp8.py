"""KV in half the bytes: 16-bit floats to 8-bit ones (e4m3fn) with a scale for each 128 of them. Lossy.

A part of n numbers becomes

    n codes of 1 byte, then ceil(n / 128) scales of 4 bytes (float32, little-endian), zeros up to a whole 4096 bytes

A number comes back as its code times the scale, rounded to the nearest of its kind. The scale makes the greatest of
its 128 numbers 448, e4m3fn's greatest, so the error is at most 1/16 of a number, or 2^-10/448 of the greatest beside it
if that is more. NaN stays NaN, infinities become the greatest number that is finite.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from lmcache_ext.tiers.header import BLOCK

GROUP = 128  # numbers that share a scale
_KINDS = {"bf16": (7, 127), "fp16": (10, 15)}  # bits of the mantissa, and bias of the exponent
_NAMES = {"bfloat16": "bf16", "float16": "fp16", "half": "fp16"}


def dtype_of(name: str) -> str | None:
    """`bf16` or `fp16`, by any of their names; None: it is neither."""
    name = name.lower().removeprefix("torch.")
    name = _NAMES.get(name, name)
    return name if name in _KINDS else None


class Fp8:
    """Both directions for parts of `dtype`. Thread-safe; works without the interpreter's lock.

    The first one of a process takes some time, the first one on a machine 2 s, while it is compiled.
    """

    def __init__(self, dtype: str) -> None:
        from lmcache_ext.tiers import fp8_code

        self._encode, self._decode = fp8_code.encoder(*_KINDS[dtype]), fp8_code.decoder(*_KINDS[dtype])

    @staticmethod
    def length(nbytes: int) -> int:
        """Bytes of a coded part."""
        count = nbytes // 2
        return -(-(count + 4 * -(-count // GROUP)) // BLOCK) * BLOCK

    def encode(self, source: memoryview, target: memoryview) -> None:
        """Code one part. Raises ValueError if it does not hold 16-bit numbers."""
        if source.nbytes % 2:
            raise ValueError(f"{source.nbytes} bytes are no numbers of 16 bits")
        codes, scales, end = _split(source.nbytes // 2, target)
        self._encode(_numbers(source), codes, scales)
        target[codes.size : end] = scales.tobytes()
        target[end:] = bytes(target.nbytes - end)

    def decode(self, source: memoryview, target: memoryview) -> None:
        """Fill a part from its code."""
        count = target.nbytes // 2
        codes, scales, end = _split(count, source)
        scales[:] = np.frombuffer(source[count:end], dtype="<f4")
        self._decode(codes, scales, _numbers(target))


def _numbers(part: memoryview) -> Any:
    return np.frombuffer(part, dtype=np.uint16) if part.nbytes else np.empty(0, np.uint16)


def _split(count: int, coded: memoryview) -> tuple[Any, Any, int]:
    """(the codes in `coded`, room for their scales, where these end in `coded`): scales need not begin on 4 bytes."""
    groups = -(-count // GROUP)
    codes = np.frombuffer(coded, dtype=np.uint8, count=count) if count else np.empty(0, np.uint8)
    return codes, np.empty(groups, np.float32), count + 4 * groups
